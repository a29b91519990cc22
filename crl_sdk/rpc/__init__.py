"""What client and server share: arrays and errors as they travel over gRPC."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crl_sdk._lazy import lazy_names

if TYPE_CHECKING:
    from crl_sdk.rpc._status import code_of, error_of, trailers_of
    from crl_sdk.rpc._tensors import decode, encode

__all__ = [
    "code_of",
    "decode",
    "encode",
    "error_of",
    "trailers_of",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "_status": (
            "code_of",
            "error_of",
            "trailers_of",
        ),
        "_tensors": (
            "decode",
            "encode",
        ),
    },
    extra="cpu",
)
