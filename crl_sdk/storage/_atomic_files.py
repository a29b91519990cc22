"""Files that are replaced completely or not at all, and JSON records stored in them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from crl_sdk.errors import CrlError

Record = TypeVar("Record", bound=msgspec.Struct)


def make_directory(path: Path, failure: type[CrlError]) -> None:
    """Create a directory and its parents, unless they exist.

    Args:
        path: Path of the directory.
        failure: Type of the error to raise.

    Raises:
        CrlError: If the directory cannot be created. Its type is `failure`.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise failure(
            f"{path}: the directory cannot be created ({error.strerror}); choose another"
        ) from error


def write_atomically(path: Path, data: bytes, failure: type[CrlError]) -> None:
    """Write a file so that readers see the old or the new content, even after a crash.

    Args:
        path: Path of the file; its directory must exist.
        data: Complete content.
        failure: Type of the error to raise.

    Raises:
        CrlError: If the file cannot be written. Its type is `failure`.
    """
    temporary: str | None = None
    try:
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False
        ) as file:
            temporary = file.name
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), 0o644)  # temporary files are readable by their owner only
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise failure(
            f"{path}: cannot be written ({error.strerror}); check the directory and free space"
        ) from error


def write_record(path: Path, record: msgspec.Struct, failure: type[CrlError]) -> None:
    """Write a struct as indented JSON, atomically.

    Args:
        path: Path of the file; its directory must exist.
        record: The struct.
        failure: Type of the error to raise.

    Raises:
        CrlError: If the file cannot be written. Its type is `failure`.
    """
    text = msgspec.json.format(msgspec.json.encode(record, order="deterministic"), indent=2)
    write_atomically(path, text + b"\n", failure)


def read_record(
    path: Path, kind: type[Record], schema: int, failure: type[CrlError], remedy: str
) -> Record:
    """Read a struct that `write_record` wrote.

    Args:
        path: Path of the file.
        kind: Type of the struct.
        schema: Schema that this SDK reads.
        failure: Type of the error to raise.
        remedy: What the user should do, for the error message.

    Returns:
        The struct.

    Raises:
        CrlError: If the file is missing, damaged or has another schema. Its type is `failure`.
    """
    try:
        raw: Any = msgspec.json.decode(path.read_bytes())
        found = raw.get("schema") if isinstance(raw, dict) else None
        if isinstance(found, int) and found != schema:
            raise failure(f"{path}: schema {found}, this SDK reads {schema}; {remedy}")
        return msgspec.convert(raw, kind)
    except OSError as error:
        raise failure(f"{path}: cannot be read ({error.strerror}); {remedy}") from error
    except msgspec.MsgspecError as error:
        raise failure(f"{path}: not a readable record ({error}); {remedy}") from error
