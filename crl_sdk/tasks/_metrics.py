"""Measures of clusterings and rankings, on plain arrays.

Among equal scores, wrong items are ranked first. An embedding that carries no information must not
profit from the order of its items. scikit-learn's ranking measures do not offer this, so they are
computed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crl_sdk.errors import InvalidInputError, MissingDependencyError

_BLOCK = 1 << 22
"""Number of similarities that are ranked at once: 16 MiB, and ten times as much while sorting."""


def clustering_accuracy(labels: NDArray[Any], clusters: NDArray[Any]) -> float:
    """Return the share of items in the right cluster under the best one-to-one assignment.

    Each cluster is assigned at most one label, and each label at most one cluster.

    Args:
        labels: True label of each item, shape (n,), of any type that can be sorted.
        clusters: Cluster of each item, shape (n,), of any type that can be sorted.

    Returns:
        Accuracy, 0 to 1.

    Raises:
        InvalidInputError: If the shapes differ or there are no items.
        MissingDependencyError: If SciPy is not installed.

    Example:
        >>> from crl_sdk.tasks._metrics import clustering_accuracy
        >>> clustering_accuracy(["red", "red", "blue", "blue"], [1, 1, 0, 1])
        0.75
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
    """Return the rank of each query's target among its items; 0 is the best.

    Args:
        scores: Score of each item for each query, shape (q, n), of a float dtype. Higher is
            better.
        targets: Column of each query's target, shape (q,), integers.

    Returns:
        Ranks, shape (q,), int64. Items with the same score as the target rank before it.

    Raises:
        InvalidInputError: If the shapes do not match, a target is out of range, or a score is NaN.
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
    """Return the share of queries whose target is among the k best items.

    Args:
        scores: Score of each item for each query, shape (q, n) with q >= 1, of a float dtype.
            Higher is better.
        targets: Column of each query's target, shape (q,), integers.
        ks: Values of k, each at least 1.

    Returns:
        Share for each k, 0 to 1.

    Raises:
        InvalidInputError: If `ranks` refuses the arguments, there is no query, or a k is below 1.
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
    """Return the average precision of each query over all its items.

    It is the mean over the relevant items of the precision at the rank of that item. A query
    without a relevant item has 0, as in the code of ASEN (github.com/Maryeon/asenpp).

    Args:
        scores: Score of each item for each query, shape (q, n), of a float dtype. Higher is
            better.
        relevant: Whether each item is relevant to each query, shape (q, n), bool.

    Returns:
        Average precision of each query, shape (q,), float64, 0 to 1.

    Raises:
        InvalidInputError: If the shapes differ or a score is NaN.
    """
    checked = _check_scores(scores)
    if np.shape(relevant) != checked.shape or np.asarray(relevant).dtype != np.bool_:
        raise InvalidInputError(
            f"expected relevant {checked.shape} bool, got {np.shape(relevant)} "
            f"{np.asarray(relevant).dtype}"
        )
    order = np.lexsort((relevant, -checked), axis=1)  # irrelevant items first among equal scores
    hits = np.take_along_axis(np.asarray(relevant), order, axis=1)
    precision = np.cumsum(hits, axis=1) / np.arange(1, checked.shape[1] + 1)
    return np.asarray((precision * hits).sum(axis=1) / np.maximum(hits.sum(axis=1), 1), np.float64)


def mean_average_precision(
    queries: NDArray[np.float32],
    candidates: NDArray[np.float32],
    query_values: NDArray[np.integer],
    candidate_values: NDArray[np.integer],
) -> float:
    """Return the mean average precision of searches by inner product.

    All candidates are ranked for each query. A candidate is relevant if its value equals that of
    the query.

    Args:
        queries: Query rows, shape (q, m) with q >= 1, float32. Unit rows rank by cosine.
        candidates: Candidate rows, shape (c, m) with c >= 1, float32.
        query_values: Value of each query, shape (q,), integers.
        candidate_values: Value of each candidate, shape (c,), integers.

    Returns:
        Mean of `average_precision` over the queries, 0 to 1.

    Raises:
        InvalidInputError: If the shapes do not match, there are no rows, or a row holds NaN.
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
