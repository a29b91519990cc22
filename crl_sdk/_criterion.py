"""The written form of a criterion's name, shared by bases, results and commands."""

from __future__ import annotations

import re

from crl_sdk.errors import CriterionError

_FORM = re.compile(r"[a-z0-9][a-z0-9 _-]{0,63}")


def normalise_criterion(criterion: str) -> str:
    """Return the criterion's name in lower case, with single spaces between its words.

    Raises:
        CriterionError: If the result is not 1 to 64 characters of a-z, 0-9, space, `_` and `-`
            that start with a letter or digit.

    Example:
        >>> normalise_criterion("  Animal   Habitat")
        'animal habitat'
    """
    name = " ".join(criterion.lower().split()) if isinstance(criterion, str) else ""
    if not _FORM.fullmatch(name):
        raise CriterionError(
            f"expected a criterion of 1-64 letters a-z, digits, spaces, '_' and '-', starting "
            f"with a letter or digit, such as 'animal habitat'; got {str(criterion)[:80]!r}"
        )
    return name
