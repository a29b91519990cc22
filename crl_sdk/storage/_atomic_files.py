"""Files and directories that are replaced completely or not at all, and JSON records in files."""

from __future__ import annotations

import errno
import glob
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TypeVar, cast

import msgspec

from crl_sdk.errors import CrlError
from crl_sdk.storage._json import decode_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_SUFFIX = ".tmp"

_GRACE = 60.0
"""Age in seconds from which a temporary file without a lock is taken for left behind. A younger one
may belong to a process that is about to lock it."""

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
"""Errors of file systems that have no hard links."""

Record = TypeVar("Record", bound=msgspec.Struct)


def make_directory(path: Path, failure: type[CrlError]) -> None:
    """Create a directory and its parents, unless they exist. New ones are on the disk afterwards.

    Args:
        path: Path of the directory.
        failure: Type of the error to raise.

    Raises:
        CrlError: If the directory cannot be created. Its type is `failure`.
    """
    try:
        missing = [each for each in (path, *path.parents) if not each.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for each in missing:
            sync_directory(each.parent)
    except OSError as error:
        raise failure(
            f"{path}: the directory cannot be created ({error.strerror}); choose another"
        ) from error


@contextmanager
def new_file(path: Path, failure: type[CrlError]) -> Iterator[BinaryIO]:
    """Yield a file that takes the place of `path` when the block ends without an error.

    Readers see the old or the new content, even after a crash: the file and its directory are
    synchronised with the disk. If the block raises, nothing is left of the file. What a killed
    process left of an earlier file of this name is removed.

    Args:
        path: Path of the file; its directory must exist.
        failure: Type of the error to raise.

    Yields:
        The file, open for reading and writing. Its name is that of a temporary file.

    Raises:
        CrlError: If the file cannot be written. Its type is `failure`.
    """
    with new_files([path], failure) as files:
        yield files[0]


@contextmanager
def new_files(
    paths: Sequence[Path], failure: type[CrlError], *, replaces: Path | None = None
) -> Iterator[list[BinaryIO]]:
    """Yield files that take their places when all of them are complete; see `new_file`.

    Args:
        paths: Paths of the files, in one directory, which must exist.
        failure: Type of the error to raise.
        replaces: A file that describes the old files. It is removed before the first of them is
            replaced.

    Yields:
        The files, open for reading and writing.

    Raises:
        CrlError: If a file cannot be written. Its type is `failure`.
    """
    path = paths[0]
    try:
        with ExitStack() as stack:
            files = []
            for path in paths:
                _remove_leftovers(path)
                files.append(stack.enter_context(_temporary_file(path)))
            yield files
            for path, file in zip(paths, files, strict=True):  # noqa: B007 - the error names it
                file.flush()
                os.fchmod(file.fileno(), 0o644)  # temporary files are readable by their owner only
                os.fsync(file.fileno())
            if replaces is not None:
                replaces.unlink(missing_ok=True)
            for path, file in zip(paths, files, strict=True):
                Path(file.name).replace(path)
        sync_directory(path.parent)
    except OSError as error:
        raise failure(
            f"{path}: cannot be written ({error.strerror or error}); check the directory and free "
            "space"
        ) from error


@contextmanager
def new_directory(path: Path, failure: type[CrlError]) -> Iterator[Path]:
    """Yield a directory that takes the place of `path` when the block ends without an error.

    Otherwise nothing is left of it, and `path` stays as it was. A directory at `path` is removed
    when the new one is in its place.

    Args:
        path: Path of the directory; its parent must exist.
        failure: Type of the error to raise.

    Yields:
        Path of the temporary directory, beside `path`.

    Raises:
        CrlError: If a directory or file cannot be written. Its type is `failure`.
    """
    try:
        _remove_leftovers(path)
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=_SUFFIX, dir=path.parent))
        lock = _lock(os.open(work, os.O_RDONLY))
        try:
            yield work
            for folder, _, files in os.walk(work):
                for name in files:
                    _sync(Path(folder, name))
                sync_directory(Path(folder))
            work.chmod(0o755)
            _swap(work, path)
        finally:
            os.close(lock)
            shutil.rmtree(work, ignore_errors=True)
        sync_directory(path.parent)
    except OSError as error:
        raise failure(
            f"{path}: cannot be written ({error.strerror or error}); check the directory and free "
            "space"
        ) from error


def _swap(work: Path, path: Path) -> None:
    """Put a finished directory in place, and then remove the old one."""
    if not path.exists():
        work.rename(path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=_SUFFIX, dir=path.parent))
    try:
        path.rename(old / path.name)
        work.rename(path)
    except BaseException:  # Ctrl-C too: the old one is removed below
        if not path.exists():
            (old / path.name).rename(path)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def sync_directory(path: Path) -> None:
    """Write the entries of a directory to the disk, so that a rename survives a power failure.

    Nothing happens where that is impossible: on Windows, on some network file systems, and in a
    directory that may be written but not listed.
    """
    if os.name != "posix":
        return
    try:
        _sync(path)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EINVAL, errno.ENOTSUP):
            raise


def _sync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


@contextmanager
def _temporary_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a file beside `path`, locked while it is open. It is deleted unless it was renamed."""
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=f".{path.name}.", suffix=_SUFFIX, delete=False
    ) as file:
        try:
            _lock(file.fileno())
            yield cast(BinaryIO, file)
        finally:
            Path(file.name).unlink(missing_ok=True)


def _lock(opened: int) -> int:
    """Lock an open file for its process. The lock ends with the process, however it ends."""
    if fcntl is not None:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return opened


def remove_leftovers(directory: Path, pattern: str) -> None:
    """Remove what killed processes left of temporary files; those of living ones stay.

    Args:
        directory: Directory of the files.
        pattern: Pattern of the names of the complete files, such as `*.safetensors`.
    """
    for leftover in _leftovers(directory, pattern):
        with suppress(OSError):
            leftover.unlink()


def _remove_leftovers(path: Path) -> None:
    """Remove what killed processes left of earlier temporary files or directories for `path`."""
    for leftover in _leftovers(path.parent, glob.escape(path.name)):
        with suppress(OSError):  # another process has removed it, or it belongs to somebody else
            old = leftover / path.name
            if old.is_dir() and not path.exists():  # killed in `_swap`, between its renames
                old.rename(path)
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()


def _leftovers(directory: Path, pattern: str) -> Iterator[Path]:
    """Yield temporary files and directories whose process has ended."""
    for leftover in list(directory.glob(f".{pattern}.*{_SUFFIX}")):
        with suppress(OSError):
            if time.time() - leftover.lstat().st_mtime >= _GRACE and not _is_locked(leftover):
                yield leftover


def replace_file(path: Path, data: bytes) -> None:
    """Write a file so that readers see the old or the new content, even after a crash.

    Raises:
        OSError: If it cannot be written.
    """
    _remove_leftovers(path)
    with _written_file(path, data) as written:
        written.replace(path)
    sync_directory(path.parent)


def create_file(path: Path, data: bytes) -> None:
    """Write a new file. If several processes create it at once, one of them succeeds.

    Raises:
        FileExistsError: If there is such a file already. It is left as it is.
        OSError: If it cannot be written.
    """
    _remove_leftovers(path)
    with _written_file(path, data) as written:
        try:
            os.link(written, path)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            with path.open("xb") as file:  # a reader may see a part of it
                file.write(data)
                os.fsync(file.fileno())
    sync_directory(path.parent)


@contextmanager
def _written_file(path: Path, data: bytes) -> Iterator[Path]:
    """Yield a temporary file beside `path` that holds some bytes and is on the disk."""
    with _temporary_file(path) as file:
        file.write(data)
        file.flush()
        os.fchmod(file.fileno(), 0o644)  # temporary files are readable by their owner only
        os.fsync(file.fileno())
        yield Path(file.name)


def delete_file(path: Path) -> None:
    """Delete a file, so that it does not come back after a power failure.

    Raises:
        OSError: If it cannot be deleted.
    """
    path.unlink()
    sync_directory(path.parent)


def _is_locked(path: Path) -> bool:
    if fcntl is None:
        return True
    opened = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(opened)
    return False


def write_atomically(path: Path, data: bytes, failure: type[CrlError]) -> None:
    """Write a file so that readers see the old or the new content, even after a crash.

    Args:
        path: Path of the file; its directory must exist.
        data: Complete content.
        failure: Type of the error to raise.

    Raises:
        CrlError: If the file cannot be written. Its type is `failure`.
    """
    with new_file(path, failure) as file:
        file.write(data)


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
        raw = decode_json(path.read_bytes())
        found = raw.get("schema") if isinstance(raw, dict) else None
        if isinstance(found, int) and found != schema:
            raise failure(f"{path}: schema {found}, this SDK reads {schema}; {remedy}")
        return msgspec.convert(raw, kind)
    except OSError as error:
        raise failure(f"{path}: cannot be read ({error.strerror}); {remedy}") from error
    except msgspec.MsgspecError as error:
        raise failure(f"{path}: not a readable record ({error}); {remedy}") from error
