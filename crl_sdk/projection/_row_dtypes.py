"""The dtypes in which embeddings are stored and sent.

docs/STORED.md says what each costs. `int8` keeps only the direction of a row, which is all that a
cosine needs: each row is scaled so that its largest value is 127, and rounded.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import DTypeLike, NDArray

from crl_sdk.errors import InvalidInputError

RowDtype: TypeAlias = Literal["float32", "float16", "int8"]
"""Dtype in which embeddings are stored and sent."""

ROW_DTYPES: tuple[RowDtype, ...] = get_args(RowDtype)

_LARGEST = 127


def is_row_dtype(dtype: DTypeLike) -> bool:
    """Return whether embeddings can have this dtype: int8, float16, float32 or float64."""
    found = np.dtype(dtype)
    return found == np.int8 or (found.kind == "f" and found.itemsize in (2, 4, 8))


def check_dtype_of(rows: NDArray[Any]) -> None:
    """Check that an array has a dtype that embeddings can have.

    Raises:
        InvalidInputError: If it has another one.
    """
    if not is_row_dtype(rows.dtype):
        raise InvalidInputError(
            "expected embeddings of a float dtype (float16, float32, float64) or int8, got "
            f"{rows.dtype}"
        )


def require_row_dtype(dtype: str, post: str = "l2") -> None:
    """Check that the rows of a projection can be written in a dtype.

    Args:
        dtype: Name of the dtype.
        post: Row normalisation of the projection.

    Raises:
        InvalidInputError: If the dtype is not one of `ROW_DTYPES`, or if it is int8 and the length
            of the rows matters.
    """
    if dtype not in ROW_DTYPES:
        raise InvalidInputError(f"expected a dtype in {', '.join(ROW_DTYPES)}, got {dtype!r}")
    if dtype == "int8" and post == "none":
        raise InvalidInputError(
            "int8 keeps the direction of a row and not its length, which a basis with the row "
            "normalisation 'none' needs: use float16, or make the basis with --post l2"
        )


def encode_rows(rows: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Return rows in the dtype in which they are stored or sent.

    Args:
        rows: Rows, shape (n, m), float32. A row of a failed image holds NaN.
        dtype: One of `ROW_DTYPES`.

    Returns:
        The rows, shape (n, m). As int8, a row that holds NaN is all zeros. As float32, they are not
        copied.

    Raises:
        InvalidInputError: If the dtype is another one, or if a value does not fit float16.

    Example:
        >>> encode_rows(np.array([[0.6, -0.8], [np.nan, np.nan]], np.float32), "int8")
        array([[  95, -127],
               [   0,    0]], dtype=int8)
    """
    require_row_dtype(dtype)
    if dtype == "float32":
        return rows
    out = np.empty(rows.shape, dtype)
    write_rows(rows, out)
    return out


def write_rows(rows: NDArray[np.float32], out: NDArray[Any]) -> None:
    """Write rows to an array of one of `ROW_DTYPES`, see `encode_rows`.

    Raises:
        InvalidInputError: If a value does not fit float16.
    """
    if out.dtype != np.int8:
        try:
            with np.errstate(over="raise"):
                np.copyto(out, rows, casting="same_kind")
        except FloatingPointError:
            raise InvalidInputError("a value does not fit float16: use float32") from None
        return
    with np.errstate(all="ignore"):
        scaled = rows * (_LARGEST / np.abs(rows).max(axis=1, keepdims=True, initial=0.0))
    scaled[~np.isfinite(scaled).all(axis=1)] = 0.0
    np.copyto(out, np.rint(scaled, out=scaled), casting="unsafe")


def decode_rows(rows: NDArray[Any]) -> NDArray[np.float32]:
    """Return stored rows as float32.

    Args:
        rows: Rows, shape (n, m), int8, float16, float32 or float64.

    Returns:
        The rows, shape (n, m), float32. Rows of int8 get the length 1, and a row of zeros, which
        stands for a failed image, gets NaN. A float32 array is not copied.

    Raises:
        InvalidInputError: If the dtype is another one.

    Example:
        >>> decode_rows(np.array([[3, -4]], np.int8))
        array([[ 0.6, -0.8]], dtype=float32)
    """
    check_dtype_of(rows)
    if rows.dtype != np.int8:
        return rows.astype(np.float32, copy=False)
    decoded = rows.astype(np.float32)
    normalise_int8(decoded)
    return decoded


def normalise_int8(rows: NDArray[np.float32]) -> None:
    """Scale rows that were int8 to length 1, in place. Rows of zeros become NaN."""
    with np.errstate(invalid="ignore"):
        rows /= np.sqrt(np.einsum("ij,ij->i", rows, rows))[:, None]


def failed_rows(shape: tuple[int, int], dtype: DTypeLike) -> NDArray[Any]:
    """Return rows of failed images: NaN, or zeros as int8."""
    return np.full(shape, 0 if np.dtype(dtype) == np.int8 else np.nan, dtype)
