"""Safetensors files with a JSON header that holds the SHA-256 of the header and all tensors.

Bases and classifiers are stored in such files: they hold no pickle, equal content gives equal
bytes, and a changed byte is detected.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from crl_sdk.errors import InvalidInputError, UnsupportedSchemaError
from crl_sdk.storage._json import decode_json

SUFFIX = ".safetensors"
"""Suffix of the file names."""


Header = TypeVar("Header", bound=msgspec.Struct)


def encode_checksummed(
    key: str, header: msgspec.Struct, tensors: Mapping[str, NDArray[Any]]
) -> bytes:
    """Serialise a header and tensors, with their checksum.

    Args:
        key: Name of the header in the file's metadata.
        header: Struct with a field `schema` and an empty field `sha256`.
        tensors: C-contiguous arrays by name.

    Returns:
        Content of the file.
    """
    from safetensors.numpy import save

    signed = msgspec.structs.replace(header, sha256=content_sha256(header, tensors))
    metadata = msgspec.json.encode(signed, order="deterministic").decode()
    return bytes(save(dict(tensors), {key: metadata}))


def decode_checksummed(
    data: bytes, key: str, kind: type[Header], *, schema: int, where: str, remedy: str
) -> tuple[Header, dict[str, NDArray[Any]]]:
    """Read the header and the tensors of a file, without comparing the checksum.

    The caller checks the values and then calls `require_checksum`.

    Args:
        data: Content of the file.
        key: Name of the header in the file's metadata.
        kind: Type of the header.
        schema: Schema that this SDK reads.
        where: Name of the file, for error messages.
        remedy: What to do with a file of an older schema.

    Returns:
        The header, and the arrays by name.

    Raises:
        UnsupportedSchemaError: If the file has another schema.
        safetensors.SafetensorError, msgspec.MsgspecError, KeyError: If it is not such a file.
    """
    from safetensors.numpy import load

    tensors = load(data)  # first, so that the library checks the file before we parse it
    length = int.from_bytes(data[:8], "little")
    metadata = decode_json(data[8 : 8 + length]).get("__metadata__") or {}
    raw = decode_json(metadata[key])
    found = raw.get("schema") if isinstance(raw, dict) else None
    if isinstance(found, int) and found != schema:
        raise UnsupportedSchemaError(
            f"{where}: schema {found}, this SDK reads {schema}: "
            + ("upgrade crl-embeddings" if found > schema else remedy)
        )
    return msgspec.convert(raw, kind), tensors


def require_checksum(
    sha256: str, header: msgspec.Struct, tensors: Mapping[str, NDArray[Any]]
) -> None:
    """Raise an error if the content does not have the checksum in its header.

    Args:
        sha256: Checksum from the header of the file.
        header: Header made again from the values that were read, with an empty `sha256`.
        tensors: Arrays that were read.

    Raises:
        InvalidInputError: If the checksum differs.
    """
    if sha256 != content_sha256(header, tensors):
        raise InvalidInputError("the content does not have the SHA-256 in the header")


def content_sha256(header: msgspec.Struct, tensors: Mapping[str, NDArray[Any]]) -> str:
    """Return the SHA-256 of a header with an empty `sha256` and of tensors, as 64 hex digits."""
    found = hashlib.sha256(msgspec.json.encode(header, order="deterministic"))
    for name in sorted(tensors):
        found.update(f"{name}{tensors[name].shape}{tensors[name].dtype}".encode())
        found.update(np.ascontiguousarray(tensors[name]).tobytes())
    return found.hexdigest()
