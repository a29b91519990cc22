"""Clustering protocol of the paper: k-means with the true k, twenty seeds, three measures."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from crl_sdk.errors import InvalidInputError, MissingDependencyError
from crl_sdk.evaluation._check_labels import check_labels
from crl_sdk.evaluation._mean_std import MeanStd
from crl_sdk.projection._projection import normalise_rows
from crl_sdk.tasks._metrics import clustering_accuracy

SEEDS = tuple(range(20))
MEASURES = ("ACC", "NMI", "ARI")


def clustering(
    rows: NDArray[np.floating], labels: NDArray[np.integer], seeds: Sequence[int] = SEEDS
) -> dict[str, MeanStd]:
    """Cluster rows with k-means and compare the clusters with the labels.

    The protocol is that of the authors' `sim_embedding.py`. Rows are scaled to unit length, k is
    the number of classes, and k-means runs with `n_init="auto"` (one start by k-means++) and the
    seeds 0 to 19. The paper reports the mean over the seeds.

    Args:
        rows: Conditional rows R = I·Tᵀ or universal embeddings, shape (n, m), of a float dtype.
        labels: Label of each row, shape (n,), integers.
        seeds: Seeds of k-means.

    Returns:
        `ACC` under the best one-to-one assignment, `NMI` (arithmetic mean) and `ARI`.

    Raises:
        InvalidInputError: If the shapes do not match, a value is NaN, there is only one class, or
            there are more classes than distinct rows.
        MissingDependencyError: If scikit-learn is not installed.
    """
    runs = clustering_runs(rows, labels, seeds)
    return {name: MeanStd.of(scores) for name, scores in runs.items()}


def clustering_runs(
    rows: NDArray[np.floating], labels: NDArray[np.integer], seeds: Sequence[int] = SEEDS
) -> dict[str, list[float]]:
    """Return the scores of `clustering` for each seed, in the order of the seeds."""
    try:
        from sklearn.cluster import KMeans
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
    except ImportError as error:
        raise MissingDependencyError("scikit-learn", "tasks", "clustering") from error

    inputs, codes = check_labels(rows, labels)
    if not seeds:
        raise InvalidInputError("expected at least one seed of k-means, got none")
    unit = normalise_rows(inputs, "l2")
    k = len(np.unique(codes))
    scores: dict[str, list[float]] = {name: [] for name in MEASURES}
    for seed in seeds:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # equal rows give fewer clusters
            found = KMeans(k, n_init="auto", random_state=seed).fit_predict(unit)
        scores["ACC"].append(clustering_accuracy(codes, found))
        scores["NMI"].append(float(normalized_mutual_info_score(codes, found)))
        scores["ARI"].append(float(adjusted_rand_score(codes, found)))
    return scores
