"""Pictures in groups: k-means on embeddings, and names for the groups that people understand."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SHOWN = 12
"""Pictures that a group shows at most."""

MOST_GROUPS = 8
"""Groups that `choose_count` tries at most."""


@dataclass(frozen=True, slots=True)
class Group:
    """Pictures that k-means put together.

    Attributes:
        name: their most frequent label; without labels, the text that sets them apart most.
        size: how many they are.
        pictures: positions of `SHOWN` of them, drawn at random.
        fitting: for each of those whether its label is the group's name; empty without labels.
        purity: share of all the group's pictures whose label is its name; None without labels.
    """

    name: str
    size: int
    pictures: tuple[int, ...]
    fitting: tuple[bool, ...] = ()
    purity: float | None = None


@dataclass(frozen=True, slots=True)
class Panel:
    """One criterion: the same pictures grouped twice.

    Attributes:
        criterion: in words.
        texts: of its basis.
        written: whether the language model wrote them.
        universal: groups of the universal embeddings.
        conditional: groups of the conditional embeddings.
        accuracies: of both clusterings against the labels; None without labels.
    """

    criterion: str
    texts: tuple[str, ...]
    written: bool
    universal: tuple[Group, ...]
    conditional: tuple[Group, ...]
    accuracies: tuple[float, float] | None = None


def cluster(rows: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Cluster rows (n, m) with k-means, seed 0; give each one's cluster (n,) int64."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # equal pictures: fewer groups, fine
        found: NDArray[np.int64] = KMeans(count, n_init=10, random_state=0).fit_predict(rows)
    return found.astype(np.int64)


def choose_count(rows: NDArray[np.float32]) -> int:
    """Give the number of groups, 2 to `MOST_GROUPS`, that parts rows (n, m) best: silhouette."""
    from sklearn.metrics import silhouette_score

    scores: dict[int, float] = {}
    for count in range(2, min(MOST_GROUPS, len(rows) - 1) + 1):
        clusters = cluster(rows, count)
        if 1 < len(np.unique(clusters)) < len(rows):
            scores[count] = silhouette_score(
                rows, clusters, sample_size=min(1000, len(rows)), random_state=0
            )
    return max(scores, key=lambda count: scores[count], default=1)


def labelled_groups(
    clusters: NDArray[np.int64], labels: NDArray[np.int64], values: Sequence[str]
) -> tuple[Group, ...]:
    """Name groups by their most frequent label, in the order of the values.

    Args:
        clusters: each picture's cluster, (n,) int64.
        labels: each picture's value, (n,) int64 into `values`.
        values: the labels' names.
    """
    found = []
    for members in _members(clusters):
        label = int(np.bincount(labels[members]).argmax())
        shown = _draw(members)
        group = Group(
            name=values[label],
            size=len(members),
            pictures=tuple(map(int, shown)),
            fitting=tuple(bool(labels[i] == label) for i in shown),
            purity=float((labels[members] == label).mean()),
        )
        found.append((label, -len(members), group))
    return tuple(group for *_, group in sorted(found, key=lambda item: item[:2]))


def described_groups(
    clusters: NDArray[np.int64], rows: NDArray[np.float32], texts: Sequence[str]
) -> tuple[Group, ...]:
    """Name each group by the text that sets it apart from all pictures most; the largest first.

    Args:
        clusters: each picture's cluster, (n,) int64.
        rows: conditional embeddings, (n, k), a column for each text.
        texts: the k texts of the basis.
    """
    spread = rows.std(0) + 1e-6
    found = []
    for members in _members(clusters):
        apart = (rows[members].mean(0) - rows.mean(0)) / spread
        name = texts[int(apart.argmax())]
        found.append(Group(name, len(members), tuple(map(int, _draw(members)))))
    return tuple(sorted(found, key=lambda group: -group.size))


def _members(clusters: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    return [np.flatnonzero(clusters == each) for each in np.unique(clusters)]


def _draw(members: NDArray[np.int64]) -> NDArray[np.int64]:
    """Draw the pictures to show, at random, not the ones nearest to the centre."""
    rng = np.random.default_rng(0)
    return rng.permutation(members)[:SHOWN]
