"""Make a basis from texts whose embeddings are known, without a text tower."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crl_sdk.basis._basis import Basis
from crl_sdk.basis._build import DEFAULT_MERGE_THRESHOLD, FROM_VECTORS, build_basis
from crl_sdk.basis._methods import Method
from crl_sdk.errors import InvalidInputError
from crl_sdk.model._fingerprint import fingerprint_of_name
from crl_sdk.projection._projection import Post, check_embeddings


def build_basis_from_vectors(
    criterion: str,
    texts: Sequence[str],
    embeddings: NDArray[np.floating],
    *,
    model: str,
    method: Method | None = None,
    post: Post = "l2",
    merge_threshold: float = DEFAULT_MERGE_THRESHOLD,
    against: Sequence[Basis] = (),
    ignore: Sequence[Basis] = (),
    background: NDArray[np.floating] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Basis:
    """Make a basis from texts whose embeddings are known, without a text tower.

    Args:
        criterion: What the texts describe, such as `color`.
        texts: The n texts.
        embeddings: Their embeddings, shape (n, d), of a float dtype. They are scaled to unit
            length.
        model: Name of the model that made the embeddings, such as `openai/clip-vit-base-patch32`,
            or the fingerprint of a bundle. The basis can be used only with embeddings of the same
            model.
        method: Projection method, see `build_basis`.
        post: Row normalisation of the conditional embedding.
        merge_threshold: Cosine in (0, 1]; 1 merges exact duplicates only.
        against: Bases of other criteria. What varies in their texts counts less.
        ignore: Bases of criteria to disregard.
        background: Embeddings of generic texts by the same model, shape (b, d).
        provenance: JSON values to store with the basis.

    Returns:
        The basis.

    Raises:
        CriterionError: If the criterion is malformed.
        BasisMismatchError: If a basis in `against` or `ignore` was made for another model.
        InvalidInputError: If the embeddings do not match the texts, hold NaN or a zero row; or as
            for `build_basis`.

    Example:
        >>> from crl_sdk.basis import build_basis_from_vectors
        >>> basis = build_basis_from_vectors(
        ...     "color", ["red", "green", "blue"], np.eye(3, 8), model="my-clip"
        ... )
        >>> basis.fingerprint, basis.projection.output_dim
        ('name:my-clip', 2)
    """
    rows = np.asarray(embeddings)
    if rows.ndim != 2 or len(rows) != len(texts) or isinstance(texts, str):
        raise InvalidInputError(
            f"expected embeddings (n, d), one row for each of {len(texts)} texts, got {rows.shape}"
        )
    wide = check_embeddings(rows, rows.shape[1]).astype(np.float64)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    if not lengths.all():
        zero = texts[int(np.flatnonzero(lengths == 0)[0])]
        raise InvalidInputError(f"the embedding of {zero!r} is zero: leave the text out")
    known: dict[str, NDArray[np.float64]] = {}
    for text, row in zip(texts, wide / lengths, strict=True):
        known.setdefault(" ".join(text.split()), row)
    return build_basis(
        criterion,
        texts,
        lambda asked: np.array([known[text] for text in asked], np.float32),
        fingerprint=fingerprint_of_name(model),
        method=method,
        post=post,
        merge_threshold=merge_threshold,
        against=against,
        ignore=ignore,
        background=background,
        provenance={
            "texts": "given with their embeddings",
            **(provenance or {}),
            FROM_VECTORS: True,
        },
    )
