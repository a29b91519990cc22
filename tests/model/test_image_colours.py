"""Colours that a viewer never sees: every PNG type with transparency, and values without a range.

The expected pixels are computed by hand from the PNG standard, and not by Pillow.
"""

from __future__ import annotations

import io
import itertools
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from crl_sdk.errors import ImageError
from crl_sdk.model._image_colours import to_plain
from crl_sdk.model._preprocess import PreprocessSpec, fit, load_pixels, to_rgb

SIDE = 16
SPEC = PreprocessSpec(SIDE, SIDE, (0.5,) * 3, (0.5,) * 3)
GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6
CHANNELS = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGBA: 4}
DEPTHS = {GREY: (1, 2, 4, 8, 16), RGB: (8, 16), PALETTE: (1, 2, 4, 8), GREY_ALPHA: (8, 16),
          RGBA: (8, 16)}  # fmt: skip
CASES = [
    (kind, depth, transparent, gamma)
    for kind, depths in DEPTHS.items()
    for depth, transparent, gamma in itertools.product(depths, (False, True), (False, True))
    if not (transparent and kind in (GREY_ALPHA, RGBA))  # the standard forbids it
]


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(values, kind, depth, *chunks):
    """Encode samples of shape (h, w, channels) without a library."""
    height, width, _ = values.shape
    rows = []
    for row in values.reshape(height, -1):
        if depth == 16:
            rows.append(row.astype(">u2").tobytes())
        else:
            bits = "".join(f"{value:0{depth}b}" for value in row)
            bits = bits.ljust(-(-len(bits) // 8) * 8, "0")
            rows.append(bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)))
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return b"".join([
        b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header), *chunks,
        chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))), chunk(b"IEND", b""),
    ])  # fmt: skip


def eight_bits(values, depth, kind):
    """Scale samples to 8 bits: 16-bit grey is rounded, 16-bit colour loses its low byte."""
    if depth < 8:
        return values * 255 // (2**depth - 1)
    if depth == 8:
        return values
    return np.rint(values / 257) if kind == GREY else values >> 8


@pytest.mark.parametrize(("kind", "depth", "transparent", "gamma"), CASES)
def test_every_type_of_png(kind, depth, transparent, gamma):
    rng = np.random.default_rng(depth + 31 * kind)
    levels = 2**depth
    values = rng.integers(0, levels, (SIDE, SIDE, CHANNELS[kind]), dtype=np.int64)
    chunks, alpha = [], np.ones((SIDE, SIDE))
    if gamma:  # ignored, as in the training of the models
        chunks.append(chunk(b"gAMA", struct.pack(">I", 100000)))
    if kind == PALETTE:
        palette = rng.integers(0, 256, (levels, 3), dtype=np.int64)
        chunks.append(chunk(b"PLTE", palette.astype(np.uint8).tobytes()))
        colours = palette[values[..., 0]]
        if transparent:
            alphas = rng.integers(0, 256, levels)
            chunks.append(chunk(b"tRNS", alphas.astype(np.uint8).tobytes()))
            alpha = alphas[values[..., 0]] / 255
    else:
        shown = values[..., : 1 if kind in (GREY, GREY_ALPHA) else 3]
        colours = eight_bits(shown, depth, kind) * np.ones(3, np.int64)
        if transparent:
            values[3:6, 3:6] = values[0, 0]  # several pixels of the hidden colour
            if depth == 16:  # and one that differs in the low byte alone
                values[8, 8] = values[0, 0] ^ 1
            shown = values
            colours = eight_bits(shown, depth, kind) * np.ones(3, np.int64)
            chunks.append(chunk(b"tRNS", values[0, 0].astype(">u2").tobytes()))
            alpha = 1.0 - (values == values[0, 0]).all(axis=2)
        elif kind in (GREY_ALPHA, RGBA):
            alpha = (values[..., -1] >> (depth - 8)) / 255
    expected = colours * alpha[..., None] + 255 * (1 - alpha[..., None])
    found = load_pixels(png(values, kind, depth, *chunks), SPEC)
    assert np.abs(found - expected).max() <= (0.51 if set(np.unique(alpha)) <= {0, 1} else 1.0)
    if set(np.unique(alpha)) <= {0.0, 1.0}:
        assert np.array_equal(found, expected)


def turned(image, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = io.BytesIO()
    image.save(data, "PNG", exif=exif)
    return data.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "I;16"])
def test_orientations_of_all_modes(mode, orientation):
    values = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 4), dtype=np.uint8)
    image = Image.fromarray(values)
    image = (
        Image.fromarray(values[..., 0].astype(np.uint16) * 257)
        if mode == "I;16"
        else image.convert(mode)
    )
    plain = Image.open(io.BytesIO(turned(image, orientation)))
    plain.load()
    upright = np.asarray(to_rgb(plain))
    turns = {2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
             5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, -1),
             7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: np.rot90}  # fmt: skip
    expected = turns.get(orientation, lambda a: a)(upright)
    assert np.array_equal(load_pixels(turned(image, orientation), SPEC), expected)


def tiff(values):
    data = io.BytesIO()
    Image.fromarray(values).save(data, "TIFF")
    return data.getvalue()


@pytest.mark.parametrize(
    ("dtype", "high", "white"),
    [("f4", 1.0, 1.0), ("f4", 0.4, 1.0), ("f4", 200.0, 255.0), ("f4", 40000.0, 65535.0),
     ("i4", 200, 255), ("i4", 40000, 65535)],
)  # fmt: skip
def test_values_without_a_range(dtype, high, white):
    values = np.linspace(0, high, SIDE * SIDE).reshape(SIDE, SIDE).astype(dtype)
    found = load_pixels(tiff(values), SPEC)
    expected = np.rint(values.astype(np.float64) * 255 / white)
    assert np.array_equal(found, np.repeat(expected[..., None], 3, axis=2))


@pytest.mark.parametrize(
    ("value", "words"),
    [(np.nan, "NaN or infinity"), (np.inf, "NaN or infinity"), (-0.1, "from -0.1 to"),
     (70000.0, "to 70000: expected 0 to 1, 255 or 65,535")],
)  # fmt: skip
def test_values_that_are_no_colours(value, words):
    values = np.full((SIDE, SIDE), 0.5, np.float32)
    values[3, 4] = value
    with pytest.raises(ImageError, match=words):
        load_pixels(tiff(values), SPEC)


def test_a_16_bit_ppm_is_what_it_says():
    """Its values are small, and its range is known all the same."""
    header = b"P5 16 16 65535\n"
    found = load_pixels(header + np.full(256, 200, ">u2").tobytes(), SPEC)
    assert (found == 1).all()


@pytest.mark.parametrize("mode", ["L", "I;16", "LA", "1"])
@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
def test_grey_images_are_resized_as_grey_to_the_same_pixels(mode, resize_mode):
    values = np.random.default_rng(1).integers(0, 256, (61, 47), dtype=np.uint8)
    image = (
        Image.fromarray(values.astype(np.uint16) * 257)
        if mode == "I;16"
        else Image.fromarray(values).convert(mode)
    )
    spec = PreprocessSpec(24, 24, (0.5,) * 3, (0.5,) * 3, resize_mode=resize_mode, fill=7)
    plain = to_plain(image)
    assert plain.mode == "L"
    assert np.array_equal(fit(plain, spec), fit(plain.convert("RGB"), spec))


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P", "I;16", "F"])
def test_strips_give_what_the_whole_image_gives(mode, monkeypatch):
    values = np.random.default_rng(2).integers(0, 256, (37, 29, 4), dtype=np.uint8)
    if mode == "I;16":
        image = Image.fromarray(values[..., 0].astype(np.uint16) * 200)
    elif mode == "F":
        image = Image.fromarray(values[..., 0].astype(np.float32))
    else:
        image = Image.fromarray(values).convert(mode)
        image.info["transparency"] = bytes(range(256)) if mode == "P" else None
        if mode != "P":
            del image.info["transparency"]
    whole = np.asarray(to_plain(image))
    monkeypatch.setattr("crl_sdk.model._image_colours._STRIP_PIXELS", 100)
    assert np.array_equal(np.asarray(to_plain(image)), whole)
