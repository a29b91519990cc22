"""Clients of the gRPC service; they need numpy, grpcio and protobuf alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crl_sdk._lazy import lazy_names

if TYPE_CHECKING:
    from crl_sdk.client._client import AsyncClient, Client, ClientOptions, ClientSecurity

__all__ = [
    "AsyncClient",
    "Client",
    "ClientOptions",
    "ClientSecurity",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "_client": (
            "AsyncClient",
            "Client",
            "ClientOptions",
            "ClientSecurity",
        ),
    },
    extra="cpu",
)
