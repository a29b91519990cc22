"""The paper's clustering protocol: k-means with the true k, twenty seeds, three measures."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from crl_sdk.errors import InvalidInputError, MissingDependencyError
from crl_sdk.evaluation._figures import Figure, check_labelled
from crl_sdk.projection._projection import normalise_rows
from crl_sdk.tasks._metrics import clustering_accuracy

SEEDS = tuple(range(20))
MEASURES = ("ACC", "NMI", "ARI")


def clustering(
    rows: NDArray[np.floating], labels: NDArray[np.integer], seeds: Sequence[int] = SEEDS
) -> dict[str, Figure]:
    """Cluster with k-means and compare with the labels.

    As the authors' `sim_embedding.py`: rows are brought to unit length, k is the number of labels,
    `n_init="auto"` (one start by k-means++), seeds 0-19; the mean over the seeds is what the paper
    prints.

    Args:
        rows: (n, m) float: R = I·Tᵀ, or universal embeddings.
        labels: (n,) integers.
        seeds: of k-means.

    Returns:
        `ACC` under the best one-to-one assignment, `NMI` (arithmetic mean) and `ARI`.

    Raises:
        InvalidInputError: shapes do not fit, NaN, one class only, or more classes than rows differ.
        MissingDependencyError: scikit-learn is not installed.
    """
    try:
        from sklearn.cluster import KMeans
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
    except ImportError as error:
        raise MissingDependencyError("scikit-learn", "tasks", "clustering") from error

    inputs, codes = check_labelled(rows, labels)
    if not seeds:
        raise InvalidInputError("expected at least one seed of k-means, got none")
    unit = normalise_rows(inputs, "l2")
    k = len(np.unique(codes))
    scores: dict[str, list[float]] = {name: [] for name in MEASURES}
    for seed in seeds:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # equal rows: fewer clusters
            found = KMeans(k, n_init="auto", random_state=seed).fit_predict(unit)
        scores["ACC"].append(clustering_accuracy(codes, found))
        scores["NMI"].append(float(normalized_mutual_info_score(codes, found)))
        scores["ARI"].append(float(adjusted_rand_score(codes, found)))
    return {name: Figure.of(runs) for name, runs in scores.items()}
