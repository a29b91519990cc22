"""Projections: an affine map of unit embeddings, followed by a row normalisation.

The NumPy code in this module is the specification of every kernel and graph of the project.
`crl_sdk.basis` makes projections from texts; this package does not know about texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from crl_sdk.errors import InvalidInputError
from crl_sdk.projection._row_dtypes import decode_rows

Post: TypeAlias = Literal["l2", "standardise", "none"]
"""Row normalisation: to unit length, to mean 0 and variance 1, or none."""

POSTS: tuple[Post, ...] = get_args(Post)

EPSILON = 1e-12
"""Smallest divisor in a row normalisation, so that a zero row stays zero."""

MAX_VALUE = 1e12
"""Largest absolute value in a projection. The squares of rows then stay far below what float32
holds. The values of bases are below 100."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Projection:
    """The map `post(embedding @ weight + bias)` from universal to conditional embeddings.

    Attributes:
        weight: Weight matrix, shape (d, m), float32.
        bias: Bias, shape (m,), float32.
        post: Row normalisation of the result.

    Example:
        >>> identity = Projection(np.eye(2, dtype=np.float32), np.zeros(2, np.float32), "l2")
        >>> identity.apply(np.array([[3.0, 4.0]], np.float32)).round(1)
        array([[0.6, 0.8]], dtype=float32)
    """

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    post: Post = "l2"

    def __post_init__(self) -> None:
        """Check shapes, dtypes and values.

        Raises:
            InvalidInputError: If a shape, dtype or `post` is wrong, or a value is not finite.
        """
        d_m, m = np.shape(self.weight), np.shape(self.bias)
        if len(d_m) != 2 or 0 in d_m or m != d_m[1:]:
            raise InvalidInputError(
                f"expected weight (d, m) and bias (m,) with d, m >= 1, got {d_m} and {m}"
            )
        if self.weight.dtype != np.float32 or self.bias.dtype != np.float32:
            raise InvalidInputError(
                f"expected float32 weight and bias, got {self.weight.dtype} and {self.bias.dtype}"
            )
        if self.post not in POSTS:
            raise InvalidInputError(f"expected post in {POSTS}, got {self.post!r}")
        if not (np.isfinite(self.weight).all() and np.isfinite(self.bias).all()):
            raise InvalidInputError("a projection's weight and bias must be finite")
        largest = max(float(np.abs(self.weight).max()), float(np.abs(self.bias).max()))
        if largest > MAX_VALUE:
            raise InvalidInputError(
                f"a projection's weight and bias must be at most {MAX_VALUE:g}, got {largest:g}: "
                "larger ones overflow in float32"
            )

    def __repr__(self) -> str:
        """Return the sizes and the row normalisation."""
        return f"Projection({self.input_dim} → {self.output_dim}, post {self.post!r})"

    @property
    def input_dim(self) -> int:
        """Length d of a universal embedding."""
        return int(self.weight.shape[0])

    @property
    def output_dim(self) -> int:
        """Length m of a conditional embedding."""
        return int(self.weight.shape[1])

    def apply(self, embeddings: NDArray[Any]) -> NDArray[np.float32]:
        """Project universal embeddings.

        Args:
            embeddings: Universal embeddings, shape (n, d), a float dtype or int8, unit rows.

        Returns:
            Conditional embeddings, shape (n, m), float32.

        Raises:
            InvalidInputError: If the shape or dtype is wrong, or a value is not finite.
        """
        checked = check_embeddings(embeddings, self.input_dim)
        return normalise_rows(checked @ self.weight + self.bias, self.post)


def normalise_rows(rows: NDArray[np.float32], post: Post) -> NDArray[np.float32]:
    """Normalise each row.

    Args:
        rows: Rows, shape (n, m), float32.
        post: `l2` scales rows to length 1. `standardise` gives rows of mean 0 and unbiased
            standard deviation 1. `none` returns the rows unchanged.

    Returns:
        Normalised rows, shape (n, m), float32. A row of zeros stays zero, and so does a constant
        row with `standardise`.
    """
    if post == "standardise":
        rows = rows - rows.mean(axis=1, keepdims=True)
        scale = np.sqrt(np.square(rows).sum(axis=1, keepdims=True) / max(rows.shape[1] - 1, 1))
    elif post == "l2":
        scale = np.linalg.norm(rows, axis=1, keepdims=True)
    else:
        return rows
    return np.asarray(rows / np.maximum(scale, EPSILON), dtype=np.float32)


def pack(
    projections: Sequence[Projection],
) -> tuple[NDArray[np.float32], NDArray[np.float32], list[slice]]:
    """Concatenate projections, so that one matrix product computes all of them.

    Args:
        projections: Projections of the same input dimension d, at least one.

    Returns:
        Weight (d, K) and bias (K,), both float32, where K is the sum of the output dimensions; and
        for each projection the slice of its columns.

    Raises:
        InvalidInputError: If the list is empty or the input dimensions differ.
    """
    dims = sorted({projection.input_dim for projection in projections})
    if len(dims) != 1:
        raise InvalidInputError(f"expected projections of one input dimension, got {dims}")
    ends = np.cumsum([projection.output_dim for projection in projections])
    slices = [
        slice(int(end) - projection.output_dim, int(end))
        for projection, end in zip(projections, ends, strict=True)
    ]
    weight = np.ascontiguousarray(np.concatenate([p.weight for p in projections], axis=1))
    bias = np.concatenate([p.bias for p in projections])
    return weight, bias, slices


def check_embeddings(embeddings: NDArray[Any], dim: int) -> NDArray[np.float32]:
    """Check embeddings from the user and convert them to float32.

    Args:
        embeddings: Embeddings, shape (n, dim), int8, float16, float32 or float64.
        dim: Expected length of an embedding.

    Returns:
        Embeddings, shape (n, dim), float32. A float32 array is not copied.

    Raises:
        InvalidInputError: If the shape or dtype is wrong, or a value is NaN or infinite.
    """
    array = np.asarray(embeddings)
    if array.ndim != 2 or array.shape[1] != dim:
        raise InvalidInputError(f"expected embeddings of shape (n, {dim}), got {array.shape}")
    checked = decode_rows(array)
    finite = np.isfinite(checked)
    if not finite.all():
        bad = np.flatnonzero(~finite.all(axis=1))
        raise InvalidInputError(
            f"{bad.size} of {len(checked)} embeddings hold NaN or infinity, the first at row "
            f"{bad[0]}: leave out the rows of images that failed"
        )
    return checked
