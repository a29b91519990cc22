"""The formats of image files: those that are read by default, and those that must be named."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterable

from PIL import Image

from crl_sdk.errors import ImageTooLargeError, InvalidInputError

SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "JPEG2000": (".jp2", ".j2k", ".jpx"),
    "TGA": (".tga",),
    "ICO": (".ico",),
    "PSD": (".psd",),
    "DDS": (".dds",),
    "PCX": (".pcx",),
    "SGI": (".sgi", ".rgb"),
    "QOI": (".qoi",),
    "XBM": (".xbm",),
    "XPM": (".xpm",),
}
"""All formats that can be read, as Pillow names them, and the suffixes of their files."""

DEFAULT_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "PPM")
"""Formats that are read unless others are named too. Their decoders are widely used and tested."""

_ICON, _ICON_SIDE = b"\0\0\1\0", 256
"""First bytes of an icon, and the largest side that the format can name."""

_ALIASES = {"JPG": "JPEG", "TIF": "TIFF", "JP2": "JPEG2000", "J2K": "JPEG2000", "TARGA": "TGA"}


def check_formats(formats: Iterable[str]) -> tuple[str, ...]:
    """Return the names of formats in upper case, each once.

    Args:
        formats: Names in any case, such as `avif` and `JPEG2000`.

    Raises:
        InvalidInputError: If a format is unknown.
    """
    names = [_ALIASES.get(name.strip().upper(), name.strip().upper()) for name in formats]
    unknown = [name for name in names if name not in SUFFIXES]
    if unknown:
        raise InvalidInputError(f"expected formats among {', '.join(SUFFIXES)}; got {unknown[0]!r}")
    return tuple(dict.fromkeys(names))


def parse_formats(text: str) -> tuple[str, ...]:
    """Return the default formats and those of a list such as `tga,jpeg2000`.

    Raises:
        InvalidInputError: If a format is unknown.
    """
    named = [name for name in text.split(",") if name.strip()]
    return check_formats([*DEFAULT_FORMATS, *named])


def identify(data: bytes) -> str | None:
    """Return the format of a file that is not read by default, or None if it is none of these."""
    if data.startswith(_ICON):  # Pillow decodes icons when it opens them
        return "ICO"
    others = [name for name in SUFFIXES if name not in (*DEFAULT_FORMATS, "ICO")]
    try:
        with Image.open(io.BytesIO(data), formats=others) as image:
            return str(image.format)
    except Exception:  # decoders of broken files raise anything, also MemoryError
        return None


def check_icon(data: bytes, name: str) -> None:
    """Refuse icons that say one size and hold images of another, which Pillow decodes unasked.

    Args:
        data: A file of any format.
        name: Name of the image in error messages.

    Raises:
        ImageTooLargeError: If an image in the file has more pixels than icons can have.
    """
    if not data.startswith(_ICON):
        return
    for i in range(int.from_bytes(data[4:6], "little")):
        entry = data[6 + 16 * i : 22 + 16 * i]
        start = int.from_bytes(entry[12:16], "little")
        inside = data[start : start + 24].ljust(24, b"\0")
        if inside.startswith(b"\x89PNG"):
            width, height = struct.unpack(">II", inside[16:])
        else:  # a bitmap; its height counts the mask
            width, height = (abs(side) for side in struct.unpack("<ii", inside[4:12]))
            height //= 2
        if max(width, height) > _ICON_SIDE:
            raise ImageTooLargeError(
                f"an icon of {width}×{height} pixels: expected at most {_ICON_SIDE}×{_ICON_SIDE}; "
                "save it as PNG",
                source=name,
            )
