"""Protocol of the paper on DeepFashion: search by cosine for each attribute, and its mAP.

The paper also trains a layer and then the encoder on these embeddings. That is not done here.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from crl_sdk.errors import InvalidInputError
from crl_sdk.evaluation._mean_std import MeanStd
from crl_sdk.projection._projection import check_embeddings, normalise_rows
from crl_sdk.tasks._metrics import mean_average_precision

PAPER_COMPONENTS = 97
"""Number of texts in the authors' shortest list. They reduce the other lists to this size."""


def reduce_texts(text_embeddings: NDArray[np.float32], components: int) -> NDArray[np.float32]:
    """Reduce text embeddings to principal components, as the authors' `text_embedding.py` does.

    The PCA takes the d coordinates as samples and the k texts as features. The mean over the
    coordinates of each text is subtracted. The result is a new basis with `components` rows. A
    basis that is not larger than that is returned unchanged. scikit-learn's PCA may use a
    randomised solver here, so the exact decomposition is computed instead.

    Args:
        text_embeddings: Text embeddings, shape (k, d), float32, unit rows.
        components: Number of rows to keep, 1 to d.

    Returns:
        Reduced rows, shape (min(k, components), d), float32. They do not have unit length if they
        were reduced.

    Raises:
        InvalidInputError: If `components` is out of range or a value is NaN.
    """
    texts = check_embeddings(text_embeddings, int(np.shape(text_embeddings)[-1]))
    k, d = texts.shape
    if not 1 <= components <= d:
        raise InvalidInputError(f"expected 1 to {d} components, got {components}")
    if k <= components:
        return texts
    samples = texts.T.astype(np.float64)
    samples -= samples.mean(axis=0)
    left, values, _ = np.linalg.svd(samples, full_matrices=False)
    return np.ascontiguousarray((left[:, :components] * values[:components]).T, np.float32)


def search_attribute(
    queries: NDArray[np.float32],
    candidates: NDArray[np.float32],
    query_values: NDArray[np.integer],
    candidate_values: NDArray[np.integer],
) -> MeanStd:
    """Search the candidates of one attribute by cosine.

    A candidate is relevant if its value equals that of the query.

    Args:
        queries: Rows R = I·Tᵀ with a reduced T, or universal embeddings, of the queries, shape
            (q, m), of a float dtype.
        candidates: Rows of the candidates, made in the same way, shape (c, m), of a float dtype.
        query_values: Value of each query, shape (q,), integers.
        candidate_values: Value of each candidate, shape (c,), integers.

    Returns:
        Mean average precision over all candidates.

    Raises:
        InvalidInputError: If the shapes do not match, there are no rows, or a value is NaN.
    """
    width = int(np.shape(queries)[-1])
    left = normalise_rows(check_embeddings(queries, width), "l2")
    right = normalise_rows(check_embeddings(candidates, width), "l2")
    return MeanStd(mean_average_precision(left, right, query_values, candidate_values))


def average_over_attributes(
    scores: Mapping[str, MeanStd], queries: Mapping[str, int]
) -> dict[str, MeanStd]:
    """Return two averages of the scores of all attributes.

    Args:
        scores: Mean average precision of each attribute.
        queries: Number of queries of each attribute.

    Returns:
        `all queries`, in which each query has the same weight, as in the authors' code; and
        `mean of attributes`, in which each attribute has the same weight.
    """
    means = [scores[name].mean for name in scores]
    counts = [queries[name] for name in scores]
    return {
        "all queries": MeanStd(float(np.average(means, weights=counts))),
        "mean of attributes": MeanStd(float(np.mean(means))),
    }
