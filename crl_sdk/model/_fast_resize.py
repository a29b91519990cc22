"""Resize a part of an image fast: with cykooz-resizer where it is installed, else with Pillow.

cykooz-resizer computes Pillow's filters with vector instructions. Most of its values are equal, and
nearly all others differ by one level; values that overshoot differ more, because the two passes are
done in the other order. It has no wheels for Linux on ARM. `make bench-photos` shows both.
"""

from __future__ import annotations

import threading
from typing import Any

from PIL import Image

cykooz: Any
try:
    import cykooz_resizer

    cykooz = cykooz_resizer
except ImportError:  # no wheel for this platform
    cykooz = None

Box = tuple[float, float, float, float]
"""Left, top, right and bottom, in pixels."""

_local = threading.local()


def resize_part(
    image: Image.Image, size: tuple[int, int], box: Box, resampling: Image.Resampling
) -> Image.Image:
    """Resize a part of an image.

    Args:
        image: Image of mode RGB or L.
        size: Width and height of the result.
        box: The part, inside the image.
        resampling: `BICUBIC` or `BILINEAR`.

    Returns:
        Image of the same mode.
    """
    if size == image.size and box == (0, 0, *size):
        return image
    if cykooz is None:
        return image.resize(size, resampling, box=box)
    pixel = cykooz.PixelType.U8 if image.mode == "L" else cykooz.PixelType.U8x3
    left, top, right, bottom = box
    source = cykooz.ImageData(image.width, image.height, pixel, image.tobytes())
    target = cykooz.ImageData(*size, pixel)
    filter_ = (
        cykooz.FilterType.catmull_rom
        if resampling is Image.Resampling.BICUBIC
        else cykooz.FilterType.bilinear
    )
    options = cykooz.ResizeOptions(
        resize_alg=cykooz.ResizeAlg.convolution(filter_),
        crop_box=cykooz.CropBox(left, top, right - left, bottom - top),
    )
    if not hasattr(_local, "resizer"):
        _local.resizer = cykooz.Resizer()
    _local.resizer.resize(source, target, options)
    return Image.frombytes(image.mode, size, target.get_buffer())
