"""Decoding stays within a budget of memory, and memory that runs out fails one image alone."""

from __future__ import annotations

import io
import resource
import struct
import subprocess
import sys
import threading
import zlib

import numpy as np
import pytest
from PIL import Image

from crl_sdk import Embedder, demo_bundle
from crl_sdk._budget import Budget
from crl_sdk.errors import ImageError, ImageTooLargeError
from crl_sdk.model._decode_memory import estimate_decode_bytes
from crl_sdk.model._preprocess import ImageLimits, PreprocessSpec, load_pixels

SPEC = PreprocessSpec(16, 16, (0.5,) * 3, (0.5,) * 3)


def encoded(mode, size=(400, 300), form="PNG", **options):
    data = io.BytesIO()
    base = Image.new("I;16" if mode == "I;16" else mode, size)
    base.save(data, form, **options)
    return data.getvalue()


@pytest.mark.parametrize(
    ("mode", "form", "options", "per_pixel"),
    [("RGB", "PNG", {}, 4), ("L", "PNG", {}, 1), ("RGBA", "PNG", {}, 8), ("LA", "PNG", {}, 5),
     ("I;16", "PNG", {}, 3), ("P", "PNG", {}, 5), ("1", "PNG", {}, 2), ("CMYK", "JPEG", {}, 8),
     ("RGB", "WEBP", {}, 16), ("RGB", "AVIF", {}, 16), ("RGB", "JPEG2000", {}, 22),
     ("L", "JPEG2000", {}, 7), ("RGB", "QOI", {}, 7), ("I;16", "PPM", {}, 8),
     ("RGB", "JPEG", {}, 4), ("RGB", "JPEG", {"progressive": True}, 10),
     ("CMYK", "JPEG", {"progressive": True}, 12), ("L", "JPEG", {"progressive": True}, 3)],
)  # fmt: skip
def test_the_estimate_before_decoding(mode, form, options, per_pixel):
    with Image.open(io.BytesIO(encoded(mode, form=form, **options))) as image:
        plain = image.mode in ("L", "RGB")
        assert estimate_decode_bytes(image, turned=False, plain=plain) == 400 * 300 * per_pixel


def test_an_image_over_the_limit_is_refused_before_it_is_decoded(monkeypatch):
    data = encoded("RGBA")
    needed = 400 * 300 * 8 + 21 * (300 + 16) * 4
    limits = ImageLimits(max_decode_bytes=needed)
    assert load_pixels(data, SPEC, limits=limits).shape == (16, 16, 3)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("decoded"))
    with pytest.raises(ImageTooLargeError, match=r"400×300 pixels of the mode RGBA .*--max-decode"):
        load_pixels(data, SPEC, limits=ImageLimits(max_decode_bytes=needed - 1))


def test_an_image_that_becomes_large_when_it_is_scaled_is_counted():
    """Wherever it comes from: a long one, or one of a model that scales to much and crops."""
    long = np.zeros((2000, 16, 3), np.uint8)  # 2,000 × 250,000 pixels once scaled
    cropped = PreprocessSpec(16, 16, (0,) * 3, (1,) * 3, resize_mode="squash", resize=(2000, 2000))
    for image, spec in ((long, PreprocessSpec(256, 256, (0,) * 3, (1,) * 3)), (long, cropped)):
        with pytest.raises(ImageTooLargeError, match=r"decoding and scaling 16×2000 .* about \d+"):
            load_pixels(image, spec, limits=ImageLimits(max_decode_bytes=8 << 20))
        shape = (spec.height, spec.width, 3)
        assert (
            load_pixels(image, spec, limits=ImageLimits(max_decode_bytes=64 << 20)).shape == shape
        )
        fast = ImageLimits(max_decode_bytes=400_000)  # scales the part that is kept alone
        assert load_pixels(image, spec, limits=fast, decode="fast").shape == shape


def test_the_budget_bounds_the_sum_and_keeps_the_order():
    budget = Budget(100)
    order, most = [], []

    def work(name, nbytes, enter, leave):
        with budget.reserve(nbytes):
            order.append(name)
            most.append(budget.used)
            enter.set()
            leave.wait(60)

    def start(name, nbytes):
        enter, leave = threading.Event(), threading.Event()
        thread = threading.Thread(target=work, args=(name, nbytes, enter, leave))
        thread.start()
        return thread, enter, leave

    first = start("first", 60)
    assert first[1].wait(60)
    large = start("large", 90)  # waits for the first
    while not budget._waiting:
        pass
    small = start("small", 10)  # would fit, but does not overtake
    while len(budget._waiting) < 2:
        pass
    assert order == ["first"]
    first[2].set()
    assert large[1].wait(60) and small[1].wait(60)
    for each in (large, small):
        each[2].set()
    for each in (first, large, small):
        each[0].join(60)
    assert order == ["first", "large", "small"] and max(most) <= 100 and budget.used == 0
    with budget.reserve(1000):  # more than all of it: alone
        assert budget.used == 100


def test_an_error_gives_the_bytes_back():
    budget = Budget(10)
    with pytest.raises(KeyError), budget.reserve(10):
        raise KeyError
    assert budget.used == 0


def test_memory_that_runs_out_fails_one_image(monkeypatch):
    real = Image.Image.resize

    def resize(self, size, *arguments, **options):
        if self.width == 333:
            raise MemoryError
        return real(self, size, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", resize)
    images = [np.zeros((100, side, 3), np.uint8) for side in (100, 333, 200)]
    with Embedder.open(demo_bundle()) as embedder:
        result = embedder.embed(images, on_error="collect")
    assert result.ok.tolist() == [True, False, True]
    assert "not enough memory to decode 333×100 pixels" in str(result.errors[1])
    assert isinstance(result.errors[1], ImageError)


WORST = {
    "I;16": ("I;16", "PNG", {"compress_level": 1}),
    "RGBA": ("RGBA", "PNG", {"compress_level": 1}),
    "LA": ("LA", "PNG", {"compress_level": 1}),
    "png": ("RGB", "PNG", {"compress_level": 1}),
    "webp": ("RGBA", "WEBP", {"lossless": True, "method": 0}),
    "avif": ("RGBA", "AVIF", {"speed": 10}),
    "jpeg2000": ("RGBA", "JPEG2000", {}),
    "cmyk": ("CMYK", "JPEG", {"progressive": True, "subsampling": 0}),
    "ppm": ("I;16", "PPM", {}),
    "strip": ("RGB", "TIFF", {"compression": "tiff_lzw", "strip_size": 1 << 30}),
    "float": ("F", "TIFF", {"compression": "tiff_lzw", "strip_size": 1 << 30}),
    "tile": None,
    "thin": ("RGB", "PNG", {}),
    "thin grey": ("L", "PNG", {}),
    "cropped": ("RGB", "PNG", {}),
}
THIN = {"thin": (10, 2600), "thin grey": (2600, 10), "cropped": (40, 40)}
"""Width and height of images that are scaled to far more pixels than they have."""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads VmHWM")
@pytest.mark.parametrize(
    ("worst", "decode"),
    [
        *((worst, "exact") for worst in WORST),
        ("LA", "fast"),
        ("png", "fast"),
        ("thin", "fast"),
        ("cropped", "fast"),
    ],
)
def test_the_worst_images_take_no_more_than_was_estimated(worst, decode, tmp_path):
    """4000 × 4000 pixels in a process of its own: its peak grows by the estimate and 64 MiB."""
    path = tmp_path / "a"
    if worst == "tile":
        path.write_bytes(tiled_tiff(32, 12000))
    else:
        mode, form, options = WORST[worst]
        path.write_bytes(encoded(mode, THIN.get(worst, (4000, 4000)), form, **options))
    side, resize = {
        "thin": (480, None), "thin grey": (480, None), "cropped": (224, (7000, 7000)),
    }.get(worst, (224, None))  # fmt: skip
    code = (
        "import sys\n"
        "from PIL import Image\n"
        "from crl_sdk.model._decode_memory import estimate_decode_bytes\n"
        "from crl_sdk.model._image_colours import is_plain\n"
        "from crl_sdk.model._image_formats import SUFFIXES\n"
        "from crl_sdk.model._preprocess import ImageLimits, PreprocessSpec, load_pixels\n"
        "from crl_sdk.model._preprocess import resized_size\n"
        "def peak():\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return next(int(l.split()[1]) for l in lines if l.startswith('VmHWM'))\n"
        "load_pixels(Image.new('RGB', (300, 300)), PreprocessSpec(224, 224, (0,) * 3, (1,) * 3))\n"
        f"spec = PreprocessSpec({side}, {side}, (.5,) * 3, (.5,) * 3, resize={resize})\n"
        "fast = sys.argv[2] == 'fast'\n"
        "with Image.open(sys.argv[1]) as image:\n"
        "    estimate = estimate_decode_bytes(image, turned=False, plain=is_plain(image),\n"
        "        copied=fast, scaled=None if fast else resized_size(image.size, spec))\n"
        "before = peak()\n"
        "limits = ImageLimits(formats=tuple(SUFFIXES))\n"
        "load_pixels(sys.argv[1], spec, limits=limits, decode=sys.argv[2])\n"
        "print(peak() - before, estimate // 1024)\n"
    )
    run = [sys.executable, "-W", "ignore", "-c", code, str(path), decode]
    said = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    grown, estimated = map(int, said.split())
    assert grown <= estimated + 64 * 1024, (grown, estimated)


def tiled_tiff(side, tile):
    """Return a TIFF file of one compressed RGB tile that is larger than the image."""
    packer = zlib.compressobj(1)
    data = b"".join(packer.compress(bytes(3 * tile)) for _ in range(tile)) + packer.flush()
    tags = [(256, side), (257, side), (258, 8), (259, 8), (262, 2), (277, 3), (322, tile),
            (323, tile), (324, 8), (325, len(data))]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    after = 8 + len(data) + 2 + len(entries) + 4
    entries = entries.replace(
        struct.pack("<HHII", 258, 4, 1, 8), struct.pack("<HHII", 258, 3, 3, after)
    )
    return b"".join([
        b"II*\0", struct.pack("<I", 8 + len(data)), data, struct.pack("<H", len(tags)), entries,
        bytes(4), struct.pack("<HHH", 8, 8, 8),
    ])  # fmt: skip


def test_a_tile_that_is_larger_than_its_image_is_refused():
    data = tiled_tiff(32, 1000)
    assert load_pixels(data, SPEC, limits=ImageLimits(max_decode_bytes=4_000_000)).max() == 0
    with pytest.raises(
        ImageTooLargeError, match="decoding and scaling 32×32 pixels of the mode RGB takes"
    ):
        load_pixels(data, SPEC, limits=ImageLimits(max_decode_bytes=2_000_000))


def icon(width, height, inside):
    head = struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(inside), 22)
    return head + inside.replace(struct.pack(">II", 16, 16), struct.pack(">II", width, height), 1)


def test_an_icon_with_a_large_image_inside_is_never_decoded(monkeypatch):
    """Pillow decodes icons when it opens them, before any limit can be checked."""
    small = icon(16, 16, encoded("RGB", (16, 16)))
    limits = ImageLimits(formats=(*ImageLimits().formats, "ICO"))
    assert load_pixels(small, SPEC, limits=limits).shape == (16, 16, 3)
    bitmap = struct.pack("<IiiHHIIiiII", 40, 300, 600, 1, 32, 0, 0, 0, 0, 0, 0)
    monkeypatch.setattr("PIL.IcoImagePlugin.IcoImageFile.load", lambda _: pytest.fail("decoded"))
    for data in (icon(8000, 8000, encoded("RGB", (16, 16))), icon(0, 0, bitmap)):
        with pytest.raises(ImageTooLargeError, match=r"an icon of .* expected at most 256×256"):
            load_pixels(data, SPEC, limits=limits)
        with pytest.raises(ImageError, match="its format is ICO, which is not read by default"):
            load_pixels(data, SPEC)


@pytest.mark.parametrize("when", ["open", "load"])
@pytest.mark.parametrize("error", [NotImplementedError, TypeError, IndexError, ZeroDivisionError,
                                   AttributeError, RuntimeError, MemoryError])  # fmt: skip
def test_whatever_a_decoder_raises_fails_one_image(when, error, monkeypatch):
    def fail(*_, **__):
        raise error("oops")

    data = encoded("RGB")
    monkeypatch.setattr(
        "PIL.Image.open" if when == "open" else "PIL.ImageFile.ImageFile.load", fail
    )
    words = "memory" if error is MemoryError else "not a readable|damaged or truncated"
    with pytest.raises(ImageError, match=words):
        load_pixels(data, SPEC)


def test_a_limit_of_the_system_fails_the_image_and_not_the_process(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded("RGBA", (5000, 5000), compress_level=1))
    code = (
        "import resource, sys\n"
        "from crl_sdk.errors import ImageError\n"
        "from crl_sdk.model._preprocess import PreprocessSpec, load_pixels\n"
        "spec = PreprocessSpec(224, 224, (.5,) * 3, (.5,) * 3)\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (120 << 20),) * 2)\n"
        "try:\n"
        "    load_pixels(sys.argv[1], spec)\n"
        "except ImageError as error:\n"
        "    print(error)\n"
    )
    run = [sys.executable, "-c", code, str(path)]
    said = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert "not enough memory to decode 5000×5000 pixels" in said
    assert resource.getrlimit(resource.RLIMIT_AS)[0] != 120 << 20
