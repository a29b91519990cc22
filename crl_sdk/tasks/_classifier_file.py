"""Read and write classifier files: a safetensors file with a JSON header."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from crl_sdk.basis._basis import Basis
from crl_sdk.errors import IntegrityError, InvalidInputError, UnsupportedSchemaError
from crl_sdk.storage._checksummed_safetensors import (
    decode_checksummed,
    encode_checksummed,
    require_checksum,
)

SCHEMA = 1

_METADATA_KEY = "crl_classifier"


@dataclass(frozen=True, slots=True, eq=False)
class ClassifierState:
    """State of a fitted classifier.

    Attributes:
        classes: Names of the c classes, sorted; at least two.
        counts: Number of labelled images of each class.
        standardise: Whether rows are standardised before the regression.
        mean: Mean that is subtracted from rows when they are standardised.
        mean_of: Number of rows that the mean was computed from.
        regularisation: Parameter C of the regression.
        coefficients: Coefficients of the regression, shape (c, m), float32.
        intercepts: Intercepts of the regression, shape (c,), float32.
        basis: Basis that makes the rows. None if they are made elsewhere.
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
    """JSON in the metadata of the file. `sha256` covers all other fields and all tensors."""

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


def encode_classifier(state: ClassifierState) -> bytes:
    """Return the bytes of a classifier file. Equal classifiers give equal bytes.

    The file is a safetensors file with the tensors `coefficients` (c, m) float32, `intercepts`
    (c,) float32 and, if there is a basis, `basis`, the bytes of its file as uint8. All other
    fields are JSON in the metadata.
    """
    tensors: dict[str, NDArray[Any]] = {
        "coefficients": state.coefficients,
        "intercepts": state.intercepts,
    }
    if state.basis is not None:
        tensors["basis"] = np.frombuffer(state.basis.to_bytes(), np.uint8)
    return encode_checksummed(_METADATA_KEY, _header(state), tensors)


def decode_classifier(data: bytes, where: str) -> ClassifierState:
    """Read a classifier from the bytes of its file.

    Args:
        data: Content of the file.
        where: Name of the file in errors.

    Raises:
        IntegrityError: If it is not a classifier, was changed, or its parts contradict each other.
        UnsupportedSchemaError: If it was written in a schema that this SDK does not read.
    """
    from safetensors import SafetensorError

    try:
        header, tensors = decode_checksummed(
            data, _METADATA_KEY, _Header,
            schema=SCHEMA, where=where, remedy="fit it again with crl classify fit",
        )  # fmt: skip
        basis = None
        if header.basis_sha256:
            basis = Basis.from_bytes(tensors["basis"].tobytes(), where=f"{where}: its basis")
        state = ClassifierState(
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
        _check(state)
        expected = _header(state)
        if header != msgspec.structs.replace(expected, sha256=header.sha256):
            raise InvalidInputError("its basis is not the one named in its header")
        require_checksum(header.sha256, expected, tensors)
    except UnsupportedSchemaError:
        raise
    except (SafetensorError, msgspec.MsgspecError, KeyError, ValueError, IntegrityError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise IntegrityError(
            f"{where}: not a valid classifier file ({reason}); copy it again or make it again with "
            "crl classify fit"
        ) from error
    return state


def _header(state: ClassifierState) -> _Header:
    basis = state.basis
    return _Header(
        schema=SCHEMA,
        classes=state.classes,
        counts=state.counts,
        criterion="" if basis is None else basis.criterion,
        fingerprint="" if basis is None else basis.fingerprint,
        basis_sha256="" if basis is None else basis.sha256(),
        standardise=state.standardise,
        mean=state.mean,
        mean_of=state.mean_of,
        regularisation=state.regularisation,
    )


def _check(state: ClassifierState) -> None:
    weight, bias, c = state.coefficients, state.intercepts, len(state.classes)
    if weight.ndim != 2 or len(weight) != c or bias.shape != (c,) or len(state.counts) != c:
        raise InvalidInputError(
            f"expected coefficients ({c}, m), intercepts and counts ({c},), got {weight.shape}, "
            f"{bias.shape} and {len(state.counts)}"
        )
    if c < 2 or list(state.classes) != sorted(set(state.classes)):
        raise InvalidInputError(f"expected two or more sorted distinct classes, got {c}")
    if weight.dtype != np.float32 or bias.dtype != np.float32:
        raise InvalidInputError(f"expected float32, got {weight.dtype} and {bias.dtype}")
    if not (np.isfinite(weight).all() and np.isfinite(bias).all() and np.isfinite(state.mean)):
        raise InvalidInputError("coefficients hold NaN or infinity")
    if state.basis is not None and weight.shape[1] != state.basis.projection.output_dim:
        raise InvalidInputError(
            f"expected coefficients for {state.basis.projection.output_dim} columns, got "
            f"{weight.shape[1]}"
        )
