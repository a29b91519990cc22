"""Reads and checks the files of models, which come from strangers. It needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from crl_sdk.errors import ExportError, IntegrityError
from crl_sdk.storage._json import decode_json

MAX_JSON = 64 << 20
"""Largest JSON file that is read, in bytes. The tokenizer of a multilingual model has 17 MB."""

_LFS = b"version https://git-lfs.github.com"


def read_json(path: Path) -> dict[str, Any]:
    """Read an object from a JSON file; empty if there is no file.

    Raises:
        ExportError: If it is too large, cannot be read, or is not a JSON object.
    """
    if not path.exists():
        return {}
    if not path.is_file():
        raise ExportError(f"{path}: expected a file, got {kind_of(path)}; get the file again")
    try:
        if path.stat().st_size > MAX_JSON:
            raise ExportError(
                f"{path}: expected at most {MAX_JSON >> 20} MiB of JSON, got "
                f"{path.stat().st_size >> 20} MiB; get the file again from its source"
            )
        content = decode_json(path.read_bytes())
    except (OSError, ValueError, IntegrityError) as error:
        raise ExportError(
            f"{path}: not readable as JSON ({error}); get the file again from its source"
        ) from error
    if not isinstance(content, dict):
        raise ExportError(
            f"{path}: expected a JSON object, got {type(content).__name__}; get the file again"
        )
    return content


def check_own_file(file: Path, directory: Path) -> None:
    """Check that a file is one, inside the directory of its model, and no pointer to another one.

    Raises:
        ExportError: If it is not a file, a link that leads elsewhere, or a pointer of Git LFS.
    """
    if not file.is_file():
        raise ExportError(f"{file}: not a file, or a link to nothing; download it again")
    check_inside(file, directory)
    check_no_pointer(file)


def check_no_pointer(file: Path) -> None:
    """Check that a file is not a pointer of Git LFS.

    Raises:
        ExportError: If it is one.
    """
    with file.open("rb") as opened:
        if opened.read(len(_LFS)) == _LFS:
            raise ExportError(
                f"{file}: a pointer of Git LFS, not the file itself; run `git lfs pull` in the "
                "repository, or download the file"
            )


def check_inside(file: Path, directory: Path) -> None:
    """Check that a file is not a link that leads out of a directory.

    Links into the cache of huggingface_hub are followed, if the directory is a part of it.

    Raises:
        ExportError: If the link leads elsewhere.
    """
    if not file.resolve().is_relative_to(_root(directory)):
        raise ExportError(
            f"{file}: a link that leads out of the directory of the model; do not use this model, "
            "or copy the file if you trust it"
        )


def _root(directory: Path) -> Path:
    """Return the directory that links may point into: the model's own, or its cache.

    The cache of huggingface_hub has `models--OWNER--NAME/snapshots/REVISION`, whose files are links
    into `models--OWNER--NAME/blobs`.
    """
    absolute = directory.absolute()
    for parent in (absolute, *absolute.parents):
        if parent.parent.name == "snapshots" and parent.parent.parent.name.startswith("models--"):
            return parent.parent.parent.resolve()
    return absolute.resolve()


def kind_of(path: Path) -> str:
    """Return in words what something is that is not a file."""
    return "a directory" if path.is_dir() else "a device or a pipe"
