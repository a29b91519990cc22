"""Files that a crash or a full disk leaves as they were, and the JSON records kept in them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from crl_sdk.errors import CrlError

Record = TypeVar("Record", bound=msgspec.Struct)


def make_directory(path: Path, failure: type[CrlError]) -> None:
    """Make a directory and those above it, unless they exist.

    Raises:
        CrlError: of the kind `failure`: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise failure(f"{path}: cannot be made ({error.strerror}); choose another") from error


def write_atomically(path: Path, data: bytes, failure: type[CrlError]) -> None:
    """Write a file so that readers see the old or the new content, never a part, even on a crash.

    Args:
        path: of the file; its directory exists.
        data: all of it.
        failure: what to raise.

    Raises:
        CrlError: of the kind `failure`: the directory does not exist or the disk is full.
    """
    temporary: str | None = None
    try:
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False
        ) as file:
            temporary = file.name
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), 0o644)  # a temporary file is its owner's alone
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise failure(
            f"{path}: cannot be written ({error.strerror}); check the directory and free space"
        ) from error


def write_record(path: Path, record: msgspec.Struct, failure: type[CrlError]) -> None:
    """Write a struct as JSON to read, atomically.

    Raises:
        CrlError: of the kind `failure`, see `write_atomically`.
    """
    text = msgspec.json.format(msgspec.json.encode(record, order="deterministic"), indent=2)
    write_atomically(path, text + b"\n", failure)


def read_record(
    path: Path, kind: type[Record], schema: int, failure: type[CrlError], again: str
) -> Record:
    """Read what `write_record` wrote.

    Args:
        path: of the file.
        kind: of the struct.
        schema: that this SDK reads.
        failure: what to raise.
        again: what to do, for the message.

    Raises:
        CrlError: of the kind `failure`: it is missing, damaged, or of another schema.
    """
    try:
        raw: Any = msgspec.json.decode(path.read_bytes())
        found = raw.get("schema") if isinstance(raw, dict) else None
        if isinstance(found, int) and found != schema:
            raise failure(f"{path}: schema {found}, this SDK reads {schema}; {again}")
        return msgspec.convert(raw, kind)
    except (msgspec.MsgspecError, OSError) as error:
        raise failure(f"{path}: not a readable record ({error}); {again}") from error
