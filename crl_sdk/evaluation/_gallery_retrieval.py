"""Protocol of the paper on GeneCIS: score = 10 * scene similarity + condition similarity.

As in the authors' `eval_functions.py`, both similarities are first divided by their norm over the
gallery. The effective weights therefore depend on the other images of the gallery.
`normalise=False` leaves the division out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from crl_sdk.errors import InvalidInputError
from crl_sdk.evaluation._mean_std import MeanStd
from crl_sdk.projection._projection import EPSILON, check_embeddings, normalise_rows
from crl_sdk.tasks._metrics import ranks
from crl_sdk.tasks._retrieval import PAPER_WEIGHT

TOP = (1, 2, 3)

MODES: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "scene and condition": (PAPER_WEIGHT, 1.0),
        "scene alone": (1.0, 0.0),
        "condition alone": (0.0, 1.0),
    }
)
"""Weights of scene similarity and condition similarity. The first mode is the paper's."""


def gallery_scores(
    reference: NDArray[np.float32],
    gallery: NDArray[np.float32],
    condition: NDArray[np.float32],
    *,
    weights: tuple[float, float] = (PAPER_WEIGHT, 1.0),
    normalise: bool = True,
) -> NDArray[np.float32]:
    """Score the images of a gallery.

    Args:
        reference: Row of the reference image, R = I·Tᵀ or its universal embedding, shape (m,).
        gallery: Rows of the gallery images, made in the same way, shape (g, m).
        condition: Mean cosine of each image with the captions of the condition, shape (g,).
        weights: Weights of the scene similarity and of the condition similarity.
        normalise: Whether to divide each similarity by its norm over the gallery first.

    Returns:
        Scores, shape (g,), float32. Higher is better.

    Raises:
        InvalidInputError: If the shapes do not match or a value is NaN.
    """
    rows = check_embeddings(gallery, int(np.shape(reference)[-1]))
    if np.shape(condition) != (len(rows),) or not np.isfinite(condition).all():
        raise InvalidInputError(
            f"expected a finite similarity with the condition for each of {len(rows)} images, "
            f"got {np.shape(condition)}"
        )
    one = check_embeddings(np.reshape(reference, (1, -1)), rows.shape[1])
    similar = normalise_rows(rows, "l2") @ normalise_rows(one, "l2")[0]
    if normalise:
        similar = similar / max(float(np.linalg.norm(similar)), EPSILON)
        condition = condition / max(float(np.linalg.norm(condition)), EPSILON)
    return np.asarray(weights[0] * similar + weights[1] * condition, np.float32)


def recalls(scores: Sequence[NDArray[np.float32]], top: Sequence[int] = TOP) -> dict[str, MeanStd]:
    """Return the recall at k of queries whose target is the first image of its gallery.

    Args:
        scores: Scores of each query's gallery, shape (g,), float32. Galleries may differ in size.
        top: Values of k.

    Returns:
        Share of queries whose target is among the k best, for each `R@k`. An image with the same
        score as the target counts as better.

    Raises:
        InvalidInputError: If there is no query or a score is NaN.
    """
    if not scores:
        raise InvalidInputError("expected at least one query, got none")
    places = np.array([ranks(row[None, :], np.zeros(1, np.int64))[0] for row in scores])
    return {f"R@{k}": MeanStd(float((places < k).mean())) for k in top}
