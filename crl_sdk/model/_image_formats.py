"""The formats of image files: those that are read by default, and those that must be named."""

from __future__ import annotations

import io
from collections.abc import Iterable

from PIL import Image

from crl_sdk.errors import InvalidInputError

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
    others = [name for name in SUFFIXES if name not in DEFAULT_FORMATS]
    try:
        with Image.open(io.BytesIO(data), formats=others) as image:
            return str(image.format)
    except Exception:  # decoders of broken files raise anything
        return None
