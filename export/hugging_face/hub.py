"""Finds the directory of a model: a local one, or the files of a repository of the hub.

The files lie in the cache of huggingface_hub, in a directory named after the commit. It needs no
torch.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path, PurePosixPath
from typing import Any

from crl_export.hugging_face.cache import (
    cached_commit,
    check_digest,
    files_of,
    remember,
    snapshot_of,
)
from crl_sdk.errors import ExportError, MissingDependencyError

Report = Callable[[str], None]
"""Function that is called with what is being downloaded, in words."""

_log = logging.getLogger(__name__)

PREFIX = "hf:"
_NAME = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")

OPEN_CLIP_CONFIG = "open_clip_config.json"
_OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_WEIGHTS = re.compile(
    r"(?P<folder>(?:\d_\w+/)?)(?P<kind>model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)"
)
_SMALL = re.compile(r"(\d_\w+/)?[\w.-]+\.(json|txt|model|md|gz|spm)")
"""Configuration, tokenizers and the model card; those of sentence-transformers are in folders."""

_WEIGHT_ENDS = (".safetensors", ".bin")


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository of the hub at one commit, and the directory of its files in the cache.

    Attributes:
        name: OWNER/REPO.
        revision: Branch, tag or commit that was asked for.
        commit: Commit, 40 hex digits.
        files: Names of its files with their sizes in bytes. Without network, those in the cache.
        directory: Directory in the cache of huggingface_hub.
        offline: Whether the hub could not be reached.
    """

    name: str
    revision: str
    commit: str
    files: Mapping[str, int]
    directory: Path
    offline: bool = False

    def download(self, files: Sequence[str], report: Report | None = None) -> Path:
        """Download the files that are not in the cache yet, and check the digests of all.

        Args:
            files: Names of files of the repository.
            report: Function that is called with the file that is downloaded and how far it is.

        Returns:
            The directory.

        Raises:
            ExportError: If one cannot be downloaded, or is damaged.
        """
        missing = [file for file in files if not (self.directory / file).is_file()]
        if missing and not self.offline:
            _log.info(
                "downloading %d file%s, %s, of %s at %s: %s",
                len(missing),
                "" if len(missing) == 1 else "s",
                _megabytes(sum(self.files[file] for file in missing)),
                self.name,
                self.commit[:12],
                ", ".join(missing),
            )
        for number, file in enumerate(missing, start=1):
            self._fetch(file, f"downloading {file}, {number} of {len(missing)}", report)
        for file in files:
            check_digest(self.directory / file)
        if not self.offline and self.revision != self.commit:
            remember(self.directory, self.revision, self.commit)
        return self.directory

    def _fetch(self, file: str, stage: str, report: Report | None) -> None:
        from huggingface_hub import hf_hub_download

        options: dict[str, Any] = {}
        if report is not None:
            report(f"{stage}, {_megabytes(self.files[file])}")
            if "tqdm_class" in signature(hf_hub_download).parameters:  # huggingface_hub 1 and later
                options["tqdm_class"] = _reporting_bar(stage, report)
        try:
            with _quiet():
                hf_hub_download(self.name, file, revision=self.commit, **options)
        except Exception as error:  # huggingface_hub and its HTTP library raise many types
            raise _failure(f"{PREFIX}{self.name}", error, file) from error


def find_directory(
    name: str,
    report: Report | None = None,
    *,
    choose: Callable[[Sequence[str]], list[str]] | None = None,
    check: Callable[[Path], object] | None = None,
) -> Path:
    """Return the directory of a model, after downloading what is needed and not there yet.

    Args:
        name: A directory, or `hf:OWNER/REPO`, perhaps with `@REVISION`.
        report: Function that is called with the progress of downloads.
        choose: Function from the names of the files to those that are needed. None for those of
            `wanted_files`.
        check: Function that is called with the directory before weights are downloaded, when all
            other files are there. It raises if the model cannot be exported.

    Raises:
        ExportError: If there is no such directory or repository, it has no weights, or it cannot be
            downloaded.
        MissingDependencyError: If huggingface_hub is not installed.
    """
    if not name.startswith(PREFIX):
        directory = Path(name)
        if not directory.is_dir():
            raise ExportError(f"{name}: no such directory; expected one, or hf:OWNER/REPO")
        return directory
    repository = open_repository(name)
    files = list(repository.files)
    wanted = (choose or wanted_files)(files)
    if choose is None and not any(file.endswith(_WEIGHT_ENDS) for file in wanted):
        raise _without_weights(name, repository)
    if check is not None:
        check(repository.download(small_files(wanted), report))
    return repository.download(wanted, report)


def open_repository(name: str, extra: str = "transformers") -> Repository:
    """Look up a repository; nothing is downloaded yet.

    Args:
        name: `hf:OWNER/REPO`, perhaps with `@REVISION`.
        extra: Extra of this package that installs huggingface_hub, for the error.

    Raises:
        ExportError: If the name is malformed, there is no such repository or revision, it may not
            be read, or neither the hub nor the cache has it.
        MissingDependencyError: If huggingface_hub is not installed.
    """
    match = _NAME.fullmatch(name)
    if match is None or ".." in name:  # a revision is a part of paths in the cache
        raise ExportError(f"expected hf:OWNER/REPO or hf:OWNER/REPO@REVISION, got {name[:120]!r}")
    repository, revision = match[1], match[2] or "main"
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise MissingDependencyError("huggingface_hub", extra, "downloading a model") from error
    try:
        with _quiet():
            info = HfApi().model_info(repository, revision=revision, files_metadata=True)
    except Exception as error:  # huggingface_hub and its HTTP library raise many types
        failure = _failure(name, error)
        if isinstance(error, _denials()):
            raise failure from error
        commit = cached_commit(repository, revision)
        if commit is None:
            raise failure from error
        _log.warning("%s: the hub cannot be reached; taking what was downloaded before", name)
        directory = snapshot_of(repository, commit)
        there = files_of(directory)
        return Repository(repository, revision, commit, there, directory, offline=True)
    files = {
        each.rfilename: each.size or 0 for each in info.siblings or () if _is_inside(each.rfilename)
    }
    commit = str(info.sha)
    if not re.fullmatch("[0-9a-f]{40}", commit):
        raise ExportError(
            f"{name}: {_endpoint()} names the commit {commit[:80]!r}, expected 40 hex digits; "
            "check HF_ENDPOINT"
        )
    return Repository(repository, revision, commit, files, snapshot_of(repository, commit))


def _denials() -> tuple[type[Exception], ...]:
    """Return the errors of a hub that was reached, after which the cache is not asked."""
    from huggingface_hub import errors

    return (
        errors.RepositoryNotFoundError,
        errors.RevisionNotFoundError,
        errors.GatedRepoError,
        errors.HFValidationError,
    )


def _failure(name: str, error: Exception, file: str = "") -> ExportError:
    """Return the error for what huggingface_hub raised."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    what = f"{name}: {file} cannot be downloaded" if file else name
    page = name.removeprefix(PREFIX).split("@")[0]
    if isinstance(error, errors.GatedRepoError) or (file and status in (401, 403)):
        return ExportError(
            f"{what}: the repository is gated; accept its terms at {_endpoint()}/{page}, and set "
            "HF_TOKEN to a token of your account that may read it"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ExportError(f"{what}: has no such revision; check what follows @")
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403):
        return ExportError(
            f"{what}: {_endpoint()} has no such repository, or it is private; check the name, and "
            "set HF_TOKEN to a token that may read it"
        )
    if isinstance(error, errors.HFValidationError):
        return ExportError(f"expected hf:OWNER/REPO or hf:OWNER/REPO@REVISION, got {name[:120]!r}")
    reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"
    if file:
        return ExportError(
            f"{what}: the download broke off ({reason}); run the command again: files that are "
            "complete are kept"
        )
    return ExportError(
        f"{what}: {_endpoint()} cannot be reached ({reason}), and the repository was not "
        "downloaded before; check the network, or copy its files into a directory and pass that"
    )


def _without_weights(name: str, repository: Repository) -> ExportError:
    if repository.offline:
        return ExportError(
            f"{name}: {_endpoint()} cannot be reached, and the weights were not downloaded before; "
            "check the network, or copy the files into a directory and pass that"
        )
    if any(file.endswith(".onnx") for file in repository.files):
        return ExportError(
            f"{name}: has ONNX graphs, but no weights for torch; import them: crl import {name} "
            "--out BUNDLE"
        )
    there = ", ".join(sorted(repository.files)[:8]) or "nothing"
    return ExportError(
        f"{name}: has no model.safetensors, pytorch_model.bin or weights of open_clip; it has "
        f"{there}. Check the name"
    )


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def _is_inside(name: str) -> bool:
    """Return whether the name of a file stays inside the directory of its repository."""
    parts = PurePosixPath(name).parts
    return bool(parts) and parts[0] != "/" and ".." not in parts and "\\" not in name


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the bars and the log of huggingface_hub, which would be drawn over the bar of `crl`.

    Failures are raised.
    """
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)
        if shown:
            enable_progress_bars()


def _reporting_bar(stage: str, report: Report) -> Any:
    """Return a class of progress bars that report instead of drawing."""
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "file": io.StringIO(), "disable": False})

        def display(self, *_: Any, **__: Any) -> None:
            report(f"{stage}, {_megabytes(int(self.n))} of {_megabytes(int(self.total or 0))}")

    return Bar


def small_files(files: Sequence[str]) -> list[str]:
    """Return the files that are not weights: configuration, tokenizer and model card."""
    return [file for file in files if _SMALL.fullmatch(file)]


def wanted_files(files: Sequence[str]) -> list[str]:
    """Return the files of a repository that an export reads.

    Weights come as safetensors if there are any. open_clip's own weights come before those of
    transformers.
    """
    small = small_files(files)
    if OPEN_CLIP_CONFIG in files:
        weights = [file for file in _OPEN_CLIP_WEIGHTS if file in files][:1]
        if weights:
            return small + weights
    found = [match for file in files if (match := _WEIGHTS.fullmatch(file))]
    safe = {match["folder"] for match in found if match["kind"] == "model"}
    return small + [
        match.string for match in found if match["kind"] == "model" or match["folder"] not in safe
    ]
