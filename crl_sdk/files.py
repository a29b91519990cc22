"""Writing files so that a crash or a full disk leaves the old one."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from crl_sdk.errors import CrlError


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
