"""Projections: affine maps of unit embeddings with a row normalisation, applied fast."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crl_sdk._lazy import lazy_names

if TYPE_CHECKING:
    from crl_sdk.projection._project_rows import project_rows
    from crl_sdk.projection._projection import Post, Projection, normalise_rows, pack
    from crl_sdk.projection._row_dtypes import RowDtype, decode_rows, encode_rows

__all__ = [
    "Post",
    "Projection",
    "RowDtype",
    "decode_rows",
    "encode_rows",
    "normalise_rows",
    "pack",
    "project_rows",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "_project_rows": ("project_rows",),
        "_projection": (
            "Post",
            "Projection",
            "normalise_rows",
            "pack",
        ),
        "_row_dtypes": (
            "RowDtype",
            "decode_rows",
            "encode_rows",
        ),
    },
    extra="cpu",
)
