"""Images to send: files, or synthetic JPEGs with the statistics of photographs."""

from __future__ import annotations

import io
import statistics
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from crl_sdk.errors import InvalidInputError
from crl_sdk.model._image_files import find_image_files
from crl_sdk.model._parity import images
from crl_sdk.model._preprocess import PreprocessSpec

_SIZES = 8
"""Number of sizes that are listed. The others are counted together."""

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


def describe_sizes(images: Sequence[bytes]) -> dict[str, int | list[str]]:
    """Return the distribution of the sizes of images, for the settings of a report.

    Args:
        images: Encoded images. Only their headers are read.

    Returns:
        How many images have which width and height, and the smallest, median and largest number of
        pixels and of bytes. Numbers of pixels are left out if no header can be read.
    """
    sizes = [size for size in map(_find_size, images) if size is not None]
    counts = Counter(f"{width}x{height}" for width, height in sizes).most_common()
    listed = [f"{size}: {count}" for size, count in counts[:_SIZES]]
    if others := sum(count for _, count in counts[_SIZES:]):
        listed.append(f"{len(counts) - _SIZES} other sizes: {others}")
    if unread := len(images) - len(sizes):
        listed.append(f"not readable: {unread}")
    found: dict[str, int | list[str]] = {"image_sizes": listed}
    for unit, values in (
        ("pixels", sorted(width * height for width, height in sizes)),
        ("bytes", sorted(map(len, images))),
    ):
        if values:
            found[f"median_image_{unit}"] = int(statistics.median(values))
        if values and values[0] != values[-1]:
            found |= {f"smallest_image_{unit}": values[0], f"largest_image_{unit}": values[-1]}
    return found


def _find_size(data: bytes) -> tuple[int, int] | None:
    """Return width and height of an encoded image, or None if its header cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an image may be larger than Pillow likes
            with Image.open(io.BytesIO(data)) as image:
                return image.width, image.height
    except Exception:  # Pillow's readers raise many types
        return None
