"""Decoding with nvImageCodec, whose decoder for the processor stands in for the one for the GPU."""

from __future__ import annotations

import io
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

import crl_sdk.model._gpu_decode as gpu_decode
from crl_sdk import Embedder, demo_bundle
from crl_sdk.errors import EngineError, ImageError, MissingDependencyError
from crl_sdk.model._preprocess import PreprocessSpec, load_pixels

if find_spec("nvidia") is None or find_spec("nvidia.nvimgcodec") is None:
    pytest.skip("nvImageCodec is not installed", allow_module_level=True)

SPEC = PreprocessSpec(64, 64, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture
def on_the_processor(monkeypatch):
    """Decode with libjpeg-turbo inside nvImageCodec, and count what it decodes."""
    decoded = []

    class Counted:
        def __init__(self, decoder):
            self.decoder = decoder

        def decode(self, stream, params):
            found = self.decoder.decode(stream, params=params)
            decoded.append(found is not None)
            return found

    def open_one(nvimgcodec):
        return Counted(
            nvimgcodec.Decoder(
                device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY,
                max_num_cpu_threads=1,
                backends=[nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)],
                options=":fancy_upsampling=1",
            )
        )

    monkeypatch.setattr(gpu_decode, "_open", open_one)
    monkeypatch.setattr(gpu_decode, "_mine", threading.local())
    return decoded


def picture(width=200, height=140, mode="RGB") -> Image.Image:
    rng = np.random.default_rng(width)
    small = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def jpeg(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return jpeg(picture(), exif=exif)


@pytest.mark.parametrize(
    "data",
    [
        jpeg(picture(), quality=90),
        jpeg(picture(201, 133), subsampling=2),
        jpeg(picture(), progressive=True),
        jpeg(picture(mode="L")),
        jpeg(picture(20, 15)),
        *(turned(orientation) for orientation in range(2, 9)),
    ],
)
@pytest.mark.parametrize(
    ("mode", "resize"),
    [("shortest", None), ("longest", None), ("squash", None), ("shortest", (73, 73)),
     ("squash", (73, 80))],
)  # fmt: skip
def test_a_jpeg_has_the_pixels_of_pillow(on_the_processor, data, mode, resize):
    spec = PreprocessSpec(64, 64, SPEC.mean, SPEC.std, resize_mode=mode, resize=resize)
    got = load_pixels(data, spec, decode="gpu")
    assert on_the_processor == [True]
    exact = load_pixels(data, spec)
    off = np.abs(got.astype(int) - exact)
    assert off.mean() < 0.5 and off.max() <= 12  # the other resizer; see docs/IMAGES.md


@pytest.mark.parametrize("options", [{}, {"subsampling": 2}, {"progressive": True}])
def test_before_resizing_the_pixels_are_equal(on_the_processor, options):
    data = jpeg(picture(201, 133), **options)
    with Image.open(io.BytesIO(data)) as opened:
        got = gpu_decode.decode_jpeg(opened, data)
    np.testing.assert_array_equal(np.asarray(got), np.asarray(picture_of(data)))


def test_what_the_gpu_does_not_decode_is_left_to_pillow(on_the_processor):
    buffer = io.BytesIO()
    picture().save(buffer, "PNG")
    others = [
        buffer.getvalue(),
        jpeg(picture(mode="CMYK")),
        jpeg(picture(), keep_rgb=True),
        picture(),
        np.asarray(picture()),
    ]
    for image in others:
        got = load_pixels(image, SPEC, decode="gpu")
        off = np.abs(got.astype(int) - load_pixels(image, SPEC))
        assert off.mean() < 0.5
    assert on_the_processor == []


@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_a_truncated_jpeg_has_the_error_of_pillow(on_the_processor, kept, capfd):
    data = jpeg(picture(640, 480))
    broken = data[: int(len(data) * kept)]
    messages = []
    for decode in ("exact", "gpu"):
        with pytest.raises(ImageError) as caught:
            load_pixels(broken, SPEC, decode=decode)
        messages.append(str(caught.value))
    assert messages[0] == messages[1] and on_the_processor == [False]
    assert "Premature" not in capfd.readouterr().err  # it does not print each damaged image


def test_threads_have_decoders_of_their_own(on_the_processor):
    data = [jpeg(picture(100 + i, 90)) for i in range(8)] * 6
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda each: load_pixels(each, SPEC, decode="gpu"), data))
    assert on_the_processor == [True] * len(data)
    for pixels, each in zip(got, data, strict=True):
        np.testing.assert_array_equal(pixels, load_pixels(each, SPEC, decode="gpu"))


def test_an_embedder_decodes_so(on_the_processor):
    data = jpeg(picture(400, 300))
    with Embedder.open(demo_bundle(), engine="onnx/cpu/fp32", decode="gpu") as embedder:
        got = embedder.embed([data]).universal
    with Embedder.open(demo_bundle(), engine="onnx/cpu/fp32") as embedder:
        exact = embedder.embed([data]).universal
    assert on_the_processor == [True] and float((got * exact).sum()) > 0.999


def test_a_gpu_that_fails_leaves_the_image_to_the_processor(on_the_processor, monkeypatch, caplog):
    class Lost:
        def decode(self, stream, params):
            raise RuntimeError("CUDA Runtime failure: '#719'")

    monkeypatch.setattr(gpu_decode, "_open", lambda _: Lost())
    data = jpeg(picture())
    np.testing.assert_array_equal(
        load_pixels(data, SPEC, decode="gpu"), load_pixels(picture_of(data), SPEC, decode="gpu")
    )
    assert "decoded on the processor: CUDA Runtime failure: '#719'" in caplog.text


def picture_of(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def test_without_a_gpu_the_error_comes_at_the_start(monkeypatch):
    def refuse(nvimgcodec):
        raise RuntimeError("CUDA Runtime failure: '#35'")

    monkeypatch.setattr(gpu_decode, "_mine", threading.local())
    monkeypatch.setattr(gpu_decode, "_open", refuse)
    with pytest.raises(EngineError, match=r"cannot use a GPU .*#35.* --decode fast"):
        Embedder.open(demo_bundle(), engine="onnx/cpu/fp32", decode="gpu")


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine has a GPU")
def test_the_real_decoder_refuses_a_machine_without_a_gpu():
    with pytest.raises(EngineError, match="nvImageCodec cannot use a GPU"):
        gpu_decode.require_gpu_decoder()


def test_without_the_package(monkeypatch):
    monkeypatch.setattr(gpu_decode, "_mine", threading.local())
    monkeypatch.setitem(sys.modules, "nvidia", None)
    with pytest.raises(MissingDependencyError, match=r"'crl-embeddings\[gpu-decode\]'"):
        Embedder.open(demo_bundle(), engine="onnx/cpu/fp32", decode="gpu")
