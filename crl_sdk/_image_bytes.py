"""Read the bytes of image files: of regular files only, and no more than a limit."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable

from crl_sdk.errors import ImageError, ImageTooLargeError

_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def read_image_file(path: str | os.PathLike[str], name: str, max_bytes: int) -> bytes:
    """Return the content of an image file.

    Args:
        path: Path of the file.
        name: Name of the image in error messages.
        max_bytes: Largest size of the file in bytes.

    Raises:
        ImageTooLargeError: If the file is larger.
        ImageError: If it cannot be read, or is a directory, pipe or device.
    """
    try:
        # a pipe without a writer would keep `open` waiting for ever
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                kind = next((each for test, each in _KINDS if test(status.st_mode)), "no file")
                raise ImageError(f"expected a file, got {kind}; leave it out", source=name)
            check_bytes(status.st_size, name, max_bytes)
            data = file.read(max_bytes + 1)  # it may grow, or not know its size
    except OSError as error:
        raise ImageError(
            f"cannot be read ({error.strerror or error}); check the path", source=name
        ) from error
    check_bytes(len(data), name, max_bytes)
    return data


def check_bytes(nbytes: int, name: str, max_bytes: int) -> None:
    """Raise an error if an encoded image is too large.

    Raises:
        ImageTooLargeError: If `nbytes` exceeds `max_bytes`.
    """
    if nbytes > max_bytes:
        raise ImageTooLargeError(
            f"{nbytes:,} bytes are over the limit of {max_bytes:,}; send a smaller image "
            "or raise ImageLimits.max_bytes",
            source=name,
        )
