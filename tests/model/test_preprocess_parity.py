"""Preprocessing equals open_clip's own transform bit for bit on RGB input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from crl_sdk.model._preprocess import PreprocessSpec, load_pixels

SIZES = [(64, 64), (65, 63), (300, 200), (200, 300), (33, 500), (500, 33), (17, 19), (1023, 769)]


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("target", [(64, 64), (96, 96), (48, 80), (80, 48)])
def test_pixels_equal_open_clips(mode, interpolation, target):
    config = PreprocessCfg(
        size=target if mode != "shortest" or target[0] != target[1] else target[0],
        mean=(0.0,) * 3, std=(1.0,) * 3,
        interpolation=interpolation, resize_mode=mode, fill_color=7,
    )  # fmt: skip
    transform = image_transform_v2(config, is_train=False)
    spec = PreprocessSpec(*target, (0, 0, 0), (1, 1, 1), interpolation, mode, 7)
    rng = np.random.default_rng(0)
    for width, height in SIZES:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        floats = transform(image).permute(1, 2, 0)
        expected = torch.round(floats * 255).to(torch.uint8).numpy()
        np.testing.assert_array_equal(load_pixels(image, spec), expected)
