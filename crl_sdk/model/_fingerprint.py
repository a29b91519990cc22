"""Fingerprints of models, and the check that an artefact and a model belong together."""

from __future__ import annotations

import re

from crl_sdk.errors import BasisMismatchError, InvalidInputError

_NAMED = "name:"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_NAME = 200


def fingerprint_of_name(name: str) -> str:
    """Return the fingerprint of a model that has no bundle and is known by its name.

    Args:
        name: Name that the user gives to the model, such as `openai/clip-vit-base-patch32`. The
            fingerprint of a bundle, 64 hex digits, is returned as it is.

    Raises:
        InvalidInputError: If the name is empty, too long or has unprintable characters.

    Example:
        >>> fingerprint_of_name("openai/clip-vit-base-patch32")
        'name:openai/clip-vit-base-patch32'
    """
    tidy = name.strip()
    if _SHA256.fullmatch(tidy):
        return tidy
    tidy = tidy.removeprefix(_NAMED)
    if not tidy or len(tidy) > _MAX_NAME or not tidy.isprintable():
        raise InvalidInputError(
            f"expected the name of a model, of 1 to {_MAX_NAME} printable characters, got "
            f"{name[:40]!r}"
        )
    return _NAMED + tidy


def is_name(fingerprint: str) -> bool:
    """Return whether a fingerprint is the name of a model that has no bundle."""
    return fingerprint.startswith(_NAMED)


def short_fingerprint(fingerprint: str) -> str:
    """Return a fingerprint for messages: a name in full, or the first digits."""
    return fingerprint if is_name(fingerprint) else f"{fingerprint[:12]}…"


def require_same_model(
    what: str, fingerprint: str, expected: str, *, used_with: str = "this bundle", remedy: str
) -> None:
    """Raise an error if an artefact was made for another model.

    Args:
        what: Name of the artefact, such as `basis 'color'`.
        fingerprint: Fingerprint of the model that the artefact was made for.
        expected: Fingerprint of the model that it is used with.
        used_with: Name of what has the expected fingerprint.
        remedy: What the user should do.

    Raises:
        BasisMismatchError: If the two fingerprints differ.
    """
    if fingerprint != expected:
        raise BasisMismatchError(
            f"{what} was made for model {short_fingerprint(fingerprint)}, but the model of "
            f"{used_with} is {short_fingerprint(expected)}: {remedy}"
        )
