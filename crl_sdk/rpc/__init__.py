"""Arrays and errors in the messages of gRPC, for client and server."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crl_sdk._lazy import lazy_names

if TYPE_CHECKING:
    from crl_sdk.rpc._status import error_from_status, error_trailers, status_code
    from crl_sdk.rpc._tensors import decode_tensor, encode_tensor

__all__ = [
    "decode_tensor",
    "encode_tensor",
    "error_from_status",
    "error_trailers",
    "status_code",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "_status": (
            "status_code",
            "error_from_status",
            "error_trailers",
        ),
        "_tensors": (
            "decode_tensor",
            "encode_tensor",
        ),
    },
    extra="cpu",
)
