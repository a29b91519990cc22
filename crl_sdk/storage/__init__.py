"""Files on disk: atomic writes, JSON records, and safetensors files with a checksum."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crl_sdk._lazy import lazy_names

if TYPE_CHECKING:
    from crl_sdk.storage._atomic_files import (
        make_directory,
        read_record,
        write_atomically,
        write_record,
    )
    from crl_sdk.storage._checksummed_safetensors import (
        SUFFIX,
        decode_checksummed,
        encode_checksummed,
    )

__all__ = [
    "SUFFIX",
    "decode_checksummed",
    "encode_checksummed",
    "make_directory",
    "read_record",
    "write_atomically",
    "write_record",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "_atomic_files": (
            "make_directory",
            "read_record",
            "write_atomically",
            "write_record",
        ),
        "_checksummed_safetensors": (
            "SUFFIX",
            "encode_checksummed",
            "decode_checksummed",
        ),
    },
    extra="cpu",
)
