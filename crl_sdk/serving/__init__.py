"""The gRPC server: batching and the path of one request, and the services that speak it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crl_sdk._lazy import lazy_names

if TYPE_CHECKING:
    from crl_sdk.serving._pipeline import Limits, Pipeline
    from crl_sdk.serving._security import Tls, Token, read_tokens
    from crl_sdk.serving._server import ServerSettings, running, serve

__all__ = [
    "Limits",
    "Pipeline",
    "ServerSettings",
    "Tls",
    "Token",
    "read_tokens",
    "running",
    "serve",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "_pipeline": (
            "Limits",
            "Pipeline",
        ),
        "_security": (
            "Tls",
            "Token",
            "read_tokens",
        ),
        "_server": (
            "ServerSettings",
            "running",
            "serve",
        ),
    },
    extra="serve",
)
