"""Preprocessing with Pillow for peers without their own, equal to open_clip's transform."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

SIDE = 224


def decode(data: bytes) -> np.ndarray:
    """Decode an image as RGB, scale its shorter side to 224 (bicubic), and crop the centre.

    Returns:
        Pixels, shape (224, 224, 3), uint8.
    """
    image = Image.open(io.BytesIO(data)).convert("RGB")
    width, height = image.size
    scale = SIDE / min(width, height)
    size = (SIDE, int(height * scale)) if width <= height else (int(width * scale), SIDE)
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = round((size[0] - SIDE) / 2), round((size[1] - SIDE) / 2)
    return np.asarray(image.crop((left, top, left + SIDE, top + SIDE)))
