"""Projection methods: how the texts of a criterion become an affine map.

Each method is one function and one `ProjectionMethod` record in `PROJECTION_METHODS`. Everything
else that depends on the method (the default, checks, help texts) is read from its record. All
methods give `embedding @ weight + bias`, so the server, the graphs and the kernels need not know
which one made a basis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from crl_sdk.basis._contrastive import contrastive_directions
from crl_sdk.basis._spectrum import bend, principal_directions
from crl_sdk.errors import InvalidInputError
from crl_sdk.projection._projection import EPSILON, Post, Projection, check_embeddings

Method: TypeAlias = Literal[
    "contrastive", "cosine", "orthogonal", "exclusive-orthogonal", "tangent", "ignore",
]  # fmt: skip
"""Name of a projection method. A test compares it with `PROJECTION_METHODS`."""

DEFAULT_METHOD: Method = "contrastive"
"""The method that is used if none is named and there are enough texts, see `default_method`."""

PAPER_METHOD: Method = "cosine"
"""The method of the paper on Conditional Representation Learning, used to reproduce its figures."""

Rows: TypeAlias = NDArray[np.floating]


@dataclass(frozen=True, slots=True)
class MethodInputs:
    """What a method may use.

    Attributes:
        texts: Text embeddings of the criterion, shape (k, d), float64, unit rows.
        against: Text embeddings of each other criterion, shape (j, d), float64, unit rows.
        background: Embeddings of generic texts, shape (n, d), float64; None if there are none.
        image_mean: Mean embedding of typical images, shape (d,); None if no images were given.
    """

    texts: Rows
    against: tuple[Rows, ...] = ()
    background: Rows | None = None
    image_mean: Rows | None = None


@dataclass(frozen=True, slots=True)
class ProjectionMethod:
    """One way to make the affine map of a criterion from its texts.

    Attributes:
        name: Name of the method, as in `method="cosine"`.
        function: Function that returns the weight of the map, shape (d, m). The bias is zero.
        columns: What the columns of the map are, in words.
        source: Where the method comes from.
        min_texts: Smallest number of distinct texts.
        takes_against: Whether the method accepts the texts of other criteria.
        needs_against: Whether it does not work without them.
        takes_background: Whether the method uses the embeddings of generic texts.
        takes_reference: Whether the method accepts embeddings of typical images.
        columns_are_texts: Whether the map has one column for each text, in the order of the texts.
        weights_texts: Whether the texts count differently, see `text_weights`.
        texts_describe: Whether the texts describe what the map keeps, so that they can name groups.
    """

    name: Method
    function: Callable[[MethodInputs], Rows]
    columns: str
    source: str
    min_texts: int = 2
    takes_against: bool = False
    needs_against: bool = False
    takes_background: bool = False
    takes_reference: bool = False
    columns_are_texts: bool = False
    weights_texts: bool = False
    texts_describe: bool = True


def known_method(name: str) -> ProjectionMethod | None:
    """Return the record of a method, or None if this version has no method of this name."""
    return next((method for method in PROJECTION_METHODS if method.name == name), None)


def find_method(name: str) -> ProjectionMethod:
    """Return the record of a method.

    Raises:
        InvalidInputError: If there is no method of this name.
    """
    method = known_method(name)
    if method is None:
        raise InvalidInputError(f"expected a method in {METHODS}, got {name!r}")
    return method


def default_method(texts: int, *, against: int = 0) -> Method:
    """Return the method that is used if none is named.

    With two texts this is `cosine`, because `contrastive` would keep no more than a sign.

    Args:
        texts: Number of distinct texts.
        against: Number of other criteria. `cosine` takes none.
    """
    return PAPER_METHOD if texts == 2 and not against else DEFAULT_METHOD


def check_method(name: str, *, against: int) -> ProjectionMethod:
    """Return the record of a method, if the method fits what is given.

    Args:
        name: Name of the method.
        against: Number of other criteria.

    Raises:
        InvalidInputError: If there is no such method, or it does not fit.
    """
    method = find_method(name)
    if method.needs_against and not against:
        raise InvalidInputError(f"the method {name!r} needs other criteria: pass them as against")
    if against and not method.takes_against:
        with_against = ", ".join(repr(m.name) for m in PROJECTION_METHODS if m.takes_against)
        raise InvalidInputError(
            f"the method {name!r} takes no other criteria: leave out against, or use one of the "
            f"methods {with_against}"
        )
    return method


def make_projection(
    text_embeddings: NDArray[np.floating],
    method: Method = DEFAULT_METHOD,
    *,
    post: Post = "l2",
    against: Sequence[NDArray[np.floating]] = (),
    background: NDArray[np.floating] | None = None,
    ignore: Sequence[Projection] = (),
    reference: NDArray[np.floating] | None = None,
) -> Projection:
    """Make the affine map of a criterion from its text embeddings.

    Args:
        text_embeddings: Text embeddings of the criterion, shape (k, d), unit rows.
        method: Name of the projection method, one of `METHODS`.
        post: Row normalisation of the conditional embedding.
        against: Text embeddings of other criteria, each of shape (j, d), unit rows. What varies in
            them counts less.
        background: Embeddings of generic texts, shape (n, d), unit rows, such as
            `ModelBundle.background`. Methods that do not use them ignore them.
        ignore: Projections of criteria to disregard. The directions of their columns are removed
            from the map.
        reference: Embeddings of typical images, shape (n, d), unit rows, for the method `tangent`,
            which turns their mean onto the mean of the texts.

    Returns:
        The projection from d to m dimensions.

    Raises:
        InvalidInputError: If the method is unknown, there are too few texts, a shape is wrong, or
            `against` or `reference` does not fit the method.
    """
    record = check_method(method, against=len(against))
    if reference is not None and not record.takes_reference:
        raise InvalidInputError(
            f"the method {method!r} takes no reference embeddings: leave them out"
        )
    k, d = np.shape(text_embeddings)
    if k < record.min_texts:
        enough = " or ".join(repr(m.name) for m in PROJECTION_METHODS if m.min_texts <= k)
        raise InvalidInputError(
            f"the method {method!r} needs at least {record.min_texts} distinct texts, got "
            f"{k}: add texts" + (f", or use the method {enough}" if enough else "")
        )

    def wide(rows: NDArray[np.floating], what: str) -> Rows:
        checked = check_embeddings(rows, d)
        if len(checked) == 0:
            raise InvalidInputError(f"expected at least one {what} embedding, got none")
        return np.asarray(checked, np.float64)

    inputs = MethodInputs(
        wide(text_embeddings, "text"),
        tuple(wide(each, "text") for each in against),
        None if background is None else wide(background, "background"),
        None if reference is None else wide(reference, "reference").mean(axis=0),
    )
    weight = record.function(inputs)
    if wrong := [other.input_dim for other in ignore if other.input_dim != d]:
        raise InvalidInputError(
            f"expected projections from {d} dimensions in ignore, got {wrong[0]}"
        )
    if ignore:
        # all at once: one after the other, the second could bring the first back
        weight = without_span(weight, np.concatenate([other.weight for other in ignore], axis=1))
    return Projection(
        np.ascontiguousarray(weight, np.float32), np.zeros(weight.shape[1], np.float32), post
    )


def contrastive(inputs: MethodInputs) -> Rows:
    """Directions in which the criterion's texts vary more than other texts do.

    Let C be the weighted covariance of the texts, with the weights of `text_weights`, and B the
    mean of what is known of how other texts vary: the mean covariance of the other criteria, and
    the covariance of the background, each of trace 1. The columns are the generalised eigenvectors
    of C against B + (10/d) I, orthonormal in descending order of their eigenvalues e; column i is
    multiplied by (e_i / e_1)^0.3. Source: oriented PCA (Diamantaras and Kung, 1996) and contrastive
    PCA (Abid et al., 2018), applied to texts; the weights are of this project.
    """
    return contrastive_directions(inputs.texts, inputs.against, inputs.background)


def cosine(inputs: MethodInputs) -> Rows:
    """Cosines with the texts T: weight = T'.

    Source: Conditional Representation Learning, arXiv 2510.04564.
    """
    return np.asarray(inputs.texts.T)


def orthogonal(inputs: MethodInputs) -> Rows:
    """Coordinates along the leading singular vectors of the centred texts, equally weighted.

    `bend` chooses how many vectors are kept. Source: adaptive orthogonal basis of OD-CRL, arXiv
    2602.05464.
    """
    directions, values = principal_directions(inputs.texts)
    return np.asarray(directions[: bend(values)].T)


def exclusive_orthogonal(inputs: MethodInputs) -> Rows:
    """`orthogonal`, without the directions that the other criteria's texts span.

    This is the complete OD-CRL, arXiv 2602.05464, with its null-space denoising. A direction that
    both criteria use is lost.
    """
    weight = orthogonal(inputs)
    spans = []
    for texts in inputs.against:
        directions, values = principal_directions(texts)
        spans.append(directions[: bend(values)])
    return without_span(weight, np.concatenate(spans).T)


def tangent(inputs: MethodInputs) -> Rows:
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
    return np.asarray(weight)


def ignore(inputs: MethodInputs) -> Rows:
    """The universal embedding without the directions in which the texts vary.

    With V the directions of `contrastive`, orthonormal and all of equal weight, the map is I - VV'.
    It keeps d dimensions. Source: projection onto a null space, as in debiasing word embeddings.
    """
    axes = contrastive(inputs)
    dim, count = axes.shape
    if 2 * count > dim:
        raise InvalidInputError(
            f"the texts vary in {count} of {dim} dimensions, so that too little would be left: "
            f"give at most {dim // 2} texts of what to disregard"
        )
    return without_span(np.eye(dim), axes)


PROJECTION_METHODS: tuple[ProjectionMethod, ...] = (
    ProjectionMethod(
        "contrastive", contrastive,
        "directions in which the texts vary more than other texts do",
        "contrastive PCA on texts, after arXiv 1709.06716",
        min_texts=3, takes_against=True, takes_background=True, weights_texts=True,
    ),
    ProjectionMethod(
        "cosine", cosine,
        "the texts",
        "Conditional Representation Learning, arXiv 2510.04564",
        min_texts=1, columns_are_texts=True,
    ),
    ProjectionMethod(
        "orthogonal", orthogonal,
        "leading directions of the centred texts",
        "OD-CRL, arXiv 2602.05464",
    ),
    ProjectionMethod(
        "exclusive-orthogonal", exclusive_orthogonal,
        "as `orthogonal`, without the directions that other criteria's texts span",
        "OD-CRL, arXiv 2602.05464",
        takes_against=True, needs_against=True,
    ),
    ProjectionMethod(
        "tangent", tangent,
        "leading directions in the sphere's tangent space at the mean text",
        "CLAY, arXiv 2604.11539",
        takes_reference=True,
    ),
    ProjectionMethod(
        "ignore", ignore,
        "the universal embedding without the directions in which the texts vary",
        "this project",
        takes_background=True, texts_describe=False,
    ),
)  # fmt: skip
"""All projection methods."""

METHODS: tuple[Method, ...] = tuple(method.name for method in PROJECTION_METHODS)
"""Names of all projection methods."""


def without_span(weight: Rows, columns: Rows) -> Rows:
    """Return a weight (d, m) without the directions that some columns (d, r) span."""
    axes, values, _ = np.linalg.svd(columns.astype(np.float64), full_matrices=False)
    axes = axes[:, values > values[0] * 1e-6]
    return np.asarray(weight - axes @ (axes.T @ weight))


def _unit(vector: Rows) -> Rows:
    return np.asarray(vector / max(float(np.linalg.norm(vector)), EPSILON))
