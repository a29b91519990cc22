"""The paper's protocol on GeneCIS: ten times the scene's similarity plus the condition's.

To the letter of the authors' `eval_functions.py`: both similarities are first divided by their norm
over the gallery, so that what each weighs depends on the other pictures in it. `normalise=False`
leaves that out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from crl_sdk.errors import InvalidInputError
from crl_sdk.evaluation._figures import Figure
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
"""How much the picture's similarity and the condition's count; the first is the paper's."""


def gallery_scores(
    reference: NDArray[np.float32],
    gallery: NDArray[np.float32],
    condition: NDArray[np.float32],
    *,
    weights: tuple[float, float] = (PAPER_WEIGHT, 1.0),
    normalise: bool = True,
) -> NDArray[np.float32]:
    """Score the pictures of a gallery.

    Args:
        reference: (m,) of the query picture: R = I·Tᵀ, or its universal embedding.
        gallery: (g, m) of the pictures, likewise.
        condition: (g,) mean cosine of each picture with the condition's captions.
        weights: of the pictures' similarity and of the condition's.
        normalise: divide each similarity by its norm over the gallery first.

    Returns:
        (g,) float32, higher is better.

    Raises:
        InvalidInputError: shapes do not fit, or NaN.
    """
    rows = check_embeddings(gallery, int(np.shape(reference)[-1]))
    if np.shape(condition) != (len(rows),) or not np.isfinite(condition).all():
        raise InvalidInputError(
            f"expected a finite similarity with the condition for each of {len(rows)} pictures, "
            f"got {np.shape(condition)}"
        )
    one = check_embeddings(np.reshape(reference, (1, -1)), rows.shape[1])
    similar = normalise_rows(rows, "l2") @ normalise_rows(one, "l2")[0]
    if normalise:
        similar = similar / max(float(np.linalg.norm(similar)), EPSILON)
        condition = condition / max(float(np.linalg.norm(condition)), EPSILON)
    return np.asarray(weights[0] * similar + weights[1] * condition, np.float32)


def recalls(scores: Sequence[NDArray[np.float32]], top: Sequence[int] = TOP) -> dict[str, Figure]:
    """Give R@k over queries whose target is the first of its gallery.

    Args:
        scores: for each query (g,) float32; galleries may differ in size.
        top: the k.

    Returns:
        `R@k` → the share of queries whose target is among the k best. A picture that scores as the
        target does counts as better.

    Raises:
        InvalidInputError: there is no query, or a score is NaN.
    """
    if not scores:
        raise InvalidInputError("expected at least one query, got none")
    places = np.array([ranks(row[None, :], np.zeros(1, np.int64))[0] for row in scores])
    return {f"R@{k}": Figure(float((places < k).mean())) for k in top}
