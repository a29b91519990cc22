"""Names for clusters: the texts of a basis that set each of them apart from the other pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crl_sdk.basis._basis import Basis
from crl_sdk.basis._methods import TEXT_COLUMNS
from crl_sdk.errors import InvalidInputError
from crl_sdk.projection._projection import check_embeddings

LEAST_STRENGTH = 1.0
"""Standard deviations by which a text has to set a cluster apart, or it does not name it."""

_FLAT = 1e-6  # standard deviation of a score that is the same for all pictures but for rounding


@dataclass(frozen=True, slots=True)
class Name:
    """What a cluster is called.

    Attributes:
        text: its texts, separated by commas, or `none fits` if `fits` is false; with a number if
            another cluster has the same.
        texts: those that set it apart, the strongest first; more than one only where a cluster
            before needs as many to be told from it.
        strengths: of each text, how many standard deviations the mean of its score is higher in
            the cluster than outside; 0 where there is no outside.
        fits: whether the first sets it apart by `LEAST_STRENGTH` or more; true where there is no
            outside. If not, the texts may lack the word for what its pictures share.
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
    """Score pictures by the texts of a basis, however its projection was made.

    Args:
        basis: of k texts.
        universal: (n, d) float, unit rows; their cosines with the texts are the scores.
        rows: conditional embeddings (n, m) float, used if `universal` is None and they have one
            column for each text.

    Returns:
        (n, k) float32.

    Raises:
        InvalidInputError: shapes do not fit; or only rows are given whose columns are not texts.
    """
    if universal is not None:
        checked = check_embeddings(universal, basis.projection.input_dim)
        return np.asarray(checked @ basis.text_embeddings.T)
    if rows is None or basis.method not in TEXT_COLUMNS:
        raise InvalidInputError(
            f"basis {basis.criterion!r} was made by the method {basis.method!r}, whose columns are "
            "not its texts: pass universal=, the universal embeddings (n, d), to name clusters"
        )
    return check_embeddings(rows, len(basis.texts))


def name_clusters(
    labels: NDArray[np.int64], scores: NDArray[np.float32], texts: Sequence[str]
) -> list[Name]:
    """Name each cluster by the text whose standardised score is highest in it against outside.

    Each text's scores are centred over the pictures and divided by their standard deviation, so
    that what all pictures share (the modality gap, a text that is near everything) does not count.
    Clusters that would be called the same get the next text of each, until they differ; if they
    have all texts in the same order, a number. So do those that no text fits.

    Args:
        labels: each picture's cluster (n,) int64, 0 to c - 1, none of them empty.
        scores: (n, k) float32, from `text_scores`.
        texts: the k texts.

    Returns:
        c names.
    """
    apart = set_apart(labels, scores)
    ranked = np.argsort(-apart, axis=1, kind="stable")
    if len(apart) == 1:  # no outside: the texts nearest to the pictures, as far as that goes
        ranked = np.argsort(-scores.mean(axis=0, dtype=np.float64), kind="stable")[None]
    fits = (apart.max(axis=1) >= LEAST_STRENGTH) | (len(apart) == 1)
    lengths = np.ones(len(apart), np.int64)
    while True:
        chosen = [row[:length] for row, length in zip(ranked, lengths, strict=True)]
        names = [
            ", ".join(texts[i] for i in row) if fit else "none fits"
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
            Name(
                text=f"{name} ({seen[name]})" if times[name] > 1 else name,
                texts=tuple(texts[i] for i in row),
                strengths=tuple(float(apart[cluster, i]) for i in row),
                fits=bool(fits[cluster]),
            )
        )
    return found


def set_apart(labels: NDArray[np.int64], scores: NDArray[np.float32]) -> NDArray[np.float64]:
    """Tell how far each text's score is higher in each cluster than outside.

    Args:
        labels: each picture's cluster (n,) int64, 0 to c - 1, none of them empty.
        scores: (n, k) float32.

    Returns:
        (c, k) float64, in standard deviations of the text's score over all pictures; 0 for a text
        whose score is the same everywhere, and for a cluster of all pictures.
    """
    n, sizes = len(labels), np.bincount(labels)
    apart = np.zeros((len(sizes), scores.shape[1]))
    for text, column in enumerate(scores.T):
        centred = column - column.mean(dtype=np.float64)
        spread = float(np.sqrt(np.square(centred).mean()))
        if spread < _FLAT:
            continue
        sums = np.bincount(labels, weights=centred)
        inside, outside = sums / sizes, (sums.sum() - sums) / np.maximum(n - sizes, 1)
        apart[:, text] = np.where(sizes < n, inside - outside, 0.0) / spread
    return apart
