"""An estimate of the memory that it takes to decode an image."""

from __future__ import annotations

from typing import Any

from PIL import Image

_BYTES = {"1": 1, "L": 1, "P": 1}
"""Bytes of a pixel in Pillow's memory. Modes that begin with I;16 take 2, all others 4."""

_DECODER_BYTES = {"WEBP": 12, "AVIF": 12, "GIF": 4, "XPM": 4}
"""Bytes of a pixel that a decoder holds of its own, whatever the mode: it decodes whole images."""

_DECODER_BYTES_PER_BAND = {"JPEG2000": 6, "PPM": 1, "QOI": 1, "SGI": 1, "DDS": 1}
"""The same per band. OpenJPEG computes in 32 bits; the others are written in Python."""

_PROGRESSIVE = 2
"""Bytes of coefficients per pixel and band that libjpeg holds of a progressive JPEG."""

_BITS, _SAMPLES, _ROWS, _TILE_WIDTH, _TILE_HEIGHT = 258, 277, 278, 322, 323
"""Tags of TIFF files."""


def estimate_decode_bytes(
    image: Image.Image,
    *,
    turned: bool,
    plain: bool,
    copied: bool = False,
    scaled: tuple[int, int] | None = None,
) -> int:
    """Return about how many bytes it takes to decode an opened image, convert it and scale it.

    Args:
        image: Image whose header was read.
        turned: Whether its orientation is changed, for which it is copied.
        plain: Whether it is of the mode L or RGB and opaque, so that it is not converted.
        copied: Whether its pixels are copied twice, without padding, to be resized.
        scaled: Width and height that the whole image is scaled to: first its width, then its
            height. None if only a part of it is.
    """
    pixels = image.width * image.height
    bands = len(image.getbands())
    source = 2 if image.mode.startswith("I;16") else _BYTES.get(image.mode, 4)
    grey = image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I")
    converted = 0 if plain else 1 if grey else 4
    form = image.format or ""
    decoder = _DECODER_BYTES.get(form, 0) + bands * _DECODER_BYTES_PER_BAND.get(form, 0)
    if form == "PPM" and image.mode == "I":
        decoder = 4
    if image.info.get("progressive"):
        decoder = bands * _PROGRESSIVE
    width, height = scaled or (0, 0)
    blocks = _tiff_block_bytes(image) if form == "TIFF" else 0
    return max(
        pixels * (3 if grey else 10) if copied else 0,
        pixels * (source + max(decoder, source if turned else 0, converted)),
        pixels * source + blocks,
        pixels * (source + converted) + width * (image.height + height) * (1 if grey else 4),
    )


def _tiff_block_bytes(image: Any) -> int:
    """Return the bytes of a strip or tile of a TIFF file. A tile may be larger than the image."""
    tags = image.tag_v2
    bits = max(tags.get(_BITS, (1,))) * tags.get(_SAMPLES, 1)
    if _TILE_WIDTH in tags:
        return int(tags[_TILE_WIDTH] * tags.get(_TILE_HEIGHT, 1) * bits) // 8
    return int(image.width * min(tags.get(_ROWS, image.height), image.height) * bits) // 8
