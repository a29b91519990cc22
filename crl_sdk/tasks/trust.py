"""Whether a basis tells these pictures apart: two signals that need no labels, and what they say.

What they cannot see: texts that describe another criterion than the one meant, and texts that are
missing. docs/PROJECTIONS.md has how often they are right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crl_sdk.errors import InvalidInputError
from crl_sdk.methods import directions_of
from crl_sdk.projection import EPSILON, check_embeddings
from crl_sdk.tasks.kmeans import check_rows, kmeans, stability

LEAST_LIFT = 2.75
LEAST_STABILITY = 0.55
"""The pair that separates best on two criteria of the demo world that no table reports: size and
background (`make eval`)."""

FEWEST = 30
"""Pictures below which nothing is said."""


@dataclass(frozen=True, slots=True)
class Trust:
    """How far the conditional embeddings of these pictures can be trusted.

    Attributes:
        lift: see `variance_lift`; None with fewer than `FEWEST` pictures.
        stability: mean adjusted Rand index of clusterings of 80 % of the pictures with that of all;
            None likewise.
        doubts: what to tell the user, one sentence each; empty if nothing speaks against them.
    """

    lift: float | None
    stability: float | None
    doubts: tuple[str, ...]


def examine(
    universal: NDArray[Any],
    conditional: NDArray[Any],
    text_embeddings: NDArray[np.floating],
    *,
    k: int | None = None,
    seed: int = 0,
) -> Trust:
    """Look for signs that a basis does not tell pictures apart.

    Args:
        universal: (n, d) float, unit rows.
        conditional: (n, m) float, their conditional embeddings.
        text_embeddings: (t, d) float, the texts of the basis.
        k: clusters for the stability; None for the number of texts, 10 at most.
        seed: of the clusterings.

    Raises:
        InvalidInputError: shapes do not fit, or NaN.
        MissingDependencyError: scikit-learn is not installed.
    """
    rows = check_rows(conditional)
    if len(rows) != len(universal):
        raise InvalidInputError(
            f"expected one conditional row for each of {len(universal)} pictures, got {len(rows)}"
        )
    if len(rows) < FEWEST:
        return Trust(None, None, ())
    lift = variance_lift(universal, text_embeddings)
    clusters = min(k if k is not None else min(len(text_embeddings), 10), len(rows))
    labels, _ = kmeans(rows, clusters, seed=seed, starts=3)
    stable = stability(rows, labels, clusters, seed=seed)
    doubts = []
    if lift < LEAST_LIFT:
        doubts.append(
            f"the pictures vary only {lift:.1f} times as much along these texts as along any "
            "directions: the model may not see what they say, or the pictures do not differ in it"
        )
    if stable is not None and stable < LEAST_STABILITY:
        doubts.append(
            f"clusters change with the pictures that are looked at (agreement {stable:.2f} of 1): "
            "the texts may not be what these pictures differ in"
        )
    return Trust(lift, stable, tuple(doubts))


def variance_lift(universal: NDArray[Any], text_embeddings: NDArray[np.floating]) -> float:
    """Tell how much more pictures vary along the texts than along as many random directions.

    The share of the pictures' variance that lies in the span of the centred texts, over the share
    r / d that r random directions of the d have.

    Args:
        universal: (n, d) float, n >= 2.
        text_embeddings: (t, d) float, t >= 2.

    Returns:
        0 to d / r; 1 is chance; 0 where all pictures or all texts are the same.

    Raises:
        InvalidInputError: shapes do not fit, or NaN.
    """
    pictures = check_rows(universal)
    dim = pictures.shape[1]
    texts = check_embeddings(text_embeddings, dim)
    if len(pictures) < 2 or len(texts) < 2:
        raise InvalidInputError(
            f"expected two pictures and two texts or more, got {len(pictures)} and {len(texts)}"
        )
    span, values = directions_of(texts)
    moved = pictures - pictures.mean(axis=0, dtype=np.float64)
    total = float((moved**2).sum())
    if total == 0 or values[0] < EPSILON:
        return 0.0
    share = float(((moved @ span.T) ** 2).sum()) / total
    return float(share / (len(span) / dim))
