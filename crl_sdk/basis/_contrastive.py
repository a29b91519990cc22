"""Directions in which a criterion's texts vary more than other texts do.

All of it is one generalised eigenvalue problem: a *signal* covariance, of what should be kept,
against a *nuisance* covariance, of what should not. Oriented PCA (Diamantaras and Kung, 1996) and
contrastive PCA (Abid et al., arXiv 1709.06716) are the same problem; here the signal is in texts.
docs/PROJECTIONS.md says how the constants were chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from crl_sdk.basis._spectrum import principal_directions
from crl_sdk.projection._projection import EPSILON

Rows = NDArray[np.floating]

RIDGE = 10.0
"""Isotropic nuisance, relative to the mean eigenvalue of a covariance of trace 1."""

POWER = 0.3
"""Power of the eigenvalues that scales the directions: 0 weights all equally."""

SIBLINGS = 3
"""Number of nearest other texts of the criterion that decide how typical a text is."""

SIBLING_FLOOR = 0.1
"""Added to the cosine with the siblings. It bounds how little a text without siblings counts."""

MIN_TEXT_WEIGHT = 1e-3
"""Smallest weight of a text that equals one of another criterion, relative to the others."""

FULL_WEIGHT_IMAGES = 300
"""Number of unlabelled images from which their scatter has its full trace of 1. With fewer images
the trace is smaller in proportion."""

BETWEEN_CLASSES = 0.1
"""Weight of the scatter between labelled classes, relative to the texts' leading direction."""


def text_weights(
    texts: Rows, against: Sequence[Rows] = (), background: Rows | None = None
) -> NDArray[np.float64]:
    """Return how much each text of a criterion counts.

    A text counts more if other texts of the criterion are near it. Its weight is 0.1 plus its mean
    cosine with the nearest three, after the mean of the background is subtracted. It counts less if
    a text of another criterion is near. The weight is then multiplied by 1 minus the largest
    cosine, after the mean of all texts is subtracted. Negative cosines count as 0.

    Args:
        texts: Text embeddings of the criterion, shape (k, d), unit rows.
        against: Text embeddings of each other criterion, shape (j, d), unit rows.
        background: Embeddings of generic texts, shape (n, d), unit rows.

    Returns:
        Weights, shape (k,), positive, with a sum of 1. They are equal if neither `against` nor
        `background` is given.
    """
    weights = np.ones(len(texts))
    near = min(SIBLINGS, len(texts) - 1)
    if background is not None and near:
        unit = _unit_rows(texts - background.mean(axis=0))
        cosines = unit @ unit.T
        np.fill_diagonal(cosines, -np.inf)
        typical = np.maximum(np.sort(cosines, axis=1)[:, -near:].mean(axis=1), 0.0)
        weights = typical + SIBLING_FLOOR
    if against:
        others = np.concatenate(against)
        centre = np.concatenate([texts, others]).mean(axis=0)
        nearest = (_unit_rows(texts - centre) @ _unit_rows(others - centre).T).max(axis=1)
        weights = weights * np.maximum(1.0 - np.maximum(nearest, 0.0), MIN_TEXT_WEIGHT)
    return np.asarray(weights / weights.sum())


def contrastive_directions(
    texts: Rows, against: Sequence[Rows] = (), background: Rows | None = None
) -> Rows:
    """Return the map of the method `contrastive`, see `crl_sdk.basis._methods.contrastive`.

    Args:
        texts: Text embeddings of the criterion, shape (k, d), unit rows.
        against: Text embeddings of each other criterion, shape (j, d), unit rows.
        background: Embeddings of generic texts, shape (n, d), unit rows.

    Returns:
        Weight of shape (d, m), m < k.
    """
    weights = text_weights(texts, against, background)
    signal = np.sqrt(weights)[:, None] * (texts - weights @ texts)
    known = []
    if against:
        known.append(np.mean([scatter(each) for each in against], axis=0))
    if background is not None:
        known.append(scatter(background))
    nuisance = np.mean(known, axis=0) if known else np.zeros((texts.shape[1],) * 2)
    return leading_directions(signal, nuisance)


def sharpened_directions(
    weight: Rows,
    images: Rows,
    clusters: NDArray[np.integer],
    *,
    labelled: bool,
    within_span: bool = False,
) -> Rows:
    """Return a contrastive map again, with the variation within clusters of images as nuisance.

    The signal is the map's own: its direction i counts with its eigenvalue. Clusters that are
    labels also add to the signal: the scatter between the classes, less what chance gives.

    Args:
        weight: Weight of a contrastive map, shape (d, m).
        images: Universal embeddings, shape (n, d), unit rows.
        clusters: Cluster or class of each image, shape (n,).
        labelled: Whether the clusters are labels.
        within_span: Whether the new columns stay in the span of the old ones, so that directions
            that were removed from the map stay removed.

    Returns:
        Weight of shape (d, m'), m' <= m for unlabelled images.
    """
    if within_span:
        span = np.linalg.qr(weight)[0]
        inner = sharpened_directions(span.T @ weight, images @ span, clusters, labelled=labelled)
        return np.asarray(span @ inner)
    lengths = np.maximum(np.linalg.norm(weight, axis=0), EPSILON)
    # a column has the length e^POWER, so that this is sqrt(e) times its direction:
    signal = (weight / lengths * lengths ** (0.5 / POWER)).T
    _, index, sizes = np.unique(clusters, return_inverse=True, return_counts=True)
    index = index.reshape(-1)
    sums = np.zeros((len(sizes), images.shape[1]))
    np.add.at(sums, index, images)
    means = sums / sizes[:, None]
    within = images - means[index]
    share = 1.0
    if labelled:
        signal = np.concatenate([signal, _between(means, sizes, within)])
    else:
        share = min(1.0, len(images) / FULL_WEIGHT_IMAGES)
    total = max(float(np.square(within).sum()), EPSILON)
    return leading_directions(signal, share * (within.T @ within) / total)


def leading_directions(signal: Rows, nuisance: Rows) -> Rows:
    """Return generalised eigenvectors of the signal against nuisance and ridge.

    Args:
        signal: Rows F of the signal covariance F'F, shape (r, d).
        nuisance: Nuisance covariance, shape (d, d), of trace 1 or so.

    Returns:
        Orthogonal columns in descending order of their eigenvalues e, shape (d, m), m <= r. Column
        i has the length (e_i / e_1)^POWER.
    """
    dim = signal.shape[1]
    root = np.linalg.cholesky(nuisance + RIDGE / dim * np.eye(dim))
    directions, values = principal_directions(np.linalg.solve(root, signal.T).T, centre=False)
    solved = np.linalg.solve(root.T, directions.T)
    basis, triangle = np.linalg.qr(solved / np.linalg.norm(solved, axis=0))
    signs = np.where(np.diag(triangle) < 0, -1.0, 1.0)
    lengths = (values / max(float(values[0]), EPSILON)) ** (2.0 * POWER)
    return np.asarray(basis * signs * lengths)


def scatter(rows: Rows) -> Rows:
    """Return the covariance (d, d) of rows (k, d), scaled to trace 1; zeros if all are equal."""
    moved = np.asarray(rows, np.float64) - rows.mean(axis=0, dtype=np.float64)
    return np.asarray(moved.T @ moved / max(float(np.square(moved).sum()), EPSILON))


def _between(means: Rows, sizes: NDArray[np.integer], within: Rows) -> Rows:
    """Return rows of the scatter between classes, less the part that sampling causes."""
    total, classes = int(sizes.sum()), len(sizes)
    moved = np.sqrt(sizes / total)[:, None] * (means - (sizes @ means) / total)
    raw = moved.T @ moved
    spread = within.T @ within / max(total - classes, 1)
    values, vectors = np.linalg.eigh(raw - spread * (classes / total))
    kept = values > 0
    scale = BETWEEN_CLASSES / max(float(np.trace(raw)), EPSILON)
    return np.asarray((vectors[:, kept] * np.sqrt(values[kept] * scale)).T)


def _unit_rows(rows: Rows) -> Rows:
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), EPSILON))
