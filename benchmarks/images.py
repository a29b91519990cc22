"""Images to send: files, or synthetic JPEGs with the statistics of photographs."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from crl_sdk.errors import InvalidInputError
from crl_sdk.model._image_files import find_image_files
from crl_sdk.model._parity import images
from crl_sdk.model._preprocess import PreprocessSpec

_DRAWN = 8
"""Number of images that are drawn. The others are altered copies, because drawing is slow."""


def read_images(directory: Path) -> list[bytes]:
    """Read the encoded images of a directory and its subdirectories, sorted by path.

    Raises:
        InvalidInputError: If the directory does not exist.
        ImageError: If it holds no image file.
    """
    if not directory.is_dir():
        raise InvalidInputError(f"{directory}: expected a directory of images, found none")
    return [path.read_bytes() for path in find_image_files([directory])]


def synthetic_jpegs(count: int, size: tuple[int, int], *, quality: int = 90) -> list[bytes]:
    """Make JPEGs that all differ. The same arguments give the same images.

    Args:
        count: Number of images.
        size: Width and height, in pixels.
        quality: JPEG quality, on Pillow's scale.

    Returns:
        The encoded images.
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
