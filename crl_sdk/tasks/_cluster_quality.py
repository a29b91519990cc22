"""Whether a basis tells these pictures apart: two signals that need no labels, and what they say.

What they cannot see: texts that describe another criterion than the one meant, if pictures differ
in that. docs/PROJECTIONS.md has how often they are right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crl_sdk.basis._methods import make_projection
from crl_sdk.errors import InvalidInputError
from crl_sdk.projection._projection import check_embeddings, normalise_rows
from crl_sdk.tasks._kmeans import check_rows, kmeans, silhouette, stability

LEAST_SEPARATION = 0.1
LEAST_STABILITY = 0.75
"""What separates best in the demo world: 0.08 to 0.12 and 0.7 to 0.8, by which of six criteria is
left out. The hit rate is measured on each with the pair of the others (`make eval`)."""

FEWEST = 30
"""Pictures below which nothing is said."""

_DRAWS = 2  # of random directions


@dataclass(frozen=True, slots=True)
class ClusterQuality:
    """How far the conditional embeddings of these pictures can be trusted.

    Attributes:
        separation: see `separation_gain`; None with fewer than `FEWEST` pictures or three texts.
        stability: mean adjusted Rand index of clusterings of 80 % of the pictures with that of all;
            None likewise.
        doubts: what to tell the user, one sentence each; empty if nothing speaks against them.
    """

    separation: float | None
    stability: float | None
    doubts: tuple[str, ...]


def examine(
    universal: NDArray[Any],
    conditional: NDArray[Any],
    text_embeddings: NDArray[np.floating],
    *,
    k: int | None = None,
    seed: int = 0,
) -> ClusterQuality:
    """Look for signs that a basis does not tell pictures apart.

    Args:
        universal: (n, d) float, unit rows.
        conditional: (n, m) float, their conditional embeddings.
        text_embeddings: (t, d) float, the texts of the basis.
        k: clusters to look at; None for the number of texts, 10 at most.
        seed: of the clusterings and of the random directions.

    Raises:
        InvalidInputError: shapes do not fit, or NaN.
        MissingDependencyError: scikit-learn is not installed.
    """
    rows, pictures = check_rows(conditional), check_rows(universal)
    texts = len(check_embeddings(text_embeddings, pictures.shape[1]))
    if len(rows) != len(pictures):
        raise InvalidInputError(
            f"expected one conditional row for each of {len(pictures)} pictures, got {len(rows)}"
        )
    if len(rows) < FEWEST:
        return ClusterQuality(None, None, ())
    if texts < 3:
        said = f"{texts} text{'s' * (texts > 1)} cannot say more than yes or no: add the others"
        return ClusterQuality(None, None, (said,))
    clusters = min(k if k is not None else min(texts, 10), len(rows))
    labels, _ = kmeans(rows, clusters, seed=seed, starts=3)
    gain = separation_gain(pictures, rows, labels, texts, seed=seed)
    stable = stability(rows, labels, clusters, seed=seed)
    doubts = []
    if gain < LEAST_SEPARATION:
        doubts.append(
            "groups are hardly further apart than along any other directions (silhouette "
            f"{gain:+.2f}): the model may not see what the texts say, or the pictures do not "
            "differ in it"
        )
    if stable is not None and stable < LEAST_STABILITY:
        doubts.append(
            f"groups change with the pictures that are looked at (agreement {stable:.2f} of 1): "
            "the texts may not be what these pictures differ in"
        )
    return ClusterQuality(gain, stable, tuple(doubts))


def separation_gain(
    universal: NDArray[np.float32],
    conditional: NDArray[np.float32],
    labels: NDArray[np.int64],
    texts: int,
    *,
    seed: int = 0,
) -> float:
    """Tell how much further groups are apart than along directions that say nothing.

    Args:
        universal: (n, d) float32, unit rows.
        conditional: (n, m) float32, their conditional embeddings.
        labels: the group of each row, (n,) int64.
        texts: random directions to draw, as many as the basis has texts; 2 or more.
        seed: of the random directions and their clusterings.

    Returns:
        The mean silhouette of the groups, less the mean of what as many groups have in `centred`
        conditional embeddings of random directions; -2 to 2, 0 is chance.
    """
    rng = np.random.default_rng(seed)
    k = int(labels.max()) + 1
    chance = []
    for draw in range(_DRAWS):
        drawn = rng.standard_normal((texts, universal.shape[1])).astype(np.float32)
        rows = make_projection(normalise_rows(drawn, "l2"), "centred").apply(universal)
        found, _ = kmeans(rows, k, seed=seed + draw, starts=3)
        chance.append(silhouette(rows, found, seed=seed))
    return silhouette(conditional, labels, seed=seed) - float(np.mean(chance))
