"""The file of a few-shot classifier: one safetensors file with a JSON header, checked when read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from crl_sdk.basis._basis import Basis
from crl_sdk.errors import IntegrityError, InvalidInputError, UnsupportedSchemaError
from crl_sdk.storage._checksummed_safetensors import require_digest, seal, unseal

SCHEMA = 1

_METADATA_KEY = "crl_classifier"


@dataclass(frozen=True, slots=True, eq=False)
class Learned:
    """What a classifier is, once it is fitted.

    Attributes:
        classes: c names, sorted, two or more.
        counts: labelled pictures of each.
        standardise: whether rows are standardised first.
        mean: the number that is subtracted then.
        mean_of: rows it is the mean of.
        regularisation: C of the regression.
        coefficients: (c, m) float32.
        intercepts: (c,) float32.
        basis: that makes the rows; None where they come from elsewhere.
    """

    classes: tuple[str, ...]
    counts: tuple[int, ...]
    standardise: bool
    mean: float
    mean_of: int
    regularisation: float
    coefficients: NDArray[np.float32]
    intercepts: NDArray[np.float32]
    basis: Basis | None


class _Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The JSON in the file's metadata; `sha256` is of the rest of it and all tensors."""

    schema: int
    classes: tuple[str, ...]
    counts: tuple[int, ...]
    criterion: str
    fingerprint: str
    basis_sha256: str
    standardise: bool
    mean: float
    mean_of: int
    regularisation: float
    sha256: str = ""


def encode(learned: Learned) -> bytes:
    """Serialise a classifier; equal ones give equal bytes.

    Returns:
        A safetensors file: `coefficients` (c, m) and `intercepts` (c,) float32, `basis` (bytes of a
        basis file) uint8 if there is one, and the rest as JSON in the metadata.
    """
    tensors: dict[str, NDArray[Any]] = {
        "coefficients": learned.coefficients,
        "intercepts": learned.intercepts,
    }
    if learned.basis is not None:
        tensors["basis"] = np.frombuffer(learned.basis.to_bytes(), np.uint8)
    return seal(_METADATA_KEY, _header(learned), tensors)


def decode(data: bytes, where: str) -> Learned:
    """Read a classifier from the bytes of its file; `where` names it in errors.

    Raises:
        IntegrityError: it is not a classifier, was changed, or its parts contradict each other.
        UnsupportedSchemaError: written in a schema this SDK does not read.
    """
    from safetensors import SafetensorError

    try:
        header, tensors = unseal(
            data, _METADATA_KEY, _Header,
            schema=SCHEMA, where=where, remake="fit it again with crl classify fit",
        )  # fmt: skip
        basis = None
        if header.basis_sha256:
            basis = Basis.from_bytes(tensors["basis"].tobytes(), where=f"{where}: its basis")
        learned = Learned(
            classes=header.classes,
            counts=header.counts,
            standardise=header.standardise,
            mean=header.mean,
            mean_of=header.mean_of,
            regularisation=header.regularisation,
            coefficients=tensors["coefficients"],
            intercepts=tensors["intercepts"],
            basis=basis,
        )
        _check(learned)
        expected = _header(learned)
        if header != msgspec.structs.replace(expected, sha256=header.sha256):
            raise InvalidInputError("its basis is not the one that its header names")
        require_digest(header.sha256, expected, tensors)
    except UnsupportedSchemaError:
        raise
    except (SafetensorError, msgspec.MsgspecError, KeyError, ValueError, IntegrityError) as error:
        raise IntegrityError(
            f"{where}: not a valid classifier file ({error}); copy it again or make it again with "
            "crl classify fit"
        ) from error
    return learned


def _header(learned: Learned) -> _Header:
    basis = learned.basis
    return _Header(
        schema=SCHEMA,
        classes=learned.classes,
        counts=learned.counts,
        criterion="" if basis is None else basis.criterion,
        fingerprint="" if basis is None else basis.fingerprint,
        basis_sha256="" if basis is None else basis.sha256(),
        standardise=learned.standardise,
        mean=learned.mean,
        mean_of=learned.mean_of,
        regularisation=learned.regularisation,
    )


def _check(learned: Learned) -> None:
    weight, bias, c = learned.coefficients, learned.intercepts, len(learned.classes)
    if weight.ndim != 2 or len(weight) != c or bias.shape != (c,) or len(learned.counts) != c:
        raise InvalidInputError(
            f"expected coefficients ({c}, m), intercepts and counts ({c},), got {weight.shape}, "
            f"{bias.shape} and {len(learned.counts)}"
        )
    if c < 2 or list(learned.classes) != sorted(set(learned.classes)):
        raise InvalidInputError(f"expected two sorted distinct classes or more, got {c}")
    if weight.dtype != np.float32 or bias.dtype != np.float32:
        raise InvalidInputError(f"expected float32, got {weight.dtype} and {bias.dtype}")
    if not (np.isfinite(weight).all() and np.isfinite(bias).all() and np.isfinite(learned.mean)):
        raise InvalidInputError("coefficients hold NaN or infinity")
    if learned.basis is not None and weight.shape[1] != learned.basis.projection.output_dim:
        raise InvalidInputError(
            f"expected coefficients for {learned.basis.projection.output_dim} columns, got "
            f"{weight.shape[1]}"
        )
