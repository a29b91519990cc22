"""The cache of huggingface_hub, and what the directory of a model says about itself.

Each repository has a directory `models--OWNER--REPO` with `blobs`, the files, named after their
digests; `snapshots/COMMIT`, with links to them; and `refs`, with the commits of branches and tags.
It needs no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from pathlib import Path

from crl_sdk.errors import ExportError
from crl_sdk.storage._atomic_files import replace_file

_LICENSE = re.compile(r"^license:[ \t]*(?:\r?\n[ \t]*-[ \t]*)?[\"']?([\w.+-]+)", re.MULTILINE)
_LICENSE_NAME = re.compile(r"^license_name:[ \t]*[\"']?([\w.+-]+)", re.MULTILINE)


def snapshot_of(repository: str, commit: str) -> Path:
    """Return the directory of a commit in the cache of huggingface_hub."""
    from huggingface_hub import constants

    folder = f"models--{repository.replace('/', '--')}"
    return Path(constants.HF_HUB_CACHE).expanduser() / folder / "snapshots" / commit


def cached_commit(repository: str, revision: str) -> str | None:
    """Return the commit of a revision if the cache has it, 40 hex digits; None otherwise."""
    commit = revision
    reference = snapshot_of(repository, "").parent / "refs" / revision
    if reference.is_file():
        commit = reference.read_text(encoding="ascii", errors="replace").strip()
    known = re.fullmatch(r"[0-9a-f]{40}", commit) and snapshot_of(repository, commit).is_dir()
    return commit if known else None


def files_of(directory: Path) -> dict[str, int]:
    """Return the names of the files below a directory, with their sizes in bytes."""
    return {
        each.relative_to(directory).as_posix(): each.stat().st_size
        for each in directory.rglob("*")
        if each.is_file()
    }


def remember(directory: Path, revision: str, commit: str) -> None:
    """Record in the cache which commit a revision is, so that it is found without network."""
    reference = directory.parent.parent / "refs" / revision
    with contextlib.suppress(OSError):  # a cache that may only be read
        reference.parent.mkdir(parents=True, exist_ok=True)
        replace_file(reference, commit.encode())


def check_digest(path: Path) -> None:
    """Check a file of the cache, which is a link to a file that is named after its digest.

    The name is the SHA-256 of a large file. Of a small one it is the SHA-1 that git gives it.

    Raises:
        ExportError: If it is missing or damaged.
    """
    if not path.is_file():
        raise ExportError(f"{path}: was not downloaded; run the command again with network")
    if not path.is_symlink():
        return
    name = Path(os.readlink(path)).name
    if re.fullmatch("[0-9a-f]{64}", name):
        digest = hashlib.sha256()
    elif re.fullmatch("[0-9a-f]{40}", name):
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    else:
        return
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != name:
        raise ExportError(
            f"{path}: is damaged: its digest is {digest.hexdigest()}, expected {name}; delete "
            f"{path.resolve()} and run the command again"
        )


def is_cached(directory: Path) -> bool:
    """Return whether a directory is that of a commit in the cache."""
    directory = directory.absolute()
    repository = directory.parent.parent.name
    return directory.parent.name == "snapshots" and repository.startswith("models--")


def label_of(directory: Path) -> str:
    """Return a name of a directory for the manifest: a repository with its commit, or its name."""
    directory = directory.absolute()
    cache = directory.parent.parent.name
    if is_cached(directory):
        return f"{cache.removeprefix('models--').replace('--', '/')}@{directory.name}"
    return f"directory {directory.name}"


def name_of(directory: Path) -> str:
    """Return the name of a model without its owner: that of the repository, or of the directory."""
    return label_of(directory).removeprefix("directory ").split("@")[0].split("/")[-1]


def license_of(directory: Path) -> str | None:
    """Return the licence that the model card of a directory names; None if it names none."""
    try:
        with (directory / "README.md").open(encoding="utf-8", errors="replace") as file:
            card = file.read(1 << 16)
    except OSError:
        return None
    head = card.split("\n---", 1)[0] if card.startswith("---") else ""
    match = _LICENSE.search(head)
    named = _LICENSE_NAME.search(head)
    if match and match[1] == "other" and named:
        return named[1]
    return match[1] if match else None
