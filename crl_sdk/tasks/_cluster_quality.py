"""Check without labels whether the clusters of a basis are reliable.

Two measures are compared with thresholds: how well the clusters separate, and how many of them a
text describes. They cannot see that the texts describe another criterion than the one meant, if
the images differ in that other criterion too. docs/PROJECTIONS.md reports how often the checks are
right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crl_sdk.errors import InvalidInputError
from crl_sdk.projection._projection import check_embeddings, normalise_rows
from crl_sdk.tasks._kmeans import check_rows, kmeans, silhouette
from crl_sdk.tasks._naming import name_clusters

MIN_SEPARATION = 0.04
"""Separation below which clusters are reported as not reliable."""

MAX_UNDESCRIBED = 0.4
"""Share of clusters that no text describes above which clusters are reported as not reliable.

Both were chosen on embeddings of real CLIP models, together; `make eval-real` measures how often
they are right, also with the thresholds that the other sets of images give."""

MIN_IMAGES = 30
"""Number of images below which nothing is checked."""

MIN_TEXTS = 3
"""Number of texts below which nothing is measured."""

MAX_CHECKED_CLUSTERS = 10
"""Largest number of clusters that is checked by default."""

_RANDOM_DRAWS = 2  # sets of random directions
_KMEANS_STARTS = 3


@dataclass(frozen=True, slots=True)
class ClusterQuality:
    """Measures of how reliable the clusters of conditional embeddings are.

    Attributes:
        separation: Mean silhouette of the clusters minus that of clusters along random directions,
            -2 to 2; 0 is chance. None with fewer than 30 images or fewer than 3 texts.
        undescribed: Share of the clusters that no text describes, 0 to 1. None under the same
            conditions.
        reasons: Reasons why the clusters are not reliable, one sentence each. Empty if no check
            failed.
    """

    separation: float | None
    undescribed: float | None
    reasons: tuple[str, ...]


def assess_clusters(
    universal: NDArray[Any],
    conditional: NDArray[Any],
    text_embeddings: NDArray[np.floating],
    *,
    k: int | None = None,
    seed: int = 0,
) -> ClusterQuality:
    """Check whether the clusters of conditional embeddings are reliable.

    Args:
        universal: Universal embeddings of n images, shape (n, d), of a float dtype, unit rows.
        conditional: Conditional embeddings of the same images, shape (n, m), of a float dtype.
        text_embeddings: Embeddings of the basis' texts, shape (t, d), of a float dtype or int8.
        k: Number of clusters to check. None for the number of texts, at most 10.
        seed: Seed of the clusterings and of the random directions.

    Returns:
        The measures, and the reasons why the clusters are not reliable.

    Raises:
        InvalidInputError: If the shapes do not match or a value is NaN.
        MissingDependencyError: If scikit-learn is not installed.
    """
    rows, images = check_rows(conditional), check_rows(universal)
    texts = len(check_embeddings(text_embeddings, images.shape[1]))
    if len(rows) != len(images):
        raise InvalidInputError(
            f"expected one conditional row for each of {len(images)} images, got {len(rows)}"
        )
    if len(rows) < MIN_IMAGES:
        return ClusterQuality(None, None, ())
    if texts < MIN_TEXTS:
        reason = (
            f"the basis has only {texts} text{'s' * (texts > 1)}: add texts, the groups can be "
            f"assessed with {MIN_TEXTS} or more"
        )
        return ClusterQuality(None, None, (reason,))
    clusters = min(k if k is not None else min(texts, MAX_CHECKED_CLUSTERS), len(rows))
    labels, _ = kmeans(rows, clusters, seed=seed, starts=_KMEANS_STARTS)
    separation = separation_gain(images, rows, labels, texts, seed=seed)
    scores = images @ check_embeddings(text_embeddings, images.shape[1]).T
    names = name_clusters(labels, scores, [str(i) for i in range(texts)])
    undescribed = float(np.mean([not name.fits for name in names]))
    reasons = []
    if separation < MIN_SEPARATION:
        reasons.append(
            "the groups are hardly better separated than groups along random directions "
            f"(silhouette {separation:+.2f}, expected at least {MIN_SEPARATION:+.2f}): the model "
            "may not see what the texts describe, or the images do not differ in it"
        )
    if undescribed > MAX_UNDESCRIBED:
        reasons.append(
            f"in {len(names)} groups of these images, no text describes {undescribed:.0%} of the "
            f"groups (expected at most {MAX_UNDESCRIBED:.0%}): texts may be missing"
        )
    return ClusterQuality(separation, undescribed, tuple(reasons))


def separation_gain(
    universal: NDArray[np.float32],
    conditional: NDArray[np.float32],
    labels: NDArray[np.int64],
    texts: int,
    *,
    seed: int = 0,
) -> float:
    """Return how much better clusters separate than clusters along random directions.

    Args:
        universal: Universal embeddings of n images, shape (n, d), float32, unit rows.
        conditional: Conditional embeddings of the same images, shape (n, m), float32.
        labels: Cluster of each image, shape (n,), int64.
        texts: Number of random directions in a draw: the number of texts of the basis, at least 2.
        seed: Seed of the random directions and of their clusterings.

    Returns:
        Mean silhouette of the clusters, minus the mean silhouette of as many clusters of cosines
        with random directions whose mean is subtracted. -2 to 2; 0 is chance.
    """
    rng = np.random.default_rng(seed)
    k = int(labels.max()) + 1
    chance = []
    for draw in range(_RANDOM_DRAWS):
        drawn = rng.standard_normal((texts, universal.shape[1])).astype(np.float32)
        unit = normalise_rows(drawn, "l2")
        rows = normalise_rows(universal @ (unit - unit.mean(axis=0)).T, "l2")
        found, _ = kmeans(rows, k, seed=seed + draw, starts=_KMEANS_STARTS)
        chance.append(silhouette(rows, found, seed=seed))
    return silhouette(conditional, labels, seed=seed) - float(np.mean(chance))
