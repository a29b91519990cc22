"""Search for image files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from crl_sdk.errors import ImageError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""Suffixes of the files that a search finds, in lower case. Upper case is found too."""


def find_image_files(paths: Iterable[Path]) -> list[Path]:
    """Return the image files at some paths.

    Args:
        paths: Files and directories. A file is taken whatever its suffix. A directory is searched
            with all its subdirectories.

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
        inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        if not inside:
            raise ImageError(
                f"no image files in this directory; looked for {', '.join(IMAGE_SUFFIXES)}",
                source=str(path),
            )
        found += inside
    return found
