"""Finds the directory of a model: a local one, or the files of a repository of the hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from crl_sdk.errors import ExportError, MissingDependencyError

PREFIX = "hf:"
_NAME = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")

OPEN_CLIP_CONFIG = "open_clip_config.json"
_OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_WEIGHTS = re.compile(
    r"(?P<folder>(?:\d_\w+/)?)(?P<kind>model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)"
)
_SMALL = re.compile(r"(\d_\w+/)?[\w.-]+\.(json|txt|model|md|gz|spm)")
"""Configuration, tokenizers and the model card; those of sentence-transformers are in folders."""

_LICENSE = re.compile(r"^license:\s*[\"']?([\w.+-]+)", re.MULTILINE)


def find_directory(name: str) -> Path:
    """Return the directory of a model, after downloading it if necessary.

    Args:
        name: A directory, or `hf:OWNER/REPO`, perhaps with `@REVISION`.

    Raises:
        ExportError: If there is no such directory or repository, or it cannot be downloaded.
        MissingDependencyError: If huggingface_hub is not installed.
    """
    if not name.startswith(PREFIX):
        directory = Path(name)
        if not directory.is_dir():
            raise ExportError(f"{name}: no such directory; expected one, or hf:OWNER/REPO")
        return directory
    match = _NAME.fullmatch(name)
    if match is None:
        raise ExportError(f"expected hf:OWNER/REPO or hf:OWNER/REPO@REVISION, got {name[:120]!r}")
    return _download(name, *match.groups())


def _download(name: str, repository: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError as error:
        raise MissingDependencyError(
            "huggingface_hub", "transformers", "downloading a model"
        ) from error
    try:
        files = HfApi().list_repo_files(repository, revision=revision)
        patterns = [re.sub(r"([*?\[])", r"[\1]", file) for file in wanted_files(files)]
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except Exception as error:  # huggingface_hub and its HTTP library raise many types
        try:  # without network, what was downloaded before serves
            return Path(snapshot_download(repository, revision=revision, local_files_only=True))
        except LocalEntryNotFoundError:
            raise ExportError(
                f"{name}: cannot be downloaded ({type(error).__name__}: {str(error)[:200]}); check "
                "the name, set HF_TOKEN if the repository is gated, or copy its files into a "
                "directory and pass that"
            ) from error


def wanted_files(files: Sequence[str]) -> list[str]:
    """Return the files of a repository that an export reads.

    Weights come as safetensors if there are any. open_clip's own weights come before those of
    transformers.
    """
    small = [file for file in files if _SMALL.fullmatch(file)]
    if OPEN_CLIP_CONFIG in files:
        weights = [file for file in _OPEN_CLIP_WEIGHTS if file in files][:1]
        if weights:
            return small + weights
    found = [match for file in files if (match := _WEIGHTS.fullmatch(file))]
    safe = {match["folder"] for match in found if match["kind"] == "model"}
    return small + [
        match.string for match in found if match["kind"] == "model" or match["folder"] not in safe
    ]


def label_of(directory: Path) -> str:
    """Return a name of a directory for the manifest: a repository with its commit, or its name."""
    directory = directory.absolute()
    cache = directory.parent.parent.name
    if directory.parent.name == "snapshots" and cache.startswith("models--"):
        return f"{cache.removeprefix('models--').replace('--', '/')}@{directory.name[:12]}"
    return f"directory {directory.name}"


def license_of(directory: Path) -> str | None:
    """Return the licence that the model card of a directory names; None if it names none."""
    try:
        with (directory / "README.md").open(encoding="utf-8", errors="replace") as file:
            card = file.read(1 << 16)
    except OSError:
        return None
    head = card.split("\n---", 1)[0] if card.startswith("---") else ""
    match = _LICENSE.search(head)
    return match[1] if match else None
