"""Principal directions of texts, and the number of them to keep."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from crl_sdk.projection._projection import EPSILON

_ENERGY = 0.9
"""Smallest share of the texts' variance that is kept where directions are dropped."""


def bend(values: NDArray[np.floating]) -> int:
    """Return the number of singular values before the sharpest bend of their curve.

    Both axes are scaled to [0, 1]. The bend is the place of the largest discrete curvature,
    y'' / (1 + y'^2)^1.5, among the places with at least 90 % of the sum of squares before them.
    That share keeps a single dominant direction from hiding the others. At least two values are
    kept because a row normalisation reduces a single column to its sign.

    Args:
        values: Singular values in descending order, shape (r,).

    Returns:
        A number from 2 to r, or r if r < 2. It is r if no place qualifies, as in a flat spectrum.

    Example:
        >>> bend(np.array([10.0, 9.0, 8.0, 0.5, 0.4, 0.3]))
        3
    """
    count = len(values)
    heights = np.asarray(values, np.float64) / max(float(values[0]), EPSILON)
    energy = np.cumsum(heights**2) / max(float((heights**2).sum()), EPSILON)
    places = [i for i in range(2, count - 1) if energy[i - 1] >= _ENERGY]
    if not places:
        return count
    before, at, after = (heights[np.array(places) + shift] for shift in (-1, 0, 1))
    step = 1.0 / (count - 1)
    slope = (after - before) / (2.0 * step)
    curvature = (after - 2.0 * at + before) / step**2 / (1.0 + slope**2) ** 1.5
    return places[int(np.argmax(curvature))]


def principal_directions(
    rows: NDArray[np.floating], *, centre: bool = True
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Return the right singular vectors of rows and their singular values.

    Values below 1e-6 of the largest are rounding errors and are left out, but at least one pair is
    returned.

    Args:
        rows: Rows of shape (k, d).
        centre: Whether to subtract the mean of the rows first.

    Returns:
        Directions of shape (r, d) and values of shape (r,) in descending order, with r <= k, and
        r < k for centred rows.
    """
    wide = np.asarray(rows, np.float64)
    if centre:
        wide = wide - wide.mean(axis=0)
    _, values, directions = np.linalg.svd(wide, full_matrices=False)
    kept = max(1, int((values > values[0] * 1e-6).sum()))
    return directions[:kept], values[:kept]
