"""The gRPC server: its services, request batching, the embedding cache, security and metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crl_sdk._lazy import lazy_names

if TYPE_CHECKING:
    from crl_sdk.serving._admission import ServerLimits
    from crl_sdk.serving._bases import BasisStore, DirectoryBasisStore
    from crl_sdk.serving._pipeline import Pipeline
    from crl_sdk.serving._security import ServerTls, Token, read_tokens
    from crl_sdk.serving._server import RunningServer, ServerSettings, run_server, serve
    from crl_sdk.serving._shared_bases import SharedBasisStore

__all__ = [
    "BasisStore",
    "DirectoryBasisStore",
    "Pipeline",
    "RunningServer",
    "ServerLimits",
    "ServerSettings",
    "ServerTls",
    "SharedBasisStore",
    "Token",
    "read_tokens",
    "run_server",
    "serve",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "_admission": ("ServerLimits",),
        "_bases": ("BasisStore", "DirectoryBasisStore"),
        "_pipeline": ("Pipeline",),
        "_security": (
            "ServerTls",
            "Token",
            "read_tokens",
        ),
        "_server": (
            "RunningServer",
            "ServerSettings",
            "run_server",
            "serve",
        ),
        "_shared_bases": ("SharedBasisStore",),
    },
    extra="serve",
)
