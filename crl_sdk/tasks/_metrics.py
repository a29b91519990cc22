"""How good clusters, rankings and retrieved items are, on plain arrays.

Where scores are equal, the wrong item counts as the better one: an embedding that says nothing must
not be rewarded for the order in which its items came.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crl_sdk.errors import InvalidInputError, MissingDependencyError

_BLOCK = 1 << 22
"""Similarities ranked at a time: 16 MiB of them, and about ten times that while they are sorted."""


def clustering_accuracy(labels: NDArray[Any], clusters: NDArray[Any]) -> float:
    """Give the share of items in the right cluster under the best one-to-one assignment.

    Each cluster stands for one label at most, and each label for one cluster.

    Args:
        labels: (n,), of any type that can be sorted.
        clusters: (n,), likewise.

    Returns:
        Between 0 and 1.

    Raises:
        InvalidInputError: the shapes differ, or there are no items.
        MissingDependencyError: SciPy is not installed.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise MissingDependencyError("scipy", "tasks", "measuring clusters") from error

    if np.ndim(labels) != 1 or np.shape(labels) != np.shape(clusters) or len(labels) == 0:
        raise InvalidInputError(
            f"expected labels (n,) and clusters (n,) with n >= 1, got {np.shape(labels)} and "
            f"{np.shape(clusters)}"
        )
    names, label = np.unique(labels, return_inverse=True)
    groups, cluster = np.unique(clusters, return_inverse=True)
    table = np.zeros((len(groups), len(names)), np.int64)
    np.add.at(table, (cluster, label), 1)
    rows, columns = linear_sum_assignment(table, maximize=True)
    return float(table[rows, columns].sum() / len(labels))


def ranks(scores: NDArray[np.floating], targets: NDArray[np.integer]) -> NDArray[np.int64]:
    """Give the place of each query's target among its items, from 0 for the best.

    Args:
        scores: (q, n) float, higher is better.
        targets: (q,) integers, the column of each query's target.

    Returns:
        (q,) int64. Items that score as the target does are placed before it.

    Raises:
        InvalidInputError: shapes do not fit, a target is out of range, or a score is NaN.
    """
    checked = _check_scores(scores)
    if np.shape(targets) != checked.shape[:1] or np.asarray(targets).dtype.kind not in "iu":
        raise InvalidInputError(
            f"expected one integer target for each of {len(checked)} queries, got "
            f"{np.shape(targets)} {np.asarray(targets).dtype}"
        )
    if len(targets) and not 0 <= int(np.min(targets)) <= int(np.max(targets)) < checked.shape[1]:
        raise InvalidInputError(
            f"expected targets from 0 to {checked.shape[1] - 1}, got {int(np.min(targets))} to "
            f"{int(np.max(targets))}"
        )
    own = np.take_along_axis(checked, np.asarray(targets)[:, None], axis=1)
    return np.asarray((checked >= own).sum(axis=1) - 1, np.int64)


def recall_at(
    scores: NDArray[np.floating], targets: NDArray[np.integer], ks: Sequence[int] = (1, 2, 3)
) -> dict[int, float]:
    """Give the share of queries whose target is among the k best items.

    Args:
        scores: (q, n) float, higher is better; q >= 1.
        targets: (q,) integers, the column of each query's target.
        ks: numbers of items, each >= 1.

    Returns:
        k → share, between 0 and 1.

    Raises:
        InvalidInputError: as `ranks`; or no query; or a k below 1.
    """
    if not ks or min(ks) < 1:
        raise InvalidInputError(f"expected k >= 1, got {list(ks)}")
    places = ranks(scores, targets)
    if len(places) == 0:
        raise InvalidInputError("expected at least one query, got none")
    return {k: float((places < k).mean()) for k in ks}


def average_precision(
    scores: NDArray[np.floating], relevant: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Give each query's average precision over all items.

    The mean, over the relevant items, of the share of relevant ones among those ranked as high.
    A query without a relevant item has 0, as in the code of ASEN (github.com/Maryeon/asenpp).

    Args:
        scores: (q, n) float, higher is better.
        relevant: (q, n) bool.

    Returns:
        (q,) float64, between 0 and 1.

    Raises:
        InvalidInputError: the shapes differ, or a score is NaN.
    """
    checked = _check_scores(scores)
    if np.shape(relevant) != checked.shape or np.asarray(relevant).dtype != np.bool_:
        raise InvalidInputError(
            f"expected relevant {checked.shape} bool, got {np.shape(relevant)} "
            f"{np.asarray(relevant).dtype}"
        )
    order = np.lexsort((relevant, -checked), axis=1)  # among equal scores the irrelevant first
    hits = np.take_along_axis(np.asarray(relevant), order, axis=1)
    precision = np.cumsum(hits, axis=1) / np.arange(1, checked.shape[1] + 1)
    return np.asarray((precision * hits).sum(axis=1) / np.maximum(hits.sum(axis=1), 1), np.float64)


def mean_average_precision(
    queries: NDArray[np.float32],
    candidates: NDArray[np.float32],
    query_values: NDArray[np.integer],
    candidate_values: NDArray[np.integer],
) -> float:
    """Rank all candidates for each query by inner product; a candidate of its value is relevant.

    Args:
        queries: (q, m) float32; unit rows for cosines. q >= 1.
        candidates: (c, m) float32, c >= 1.
        query_values: (q,) integers.
        candidate_values: (c,) integers.

    Returns:
        The mean of `average_precision` over the queries.

    Raises:
        InvalidInputError: shapes do not fit, there are no rows, or one holds NaN.
    """
    q, c = len(queries), len(candidates)
    if (
        np.ndim(queries) != 2
        or np.ndim(candidates) != 2
        or queries.shape[1:] != candidates.shape[1:]
        or (np.shape(query_values), np.shape(candidate_values)) != ((q,), (c,))
        or 0 in (q, c)
    ):
        raise InvalidInputError(
            "expected queries (q, m) and candidates (c, m) with one value each and q, c >= 1, got "
            f"{np.shape(queries)}, {np.shape(candidates)}, {np.shape(query_values)} and "
            f"{np.shape(candidate_values)}"
        )
    step = max(1, _BLOCK // c)
    total = 0.0
    for start in range(0, q, step):
        block = slice(start, start + step)
        relevant = query_values[block, None] == candidate_values[None, :]
        total += float(average_precision(queries[block] @ candidates.T, relevant).sum())
    return total / q


def _check_scores(scores: NDArray[np.floating]) -> NDArray[np.floating]:
    array = np.asarray(scores)
    if array.ndim != 2 or array.shape[1] == 0 or array.dtype.kind != "f":
        raise InvalidInputError(
            f"expected scores (q, n) of floats with n >= 1, got {array.shape} {array.dtype}"
        )
    if np.isnan(array).any():
        raise InvalidInputError(
            f"{int(np.isnan(array).any(axis=1).sum())} of {len(array)} queries have a score that "
            "is NaN: leave out the rows of images that failed"
        )
    return array
