"""Files of stored embeddings: reading them, and projecting them onto bases without the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crl_sdk._lazy import lazy_names

if TYPE_CHECKING:
    from crl_sdk.stored._project import Projected, project_stored
    from crl_sdk.stored._reader import Stored

__all__ = [
    "Projected",
    "Stored",
    "project_stored",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "_project": (
            "Projected",
            "project_stored",
        ),
        "_reader": ("Stored",),
    },
    extra="cpu",
)
