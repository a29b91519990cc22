"""Small files that processes of many machines share: in a directory, or in an object store.

The one thing that all such places can do is to create a file unless it exists. A rename that
replaces, a lock or a clock that all machines agree on is not needed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from crl_sdk.errors import InvalidInputError, MissingDependencyError
from crl_sdk.storage._atomic_files import create_file, replace_file

Result = TypeVar("Result")

_FILE = "file://"


class SharedFiles(Protocol):
    """Files below a prefix. Names are relative to it, with at most one `/`.

    All methods raise OSError if the place cannot be reached, whatever its driver raises.
    """

    def names(self, folder: str) -> list[str]:
        """Return the names of the files in a folder, in any order; none if there is no folder."""

    def read(self, name: str) -> bytes:
        """Return the content of a file.

        Raises:
            FileNotFoundError: If there is no such file.
        """

    def write(self, name: str, data: bytes) -> None:
        """Write a file, which is replaced if it exists. Readers see all of it or nothing."""

    def create(self, name: str, data: bytes) -> None:
        """Write a new file. If several processes create it at once, one of them succeeds.

        Raises:
            FileExistsError: If there is such a file already.
        """

    def remove(self, name: str) -> None:
        """Remove a file. It is no error if there is none."""


def open_shared_files(url: str) -> SharedFiles:
    """Return the files below a directory or a URL. Nothing is created.

    Args:
        url: Directory, `file://` and its path, or a URL that fsspec knows, such as
            `s3://bucket/prefix`.

    Raises:
        InvalidInputError: If fsspec does not know the URL.
        MissingDependencyError: If fsspec or its driver for the URL is not installed.
    """
    if "://" not in url or url.startswith(_FILE):
        return _DirectoryFiles(Path(url.removeprefix(_FILE)))
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise MissingDependencyError("fsspec", "shared", url) from error
    try:
        system, root = url_to_fs(url)
    except ImportError as error:  # fsspec names the package of the driver
        raise MissingDependencyError(
            error.name or "fsspec", "shared", url, otherwise=f"and the driver of fsspec ({error})"
        ) from error
    except ValueError as error:
        raise InvalidInputError(
            f"expected a directory or a URL that fsspec knows, got {url!r} ({error})"
        ) from error
    return _ObjectFiles(system, root.rstrip("/"))


class _DirectoryFiles:
    """Files in a directory, such as one that is mounted over NFS."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def names(self, folder: str) -> list[str]:
        try:
            with os.scandir(self._root / folder) as entries:
                return [entry.name for entry in entries if not entry.name.startswith(".")]
        except FileNotFoundError:
            return []

    def read(self, name: str) -> bytes:
        return (self._root / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        replace_file(self._with_folder(name), data)

    def create(self, name: str, data: bytes) -> None:
        create_file(self._with_folder(name), data)

    def remove(self, name: str) -> None:
        (self._root / name).unlink(missing_ok=True)

    def _with_folder(self, name: str) -> Path:
        path = self._root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


class _ObjectFiles:
    """Files in what fsspec has a driver for. Those of object stores write whole files."""

    def __init__(self, system: Any, root: str) -> None:
        self._system, self._root = system, root

    def names(self, folder: str) -> list[str]:
        def work() -> list[str]:
            self._system.invalidate_cache()  # others write, which the driver does not notice
            return [str(each) for each in self._system.ls(self._path(folder), detail=False)]

        try:
            found = self._try(work)
        except FileNotFoundError:
            return []
        return [path.rstrip("/").rpartition("/")[2] for path in found]

    def read(self, name: str) -> bytes:
        return self._try(lambda: bytes(self._system.cat_file(self._path(name))))

    def write(self, name: str, data: bytes) -> None:
        self._try(lambda: self._system.pipe_file(self._path(name), data))

    def create(self, name: str, data: bytes) -> None:
        self._try(lambda: self._system.pipe_file(self._path(name), data, mode="create"))

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._try(lambda: self._system.rm_file(self._path(name)))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @staticmethod
    def _try(work: Callable[[], Result]) -> Result:
        """Do some work. Errors of a driver that are no OSError become one."""
        try:
            return work()
        except OSError:
            raise
        except Exception as error:  # each driver has its own: of HTTP, of credentials
            raise OSError(f"{type(error).__name__}: {error}") from error
