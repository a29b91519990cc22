"""Clients of the service. They need numpy, grpcio and protobuf only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crl_sdk._lazy import lazy_names
from crl_sdk._progress import GenerationProgress

if TYPE_CHECKING:
    from crl_sdk.client._client import AsyncClient, Client
    from crl_sdk.client._options import ClientOptions, ClientSecurity
    from crl_sdk.client._results import BasisInfo, ServedBasis, ServedModel, ServedPreprocessing

__all__ = [
    "AsyncClient",
    "BasisInfo",
    "Client",
    "ClientOptions",
    "ClientSecurity",
    "GenerationProgress",
    "ServedBasis",
    "ServedModel",
    "ServedPreprocessing",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "_client": (
            "AsyncClient",
            "Client",
        ),
        "_options": (
            "ClientOptions",
            "ClientSecurity",
        ),
        "_results": (
            "BasisInfo",
            "ServedBasis",
            "ServedModel",
            "ServedPreprocessing",
        ),
    },
    extra="cpu",
)
