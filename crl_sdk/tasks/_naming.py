"""Name clusters by the texts of a basis that tell each cluster from the other images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crl_sdk.basis._basis import Basis
from crl_sdk.basis._methods import known_method
from crl_sdk.errors import InvalidInputError
from crl_sdk.projection._projection import check_embeddings

MIN_STRENGTH = 1.0
"""Smallest strength, in standard deviations, of a text that may name a cluster."""

NO_TEXT = "no matching text"
"""Name of a cluster that no text of the basis describes."""

_FLAT = 1e-6  # standard deviation of a score that differs between images by rounding only


@dataclass(frozen=True, slots=True)
class ClusterName:
    """Name of a cluster.

    Attributes:
        text: Texts of the cluster, separated by commas, or `no matching text` if `fits` is false.
            A number is added if another cluster has the same name.
        texts: Texts that describe the cluster, strongest first. Usually one; more are added until
            the clusters have different names.
        strengths: Strength of each text: its mean score inside the cluster minus its mean score
            outside, in standard deviations. 0 if the cluster holds all images.
        fits: Whether the first text has a strength of at least 1. True if the cluster holds all
            images. If false, the basis may lack a text for what the images have in common.
    """

    text: str
    texts: tuple[str, ...]
    strengths: tuple[float, ...]
    fits: bool = True


def text_scores(
    basis: Basis,
    *,
    universal: NDArray[Any] | None = None,
    rows: NDArray[Any] | None = None,
) -> NDArray[np.float32]:
    """Return the score of each image for each text of a basis.

    Args:
        basis: Basis with k texts, made by any method.
        universal: Universal embeddings, shape (n, d), of a float dtype, unit rows. Their cosines
            with the text embeddings are the scores.
        rows: Conditional embeddings, shape (n, m), of a float dtype. They are used if `universal`
            is None and the method of the basis has one column per text.

    Returns:
        Scores, shape (n, k), float32.

    Raises:
        InvalidInputError: If the shapes do not match, or if `universal` is needed.
    """
    if universal is not None:
        checked = check_embeddings(universal, basis.projection.input_dim)
        return np.asarray(checked @ basis.text_embeddings.T)
    record = known_method(basis.method)
    if rows is None or record is None or not record.columns_are_texts:
        raise InvalidInputError(
            f"basis {basis.criterion!r} was made by the method {basis.method!r}, whose columns are "
            "not its texts: pass universal=, the universal embeddings (n, d), to name clusters"
        )
    return check_embeddings(rows, len(basis.texts))


def name_clusters(
    labels: NDArray[np.int64], scores: NDArray[np.float32], texts: Sequence[str]
) -> list[ClusterName]:
    """Name each cluster by the text that tells it best from the other images.

    The scores of each text are centred over all images and divided by their standard deviation.
    What all images have in common (the modality gap, a text that is near every image) therefore
    does not count. If several clusters have the same name, the next text of each is added until
    the names differ. If that is not possible, a number is added. Clusters without a matching text
    get a number too.

    Args:
        labels: Cluster of each image, shape (n,), int64, 0 to c - 1. No cluster is empty.
        scores: Scores from `text_scores`, shape (n, k), float32.
        texts: The k texts.

    Returns:
        The c names.
    """
    strengths = text_strengths(labels, scores)
    ranked = np.argsort(-strengths, axis=1, kind="stable")
    if len(strengths) == 1:  # no other images to compare with: take the nearest texts
        ranked = np.argsort(-scores.mean(axis=0, dtype=np.float64), kind="stable")[None]
    fits = (strengths.max(axis=1) >= MIN_STRENGTH) | (len(strengths) == 1)
    lengths = np.ones(len(strengths), np.int64)
    while True:
        chosen = [row[:length] for row, length in zip(ranked, lengths, strict=True)]
        names = [
            ", ".join(texts[i] for i in row) if fit else NO_TEXT
            for row, fit in zip(chosen, fits, strict=True)
        ]
        times = Counter(names)
        again = [i for i in np.flatnonzero(fits) if times[names[i]] > 1 and lengths[i] < len(texts)]
        if not again:
            break
        lengths[again] += 1
    seen: Counter[str] = Counter()
    found = []
    for cluster, (name, row) in enumerate(zip(names, chosen, strict=True)):
        seen[name] += 1
        found.append(
            ClusterName(
                text=f"{name} ({seen[name]})" if times[name] > 1 else name,
                texts=tuple(texts[i] for i in row),
                strengths=tuple(float(strengths[cluster, i]) for i in row),
                fits=bool(fits[cluster]),
            )
        )
    return found


def text_strengths(labels: NDArray[np.int64], scores: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the strength of each text in each cluster.

    strength = (mean score inside the cluster - mean score outside) / standard deviation of the
    score over all images.

    Args:
        labels: Cluster of each image, shape (n,), int64, 0 to c - 1. No cluster is empty.
        scores: Score of each image for each text, shape (n, k), float32.

    Returns:
        Strengths, shape (c, k), float64. 0 for a text whose score is the same for all images, and
        for a cluster that holds all images.
    """
    n, sizes = len(labels), np.bincount(labels)
    strengths = np.zeros((len(sizes), scores.shape[1]))
    for text, column in enumerate(scores.T):
        centred = column - column.mean(dtype=np.float64)
        spread = float(np.sqrt(np.square(centred).mean()))
        if spread < _FLAT:
            continue
        sums = np.bincount(labels, weights=centred)
        inside, outside = sums / sizes, (sums.sum() - sums) / np.maximum(n - sizes, 1)
        strengths[:, text] = np.where(sizes < n, inside - outside, 0.0) / spread
    return strengths
