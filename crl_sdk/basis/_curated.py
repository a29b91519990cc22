"""Curated lists: the values of criteria that every field has, written by hand.

They need no language model, and are never passed off as generated. Each list is a file in the
directory `curated`. The lists were written for this project and have its licence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Any

from crl_sdk._criterion import normalise_criterion
from crl_sdk.basis._votes import text_key
from crl_sdk.errors import InvalidInputError


@dataclass(frozen=True, slots=True)
class CuratedList:
    """The values of a criterion, written by hand.

    Attributes:
        name: Name of the criterion.
        aliases: Other names of it.
        texts: The values; the first ones are those that anybody would name.
    """

    name: str
    aliases: tuple[str, ...]
    texts: tuple[str, ...]

    @property
    def provenance(self) -> dict[str, Any]:
        """JSON values for the provenance of a basis that is made from the list."""
        return {"texts": "curated", "list": self.name, "licence": "Apache-2.0"}


@cache
def curated_lists() -> Mapping[str, CuratedList]:
    """Return all lists by their name.

    Example:
        >>> curated_lists()["season"].texts[:4]
        ('spring', 'summer', 'autumn', 'winter')
    """
    folder = resources.files("crl_sdk.basis").joinpath("curated")
    files = sorted(file.name for file in folder.iterdir() if file.name.endswith(".txt"))
    found = [_parse(folder.joinpath(file).read_text("utf-8")) for file in files]
    return MappingProxyType({each.name: each for each in found})


def find_curated(criterion: str) -> CuratedList | None:
    """Return the list of a criterion, found by any of its names, or None.

    Raises:
        CriterionError: If the criterion is malformed.
    """
    key = text_key(normalise_criterion(criterion))
    for each in curated_lists().values():
        if key in {text_key(name) for name in (each.name, *each.aliases)}:
            return each
    return None


def require_curated(criterion: str) -> CuratedList:
    """Return the list of a criterion, found by any of its names.

    Raises:
        CriterionError: If the criterion is malformed.
        InvalidInputError: If there is no such list.
    """
    found = find_curated(criterion)
    if found is None:
        raise InvalidInputError(
            f"expected a curated list of {', '.join(curated_lists())}, got {criterion!r}: let a "
            "language model write its texts, or give your own"
        )
    return found


def _parse(text: str) -> CuratedList:
    head, *texts = text.splitlines()
    name, _, aliases = head.removeprefix("# ").partition(": ")
    return CuratedList(name, tuple(aliases.split(", ")), tuple(texts))
