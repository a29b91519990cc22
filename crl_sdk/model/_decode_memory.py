"""An estimate of the memory that it takes to decode an image."""

from __future__ import annotations

from PIL import Image

_BYTES = {"1": 1, "L": 1, "P": 1}
"""Bytes of a pixel in Pillow's memory. Modes that begin with I;16 take 2, all others 4."""

_WHOLE_BUFFER = ("WEBP", "AVIF", "GIF", "JPEG2000")
"""Formats whose decoders hold a whole image of four bytes per pixel of their own."""

_PROGRESSIVE = 6
"""Bytes of coefficients per pixel that libjpeg holds of a progressive JPEG, without subsampling."""


def estimate_decode_bytes(image: Image.Image, *, turned: bool, plain: bool) -> int:
    """Return about how many bytes it takes to decode an opened image and to convert it.

    Args:
        image: Image whose header was read.
        turned: Whether its orientation is changed, for which it is copied.
        plain: Whether it is of the mode L or RGB and opaque, so that it is not converted.
    """
    pixels = image.width * image.height
    source = 2 if image.mode.startswith("I;16") else _BYTES.get(image.mode, 4)
    grey = image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I")
    converted = 0 if plain else 1 if grey else 4
    decoder = 4 if image.format in _WHOLE_BUFFER else 0
    if image.info.get("progressive"):
        decoder = _PROGRESSIVE
    return pixels * (source + max(decoder, source if turned else 0, converted))
