"""Measures compared with brute force, scikit-learn and cases computed by hand."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from crl_sdk.errors import InvalidInputError
from crl_sdk.tasks._metrics import (
    average_precision,
    clustering_accuracy,
    mean_average_precision,
    ranks,
    recall_at,
)

sklearn_metrics = pytest.importorskip("sklearn.metrics")


@pytest.mark.parametrize("seed", range(12))
def test_accuracy_is_the_best_of_all_assignments(seed):
    rng = np.random.default_rng(seed)
    classes, groups = rng.integers(1, 5, 2)
    labels, clusters = rng.integers(0, classes, 23), rng.integers(0, groups, 23)
    padded = range(max(classes, groups))
    best = max(
        np.mean([order[cluster] == label for label, cluster in zip(labels, clusters, strict=True)])
        for order in permutations(padded)
    )
    assert clustering_accuracy(labels, clusters) == pytest.approx(best)


def test_accuracy_takes_any_names():
    labels = np.array(["b", "b", "a", "a", "c"])
    assert clustering_accuracy(labels, np.array([7, 7, -1, -1, 100])) == 1
    assert clustering_accuracy(labels, np.array([3, 3, 3, 3, 3])) == pytest.approx(2 / 5)
    assert clustering_accuracy(labels, np.arange(5)) == pytest.approx(3 / 5)


@pytest.mark.parametrize(
    ("labels", "clusters"), [([], []), ([0, 1], [0]), ([[0]], [[0]]), ([0], 0)]
)
def test_accuracy_refuses_what_does_not_fit(labels, clusters):
    with pytest.raises(InvalidInputError, match="expected labels"):
        clustering_accuracy(np.array(labels), np.array(clusters))


def test_recall_by_hand():
    scores = np.array([[0.9, 0.1, 0.5], [0.2, 0.3, 0.1], [0.1, 0.3, 0.2], [0.5, 0.5, 0.5]])
    targets = np.array([0, 0, 0, 1])
    assert ranks(scores, targets).tolist() == [0, 1, 2, 2]  # equal scores rank before the target
    assert recall_at(scores, targets) == {1: 1 / 4, 2: 2 / 4, 3: 1.0}
    assert recall_at(scores, targets, (10,)) == {10: 1.0}


@pytest.mark.parametrize("seed", range(4))
def test_recall_is_scikit_learns_top_k_accuracy(seed):
    rng = np.random.default_rng(seed)
    scores, targets = rng.standard_normal((50, 6)), rng.integers(0, 6, 50)
    for k, share in recall_at(scores, targets).items():
        theirs = sklearn_metrics.top_k_accuracy_score(targets, scores, k=k, labels=range(6))
        assert share == pytest.approx(theirs)


def test_recall_refuses_what_does_not_fit():
    scores = np.zeros((2, 3))
    for targets in ([0, 3], [-1, 0], [0], [0.0, 1.0]):
        with pytest.raises(InvalidInputError, match="target"):
            recall_at(scores, np.array(targets))
    with pytest.raises(InvalidInputError, match="NaN"):
        recall_at(np.array([[np.nan, 0.0]]), np.array([0]))
    with pytest.raises(InvalidInputError, match="k >= 1"):
        recall_at(scores, np.array([0, 0]), (0,))
    with pytest.raises(InvalidInputError, match="at least one query"):
        recall_at(np.zeros((0, 3)), np.zeros(0, np.int64))


def test_average_precision_by_hand():
    scores = np.array([[4.0, 3, 2, 1], [4, 3, 2, 1], [4, 3, 2, 1], [0, 0, 0, 0]])
    relevant = np.array([[1, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]], np.bool_)
    expected = [(1 + 2 / 3) / 2, 1 / 4, 0, 1 / 4]
    assert average_precision(scores, relevant) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(6))
def test_average_precision_is_scikit_learns_without_equal_scores(seed):
    rng = np.random.default_rng(seed)
    scores = rng.permuted(np.tile(np.arange(40.0), (9, 1)), axis=1)
    relevant = rng.random((9, 40)) < 0.2
    relevant[:, 0] = True
    theirs = [
        sklearn_metrics.average_precision_score(own, row)
        for own, row in zip(relevant, scores, strict=True)
    ]
    assert average_precision(scores, relevant) == pytest.approx(theirs)


def test_mean_average_precision_by_hand_and_in_blocks(monkeypatch):
    queries = np.array([[1, 0], [0, 1]], np.float32)
    candidates = np.array([[1, 0], [0.8, 0.6], [0.6, 0.8], [0, 1]], np.float32)
    value = mean_average_precision(queries, candidates, np.array([0, 1]), np.array([0, 1, 0, 1]))
    assert value == pytest.approx(((1 + 2 / 3) / 2 + (1 + 2 / 3) / 2) / 2)

    rng = np.random.default_rng(0)
    rows, others = rng.standard_normal((2, 30, 5)).astype(np.float32)
    values, theirs = rng.integers(0, 3, (2, 30))
    whole = mean_average_precision(rows, others, values, theirs)
    monkeypatch.setattr("crl_sdk.tasks._metrics._BLOCK", 64)  # two queries at a time
    assert mean_average_precision(rows, others, values, theirs) == pytest.approx(whole)


def test_mean_average_precision_refuses_what_does_not_fit():
    rows, values = np.zeros((2, 3), np.float32), np.zeros(2, np.int64)
    for given in (
        (rows, rows[:, :2], values, values),
        (rows, rows, values[:1], values),
        (rows[:0], rows, values[:0], values),
        (rows, rows[:0], values, values[:0]),
        (rows[0], rows, values, values),
    ):
        with pytest.raises(InvalidInputError, match="expected queries"):
            mean_average_precision(*given)
    with pytest.raises(InvalidInputError, match="NaN"):
        mean_average_precision(np.full((2, 3), np.nan, np.float32), rows, values, values)
