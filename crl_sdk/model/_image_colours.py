"""Convert images of any mode to 8-bit grey or RGB, without what a viewer never sees.

All conversions work on strips of the image, so that they need little memory besides the result.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_STRIP_PIXELS = 1 << 20

_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")

_GREY_LEVELS = {"L;2": 3, "L;4": 15, "L;2I": 3, "L;4I": 15}
"""Largest grey level in PNG files of two and four bits, by Pillow's raw mode."""


def is_plain(image: Image.Image) -> bool:
    """Return whether an image is opaque 8-bit grey or RGB, which is not converted."""
    return image.mode in ("L", "RGB") and "transparency" not in image.info


def to_plain(image: Image.Image, encoded: bytes | None = None) -> Image.Image:
    """Convert an image to 8-bit grey or RGB, with its full range and without transparency.

    Args:
        image: Loaded image of any mode. 16-bit modes hold 0-65535. The modes of 32-bit integers and
            floats have no range of their own; see `_scale`.
        encoded: The file, from which the low bytes of a 16-bit colour are read where one colour is
            transparent.

    Returns:
        Image of mode L or RGB. Transparent parts are white.

    Raises:
        ValueError: If values of a 32-bit mode are not finite, negative, or too large.
    """
    if is_plain(image):
        return image
    transparent = image.info.get("transparency")
    if image.mode.startswith("I;16"):
        return _by_strips(image, "L", lambda part: _from_16_bits(part, transparent))
    if image.mode in ("I", "F"):
        divisor = _scale(image)
        return _by_strips(image, "L", lambda part: _from_32_bits(part, divisor))
    if encoded is not None and _raw_mode(image) == "RGB;16B" and isinstance(transparent, tuple):
        return _without_16_bit_colour(image, transparent, encoded)
    if image.mode in _ALPHA_MODES or transparent is not None:
        grey = image.mode in ("1", "L", "LA", "La")
        if image.mode == "L" and isinstance(transparent, int):
            levels = _GREY_LEVELS.get(_raw_mode(image), 255)
            image.info["transparency"] = transparent * 255 // levels
        return _by_strips(image, "L" if grey else "RGB", _on_white)
    return image.convert("L" if image.mode == "1" else "RGB")


def _by_strips(
    image: Image.Image, mode: str, convert: Callable[[Image.Image], Image.Image]
) -> Image.Image:
    """Convert an image strip by strip."""
    result = Image.new(mode, image.size)
    height = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, height):
        part = image.crop((0, top, image.width, min(top + height, image.height)))
        converted = convert(part)
        result.paste(converted if converted.mode == mode else converted.convert(mode), (0, top))
    return result


def _on_white(part: Image.Image) -> Image.Image:
    rgba = part.convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")


def _from_16_bits(part: Image.Image, transparent: Any) -> Image.Image:
    values = np.asarray(part)
    eight = np.rint(values.astype(np.float64) / 257).astype(np.uint8)
    if isinstance(transparent, int):
        eight[values == transparent] = 255
    return Image.fromarray(eight)


def _scale(image: Image.Image) -> float:
    """Return the value that stands for white in an image of 32-bit integers or floats.

    Such files do not say what white is. It is taken to be the smallest of 1 (floats only), 255 and
    65,535 that no value exceeds. Of PPM files it is known.

    Raises:
        ValueError: If a value is not finite, negative, or above 65,535.
    """
    height = max(1, _STRIP_PIXELS // image.width)
    low, high = np.inf, -np.inf
    for top in range(0, image.height, height):
        strip = np.asarray(image.crop((0, top, image.width, min(top + height, image.height))))
        if not np.isfinite(strip).all():
            raise ValueError("it holds NaN or infinity, which are no colours")
        low, high = min(low, float(strip.min())), max(high, float(strip.max()))
    whites = [1.0, 255.0, 65535.0] if image.mode == "F" else [255.0, 65535.0]
    if image.mode == "I" and image.format == "PPM":  # Pillow has scaled it to 16 bits
        whites = [65535.0]
    white = next((each for each in whites if high <= each), None)
    if low < 0 or white is None:
        raise ValueError(
            f"its values are from {low:g} to {high:g}: expected 0 to 1, 255 or 65,535; scale them"
        )
    return white


def _from_32_bits(part: Image.Image, white: float) -> Image.Image:
    values = np.asarray(part).astype(np.float64)
    return Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))


def _raw_mode(image: Image.Image) -> str:
    """Return the layout of the pixels in the file, which Pillow keeps until they are loaded."""
    return str(image.info.get(RAW_MODE, ""))


RAW_MODE = "crl_raw_mode"
"""Key of `Image.info` under which `note_raw_mode` keeps the layout of the pixels in the file."""


def note_raw_mode(image: Image.Image) -> None:
    """Keep the layout of the pixels in the file of an opened image, before they are loaded."""
    tiles = getattr(image, "tile", None)
    if image.format == "PNG" and tiles:
        arguments = tiles[0][3]
        image.info[RAW_MODE] = arguments if isinstance(arguments, str) else arguments[0]


def _without_16_bit_colour(
    image: Image.Image, colour: tuple[int, ...], encoded: bytes
) -> Image.Image:
    """Make one 16-bit colour white. Pillow keeps the high bytes only, so the low ones are read."""
    with Image.open(io.BytesIO(encoded), formats=["PNG"]) as again:
        again.tile = [tile._replace(args="RGB;16L") for tile in again.tile]
        again.load()
        low = again.copy()
    result = image.copy()
    result.info.pop("transparency", None)
    height = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, height):
        box = (0, top, image.width, min(top + height, image.height))
        shown = np.array(image.crop(box))
        hidden = _equals(shown, [value >> 8 for value in colour])
        hidden &= _equals(np.asarray(low.crop(box)), [value & 255 for value in colour])
        shown[hidden] = 255
        result.paste(Image.fromarray(shown), (0, top))
    return result


def _equals(pixels: NDArray[np.uint8], colour: list[int]) -> NDArray[np.bool_]:
    return np.asarray((pixels == np.array(colour, np.uint8)).all(axis=2))
