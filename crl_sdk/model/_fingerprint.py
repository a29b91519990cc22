"""The check that an artefact and a model belong together."""

from __future__ import annotations

from crl_sdk.errors import BasisMismatchError


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
            f"{what} was made for model {fingerprint[:12]}…, but the model of {used_with} is "
            f"{expected[:12]}…: {remedy}"
        )
