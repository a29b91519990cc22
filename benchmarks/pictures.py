"""Pictures to send: files, or synthetic JPEGs with the statistics of photographs."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from crl_sdk.errors import InvalidInputError
from crl_sdk.model._parity import images
from crl_sdk.model._preprocess import PreprocessSpec

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

_DRAWN = 8
"""Different pictures that are drawn; the others are these, shifted: drawing is slow."""


def read_images(directory: Path) -> list[bytes]:
    """Read the encoded images of a directory and those below it, by name.

    Raises:
        InvalidInputError: there are none.
    """
    paths = sorted(path for path in directory.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        kinds = ", ".join(SUFFIXES)
        raise InvalidInputError(f"{directory}: expected pictures ({kinds}), found none")
    return [path.read_bytes() for path in paths]


def synthetic_jpegs(count: int, size: tuple[int, int], *, quality: int = 90) -> list[bytes]:
    """Make JPEGs, all different, the same for the same arguments.

    Args:
        count: how many.
        size: width and height in pixels.
        quality: of the JPEGs, as Pillow has it.
    """
    width, height = size
    spec = PreprocessSpec(height, width, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    drawn = images(spec, min(count, _DRAWN))
    made = []
    for i in range(count):
        pixels = drawn[i % len(drawn)]
        if i >= len(drawn):
            pixels = pixels.copy()
            pixels[: 1 + i % height] = 255 - pixels[: 1 + i % height]
            pixels[0, 0] = [i % 256, i // 256 % 256, 7]
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=quality)
        made.append(file.getvalue())
    return made
