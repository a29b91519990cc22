"""Search for image files."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

from crl_sdk.errors import ImageError
from crl_sdk.model._image_formats import DEFAULT_FORMATS, SUFFIXES

_SORTED = 100_000
"""Number of entries of a directory up to which they are sorted."""

LeaveOut = Callable[[str], None]
"""Told about each directory and file that a search leaves out, with the reason."""


def find_image_files(
    paths: Iterable[Path],
    *,
    formats: Sequence[str] = DEFAULT_FORMATS,
    leave_out: LeaveOut = lambda _: None,
) -> list[Path]:
    """Return the image files at some paths.

    Args:
        paths: Files and directories. A file is taken whatever its suffix. A directory is searched
            with all its subdirectories; links to directories are not followed.
        formats: Formats whose files a search finds, by their suffixes in upper or lower case.
        leave_out: Called with each directory that cannot be read, and each pipe or device with the
            name of an image.

    Returns:
        The files in the order of `paths`, those of one directory sorted by path.

    Raises:
        ImageError: If a directory holds no image file.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(walk_image_files(path, formats=formats, leave_out=leave_out))
        if not inside:
            suffixes = [suffix for name in formats for suffix in SUFFIXES[name]]
            raise ImageError(
                f"no image files in this directory; looked for {', '.join(suffixes)}",
                source=str(path),
            )
        found += inside
    return found


def walk_image_files(
    directory: Path,
    *,
    formats: Sequence[str] = DEFAULT_FORMATS,
    leave_out: LeaveOut = lambda _: None,
) -> Iterator[Path]:
    """Yield the image files of a directory and its subdirectories, one by one.

    The entries of a directory come sorted by name, unless there are more than `_SORTED`: those come
    in the order of the file system, so that they need not be in memory.

    Args:
        directory: Directory to search. Links to directories are not followed.
        formats: Formats whose files are found, by their suffixes in upper or lower case.
        leave_out: Called with each directory and file that is left out.
    """
    suffixes = tuple(suffix for name in formats for suffix in SUFFIXES[name])
    try:
        with os.scandir(directory) as scanned:
            for entry in _in_order(scanned):
                if entry.is_dir(follow_symlinks=False):
                    yield from walk_image_files(
                        Path(entry.path), formats=formats, leave_out=leave_out
                    )
                elif os.path.splitext(entry.name)[1].lower() in suffixes and _is_regular(
                    entry, leave_out
                ):
                    yield Path(entry.path)
    except OSError as error:
        leave_out(f"{directory}: cannot be searched ({error.strerror})")


def _in_order(entries: Iterator[os.DirEntry[str]]) -> Iterator[os.DirEntry[str]]:
    first = list(islice(entries, _SORTED + 1))
    if len(first) <= _SORTED:
        first.sort(key=lambda entry: entry.name)
    return chain(first, entries)


def _is_regular(entry: os.DirEntry[str], leave_out: LeaveOut) -> bool:
    try:
        if entry.is_symlink() and entry.is_dir():
            return False
        regular = stat.S_ISREG(entry.stat().st_mode)
    except OSError as error:
        leave_out(f"{entry.path}: cannot be read ({error.strerror})")
        return False
    if not regular:
        leave_out(f"{entry.path}: not a file, but a pipe, socket or device")
    return regular


def printable_path(path: Path) -> str:
    r"""Return a path as text that any file and terminal takes.

    Bytes of a name that are not UTF-8 are written as `\xff`.
    """
    return os.fsencode(path).decode("utf-8", "backslashreplace")
