"""Preprocessing for the peers that bring none: Pillow, as open_clip's own transform has it."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

SIDE = 224


def decode(data: bytes) -> np.ndarray:
    """Decode an RGB image, scale its shorter side to 224 by bicubic, and cut out the centre.

    Returns:
        (224, 224, 3) uint8.
    """
    image = Image.open(io.BytesIO(data)).convert("RGB")
    width, height = image.size
    scale = SIDE / min(width, height)
    size = (SIDE, int(height * scale)) if width <= height else (int(width * scale), SIDE)
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = round((size[0] - SIDE) / 2), round((size[1] - SIDE) / 2)
    return np.asarray(image.crop((left, top, left + SIDE, top + SIDE)))
