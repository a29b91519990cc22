"""Images that are scaled to more than the model takes, and cropped: against Pillow's own."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from crl_sdk.errors import ImageTooLargeError, InvalidInputError
from crl_sdk.model import _fast_resize
from crl_sdk.model._preprocess import (
    FAST_SIZE,
    ImageLimits,
    PreprocessSpec,
    load_pixels,
    resized_size,
)

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
SIZES = [(73, 73), (64, 64), (300, 200), (201, 301), (33, 500), (500, 33), (17, 19), (1023, 769)]
CASES = [  # mode, height and width after scaling, of the model's input
    ("shortest", (73, 73), (64, 64)),
    ("shortest", (74, 74), (64, 49)),
    ("shortest", (64, 64), (64, 49)),
    ("shortest", (80, 60), (64, 48)),
    ("squash", (77, 77), (64, 64)),
    ("squash", (90, 71), (64, 64)),
    ("squash", (90, 71), (48, 65)),
    ("squash", (64, 70), (64, 48)),
]


def spec_of(mode, resize, target, **fields):
    return PreprocessSpec(*target, (0, 0, 0), (1, 1, 1), resize_mode=mode, resize=resize, **fields)


def noise(width, height, kind="RGB"):
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).convert(kind)


def scaled(image, mode, resize, filter_):
    """The image that is cropped, by Pillow alone."""
    height, width = resize
    if mode == "shortest":
        factor = max(height / image.height, width / image.width)
        if height == width:  # torchvision rounds down
            width, height = (int(width * side / min(image.size)) for side in image.size)
        else:
            width, height = (round(side * factor) for side in image.size)
    return image.resize((width, height), filter_)


@pytest.mark.parametrize(("mode", "resize", "target"), CASES)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pixels_equal_those_of_pillow(mode, resize, target, interpolation):
    spec = spec_of(mode, resize, target, interpolation=interpolation)
    for size in SIZES:
        image = noise(*size)
        whole = scaled(image, mode, resize, FILTERS[interpolation])
        height, width = target
        left, top = round((whole.width - width) / 2), round((whole.height - height) / 2)
        expected = np.asarray(whole.crop((left, top, left + width, top + height)))
        found = load_pixels(image, spec)
        assert found.flags.c_contiguous
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("mode", "resize", "target"), CASES)
def test_pixels_equal_those_of_torchvision(mode, resize, target):
    """The evaluation transform of timm: `Resize`, then `CenterCrop`."""
    if mode == "shortest" and resize[0] != resize[1]:
        pytest.skip("torchvision scales the shorter side to one number")
    spec = spec_of(mode, resize, target)
    to = resize[0] if mode == "shortest" else resize
    transform = transforms.Compose(
        [transforms.Resize(to, InterpolationMode.BICUBIC), transforms.CenterCrop(target)]
    )
    for size in SIZES:
        image = noise(*size)
        np.testing.assert_array_equal(load_pixels(image, spec), np.asarray(transform(image)))


@pytest.mark.parametrize("kind", ["L", "1"])
@pytest.mark.parametrize(("mode", "resize", "target"), CASES)
def test_grey_images_are_cropped_as_colours_are(kind, mode, resize, target):
    image = noise(201, 150, kind)
    spec = spec_of(mode, resize, target)
    np.testing.assert_array_equal(load_pixels(image, spec), load_pixels(image.convert("RGB"), spec))


@pytest.fixture(params=["cykooz-resizer", "Pillow"])
def resizer(request, monkeypatch):
    """Each of the two libraries that `fast` resizes with."""
    if request.param == "Pillow":
        monkeypatch.setattr(_fast_resize, "cykooz", None)
    elif _fast_resize.cykooz is None:
        pytest.skip("cykooz-resizer has no wheel for this platform")


def gradient(width, height):
    y, x = np.mgrid[0:height, 0:width]
    bands = [x * 255 // max(width - 1, 1), y * 255 // max(height - 1, 1), (x + y) % 256 // 4 * 4]
    return Image.fromarray(np.stack(bands, axis=-1).astype(np.uint8))


@pytest.mark.usefixtures("resizer")
@pytest.mark.parametrize(("mode", "resize", "target"), CASES)
@pytest.mark.parametrize("size", [(640, 480), (479, 641), (131, 129), (73, 73), (40, 30)])
@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 8])
def test_fast_decoding_gives_nearly_the_same_image(mode, resize, target, size, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = io.BytesIO()
    gradient(*size).save(data, "JPEG", quality=95, exif=exif)
    spec = spec_of(mode, resize, target)
    exact, fast = (load_pixels(data.getvalue(), spec, decode=way) for way in ("exact", "fast"))
    assert fast.shape == (*target, 3) and fast.flags.c_contiguous
    assert np.abs(exact.astype(int) - fast).mean() < 1.0  # a pixel off would be 255 / 90 = 3


@pytest.mark.usefixtures("resizer")
@pytest.mark.parametrize(("mode", "resize", "target"), CASES)
def test_fast_resizing_gives_nearly_the_same_image(mode, resize, target):
    spec = spec_of(mode, resize, target)
    for size in SIZES:
        exact, fast = (load_pixels(noise(*size), spec, decode=way) for way in ("exact", "fast"))
        difference = np.abs(exact.astype(int) - fast)
        assert difference.mean() < 0.5
        assert np.percentile(difference, 90) <= 1


def test_fast_decoding_shrinks_no_further_than_the_size_that_is_cropped(monkeypatch):
    """A JPEG is halved if that leaves `FAST_SIZE` times the pixels of `resize`, not of the crop."""
    monkeypatch.setattr(_fast_resize, "cykooz", None)  # so that equal sizes give equal bits
    spec = spec_of("squash", (128, 128), (64, 64))
    for side, equal in ((int(128 * FAST_SIZE * 2) - 1, True), (int(128 * FAST_SIZE * 2), False)):
        data = io.BytesIO()
        noise(side, side).save(data, "JPEG")
        exact, fast = (load_pixels(data.getvalue(), spec, decode=way) for way in ("exact", "fast"))
        assert (np.abs(exact.astype(int) - fast).mean() < 0.1) == equal


@given(
    st.integers(2, 4000),
    st.integers(2, 4000),
    st.sampled_from(["shortest", "squash"]),
    st.integers(0, 90),
    st.integers(0, 90),
)
def test_the_scaled_image_covers_the_crop(width, height, mode, taller, wider):
    spec = spec_of(mode, (64 + taller, 48 + wider), (64, 48))
    new_width, new_height = resized_size((width, height), spec)
    least = spec.resize or (64, 48)
    assert new_height >= least[0] and new_width >= least[1]
    if mode == "squash":
        assert (new_height, new_width) == least


def test_the_size_of_the_input_is_no_other_size():
    plain = PreprocessSpec(64, 48, (0, 0, 0), (1, 1, 1))
    assert spec_of("shortest", (64, 48), (64, 48)) == plain
    assert spec_of("longest", (64, 48), (64, 48)).resize is None
    assert spec_of("squash", [70, 48], (64, 48)).resize == (70, 48)  # as JSON has it


@pytest.mark.parametrize(
    ("mode", "resize", "words"),
    [
        ("shortest", (63, 64), r"63×64 cannot be cropped to the model's 64×48 pixels.*--resize"),
        ("squash", (64, 47), "64×47 cannot be cropped"),
        ("squash", (0, 0), "0×0 cannot be cropped"),
        ("squash", (-300, 300), "-300×300 cannot be cropped"),
        ("longest", (256, 256), r"`longest` pads to 64×48 pixels and crops nothing.*--resize"),
        ("shortest", 256, r"expected a height and a width in whole pixels.*got 256"),
        ("shortest", (256,), r"got \(256,\)"),
        ("shortest", (256, 256, 3), "expected a height and a width"),
        ("shortest", (256.0, 256), "expected a height and a width"),
        ("shortest", (True, 256), "expected a height and a width"),
        ("shortest", "ab", "expected a height and a width"),
    ],
)
def test_sizes_that_are_refused(mode, resize, words):
    with pytest.raises(InvalidInputError, match=words):
        spec_of(mode, resize, (64, 48))


@pytest.mark.parametrize("decode", ["exact", "fast"])
def test_the_limit_of_pixels_counts_the_scaled_image(decode):
    spec = spec_of("squash", (2000, 2000), (64, 64))
    limits = ImageLimits(max_pixels=3_999_999)
    with pytest.raises(ImageTooLargeError, match=r"pixels once scaled to 2000×2000"):
        load_pixels(noise(20, 20), spec, limits=limits, decode=decode)
    spec = spec_of("shortest", (200, 200), (64, 64))
    with pytest.raises(ImageTooLargeError, match=r"pixels once scaled to 200×20000"):
        load_pixels(noise(20, 2000), spec, limits=limits, decode=decode)


def test_a_bound_on_the_size_in_json_is_read():
    """`preprocess.json` of a Triton repository holds lists."""
    written = json.loads(json.dumps({"height": 64, "width": 64, "resize": [73, 73]}))
    spec = PreprocessSpec(**written, mean=(0, 0, 0), std=(1, 1, 1))
    assert spec == spec_of("shortest", (73, 73), (64, 64))
