"""Search for image files."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from crl_sdk.errors import ImageError
from crl_sdk.model._image_formats import DEFAULT_FORMATS, SUFFIXES

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
    suffixes = [suffix for name in formats for suffix in SUFFIXES[name]]
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(_search(path, suffixes, leave_out))
        if not inside:
            raise ImageError(
                f"no image files in this directory; looked for {', '.join(suffixes)}",
                source=str(path),
            )
        found += inside
    return found


def _search(directory: Path, suffixes: Sequence[str], leave_out: LeaveOut) -> Iterator[Path]:
    def unreadable(error: OSError) -> None:
        leave_out(f"{error.filename}: cannot be searched ({error.strerror})")

    for folder, _, names in os.walk(directory, onerror=unreadable):
        for name in names:
            path = Path(folder, name)
            if path.suffix.lower() not in suffixes:
                continue
            try:
                regular = stat.S_ISREG(path.stat().st_mode)
            except OSError as error:
                leave_out(f"{path}: cannot be read ({error.strerror})")
                continue
            if regular:
                yield path
            else:
                leave_out(f"{path}: not a file, but a pipe, socket or device")


def printable_path(path: Path) -> str:
    r"""Return a path as text that any file and terminal takes.

    Bytes of a name that are not UTF-8 are written as `\xff`.
    """
    return os.fsencode(path).decode("utf-8", "backslashreplace")
