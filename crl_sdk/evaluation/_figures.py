"""What the protocols take and give: rows with labels, and measures over runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crl_sdk.errors import InvalidInputError
from crl_sdk.projection._projection import check_embeddings


@dataclass(frozen=True, slots=True)
class Figure:
    """A measure over seeds, splits or queries.

    Attributes:
        mean: of all runs.
        std: their standard deviation (divided by n); None for a single run.
    """

    mean: float
    std: float | None = None

    @classmethod
    def of(cls, runs: Sequence[float]) -> Figure:
        """Give mean and standard deviation of some runs."""
        return cls(float(np.mean(runs)), float(np.std(runs)))


def check_labelled(
    rows: NDArray[np.floating], labels: NDArray[np.integer]
) -> tuple[NDArray[np.float32], NDArray[np.integer]]:
    """Check rows that are to be grouped or classified by their labels.

    Args:
        rows: (n, m) float.
        labels: (n,) integers.

    Returns:
        The same, the rows as float32.

    Raises:
        InvalidInputError: shapes or dtypes do not fit, a row holds NaN, or there are fewer than two
            classes.
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
            f"expected two classes or more, all {len(codes)} rows have the label {codes[0]}: there "
            "is nothing to tell apart"
        )
    return inputs, codes
