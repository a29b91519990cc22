"""Preprocessing: unusual images, and typed errors for bad ones."""

from __future__ import annotations

import base64
import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from crl_sdk.errors import ImageError, ImageTooLargeError
from crl_sdk.model import _fast_resize
from crl_sdk.model._preprocess import (
    FAST_SIZE,
    ImageLimits,
    PreprocessSpec,
    load_pixels,
    resized_size,
)

SPEC = PreprocessSpec(64, 64, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(width: int, height: int) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=2).astype(np.uint8))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_every_way_in_gives_the_same_pixels(tmp_path, kind):
    data = encode(gradient(100, 80), kind)
    path = tmp_path / "image"
    path.write_bytes(data)
    decoded = Image.open(io.BytesIO(data)).convert("RGB")
    expected = load_pixels(decoded, SPEC)
    assert expected.shape == (64, 64, 3) and expected.dtype == np.uint8
    assert expected.flags.c_contiguous
    for given_image in (data, bytearray(data), path, str(path), np.asarray(decoded)):
        np.testing.assert_array_equal(load_pixels(given_image, SPEC), expected)


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(100, 80), (80, 100), (64, 64), (63, 65), (7, 500), (3, 2)])
@pytest.mark.parametrize("target", [(64, 64), (48, 64)])
def test_output_has_the_models_size(mode, size, target):
    spec = PreprocessSpec(*target, (0, 0, 0), (1, 1, 1), resize_mode=mode)
    assert load_pixels(gradient(*size), spec).shape == (*target, 3)


def test_longest_pads_with_fill():
    spec = PreprocessSpec(64, 64, (0, 0, 0), (1, 1, 1), resize_mode="longest", fill=77)
    pixels = load_pixels(Image.new("RGB", (100, 50), (200, 0, 0)), spec)
    assert (pixels[0] == 77).all() and (pixels[-1] == 77).all()
    assert (pixels[32] == (200, 0, 0)).all()


@pytest.mark.parametrize("kind", ["RGB", "RGBA", "1", "P", "CMYK"])
def test_an_image_of_the_caller_stays_open(kind):
    image = gradient(90, 60).convert(kind)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.info["exif"] = exif.tobytes()
    for decode in ("exact", "fast"):
        assert load_pixels(image, SPEC, decode=decode).shape == (64, 64, 3)
        image.getpixel((0, 0))


def test_exif_orientation_is_applied():
    upright = gradient(90, 60)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned by 90 degrees counter-clockwise
    stored = encode(upright.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)
    np.testing.assert_array_equal(load_pixels(stored, SPEC), load_pixels(upright, SPEC))


def test_sixteen_bits_keep_their_range():
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))
    pixels = load_pixels(encode(Image.fromarray(ramp)), SPEC)
    expected = np.rint(ramp / 257)
    assert np.abs(pixels[..., 0] - expected).max() == 0
    assert (pixels[..., 0] == pixels[..., 1]).all()


def test_transparency_is_laid_on_white():
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[:, :32] = (255, 0, 0, 255)  # right half: black, fully transparent
    for data in (encode(Image.fromarray(rgba)), rgba):
        pixels = load_pixels(data, SPEC)
        assert (pixels[:, :32] == (255, 0, 0)).all()
        assert (pixels[:, 32:] == 255).all()


def test_grey_alpha_palette_and_cmyk():
    grey_alpha = np.zeros((64, 64, 2), np.uint8)
    grey_alpha[..., 0], grey_alpha[:, 32:, 1] = 80, 255
    pixels = load_pixels(grey_alpha, SPEC)
    assert (pixels[:, :32] == 255).all() and (pixels[:, 32:] == 80).all()

    palette = Image.new("RGB", (64, 64), (10, 200, 30)).convert("P", palette=Image.Palette.ADAPTIVE)
    assert np.abs(load_pixels(encode(palette), SPEC).astype(int) - (10, 200, 30)).max() <= 1

    see_through = Image.new("P", (64, 64), 0)
    see_through.putpalette([9, 9, 9] * 256)
    assert (load_pixels(encode(see_through, transparency=0), SPEC) == 255).all()

    cmyk = encode(Image.new("CMYK", (64, 64), (0, 255, 255, 0)), "JPEG")
    assert load_pixels(cmyk, SPEC)[32, 32].tolist() == pytest.approx([254, 0, 0], abs=3)


def test_palette_is_resized_in_colour_not_by_nearest_index():
    smooth = gradient(200, 200)
    palette = smooth.convert("P", palette=Image.Palette.ADAPTIVE)
    expected = load_pixels(palette.convert("RGB"), SPEC)
    np.testing.assert_array_equal(load_pixels(palette, SPEC), expected)


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert load_pixels(data, SPEC)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty (0 bytes)"),
        (b"just some text in a file named .jpg", "not a readable image"),
        (b"\xff\xd8\xff\xe0", "not a readable image"),
        (encode(gradient(200, 200), "JPEG")[:2000], "damaged or truncated"),
        (encode(gradient(200, 200), "PNG")[:400], "damaged or truncated"),
    ],
    ids=["empty", "text", "header only", "truncated jpeg", "truncated png"],
)
def test_damaged_images_are_named(tmp_path, data, words):
    path = tmp_path / "holiday.jpg"
    path.write_bytes(data)
    with pytest.raises(ImageError) as caught:
        load_pixels(path, SPEC)
    assert words in str(caught.value)
    assert caught.value.source == str(path) and "holiday.jpg" in str(caught.value)


def test_missing_file_and_directory(tmp_path):
    for path in (tmp_path / "nowhere.jpg", tmp_path):
        with pytest.raises(ImageError, match="cannot be read"):
            load_pixels(path, SPEC)


def png_header(width: int, height: int) -> bytes:
    """A decompression bomb: a PNG of a few bytes with a header that claims a size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99))


@pytest.mark.parametrize("size", [(8001, 8000), (10_000, 10_000), (50_000, 50_000)])
def test_decompression_bomb_is_refused_before_decoding(size):
    with pytest.raises(ImageTooLargeError, match="send a smaller image"):
        load_pixels(png_header(*size), SPEC)


def test_sizes_that_make_no_sense():
    with pytest.raises(ImageError, match="at least 2"):
        load_pixels(Image.new("RGB", (1, 1)), SPEC)
    with pytest.raises(ImageError, match="at least 2"):
        load_pixels(Image.new("RGB", (20_000, 1)), SPEC)
    with pytest.raises(ImageTooLargeError, match="once scaled to 64×640000"):
        load_pixels(Image.new("RGB", (2, 20_000)), SPEC, limits=ImageLimits(max_pixels=10_000_000))
    with pytest.raises(ImageTooLargeError, match="bytes are over the limit"):
        load_pixels(b"x" * 11, SPEC, limits=ImageLimits(max_bytes=10))


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((8, 8, 3), np.float32),
        np.full((8, 8, 3), np.nan),
        np.zeros((8, 8, 3), np.int64),
        np.zeros((3, 8, 8), np.uint8),
        np.zeros((2, 8, 8, 3), np.uint8),
        np.zeros((0, 8, 3), np.uint8),
        np.zeros(8, np.uint8),
    ],
    ids=["float", "nan", "int64", "channels first", "batch", "empty", "1-d"],
)
def test_wrong_arrays(array):
    with pytest.raises(ImageError, match="expected an array of"):
        load_pixels(array, SPEC)


def test_wrong_type():
    with pytest.raises(ImageError, match="got int"):
        load_pixels(7, SPEC)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns of corrupt EXIF data
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_corrupted_bytes_give_pixels_or_a_typed_error(data):
    kind = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"]))
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif} if kind in ("JPEG", "PNG", "WEBP", "TIFF") else {}
    good = bytearray(encode(gradient(40, 30), kind, **options))
    for _ in range(data.draw(st.integers(1, 8))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    try:
        pixels = load_pixels(bytes(good), SPEC, limits=ImageLimits(max_pixels=1_000_000))
    except ImageError:
        return
    assert pixels.shape == (64, 64, 3)


@given(
    st.integers(2, 4000),
    st.integers(2, 4000),
    st.sampled_from(["shortest", "longest", "squash"]),
    st.sampled_from([(64, 64), (48, 80), (224, 224)]),
)
def test_resized_size_covers_or_fits_the_target(width, height, mode, target):
    spec = PreprocessSpec(*target, (0, 0, 0), (1, 1, 1), resize_mode=mode)
    new_width, new_height = resized_size((width, height), spec)
    if mode == "shortest":
        assert new_width >= spec.width and new_height >= spec.height
    elif mode == "longest":
        assert 1 <= new_width <= spec.width and 1 <= new_height <= spec.height
    else:
        assert (new_width, new_height) == (spec.width, spec.height)


@pytest.fixture(params=["cykooz-resizer", "Pillow"])
def resizer(request, monkeypatch):
    """Each of the two libraries that `fast` resizes with."""
    if request.param == "Pillow":
        monkeypatch.setattr(_fast_resize, "cykooz", None)
    elif _fast_resize.cykooz is None:
        pytest.skip("cykooz-resizer has no wheel for this platform")
    return request.param


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("target", [(64, 64), (48, 64)])
@pytest.mark.parametrize(
    "size", [(640, 480), (479, 641), (131, 129), (64, 64), (40, 30), (900, 64)]
)
@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
def test_fast_decoding_gives_nearly_the_same_image(mode, target, size, orientation, resizer):
    spec = PreprocessSpec(*target, (0, 0, 0), (1, 1, 1), resize_mode=mode, fill=77)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(gradient(*size), "JPEG", quality=95, exif=exif)
    exact, fast = (load_pixels(data, spec, decode=way) for way in ("exact", "fast"))
    assert fast.shape == exact.shape and fast.dtype == np.uint8 and fast.flags.c_contiguous
    difference = np.abs(exact.astype(int) - fast)
    # half a pixel off would be 255 / 64 / 2 = 2 on average; ringing at the edge of the padding more
    assert difference.mean() < 1.0
    assert np.percentile(difference, 98) <= 4


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("kind", ["L", "RGB"])
@pytest.mark.parametrize("size", [(200, 150), (64, 64), (50, 70), (1000, 65)])
def test_fast_resizing_gives_nearly_the_same_image(interpolation, kind, size, resizer):
    """Noise is the worst case: it overshoots everywhere."""
    spec = PreprocessSpec(64, 64, (0, 0, 0), (1, 1, 1), interpolation=interpolation)
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8)).convert(kind)
    for image in (noise, np.asarray(noise), encode(noise), encode(noise, "WEBP", lossless=True)):
        exact, fast = (load_pixels(image, spec, decode=way) for way in ("exact", "fast"))
        difference = np.abs(exact.astype(int) - fast)
        assert difference.mean() < 0.5
        assert np.percentile(difference, 90) <= 1


def test_fast_decoding_shrinks_large_jpegs_alone(monkeypatch):
    monkeypatch.setattr(_fast_resize, "cykooz", None)  # so that equal sizes give equal bits
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (400, 400, 3), np.uint8))
    side = 64 * FAST_SIZE * 2  # as large as the half of it may be
    for data, equal in (
        (encode(noise), True), (encode(noise, "WEBP"), True),
        (encode(noise.resize((int(side) - 1,) * 2), "JPEG"), True),
        (encode(noise.resize((int(side),) * 2), "JPEG"), False), (encode(noise, "JPEG"), False),
    ):  # fmt: skip
        exact, fast = (load_pixels(data, SPEC, decode=way) for way in ("exact", "fast"))
        assert (np.abs(exact.astype(int) - fast).mean() < 0.1) == equal


@pytest.mark.parametrize("kind", ["L", "CMYK", "RGB"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0"])
def test_fast_decoding_of_unusual_jpegs(kind, progressive, subsampling, resizer):
    if kind != "RGB" and subsampling == "4:2:0":
        pytest.skip("only colour is subsampled")
    image = gradient(641, 479).convert(kind)
    data = encode(image, "JPEG", progressive=progressive, subsampling=subsampling)
    exact, fast = (load_pixels(data, SPEC, decode=way) for way in ("exact", "fast"))
    assert np.abs(exact.astype(int) - fast).mean() < 1.0


TWELVE_BITS = (
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAIBAQEBAQIBAQECAgICAgQDAgICAgUEBAMEBgUGBgYFBgYGBwkIBgcJBwYG"
    "CAsICQoKCgoKBggLDAsKDAkKCgr/wQALDAAIAAgBAREA/8QAFAABAAAAAAAAAAAAAAAAAAAACP/EABwQAAAGAwAAAAAA"
    "AAAAAAAAAAALDio2SFRkcv/aAAgBAQAAPwA/luKbjYEwvxq286g//9k="
)
"""A grey JPEG of 8 × 8 pixels with 12 bits per value, by libjpeg-turbo through imagecodecs."""


@pytest.mark.parametrize("decode", ["exact", "fast"])
def test_a_jpeg_of_twelve_bits_is_refused(decode):
    with pytest.raises(ImageError, match="a damaged JPEG, or one without 8 bits per value"):
        load_pixels(base64.b64decode(TWELVE_BITS), SPEC, decode=decode)


def test_fast_decoding_refuses_what_exact_decoding_refuses():
    data = encode(gradient(640, 480), "JPEG")
    for bad in (data[:-3000], data[:300], b"\xff\xd8\xff\xe0"):
        with pytest.raises(ImageError):
            load_pixels(bad, SPEC, decode="fast")
    with pytest.raises(ImageTooLargeError):
        load_pixels(data, SPEC, decode="fast", limits=ImageLimits(max_pixels=100_000))
