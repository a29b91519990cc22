"""K-means clustering of embeddings, and the choice of the number of clusters."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crl_sdk.errors import InvalidInputError, MissingDependencyError
from crl_sdk.projection._projection import check_embeddings
from crl_sdk.tasks._few_threads import few_threads

MAX_CLUSTERS = 20
"""Largest number of clusters that `choose_k` tries by default."""

RESAMPLES = 10
"""Number of random subsets of the rows that are clustered on their own."""

WEAK_SILHOUETTE = 0.25
"""Mean silhouette below which there is no substantial structure, after Kaufman and Rousseeuw,
Finding Groups in Data, 1990."""

_RESAMPLE_SHARE = 0.8  # of the rows
_MAX_RESAMPLE_ROWS = 500
_MAX_START_ROWS = 20_000  # rows that all starts of k-means see; more rows continue from the best


@dataclass(frozen=True, slots=True)
class ClusterCount:
    """A chosen number of clusters, with measures of how certain the choice is.

    Attributes:
        k: Number with the best mean silhouette over the resamples.
        silhouettes: Mean silhouette, -1 to 1, for each number that was tried. Empty if there are
            too few distinct rows to try any.
        agreement: Share of the resamples whose own best number is `k`. None if no number was
            tried. 1.0 means that the choice does not depend on which rows were drawn. It does not
            mean that the clusters are well separated; see `silhouettes[k]` for that.
        margin: Mean silhouette of `k` minus that of the next best number. None if there is no
            other number.
        resamples: Number of resamples.
        resample_rows: Number of rows in each resample.
    """

    k: int
    silhouettes: Mapping[int, float]
    agreement: float | None
    margin: float | None
    resamples: int
    resample_rows: int

    @property
    def runner_up(self) -> int | None:
        """Next best number, or None if there is no other."""
        others = {k: value for k, value in self.silhouettes.items() if k != self.k}
        return max(others, key=lambda k: others[k], default=None)

    @property
    def weak(self) -> bool:
        """Whether even the best mean silhouette is below 0.25, so that clusters hardly separate."""
        return self.silhouettes.get(self.k, 0.0) < WEAK_SILHOUETTE


def check_rows(rows: NDArray[Any]) -> NDArray[np.float32]:
    """Check rows that a caller passed, and return them as float32.

    Args:
        rows: Rows, shape (n, m), of a float dtype or int8.

    Returns:
        The rows, shape (n, m), float32.

    Raises:
        InvalidInputError: If they are not (n, m) floats with n, m >= 1, or hold NaN or infinity.
    """
    array = np.asarray(rows)
    if array.ndim != 2 or 0 in array.shape:
        raise InvalidInputError(
            f"expected rows (n, m) with at least one row and one column, got {array.shape}"
        )
    return check_embeddings(array, array.shape[1])


def kmeans(
    rows: NDArray[np.float32], k: int, *, seed: int = 0, starts: int = 10
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Cluster rows by Euclidean k-means and keep the best of several starts.

    With more than 20,000 rows, the starts run on a sample of 20,000. The best of them then
    continues on all rows.

    Args:
        rows: Rows to cluster, shape (n, m), float32.
        k: Number of clusters, 1 to n.
        seed: Seed of the random choices. Equal seeds give equal clusters.
        starts: Number of starts.

    Returns:
        The cluster of each row, shape (n,), int64, and the centres, shape (c, m), float32.
        Clusters are numbered by size, largest first. c is less than k if there are fewer than k
        distinct rows.

    Raises:
        InvalidInputError: If `k` is out of range, or rows are malformed or hold NaN or infinity.
        MissingDependencyError: If scikit-learn is not installed.
    """
    if isinstance(k, bool) or not 1 <= k <= len(rows):
        raise InvalidInputError(
            f"expected k from 1 to the {len(rows)} rows, got {k}: choose k in this range"
        )
    rows = check_rows(rows)
    with few_threads(rows):
        return _fit(rows, k, seed, starts)


def _fit(
    rows: NDArray[np.float32], k: int, seed: int, starts: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # equal rows give fewer clusters
        if len(rows) <= _MAX_START_ROWS:
            model = KMeans(k, n_init=starts, random_state=seed).fit(rows)
        else:
            drawn = np.random.default_rng(seed).choice(len(rows), _MAX_START_ROWS, replace=False)
            part = np.ascontiguousarray(rows[np.sort(drawn)])
            first = KMeans(k, n_init=starts, random_state=seed).fit(part)
            model = KMeans(k, init=first.cluster_centers_, n_init=1).fit(rows)
    used, labels, sizes = np.unique(model.labels_, return_inverse=True, return_counts=True)
    order = np.argsort(-sizes, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    centres = model.cluster_centers_[used[order]].astype(np.float32)
    return rank[labels].astype(np.int64), centres


def choose_k(
    rows: NDArray[Any], max_k: int = MAX_CLUSTERS, *, resamples: int = RESAMPLES, seed: int = 0
) -> ClusterCount:
    """Choose the number of clusters by silhouette.

    Each resample holds 80 % of the rows (at most 500), drawn without replacement. It is clustered
    into 2, 3, … clusters, and the mean silhouette of each clustering is taken. The number with
    the best mean over all resamples is chosen. With three or more distinct rows it is never 1;
    `ClusterCount.weak` says whether there are clusters at all.

    Args:
        rows: Rows to cluster, shape (n, m), of a float dtype or int8.
        max_k: Largest number to try, at least 2. It is limited to half the rows of a resample.
        resamples: Number of resamples.
        seed: Seed of the random choices. Equal seeds give equal results.

    Returns:
        The chosen number and how certain it is.

    Raises:
        InvalidInputError: If the rows are malformed or hold NaN, or an argument is out of range.
        MissingDependencyError: If scikit-learn or SciPy is not installed.
    """
    checked = check_rows(rows)
    if max_k < 2 or resamples < 1:
        raise InvalidInputError(
            f"expected max_k >= 2 and resamples >= 1, got {max_k} and {resamples}"
        )
    samples = list(_resamples(len(checked), resamples, seed))
    with few_threads(checked[samples[0]]):
        found = [_silhouettes(checked[drawn], max_k, seed + i) for i, drawn in enumerate(samples)]
    tried = sorted(set.union(*(set(each) for each in found)))
    means = {k: float(np.mean([each[k] for each in found if k in each])) for k in tried}
    size = len(samples[0])
    if not means:
        return ClusterCount(1, {}, None, None, resamples, size)
    k = _best(means)
    others = [value for other, value in means.items() if other != k]
    return ClusterCount(
        k=k,
        silhouettes=means,
        agreement=float(np.mean([bool(each) and _best(each) == k for each in found])),
        margin=means[k] - max(others) if others else None,
        resamples=resamples,
        resample_rows=size,
    )


def stability(
    rows: NDArray[np.float32], labels: NDArray[np.int64], k: int, *, seed: int = 0
) -> float | None:
    """Return how well clusterings of resamples agree with a clustering of all rows.

    Args:
        rows: Clustered rows, shape (n, m), float32.
        labels: Cluster of each row, shape (n,), int64.
        k: Number of clusters.
        seed: Seed of the resamples, which are drawn as in `choose_k`.

    Returns:
        Mean adjusted Rand index of the resamples: 1 for equal clusterings, 0 for chance. None for
        one cluster or fewer than five rows.
    """
    if k < 2 or len(rows) < 5:
        return None
    from sklearn.metrics import adjusted_rand_score

    indices = []
    samples = list(_resamples(len(rows), RESAMPLES, seed))
    with few_threads(rows[samples[0]]):
        for i, drawn in enumerate(samples):
            found, _ = _fit(rows[drawn], min(k, len(drawn)), seed + i, 3)
            indices.append(adjusted_rand_score(labels[drawn], found))
    return float(np.mean(indices))


def silhouette(rows: NDArray[np.float32], labels: NDArray[np.int64], *, seed: int = 0) -> float:
    """Return the mean silhouette of a clustering (Rousseeuw 1987, Euclidean distances).

    Args:
        rows: Clustered rows, shape (n, m), float32. At most 500 of them are used.
        labels: Cluster of each row, shape (n,), int64.
        seed: Seed of the choice of rows.

    Returns:
        Mean silhouette, -1 to 1. 0 if there is only one cluster.

    Raises:
        MissingDependencyError: If SciPy is not installed.
    """
    drawn = np.random.default_rng(seed).permutation(len(rows))[:_MAX_RESAMPLE_ROWS]
    kinds, compact = np.unique(labels[drawn], return_inverse=True)
    if len(kinds) < 2:
        return 0.0
    return mean_silhouette(_distances(rows[drawn]), compact.astype(np.int64))


def mean_silhouette(distances: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """Return the mean silhouette of a clustering from the distances between its rows.

    It equals `sklearn.metrics.silhouette_score(distances, labels, metric="precomputed")`, which
    takes 5 to 17 times as long on 100 to 500 rows and would slow `choose_k` down by 20 to 40 %.

    Args:
        distances: Distances between all rows, shape (s, s), float64.
        labels: Cluster of each row, shape (s,), int64, 0 to k - 1 with k >= 2. No cluster is
            empty.
    """
    each = np.arange(len(labels))
    member = np.eye(int(labels.max()) + 1)[labels]
    sizes = member.sum(axis=0)
    sums = distances @ member
    own = sums[each, labels] / np.maximum(sizes[labels] - 1, 1)
    means = sums / sizes
    means[each, labels] = np.inf
    nearest = means.min(axis=1)
    longer = np.maximum(own, nearest)
    values = np.divide(nearest - own, longer, out=np.zeros_like(own), where=longer > 0)
    values[sizes[labels] == 1] = 0.0
    return float(values.mean())


def _silhouettes(rows: NDArray[np.float32], max_k: int, seed: int) -> dict[int, float]:
    distinct = len(np.unique(rows, axis=0))
    distances = _distances(rows)
    found: dict[int, float] = {}
    for k in range(2, min(max_k, max(len(rows) // 2, 2), distinct, len(rows) - 1) + 1):
        labels, centres = _fit(rows, k, seed, 3)
        if len(centres) == k:
            found[k] = mean_silhouette(distances, labels)
    return found


def _distances(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    try:
        from scipy.spatial.distance import cdist
    except ImportError as error:
        raise MissingDependencyError("scipy", "tasks", "silhouettes") from error
    return np.asarray(cdist(rows, rows), np.float64)


def _best(silhouettes: Mapping[int, float]) -> int:
    """Return the number with the best silhouette, the smallest one if several are equal."""
    return min(silhouettes, key=lambda k: (-round(silhouettes[k], 9), k))


def _resamples(n: int, count: int, seed: int) -> Iterator[NDArray[np.int64]]:
    size = min(_MAX_RESAMPLE_ROWS, n, max(math.ceil(_RESAMPLE_SHARE * n), 3))
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield np.sort(rng.choice(n, size, replace=False))
