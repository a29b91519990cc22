"""Say in words what matters about your images, and get embeddings that carry just that.

Public names are imported on first use. `import crl_sdk` is therefore fast, and a client of the
service needs no inference runtime.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from crl_sdk import _telemetry
from crl_sdk._lazy import lazy_names
from crl_sdk._version import __version__

if TYPE_CHECKING:
    from crl_sdk._embedder import Embedder
    from crl_sdk._embeddings import Embeddings
    from crl_sdk.basis import Basis
    from crl_sdk.client import AsyncClient, Client, ClientOptions, ClientSecurity
    from crl_sdk.errors import CrlError
    from crl_sdk.model import ImageLimits, ModelBundle, demo_bundle
    from crl_sdk.projection import Projection

__all__ = [
    "AsyncClient",
    "Basis",
    "Client",
    "ClientOptions",
    "ClientSecurity",
    "CrlError",
    "Embedder",
    "Embeddings",
    "ImageLimits",
    "ModelBundle",
    "Projection",
    "__version__",
    "demo_bundle",
]

_telemetry.switch_off_telemetry()  # before any library is imported

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "_embedder": ("Embedder",),
        "_embeddings": ("Embeddings",),
        "basis": ("Basis",),
        "client": (
            "AsyncClient",
            "Client",
            "ClientOptions",
            "ClientSecurity",
        ),
        "errors": ("CrlError",),
        "model": (
            "ImageLimits",
            "ModelBundle",
            "demo_bundle",
        ),
        "projection": ("Projection",),
    },
    extra="cpu",
)
