"""Safetensors files whose JSON header holds the SHA-256 of itself and of all tensors.

What a basis and a classifier are kept in: no pickle, equal content gives equal bytes, and a changed
byte is noticed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from crl_sdk.errors import InvalidInputError, UnsupportedSchemaError

SUFFIX = ".safetensors"
"""Suffix of the file names."""


Header = TypeVar("Header", bound=msgspec.Struct)


def seal(key: str, header: msgspec.Struct, tensors: Mapping[str, NDArray[Any]]) -> bytes:
    """Serialise tensors and a header.

    Args:
        key: of the header in the file's metadata.
        header: with a field `schema`, and a field `sha256` that is empty.
        tensors: contiguous.
    """
    from safetensors.numpy import save

    signed = msgspec.structs.replace(header, sha256=digest(header, tensors))
    metadata = msgspec.json.encode(signed, order="deterministic").decode()
    return bytes(save(dict(tensors), {key: metadata}))


def unseal(
    data: bytes, key: str, kind: type[Header], *, schema: int, where: str, remake: str
) -> tuple[Header, dict[str, NDArray[Any]]]:
    """Read header and tensors; `require_digest` checks that they belong together.

    Args:
        data: of the file.
        key: of the header in the file's metadata.
        kind: of the header.
        schema: that this SDK reads.
        where: names the file in errors.
        remake: what to do with a file of an older schema.

    Raises:
        UnsupportedSchemaError: it is written in another schema.
        safetensors.SafetensorError, msgspec.MsgspecError, KeyError: it is no such file.
    """
    from safetensors.numpy import load

    tensors = load(data)  # the library's checks come first
    length = int.from_bytes(data[:8], "little")
    metadata = msgspec.json.decode(data[8 : 8 + length]).get("__metadata__") or {}
    raw = msgspec.json.decode(metadata[key])
    found = raw.get("schema") if isinstance(raw, dict) else None
    if isinstance(found, int) and found != schema:
        raise UnsupportedSchemaError(
            f"{where}: schema {found}, this SDK reads {schema}: "
            + ("upgrade crl-embeddings" if found > schema else remake)
        )
    return msgspec.convert(raw, kind), tensors


def require_digest(
    sha256: str, header: msgspec.Struct, tensors: Mapping[str, NDArray[Any]]
) -> None:
    """Refuse content that does not give the digest that its file holds.

    Args:
        sha256: of the file's header.
        header: made again of what was read, its own `sha256` empty.
        tensors: as read.

    Raises:
        InvalidInputError: it does not.
    """
    if sha256 != digest(header, tensors):
        raise InvalidInputError("its content does not give the SHA-256 in its header")


def digest(header: msgspec.Struct, tensors: Mapping[str, NDArray[Any]]) -> str:
    """Digest a header whose `sha256` is empty, and tensors: SHA-256, 64 hex digits."""
    found = hashlib.sha256(msgspec.json.encode(header, order="deterministic"))
    for name in sorted(tensors):
        found.update(f"{name}{tensors[name].shape}{tensors[name].dtype}".encode())
        found.update(np.ascontiguousarray(tensors[name]).tobytes())
    return found.hexdigest()
