"""K-means on embeddings, and how many clusters there are: chosen, and how sure that is."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crl_sdk.errors import InvalidInputError, MissingDependencyError
from crl_sdk.projection._projection import check_embeddings

MOST_CLUSTERS = 20
"""Clusters that `choose_k` tries at most."""

RESAMPLES = 10
"""Parts of the rows, drawn at random, that are clustered on their own."""

WEAK_SILHOUETTE = 0.25
"""No substantial structure below it: Kaufman and Rousseeuw, Finding Groups in Data, 1990."""

_SHARE, _SAMPLE = 0.8, 500  # of the rows, in one resample; and rows at most
_FIT_SAMPLE = 20_000  # rows that ten starts of k-means see; more rows start from their best
_FEW_VALUES = 1 << 19  # of rows; on fewer, threads wait for each other longer than they work


@dataclass(frozen=True, slots=True)
class Choice:
    """How many clusters, and how sure that is.

    Attributes:
        k: the number with the best mean silhouette over the resamples.
        silhouettes: each number that was tried → its mean silhouette, -1 to 1; empty if there are
            too few distinct rows to try any.
        agreement: share of the resamples that, each on its own, find `k` best; None if none was
            tried. 1.0 says that the choice does not hang on which pictures were looked at; it
            does not say that the clusters are far apart, which `silhouettes[k]` tells.
        margin: how far the mean silhouette of `k` is above that of the next best number; None if
            there is no other.
        resamples: how many there were.
        resample_rows: rows of each.
    """

    k: int
    silhouettes: Mapping[int, float]
    agreement: float | None
    margin: float | None
    resamples: int
    resample_rows: int

    @property
    def runner_up(self) -> int | None:
        """The next best number; None if there is no other."""
        others = {k: value for k, value in self.silhouettes.items() if k != self.k}
        return max(others, key=lambda k: others[k], default=None)

    @property
    def weak(self) -> bool:
        """Whether the clusters hardly stand apart, under any number: see `WEAK_SILHOUETTE`."""
        return self.silhouettes.get(self.k, 0.0) < WEAK_SILHOUETTE


def check_rows(rows: NDArray[Any]) -> NDArray[np.float32]:
    """Check rows that come from outside; give them as (n, m) float32.

    Raises:
        InvalidInputError: they are not (n, m) floats with n, m >= 1, or hold NaN or infinity.
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
    """Cluster rows by Euclidean k-means, the best of several starts.

    Beyond 20,000 rows the starts see a sample of so many; the best goes on with all rows.

    Args:
        rows: (n, m) float32.
        k: clusters, 1 to n.
        seed: equal seeds give equal clusters.
        starts: how often to start anew.

    Returns:
        Each row's cluster (n,) int64, and the centres (c, m) float32. Clusters are numbered by
        size, the largest first; c is less than k if there are fewer distinct rows.

    Raises:
        InvalidInputError: k is out of range.
        MissingDependencyError: scikit-learn is not installed.
    """
    if isinstance(k, bool) or not 1 <= k <= len(rows):
        raise InvalidInputError(
            f"expected k from 1 to the {len(rows)} rows, got {k}: ask for fewer clusters"
        )
    with _threads(rows):
        return _fit(rows, k, seed, starts)


def _fit(
    rows: NDArray[np.float32], k: int, seed: int, starts: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # equal rows: fewer clusters
        if len(rows) <= _FIT_SAMPLE:
            model = KMeans(k, n_init=starts, random_state=seed).fit(rows)
        else:
            drawn = np.random.default_rng(seed).choice(len(rows), _FIT_SAMPLE, replace=False)
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
    rows: NDArray[Any], most: int = MOST_CLUSTERS, *, resamples: int = RESAMPLES, seed: int = 0
) -> Choice:
    """Choose the number of clusters by silhouette, and tell how sure that is.

    Each resample draws 80 % of the rows without replacement (500 at most), clusters them into 2,
    3, … clusters and takes the mean silhouette of each clustering. The
    number with the best mean over the resamples is chosen. It is never 1 while there are three
    distinct rows: whether there are clusters at all is told by `Choice.weak`.

    Args:
        rows: (n, m) float.
        most: the largest number to try, 2 or more; never more than half the rows of a resample.
        resamples: how many to draw.
        seed: equal seeds give equal choices.

    Raises:
        InvalidInputError: the rows are malformed or hold NaN, or an argument is out of range.
        MissingDependencyError: scikit-learn or scipy is not installed.
    """
    checked = check_rows(rows)
    if most < 2 or resamples < 1:
        raise InvalidInputError(
            f"expected most >= 2 and resamples >= 1, got {most} and {resamples}"
        )
    samples = list(_resamples(len(checked), resamples, seed))
    with _threads(checked[samples[0]]):
        found = [_silhouettes(checked[drawn], most, seed + i) for i, drawn in enumerate(samples)]
    tried = sorted(set.union(*(set(each) for each in found)))
    means = {k: float(np.mean([each[k] for each in found if k in each])) for k in tried}
    size = len(samples[0])
    if not means:
        return Choice(1, {}, None, None, resamples, size)
    k = _best(means)
    others = [value for other, value in means.items() if other != k]
    return Choice(
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
    """Tell how much of a clustering comes back when parts of the rows are clustered on their own.

    Args:
        rows: (n, m) float32.
        labels: each row's cluster (n,) int64.
        k: number of clusters.
        seed: of the resamples, which are drawn as `choose_k` draws them.

    Returns:
        The mean adjusted Rand index of the resamples' clusters with these, 1 for the same, 0 for
        no more than chance; None for one cluster or fewer than five rows.
    """
    if k < 2 or len(rows) < 5:
        return None
    from sklearn.metrics import adjusted_rand_score

    indices = []
    samples = list(_resamples(len(rows), RESAMPLES, seed))
    with _threads(rows[samples[0]]):
        for i, drawn in enumerate(samples):
            found, _ = _fit(rows[drawn], min(k, len(drawn)), seed + i, 3)
            indices.append(adjusted_rand_score(labels[drawn], found))
    return float(np.mean(indices))


def silhouette(rows: NDArray[np.float32], labels: NDArray[np.int64], *, seed: int = 0) -> float:
    """Give the mean silhouette of a clustering (Rousseeuw 1987, Euclidean), on 500 rows at most.

    Args:
        rows: (n, m) float32.
        labels: each row's cluster (n,) int64.
        seed: of the rows that are drawn.

    Returns:
        -1 to 1; 0 where there is one cluster only.

    Raises:
        MissingDependencyError: scipy is not installed.
    """
    drawn = np.random.default_rng(seed).permutation(len(rows))[:_SAMPLE]
    kinds, compact = np.unique(labels[drawn], return_inverse=True)
    if len(kinds) < 2:
        return 0.0
    return mean_silhouette(_distances(rows[drawn]), compact.astype(np.int64))


def mean_silhouette(distances: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """Give the mean silhouette of a clustering.

    Args:
        distances: between all rows, (s, s) float64.
        labels: each row's cluster (s,) int64, 0 to k - 1, none of them empty, k >= 2.
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


def _silhouettes(rows: NDArray[np.float32], most: int, seed: int) -> dict[int, float]:
    distinct = len(np.unique(rows, axis=0))
    distances = _distances(rows)
    found: dict[int, float] = {}
    for k in range(2, min(most, max(len(rows) // 2, 2), distinct, len(rows) - 1) + 1):
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


def _threads(rows: NDArray[np.float32]) -> AbstractContextManager[Any]:
    """Hold BLAS and OpenMP to one thread, in the whole process, while few rows are worked on."""
    try:
        import sklearn.cluster  # noqa: F401  # what is loaded later would not be held
    except ImportError as error:
        raise MissingDependencyError("scikit-learn", "tasks", "clustering") from error
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1) if rows.size < _FEW_VALUES else nullcontext()


def _best(silhouettes: Mapping[int, float]) -> int:
    """Give the number with the best silhouette, the smallest of equals."""
    return min(silhouettes, key=lambda k: (-round(silhouettes[k], 9), k))


def _resamples(n: int, count: int, seed: int) -> Iterator[NDArray[np.int64]]:
    size = min(_SAMPLE, n, max(math.ceil(_SHARE * n), 3))
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield np.sort(rng.choice(n, size, replace=False))
