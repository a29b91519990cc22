"""The paper's protocol on DeepFashion: cosines in each attribute's space, mean average precision.

Without its training: the paper also fits a layer, then the encoder, to these spaces.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from crl_sdk.errors import InvalidInputError
from crl_sdk.evaluation._figures import Figure
from crl_sdk.projection._projection import check_embeddings, normalise_rows
from crl_sdk.tasks._metrics import mean_average_precision

PAPER_COMPONENTS = 97
"""The number of texts of the authors' shortest list, to which they reduce the others."""


def reduced(text_embeddings: NDArray[np.float32], components: int) -> NDArray[np.float32]:
    """Reduce a basis by principal components, as the authors' `text_embedding.py`.

    The d coordinates are what PCA takes for samples and the k texts for their features, each text's
    mean coordinate being subtracted; what comes out is a new basis of `components` rows. A basis
    that is no larger is left as it is. (scikit-learn's PCA may take a randomised solver here; this
    is the exact one.)

    Args:
        text_embeddings: (k, d) float32, unit rows.
        components: how many rows to keep, at least 1.

    Returns:
        (min(k, components), d) float32; reduced rows have no unit length.

    Raises:
        InvalidInputError: components is below 1 or above d, or NaN.
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


def attribute_map(
    queries: NDArray[np.float32],
    candidates: NDArray[np.float32],
    query_values: NDArray[np.integer],
    candidate_values: NDArray[np.integer],
) -> Figure:
    """Search the candidates of one attribute by cosine.

    Args:
        queries: (q, m) float: R = I·Tᵀ with a reduced T, or universal embeddings.
        candidates: (c, m) likewise.
        query_values: (q,) integers.
        candidate_values: (c,) integers; a candidate of the query's value is what is wanted.

    Returns:
        Mean average precision over all candidates.

    Raises:
        InvalidInputError: shapes do not fit, there are no rows, or NaN.
    """
    width = int(np.shape(queries)[-1])
    left = normalise_rows(check_embeddings(queries, width), "l2")
    right = normalise_rows(check_embeddings(candidates, width), "l2")
    return Figure(mean_average_precision(left, right, query_values, candidate_values))


def overall(figures: Mapping[str, Figure], queries: Mapping[str, int]) -> dict[str, Figure]:
    """Give both means over attributes.

    Args:
        figures: attribute → its mAP.
        queries: attribute → how many queries it has.

    Returns:
        `all queries`, in which each query counts the same, as in the authors' code; and
        `mean of attributes`, in which each attribute does.
    """
    means = [figures[name].mean for name in figures]
    counts = [queries[name] for name in figures]
    return {
        "all queries": Figure(float(np.average(means, weights=counts))),
        "mean of attributes": Figure(float(np.mean(means))),
    }
