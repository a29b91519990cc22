"""Preprocessing against the processors of transformers themselves, in Pillow's form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

from PIL import Image  # noqa: E402

from crl_export.imported.preprocessing import spec_from  # noqa: E402
from crl_sdk.model import load_pixels  # noqa: E402
from tiny_hugging_face import pillow  # noqa: E402

CLIPImageProcessor = pillow("CLIPImageProcessor")
ConvNextImageProcessor = pillow("ConvNextImageProcessor")
EfficientNetImageProcessor = pillow("EfficientNetImageProcessor")
SIZES = [(640, 480), (480, 640), (256, 256), (300, 1001), (100, 90), (1920, 1080), (290, 347)]
OPENAI = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
ALIGN = {  # as the preprocessor_config.json of kakaobrain/align-base has it
    "do_resize": True, "size": {"height": 346, "width": 346}, "resample": 2,
    "do_center_crop": True, "crop_size": {"height": 289, "width": 289},
    "do_rescale": True, "rescale_factor": 0.00784313725490196, "rescale_offset": True,
    "do_normalize": False, "include_top": False,
}  # fmt: skip


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for width, height in SIZES
    ]


def ours(image, processor) -> np.ndarray:
    """What the graph of a bundle computes from our pixels, before the tower."""
    spec = spec_from(processor.to_dict(), Path("preprocessor_config.json"))
    pixels = load_pixels(image, spec).astype(np.float32)
    values = (pixels / 255 - np.float32(spec.mean)) / np.float32(spec.std)
    return values.transpose(2, 0, 1)


def theirs(image, processor) -> np.ndarray:
    return processor(images=[image], return_tensors="np")["pixel_values"][0]


@pytest.mark.parametrize(
    "processor",
    [
        CLIPImageProcessor(size={"shortest_edge": 256}, crop_size=224, **OPENAI),
        CLIPImageProcessor(size={"shortest_edge": 256}, crop_size={"height": 240, "width": 200}),
        CLIPImageProcessor(size={"height": 250, "width": 300}, crop_size=224, resample=2),
        ConvNextImageProcessor(size={"shortest_edge": 224}, crop_pct=0.875),
        ConvNextImageProcessor(size={"shortest_edge": 384}),
        EfficientNetImageProcessor(**ALIGN),
        EfficientNetImageProcessor(**{**ALIGN, "include_top": True, "do_normalize": True}),
        EfficientNetImageProcessor(**{**ALIGN, "rescale_factor": 1 / 255, "rescale_offset": False}),
    ],
    ids=["clip", "clip tall", "clip squash", "convnext", "convnext 384", "align", "top", "plain"],
)  # fmt: skip
def test_pixels_equal_those_of_transformers(processor):
    """Except where half a pixel is cropped: they round it down, this SDK to the even one."""
    for image in pictures():
        found, expected = ours(image, processor), theirs(image, processor)
        assert found.shape == expected.shape
        if _half_a_pixel(image, processor):
            # moved by one pixel, the images are equal
            shifted = [
                np.abs(found[:, : -down or None, : -right or None] - expected[:, down:, right:])
                for down, right in ((1, 0), (0, 1))
            ]
            assert min(each.max() for each in shifted) < 2e-6 * np.abs(expected).max()
        else:
            assert np.abs(found - expected).max() < 2e-6 * np.abs(expected).max()


def _half_a_pixel(image, processor) -> bool:
    """Return whether the crop begins at an odd pixel and a half."""
    spec = spec_from(processor.to_dict(), Path("preprocessor_config.json"))
    if spec.resize_mode == "squash":
        height, width = spec.resize or (spec.height, spec.width)
    else:
        side = (spec.resize or (spec.height, spec.width))[0]
        width, height = (int(side * each / min(image.size)) for each in image.size)
    return any(more % 4 == 3 for more in (width - spec.width, height - spec.height))


def test_an_image_smaller_than_the_crop_is_refused_here_and_padded_there():
    from crl_sdk.errors import ExportError

    processor = CLIPImageProcessor(size={"shortest_edge": 200}, crop_size=224)
    assert (theirs(Image.new("RGB", (300, 300), "white"), processor)[:, 0, 0] < -1).all()
    with pytest.raises(ExportError, match="`crop_size` is 224×224, expected at most `size`"):
        ours(pictures()[0], processor)
