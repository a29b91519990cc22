"""Cluster images by one criterion, name the clusters, and find typical images of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crl_sdk.basis._basis import Basis
from crl_sdk.basis._methods import known_method
from crl_sdk.errors import InvalidInputError
from crl_sdk.projection._projection import EPSILON
from crl_sdk.tasks._kmeans import (
    MAX_CLUSTERS,
    ClusterCount,
    check_rows,
    choose_k,
    kmeans,
    stability,
)
from crl_sdk.tasks._naming import ClusterName, name_clusters, text_scores

TYPICAL_IMAGES = 12
"""Default number of typical images of a cluster. A third as many images of its edge are kept."""

_COPY_DISTANCE = 1e-4  # distance of embeddings up to which two images count as copies
_WINDOW = 1000  # images that are searched for copies at once


@dataclass(frozen=True, slots=True)
class Cluster:
    """One cluster of a clustering.

    Attributes:
        name: Name of the cluster. None if no basis was given.
        size: Number of rows in the cluster.
        cohesion: Mean cosine of two different rows of the cluster, -1 to 1. 1.0 for a single row.
        typical: Positions of the rows nearest to the centre, nearest first. Of several copies of
            one image only one is kept.
        edge: Positions of the rows farthest from the centre, farthest first, without those in
            `typical`.
    """

    name: ClusterName | None
    size: int
    cohesion: float
    typical: tuple[int, ...]
    edge: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Clustering:
    """Result of `cluster`.

    Attributes:
        labels: Cluster of each row, shape (n,), int64. Cluster 0 is the largest.
        centres: Centres of the clusters, shape (c, m), float32.
        distances: Distance of each row from its centre, shape (n,), float32.
        typicality: Share of its cluster that is at least as far from the centre, for each row,
            shape (n,), float32. 1.0 for the most typical row.
        clusters: The c clusters, in the order of the labels.
        k: Number of clusters that was asked for or chosen. c is less if there are fewer than k
            distinct rows.
        choice: How k was chosen and how certain that is. None if k was given.
        stability: Mean adjusted Rand index with clusterings of 80 % of the rows: 1 for equal
            clusterings, 0 for chance. None for one cluster or fewer than five rows.
    """

    labels: NDArray[np.int64]
    centres: NDArray[np.float32]
    distances: NDArray[np.float32]
    typicality: NDArray[np.float32]
    clusters: tuple[Cluster, ...]
    k: int
    choice: ClusterCount | None
    stability: float | None


def cluster(
    rows: NDArray[Any],
    k: int | None = None,
    *,
    basis: Basis | None = None,
    universal: NDArray[Any] | None = None,
    max_k: int = MAX_CLUSTERS,
    typical: int = TYPICAL_IMAGES,
    seed: int = 0,
) -> Clustering:
    """Cluster conditional embeddings by k-means, and name the clusters.

    The rows are used as they are. `Embedder.embed`, `Client.embed`, `Basis.projection.apply` and
    `crl project` return rows that are normalised as their basis says.

    Args:
        rows: Conditional embeddings or any other vectors, shape (n, m), of a float dtype or int8.
        k: Number of clusters, 1 to n. None to choose it with `choose_k`.
        basis: Basis whose texts name the clusters. It need not be the one that made the rows. The
            texts of the method `ignore` describe what is disregarded and name nothing.
        universal: Universal embeddings of the same images, shape (n, d), of a float dtype. With
            them, clusters can be named whatever the method of the basis, and copies of an image
            are recognised.
        max_k: Largest number of clusters to try if `k` is None.
        typical: Largest number of typical rows to return for each cluster.
        seed: Seed of the random choices. Equal seeds give equal clusters.

    Returns:
        The clustering.

    Raises:
        InvalidInputError: If the rows are malformed, hold NaN or do not match each other; if `k`
            is out of range; or if the clusters cannot be named without `universal`.
        MissingDependencyError: If scikit-learn or SciPy is not installed.

    Example:
        >>> import numpy as np
        >>> from crl_sdk.tasks import cluster
        >>> rows = np.repeat(np.eye(3, dtype=np.float32), 10, axis=0)
        >>> [each.size for each in cluster(rows, 3).clusters]
        [10, 10, 10]
    """
    checked = check_rows(rows)
    images = checked if universal is None else check_rows(universal)
    if len(images) != len(checked):
        raise InvalidInputError(
            f"expected universal embeddings of the same images, got {len(checked)} rows and "
            f"{len(images)} universal embeddings"
        )
    if basis is not None and (method := known_method(basis.method)) and not method.texts_describe:
        basis = None
    scores = None if basis is None else text_scores(basis, universal=universal, rows=checked)
    choice = choose_k(checked, max_k, seed=seed) if k is None else None
    count = choice.k if choice is not None else k
    assert count is not None
    labels, centres = kmeans(checked, count, seed=seed)
    distances = np.linalg.norm(checked - centres[labels], axis=1)
    names: list[ClusterName] | list[None] = [None] * len(centres)
    if basis is not None and scores is not None:
        names = name_clusters(labels, scores, basis.texts)
    typicality = np.empty(len(checked), np.float32)
    clusters = []
    for number, name in enumerate(names):
        members = np.flatnonzero(labels == number)
        typicality[members] = _typicality(distances[members])
        nearest = _nearest(members, distances[members], images, typical)
        others = members[~np.isin(members, nearest)]
        clusters.append(
            Cluster(
                name=name,
                size=len(members),
                cohesion=cohesion(checked[members]),
                typical=nearest,
                edge=_nearest(others, -distances[others], images, typical // 3),
            )
        )
    return Clustering(
        labels=labels,
        centres=centres,
        distances=distances.astype(np.float32),
        typicality=typicality,
        clusters=tuple(clusters),
        k=count,
        choice=choice,
        stability=stability(checked, labels, count, seed=seed),
    )


def cohesion(rows: NDArray[np.float32]) -> float:
    """Return the mean cosine of two different rows of (s, m), or 1.0 for a single row."""
    s = len(rows)
    if s == 1:
        return 1.0
    wide = rows.astype(np.float64)
    unit = wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), EPSILON)
    total = unit.sum(axis=0)
    return float((total @ total - np.square(unit).sum()) / (s * (s - 1)))


def _typicality(distances: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return for each row the share of rows that are at least as far from the centre."""
    nearer = np.searchsorted(np.sort(distances), distances, side="left")
    return np.asarray(1.0 - nearer / len(distances), np.float32)


def _nearest(
    members: NDArray[np.int64],
    distances: NDArray[np.float32],
    images: NDArray[np.float32],
    count: int,
) -> tuple[int, ...]:
    """Return the members of least distance, with copies of one image left out."""
    order = members[np.argsort(distances, kind="stable")]
    found: list[int] = []
    for start in range(0, len(order), _WINDOW):
        left = order[start : start + _WINDOW]
        for known in found:
            left = _without_copies(left, known, images)
        while len(left) and len(found) < count:
            found.append(int(left[0]))
            left = _without_copies(left, found[-1], images)
        if len(found) >= count:
            break
    return tuple(found)


def _without_copies(
    positions: NDArray[np.int64], known: int, images: NDArray[np.float32]
) -> NDArray[np.int64]:
    away = np.linalg.norm(images[positions] - images[known], axis=1)
    return np.asarray(positions[away > _COPY_DISTANCE])
