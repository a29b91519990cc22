"""Say in words what matters about your images, and get embeddings that carry just that.

The public names of the SDK. They are imported on first use, so that `import crl_sdk` is quick and
a client needs neither an inference runtime nor a model.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from crl_sdk._version import __version__

if TYPE_CHECKING:
    from crl_sdk.basis import Basis
    from crl_sdk.bundle import ModelBundle, demo_bundle
    from crl_sdk.client import AsyncClient, Client
    from crl_sdk.embedder import Embedder, Embeddings
    from crl_sdk.errors import CrlError
    from crl_sdk.preprocess import ImageLimits
    from crl_sdk.projection import Projection

_HOMES = {
    "AsyncClient": "crl_sdk.client",
    "Basis": "crl_sdk.basis",
    "Client": "crl_sdk.client",
    "CrlError": "crl_sdk.errors",
    "Embedder": "crl_sdk.embedder",
    "Embeddings": "crl_sdk.embedder",
    "ImageLimits": "crl_sdk.preprocess",
    "ModelBundle": "crl_sdk.bundle",
    "Projection": "crl_sdk.projection",
    "demo_bundle": "crl_sdk.bundle",
}

__all__ = [
    "AsyncClient",
    "Basis",
    "Client",
    "CrlError",
    "Embedder",
    "Embeddings",
    "ImageLimits",
    "ModelBundle",
    "Projection",
    "__version__",
    "demo_bundle",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'crl_sdk' has no attribute {name!r}")
    try:
        value = getattr(import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("crl_sdk"):
            raise
        from crl_sdk.errors import MissingDependencyError

        raise MissingDependencyError(error.name, "cpu", f"crl_sdk.{name}") from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names."""
    return __all__
