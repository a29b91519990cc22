"""Stored embeddings: read them, and project them onto bases without the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crl_sdk._lazy import lazy_names

if TYPE_CHECKING:
    from crl_sdk.stored._project import ProjectedFile, ProjectionRecord, project_stored
    from crl_sdk.stored._reader import StoredEmbeddings

__all__ = [
    "ProjectedFile",
    "ProjectionRecord",
    "StoredEmbeddings",
    "project_stored",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "_project": (
            "ProjectedFile",
            "ProjectionRecord",
            "project_stored",
        ),
        "_reader": ("StoredEmbeddings",),
    },
    extra="cpu",
)
