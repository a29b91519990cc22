"""How texts become an affine map: each method in a few lines of NumPy, with its source.

Every one gives `embedding @ weight + bias`, and a row normalisation makes the rest: neither the
server nor a kernel knows which it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from crl_sdk.basis._basis import METHODS, Method
from crl_sdk.errors import InvalidInputError
from crl_sdk.projection._projection import EPSILON, Post, Projection, check_embeddings

TEXT_COLUMNS: tuple[Method, ...] = ("cosine", "centred", "exclusive", "exclusive-weighted")
"""Methods whose maps have one column for each text, in their order."""

_ENERGY = 0.9
"""Share of the texts' variance that is kept at least where directions are dropped."""

Rows: TypeAlias = NDArray[np.floating]


@dataclass(frozen=True, slots=True)
class Given:
    """What a method may use.

    Attributes:
        texts: (k, d) float32, unit rows: the criterion's texts.
        against: of each other criterion, its texts likewise.
        images: (d,) mean of typical images' embeddings; None if there are none.
    """

    texts: Rows
    against: tuple[Rows, ...] = ()
    images: Rows | None = None


def make_projection(
    text_embeddings: NDArray[np.floating],
    method: Method = "centred",
    *,
    post: Post = "l2",
    reference: NDArray[np.floating] | None = None,
    against: Sequence[NDArray[np.floating]] = (),
) -> Projection:
    """Make the affine map of a criterion from its texts T (k, d).

    Args:
        text_embeddings: (k, d), unit rows.
        method: one of `METHODS`; the functions of this module say what each does.
        post: normalisation of the conditional embedding.
        reference: (n, d) unit embeddings of typical images. Their mean is removed from every
            image; `tangent` turns it onto the mean of the texts first.
        against: text embeddings (j, d) of other criteria, for the methods that begin with
            `exclusive`.

    Raises:
        InvalidInputError: an unknown method; too few texts; references or against that the method
            does not take or lacks; a wrong shape.
    """
    if method not in METHODS:
        raise InvalidInputError(f"expected a method in {METHODS}, got {method!r}")
    k, d = np.shape(text_embeddings)
    if k < 2 and method != "cosine":  # one text minus its mean is nothing
        raise InvalidInputError(
            f"the method {method!r} needs at least two distinct texts, got {k}; add texts, or use "
            "the method 'cosine'"
        )
    if takes_against(method) != bool(against):
        raise InvalidInputError(
            "expected against, the text embeddings of other criteria, with the methods that "
            f"begin with 'exclusive' and with no other; got {len(against)} for {method!r}"
        )
    given = Given(
        check_embeddings(text_embeddings, d),
        tuple(check_embeddings(each, d) for each in against),
        _mean_of(reference, d, method),
    )
    weight, origin = _METHODS[method](given)
    bias = 0.0 - origin @ weight
    return Projection(
        np.ascontiguousarray(weight, np.float32), np.ascontiguousarray(bias, np.float32), post
    )


def default_method(*, against: bool) -> Method:
    """Give the method that is taken where none is asked for: by whether against are known."""
    return "exclusive-weighted" if against else "centred"


def takes_against(method: Method) -> bool:
    """Tell whether a method is made against other criteria."""
    return method.startswith("exclusive")


def cosine(given: Given) -> tuple[Rows, Rows]:
    """Cosines with the texts: T'. Conditional Representation Learning, arXiv 2510.04564."""
    return given.texts.T, np.zeros(given.texts.shape[1])


def centred(given: Given) -> tuple[Rows, Rows]:
    """Cosines with what sets each text apart from the mean of all: (T - mean T)'.

    What all texts have in common, which is mostly how far texts lie from images, is gone. It gives
    `cosine` minus each row's mean, so it orders an image's texts in the same way.
    """
    return (given.texts - given.texts.mean(axis=0)).T, _origin(given)


def orthogonal(given: Given) -> tuple[Rows, Rows]:
    """Coordinates in the leading directions of the centred texts, all of equal weight.

    The singular vectors up to the bend of the spectrum: `bend` says where that is. Adaptive
    orthogonal basis of OD-CRL, arXiv 2602.05464.
    """
    directions, values = directions_of(given.texts)
    return directions[: bend(values)].T, _origin(given)


def pca(given: Given) -> tuple[Rows, Rows]:
    """Principal components fitted on the texts and applied to images: (x - mean T) V'.

    All of them up to 128, and the texts' own mean is what is subtracted. InDiReCT, arXiv
    2211.12760.
    """
    directions, _ = directions_of(given.texts)
    origin = given.texts.mean(axis=0) if given.images is None else given.images
    return directions[:128].T, origin


def tangent(given: Given) -> tuple[Rows, Rows]:
    """Principal directions of the texts in the tangent space of the sphere at their mean.

    The logarithm takes what is orthogonal to the mean and scales it by the angle; row
    normalisation undoes the scale of images, so that their logarithm is linear here. With
    references the images' mean is the point their logarithm is taken at, and a Householder
    reflection turns it onto the texts' mean. CLAY, arXiv 2604.11539.
    """
    at = _unit(given.texts.mean(axis=0))
    along = np.clip(given.texts @ at, -1.0, 1.0)
    flat = given.texts - along[:, None] * at
    angles = np.arccos(along) / np.maximum(np.linalg.norm(flat, axis=1), EPSILON)
    directions, values = directions_of(flat * angles[:, None])
    weight = directions[: bend(values)].T
    weight = weight - np.outer(at, at @ weight)
    if given.images is not None:
        mirror = at - _unit(given.images)
        weight = weight - 2.0 * np.outer(mirror, mirror @ weight) / max(
            float(mirror @ mirror), EPSILON
        )
    return weight, np.zeros(len(at))


def exclusive(given: Given) -> tuple[Rows, Rows]:
    """`centred`, after what the other criteria's texts span is taken out of it.

    Null-space denoising of OD-CRL, arXiv 2602.05464. A direction that against share with the
    criterion is lost to it as well.
    """
    weight, origin = centred(given)
    return _without_others(weight, given), origin


def exclusive_orthogonal(given: Given) -> tuple[Rows, Rows]:
    """`orthogonal`, after what the other criteria's texts span is taken out: OD-CRL whole."""
    weight, origin = orthogonal(given)
    return _without_others(weight, given), origin


def exclusive_weighted(given: Given) -> tuple[Rows, Rows]:
    """`cosine`, each text weighted by how little of it against' texts explain: (w T)'.

    Ours. Where `exclusive` takes directions away, which a criterion may share, this makes texts
    count less that are another criterion's, or that the model takes for one. Wiener's filter says
    what part of a text, as it lies from the against' mean, is theirs: they vary by S, the mean of
    their covariances at trace 1, and a text that could be any by I / d. Squares of what is left
    are the weights, relative to the median text's, and 1 at most: against that hold some of the
    criterion's own texts do less harm so.
    """
    dim = given.texts.shape[1]
    spread = np.mean([_scatter(texts) for texts in given.against], axis=0)
    own = np.linalg.inv(np.eye(dim) + dim * spread)
    moved = given.texts - np.mean([texts.mean(axis=0) for texts in given.against], axis=0)
    energy = np.maximum(np.square(moved).sum(axis=1), EPSILON)
    share = np.einsum("kd,de,ke->k", moved, own, moved) / energy
    weights = np.minimum(share / max(float(np.median(share)), EPSILON), 1.0) ** 2
    return (weights[:, None] * given.texts).T, _origin(given)


_METHODS: MappingProxyType[Method, Callable[[Given], tuple[Rows, Rows]]] = MappingProxyType(
    {
        "cosine": cosine,
        "centred": centred,
        "orthogonal": orthogonal,
        "pca": pca,
        "tangent": tangent,
        "exclusive": exclusive,
        "exclusive-orthogonal": exclusive_orthogonal,
        "exclusive-weighted": exclusive_weighted,
    }
)


def bend(values: NDArray[np.floating]) -> int:
    """Give how many singular values come before the sharpest bend of their curve.

    Both axes are scaled to [0, 1], and the bend is where the discrete curvature
    y'' / (1 + y'^2)^1.5 is largest, among the places before which at least `_ENERGY` of the sum of
    squares lies: a first direction that towers above the others is no reason to drop these. Two
    stay at least, since row normalisation leaves nothing of a single column but its sign.

    Args:
        values: (r,) descending.

    Returns:
        2 to r, or r if that is less; r where no place qualifies, as in a flat spectrum.
    """
    count = len(values)
    heights = np.asarray(values, np.float64) / max(float(values[0]), EPSILON)
    energy = np.cumsum(heights**2) / max(float((heights**2).sum()), EPSILON)
    places = [i for i in range(2, count - 1) if energy[i - 1] >= _ENERGY]
    if not places:
        return count
    before, at, after = (heights[np.array(places) + shift] for shift in (-1, 0, 1))
    step = 1.0 / (count - 1)
    slope = (after - before) / (2.0 * step)
    curvature = (after - 2.0 * at + before) / step**2 / (1.0 + slope**2) ** 1.5
    return places[int(np.argmax(curvature))]


def _origin(given: Given) -> Rows:
    return np.zeros(given.texts.shape[1]) if given.images is None else given.images


def directions_of(rows: Rows) -> tuple[Rows, Rows]:
    """Give the right singular vectors (r, d) of centred rows (k, d), and their values.

    The strongest come first. What is zero but for rounding is left out, so that r < k, but never
    all of it.
    """
    wide = np.asarray(rows, np.float64)
    _, values, directions = np.linalg.svd(wide - wide.mean(axis=0), full_matrices=False)
    kept = max(1, int((values > values[0] * 1e-6).sum()))
    return directions[:kept], values[:kept]


def _without_others(weight: Rows, given: Given) -> Rows:
    """Project columns onto the null space of all against' leading directions."""
    spans = []
    for texts in given.against:
        directions, values = directions_of(texts)
        spans.append(directions[: bend(values)])
    together = np.linalg.qr(np.concatenate(spans).T)[0]
    return np.asarray(weight - together @ (together.T @ weight))


def _scatter(rows: Rows) -> Rows:
    """Give the covariance of rows (k, d), scaled to a trace of 1; 0 where all are the same."""
    moved = np.asarray(rows, np.float64) - rows.mean(axis=0, dtype=np.float64)
    return np.asarray(moved.T @ moved / max(float(np.square(moved).sum()), EPSILON))


def _mean_of(reference: NDArray[np.floating] | None, dim: int, method: Method) -> Rows | None:
    if reference is None:
        return None
    if method == "cosine":
        raise InvalidInputError("the method 'cosine' takes no reference embeddings; use 'centred'")
    checked = check_embeddings(reference, dim)
    if len(checked) == 0:
        raise InvalidInputError("expected at least one reference embedding, got none")
    return np.asarray(checked.mean(axis=0, dtype=np.float64))


def _unit(vector: Rows) -> Rows:
    return np.asarray(vector / max(float(np.linalg.norm(vector)), EPSILON))
