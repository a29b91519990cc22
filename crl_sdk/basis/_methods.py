"""Projection methods: how the texts of a criterion become an affine map.

Each method is one function and one `ProjectionMethod` record in `PROJECTION_METHODS`. Everything
else that depends on the method (defaults, checks, help texts) is read from its record. All methods
give `embedding @ weight + bias`, so the server, the graphs and the kernels need not know which one
made a basis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from crl_sdk.basis._spectrum import bend, principal_directions
from crl_sdk.errors import InvalidInputError
from crl_sdk.projection._projection import EPSILON, Post, Projection, check_embeddings

Method: TypeAlias = Literal[
    "cosine", "centred", "orthogonal", "pca", "tangent",
    "exclusive", "exclusive-orthogonal", "exclusive-weighted", "contrastive",
]  # fmt: skip
"""Name of a projection method. A test compares it with `PROJECTION_METHODS`."""

Rows: TypeAlias = NDArray[np.floating]

_RIDGE = 10.0
"""Ridge of `contrastive`, relative to the mean eigenvalue of the background."""

_MIN_TEXT_WEIGHT = 1e-3
"""Smallest weight of a text in `contrastive`, so that some are left if all belong elsewhere."""


@dataclass(frozen=True, slots=True)
class MethodInputs:
    """What a method may use.

    Attributes:
        texts: Text embeddings of the criterion, shape (k, d), float32, unit rows.
        against: Text embeddings of each other criterion, shape (j, d), float32, unit rows.
        image_mean: Mean embedding of typical images, shape (d,); None if no images were given.
    """

    texts: Rows
    against: tuple[Rows, ...] = ()
    image_mean: Rows | None = None


@dataclass(frozen=True, slots=True)
class ProjectionMethod:
    """One way to make the affine map of a criterion from its texts.

    Attributes:
        name: Name of the method, as in `method="centred"`.
        function: Function that returns the weight, shape (d, m), and the origin, shape (d,). The
            map is `(embedding - origin) @ weight`.
        columns: What the columns of the map are, in words.
        source: Where the method comes from.
        min_texts: Smallest number of distinct texts.
        needs_against: Whether the method needs the texts of other criteria.
        takes_reference: Whether the method accepts embeddings of typical images.
        columns_are_texts: Whether the map has one column for each text, in the order of the texts.
        weights_texts: Whether the columns are texts of different weights, which users may want to
            see.
        default: Whether this is the default among the methods with the same `needs_against`.
    """

    name: Method
    function: Callable[[MethodInputs], tuple[Rows, Rows]]
    columns: str
    source: str
    min_texts: int = 2
    needs_against: bool = False
    takes_reference: bool = True
    columns_are_texts: bool = False
    weights_texts: bool = False
    default: bool = False


def find_method(name: str) -> ProjectionMethod:
    """Return the record of a method.

    Raises:
        InvalidInputError: If there is no method of this name.
    """
    for method in PROJECTION_METHODS:
        if method.name == name:
            return method
    raise InvalidInputError(f"expected a method in {METHODS}, got {name!r}")


def default_method(*, against: bool) -> Method:
    """Return the method that is used if none is named.

    Args:
        against: Whether other criteria are given.
    """
    return next(
        method.name
        for method in PROJECTION_METHODS
        if method.default and method.needs_against == against
    )


def check_method(name: str, *, against: int, reference: bool) -> ProjectionMethod:
    """Return the record of a method, if the method fits what is given.

    Args:
        name: Name of the method.
        against: Number of other criteria.
        reference: Whether embeddings of typical images are given.

    Raises:
        InvalidInputError: If there is no such method, or it does not fit.
    """
    method = find_method(name)
    if method.needs_against != (against > 0):
        if method.needs_against:
            raise InvalidInputError(
                f"the method {name!r} needs other criteria: pass them as against"
            )
        with_against = ", ".join(repr(m.name) for m in PROJECTION_METHODS if m.needs_against)
        raise InvalidInputError(
            f"the method {name!r} takes no other criteria: leave out against, or use one of the "
            f"methods {with_against}"
        )
    if reference and not method.takes_reference:
        raise InvalidInputError(
            f"the method {name!r} takes no reference embeddings; use "
            f"{default_method(against=method.needs_against)!r}"
        )
    return method


def make_projection(
    text_embeddings: NDArray[np.floating],
    method: Method = "centred",
    *,
    post: Post = "l2",
    reference: NDArray[np.floating] | None = None,
    against: Sequence[NDArray[np.floating]] = (),
) -> Projection:
    """Make the affine map of a criterion from its text embeddings.

    Args:
        text_embeddings: Text embeddings of the criterion, shape (k, d), unit rows.
        method: Name of the projection method, one of `METHODS`.
        post: Row normalisation of the conditional embedding.
        reference: Embeddings of typical images, shape (n, d), unit rows. Their mean is subtracted
            from every image; `tangent` rotates it onto the mean of the texts instead.
        against: Text embeddings of other criteria, each of shape (j, d). Required by the methods
            with `needs_against`, refused by the others.

    Returns:
        The projection from d to m dimensions.

    Raises:
        InvalidInputError: If the method is unknown, there are too few texts, a shape is wrong, or
            `reference` or `against` does not fit the method.
    """
    record = check_method(method, against=len(against), reference=reference is not None)
    k, d = np.shape(text_embeddings)
    if k < record.min_texts:
        enough = " or ".join(repr(m.name) for m in PROJECTION_METHODS if m.min_texts <= k)
        raise InvalidInputError(
            f"the method {method!r} needs at least {record.min_texts} distinct texts, got "
            f"{k}: add texts" + (f", or use the method {enough}" if enough else "")
        )
    inputs = MethodInputs(
        check_embeddings(text_embeddings, d),
        tuple(check_embeddings(each, d) for each in against),
        None if reference is None else _image_mean(reference, d),
    )
    weight, origin = record.function(inputs)
    bias = 0.0 - origin @ weight
    return Projection(
        np.ascontiguousarray(weight, np.float32), np.ascontiguousarray(bias, np.float32), post
    )


def cosine(inputs: MethodInputs) -> tuple[Rows, Rows]:
    """Cosines with the texts T: weight = T'.

    Source: Conditional Representation Learning, arXiv 2510.04564.
    """
    return inputs.texts.T, np.zeros(inputs.texts.shape[1])


def centred(inputs: MethodInputs) -> tuple[Rows, Rows]:
    """Cosines with the texts T after their mean is subtracted: weight = (T - mean T)'.

    This removes what all texts have in common, which is mostly the distance between texts and
    images. The result is `cosine` minus the mean of each row, so the texts of an image keep their
    order.
    """
    return (inputs.texts - inputs.texts.mean(axis=0)).T, _origin(inputs)


def orthogonal(inputs: MethodInputs) -> tuple[Rows, Rows]:
    """Coordinates along the leading singular vectors of the centred texts, equally weighted.

    `bend` chooses how many vectors are kept. Source: adaptive orthogonal basis of OD-CRL, arXiv
    2602.05464.
    """
    directions, values = principal_directions(inputs.texts)
    return directions[: bend(values)].T, _origin(inputs)


def pca(inputs: MethodInputs) -> tuple[Rows, Rows]:
    """Principal components of the texts, applied to images: (x - mean T) V'.

    At most 128 components are kept. Without reference images the mean of the texts is subtracted.
    Source: InDiReCT, arXiv 2211.12760.
    """
    directions, _ = principal_directions(inputs.texts)
    origin = inputs.texts.mean(axis=0) if inputs.image_mean is None else inputs.image_mean
    return directions[:128].T, origin


def tangent(inputs: MethodInputs) -> tuple[Rows, Rows]:
    """Principal directions of the texts in the tangent space of the sphere at their mean.

    The logarithm map of a unit vector x at the point p is (x - (x·p) p), scaled to the length of
    the angle between x and p. For images this scale is left out because the row normalisation
    removes it, so the map stays linear. With reference images, their mean is the point p of the
    images, and a Householder reflection moves it onto the mean of the texts. Source: CLAY, arXiv
    2604.11539.
    """
    at = _unit(inputs.texts.mean(axis=0))
    along = np.clip(inputs.texts @ at, -1.0, 1.0)
    flat = inputs.texts - along[:, None] * at
    angles = np.arccos(along) / np.maximum(np.linalg.norm(flat, axis=1), EPSILON)
    directions, values = principal_directions(flat * angles[:, None])
    weight = directions[: bend(values)].T
    weight = weight - np.outer(at, at @ weight)
    if inputs.image_mean is not None:
        mirror = at - _unit(inputs.image_mean)
        weight = weight - 2.0 * np.outer(mirror, mirror @ weight) / max(
            float(mirror @ mirror), EPSILON
        )
    return weight, np.zeros(len(at))


def exclusive(inputs: MethodInputs) -> tuple[Rows, Rows]:
    """`centred`, without the directions that the other criteria's texts span.

    A direction that both criteria use is lost. Source: null-space denoising of OD-CRL, arXiv
    2602.05464.
    """
    weight, origin = centred(inputs)
    return _remove_other_directions(weight, inputs), origin


def exclusive_orthogonal(inputs: MethodInputs) -> tuple[Rows, Rows]:
    """`orthogonal`, without the directions that the other criteria's texts span.

    This is the complete OD-CRL, arXiv 2602.05464.
    """
    weight, origin = orthogonal(inputs)
    return _remove_other_directions(weight, inputs), origin


def exclusive_weighted(inputs: MethodInputs) -> tuple[Rows, Rows]:
    """`cosine`, with each text t weighted by how little the other criteria's texts explain of it.

    Let m be the mean of the other criteria's mean texts, and S the mean of their covariances, each
    scaled to trace 1. With noise of covariance I/d, the Wiener filter leaves this share of the
    energy of t - m unexplained:

        share(t) = (t - m)' (I + d S)^-1 (t - m) / |t - m|^2

    The weight of a text is min(share / median share, 1)^2. `exclusive` removes directions, which
    the criterion may need; this method lowers the weight of texts, so it does less harm if the
    other criteria contain some of the criterion's own texts. Source: this project.
    """
    dim = inputs.texts.shape[1]
    spread = np.mean([_scatter(texts) for texts in inputs.against], axis=0)
    filtered = np.linalg.inv(np.eye(dim) + dim * spread)
    moved = inputs.texts - np.mean([texts.mean(axis=0) for texts in inputs.against], axis=0)
    energy = np.maximum(np.square(moved).sum(axis=1), EPSILON)
    share = np.einsum("kd,de,ke->k", moved, filtered, moved) / energy
    weights = np.minimum(share / max(float(np.median(share)), EPSILON), 1.0) ** 2
    return (weights[:, None] * inputs.texts).T, _origin(inputs)


def contrastive(inputs: MethodInputs) -> tuple[Rows, Rows]:
    """Directions in which the criterion's texts vary more than the other criteria's texts do.

    Let C be the covariance of the texts T, and B the mean of the other criteria's covariances,
    each scaled to trace 1. The directions are the generalised eigenvectors of C against
    B + (r/d) I, orthonormal in descending order of their eigenvalues e, and direction i is
    multiplied by (e_i / e_1)^(1/4). The ridge r is 10.

    C weights each text t by 1 - c(t), where c(t) >= 0 is the largest cosine of t with a text of
    another criterion after the mean of all texts is subtracted. Texts that belong to another
    criterion therefore count little. Source: oriented PCA (Diamantaras and Kung, 1996) and
    contrastive PCA (Abid et al., 2018), applied to texts; the weights are of this project.
    """
    others = np.concatenate(inputs.against).astype(np.float64)
    texts, dim = inputs.texts.astype(np.float64), inputs.texts.shape[1]
    mean = np.concatenate([texts, others]).mean(axis=0)
    nearest = (_unit_rows(texts - mean) @ _unit_rows(others - mean).T).max(axis=1)
    weights = np.maximum(1.0 - np.maximum(nearest, 0.0), _MIN_TEXT_WEIGHT)
    weights /= weights.sum()
    moved = np.sqrt(weights)[:, None] * (texts - weights @ texts)
    background = np.mean([_scatter(each) for each in inputs.against], axis=0)
    root = np.linalg.cholesky(background + _RIDGE / dim * np.eye(dim))
    directions, values = principal_directions(np.linalg.solve(root, moved.T).T, centre=False)
    solved = np.linalg.solve(root.T, directions.T)
    basis, triangle = np.linalg.qr(solved / np.linalg.norm(solved, axis=0))
    signs = np.where(np.diag(triangle) < 0, -1.0, 1.0)
    return basis * signs * np.sqrt(values / max(float(values[0]), EPSILON)), _origin(inputs)


PROJECTION_METHODS: tuple[ProjectionMethod, ...] = (
    ProjectionMethod(
        "cosine", cosine,
        "the texts",
        "Conditional Representation Learning, arXiv 2510.04564",
        min_texts=1, takes_reference=False, columns_are_texts=True,
    ),
    ProjectionMethod(
        "centred", centred,
        "the texts minus their mean",
        "this project",
        columns_are_texts=True, default=True,
    ),
    ProjectionMethod(
        "orthogonal", orthogonal,
        "leading directions of the centred texts",
        "OD-CRL, arXiv 2602.05464",
    ),
    ProjectionMethod(
        "pca", pca,
        "principal components of the texts, at most 128",
        "InDiReCT, arXiv 2211.12760",
    ),
    ProjectionMethod(
        "tangent", tangent,
        "leading directions in the sphere's tangent space at the mean text",
        "CLAY, arXiv 2604.11539",
    ),
    ProjectionMethod(
        "exclusive", exclusive,
        "as `centred`, without the directions that other criteria's texts span",
        "OD-CRL, arXiv 2602.05464",
        needs_against=True, columns_are_texts=True,
    ),
    ProjectionMethod(
        "exclusive-orthogonal", exclusive_orthogonal,
        "as `orthogonal`, without the directions that other criteria's texts span",
        "OD-CRL, arXiv 2602.05464",
        needs_against=True,
    ),
    ProjectionMethod(
        "exclusive-weighted", exclusive_weighted,
        "the texts, each weighted by the share of it that other criteria's texts do not explain",
        "this project",
        needs_against=True, columns_are_texts=True, weights_texts=True, default=True,
    ),
    ProjectionMethod(
        "contrastive", contrastive,
        "directions in which the texts vary more than other criteria's texts do",
        "contrastive PCA on texts, after arXiv 1709.06716",
        needs_against=True,
    ),
)  # fmt: skip
"""All projection methods."""

METHODS: tuple[Method, ...] = tuple(method.name for method in PROJECTION_METHODS)
"""Names of all projection methods."""

PAPER_METHOD: Method = "cosine"
"""The method of the paper on Conditional Representation Learning, used to reproduce its figures."""


def _remove_other_directions(weight: Rows, inputs: MethodInputs) -> Rows:
    """Project columns onto the null space of the other criteria's leading directions."""
    spans = []
    for texts in inputs.against:
        directions, values = principal_directions(texts)
        spans.append(directions[: bend(values)])
    together = np.linalg.qr(np.concatenate(spans).T)[0]
    return np.asarray(weight - together @ (together.T @ weight))


def _unit_rows(rows: Rows) -> Rows:
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), EPSILON))


def _scatter(rows: Rows) -> Rows:
    """Return the covariance (d, d) of rows (k, d), scaled to trace 1; zeros if all are equal."""
    moved = np.asarray(rows, np.float64) - rows.mean(axis=0, dtype=np.float64)
    return np.asarray(moved.T @ moved / max(float(np.square(moved).sum()), EPSILON))


def _origin(inputs: MethodInputs) -> Rows:
    return np.zeros(inputs.texts.shape[1]) if inputs.image_mean is None else inputs.image_mean


def _image_mean(reference: NDArray[np.floating], dim: int) -> Rows:
    checked = check_embeddings(reference, dim)
    if len(checked) == 0:
        raise InvalidInputError("expected at least one reference embedding, got none")
    return np.asarray(checked.mean(axis=0, dtype=np.float64))


def _unit(vector: Rows) -> Rows:
    return np.asarray(vector / max(float(np.linalg.norm(vector)), EPSILON))
