"""Pictures in clusters, by one criterion: named, with the most typical pictures of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crl_sdk.basis._basis import Basis
from crl_sdk.errors import InvalidInputError
from crl_sdk.projection._projection import EPSILON
from crl_sdk.tasks._kmeans import MOST_CLUSTERS, Choice, check_rows, choose_k, kmeans, stability
from crl_sdk.tasks._naming import Name, name_clusters, text_scores

SHOWN = 12
"""Typical pictures of a cluster at most; of its edge, a third of that."""

_SAME = 1e-4
"""Distance of embeddings up to which two pictures are one and the same file or a copy."""

_WINDOW = 1000  # pictures that are looked through for copies at once


@dataclass(frozen=True, slots=True)
class Cluster:
    """One cluster.

    Attributes:
        name: what sets it apart, see `crl_sdk.tasks.Name`; None without a basis.
        size: rows.
        cohesion: mean cosine of two different rows of it, -1 to 1; 1.0 for a single row.
        typical: positions of the rows nearest to its centre, nearest first, copies once.
        edge: positions of the rows farthest from it that are not among those, farthest first.
    """

    name: Name | None
    size: int
    cohesion: float
    typical: tuple[int, ...]
    edge: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Clustering:
    """What `cluster` returns.

    Attributes:
        labels: (n,) int64, each row's cluster; 0 is the largest.
        centres: (c, m) float32.
        distances: (n,) float32, of each row from its centre.
        typicality: (n,) float32, share of its cluster that is at least as far from the centre: 1.0
            for the most typical row.
        clusters: c of them, in the order of the labels.
        k: how many clusters were asked for or chosen; c is less if there are fewer distinct rows.
        choice: how k was chosen and how sure that is; None if k was given.
        stability: mean adjusted Rand index with clusterings of 80 % of the rows, 1 for the same, 0
            for no more than chance; None for one cluster or fewer than five rows.
    """

    labels: NDArray[np.int64]
    centres: NDArray[np.float32]
    distances: NDArray[np.float32]
    typicality: NDArray[np.float32]
    clusters: tuple[Cluster, ...]
    k: int
    choice: Choice | None
    stability: float | None


def cluster(
    rows: NDArray[Any],
    k: int | None = None,
    *,
    basis: Basis | None = None,
    universal: NDArray[Any] | None = None,
    most: int = MOST_CLUSTERS,
    shown: int = SHOWN,
    seed: int = 0,
) -> Clustering:
    """Cluster conditional embeddings by k-means, and name the clusters.

    Rows are taken as they are, normalised as their basis says. `Embedder.embed`, `Client.embed`,
    `Basis.projection.apply` and the files of `crl project` give such rows.

    Args:
        rows: (n, m) float; conditional embeddings, or any others.
        k: number of clusters, 1 to n; None chooses it, see `crl_sdk.tasks.choose_k`.
        basis: names the clusters; it need not be the one that made the rows.
        universal: (n, d) float, the same pictures' universal embeddings: with them clusters are
            named whatever the basis' method, and copies of a picture are known.
        most: clusters at most, where k is chosen.
        shown: typical rows of each cluster at most.
        seed: equal seeds give equal clusters.

    Raises:
        InvalidInputError: rows are malformed, hold NaN or do not fit together; k is out of range;
            the names need `universal`.
        MissingDependencyError: scikit-learn or scipy is not installed.
    """
    checked = check_rows(rows)
    pictures = checked if universal is None else check_rows(universal)
    if len(pictures) != len(checked):
        raise InvalidInputError(
            f"expected universal embeddings of the same pictures, got {len(checked)} rows and "
            f"{len(pictures)} universal ones"
        )
    scores = None if basis is None else text_scores(basis, universal=universal, rows=checked)
    choice = choose_k(checked, most, seed=seed) if k is None else None
    count = choice.k if choice is not None else k
    assert count is not None
    labels, centres = kmeans(checked, count, seed=seed)
    distances = np.linalg.norm(checked - centres[labels], axis=1)
    names: list[Name] | list[None] = [None] * len(centres)
    if basis is not None and scores is not None:
        names = name_clusters(labels, scores, basis.texts)
    typicality = np.empty(len(checked), np.float32)
    clusters = []
    for number, name in enumerate(names):
        members = np.flatnonzero(labels == number)
        typicality[members] = _typicality(distances[members])
        typical = _nearest(members, distances[members], pictures, shown)
        others = members[~np.isin(members, typical)]
        clusters.append(
            Cluster(
                name=name,
                size=len(members),
                cohesion=cohesion(checked[members]),
                typical=typical,
                edge=_nearest(others, -distances[others], pictures, shown // 3),
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
    """Give the mean cosine of two different rows of (s, m); 1.0 for a single row."""
    s = len(rows)
    if s == 1:
        return 1.0
    wide = rows.astype(np.float64)
    unit = wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), EPSILON)
    total = unit.sum(axis=0)
    return float((total @ total - np.square(unit).sum()) / (s * (s - 1)))


def _typicality(distances: NDArray[np.float32]) -> NDArray[np.float32]:
    """Give each row's share of rows that are at least as far; equal distances share it."""
    nearer = np.searchsorted(np.sort(distances), distances, side="left")
    return np.asarray(1.0 - nearer / len(distances), np.float32)


def _nearest(
    members: NDArray[np.int64],
    distances: NDArray[np.float32],
    pictures: NDArray[np.float32],
    shown: int,
) -> tuple[int, ...]:
    """Give the members of least distance, copies of one picture once."""
    order = members[np.argsort(distances, kind="stable")]
    found: list[int] = []
    for start in range(0, len(order), _WINDOW):
        left = order[start : start + _WINDOW]
        for known in found:
            left = _without_copies(left, known, pictures)
        while len(left) and len(found) < shown:
            found.append(int(left[0]))
            left = _without_copies(left, found[-1], pictures)
        if len(found) >= shown:
            break
    return tuple(found)


def _without_copies(
    positions: NDArray[np.int64], known: int, pictures: NDArray[np.float32]
) -> NDArray[np.int64]:
    away = np.linalg.norm(pictures[positions] - pictures[known], axis=1)
    return np.asarray(positions[away > _SAME])
