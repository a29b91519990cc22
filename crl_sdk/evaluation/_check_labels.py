"""Check rows and labels that a protocol is given."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from crl_sdk.errors import InvalidInputError
from crl_sdk.projection._projection import check_embeddings


def check_labels(
    rows: NDArray[np.floating], labels: NDArray[np.integer]
) -> tuple[NDArray[np.float32], NDArray[np.integer]]:
    """Check rows and their labels, and return the rows as float32.

    Args:
        rows: Rows, shape (n, m), of a float dtype.
        labels: Label of each row, shape (n,), integers.

    Returns:
        The rows as float32, and the labels as an array.

    Raises:
        InvalidInputError: If the shapes or dtypes are wrong, a row holds NaN, or there are fewer
            than two classes.
    """
    if np.ndim(rows) != 2 or 0 in np.shape(rows):
        raise InvalidInputError(f"expected rows (n, m) with n, m >= 1, got {np.shape(rows)}")
    inputs, codes = check_embeddings(rows, np.shape(rows)[1]), np.asarray(labels)
    if codes.shape != (len(inputs),) or codes.dtype.kind not in "iu":
        raise InvalidInputError(
            f"expected an integer label for each of {len(inputs)} rows, got {codes.shape} "
            f"{codes.dtype}"
        )
    if len(np.unique(codes)) < 2:
        raise InvalidInputError(
            f"expected two classes or more, but all {len(codes)} rows have the label {codes[0]}"
        )
    return inputs, codes
