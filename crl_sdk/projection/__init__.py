"""Projections: affine maps of unit embeddings with a row normalisation, applied fast."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crl_sdk._lazy import lazy_names

if TYPE_CHECKING:
    from crl_sdk.projection._project_rows import project_rows
    from crl_sdk.projection._projection import Post, Projection, normalise_rows, pack

__all__ = [
    "Post",
    "Projection",
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
    },
    extra="cpu",
)
