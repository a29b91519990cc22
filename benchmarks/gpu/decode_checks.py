"""Check of the JPEG decoder on the GPU, where nvImageCodec is installed."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from crl_benchmarks.gpu.engine_checks import NotHere
from crl_sdk.errors import MissingDependencyError
from crl_sdk.model._gpu_decode import decode_jpeg, require_gpu_decoder

SIZES = ((640, 480), (1920, 1080), (4000, 3000))
"""Width and height of the pictures."""


def check_decoder(
    sizes: tuple[tuple[int, int], ...] = SIZES, *, threads: int = 8, rounds: int = 5
) -> dict[str, Any]:
    """Compare decoded JPEGs with Pillow's, and time both in turns with several threads.

    Args:
        sizes: Width and height of each picture.
        threads: Number of threads that decode.
        rounds: Number of measurements of each decoder.

    Raises:
        NotHere: If nvImageCodec is not installed.
        EngineError: If it is installed and cannot use the GPU.
        AssertionError: If a picture is not decoded, or differs by more than 2 levels in the mean.
    """
    try:
        require_gpu_decoder()
    except MissingDependencyError as error:
        raise NotHere(str(error)) from error
    figures: dict[str, Any] = {}
    with ThreadPoolExecutor(threads) as pool:
        for size in sizes:
            data = _draw(size)
            got, exact = np.asarray(_on_gpu(data)), np.asarray(_by_pillow(data))
            off = np.abs(got.astype(np.int16) - exact)
            mean = float(off.mean())
            assert mean < 2, f"{size}: differs from Pillow by {mean:.2f} levels in the mean"
            rates: dict[str, list[float]] = {"gpu": [], "pillow": []}
            for _ in range(rounds):
                rates["gpu"].append(_rate(pool, _on_gpu, data, threads * 4))
                rates["pillow"].append(_rate(pool, _by_pillow, data, threads * 4))
            figures["x".join(map(str, size))] = {
                "bytes": len(data),
                "mean_levels": round(mean, 4),
                "max_levels": int(off.max()),
                **{f"{name}_images_per_second": [round(each, 1) for each in sorted(values)]
                   for name, values in rates.items()},
            }  # fmt: skip
    return {"threads": threads, **figures}


def _draw(size: tuple[int, int]) -> bytes:
    rng = np.random.default_rng(0)
    grid = rng.integers(0, 256, (size[1] // 8, size[0] // 8, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grid).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _on_gpu(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as opened:
        decoded = decode_jpeg(opened, data)
    if decoded is None:
        raise AssertionError("the GPU did not decode a plain JPEG")
    return decoded


def _by_pillow(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as opened:
        image: Image.Image = opened.convert("RGB")
    return image


def _rate(
    pool: ThreadPoolExecutor, decode: Callable[[bytes], Image.Image], data: bytes, count: int
) -> float:
    started = time.perf_counter()
    list(pool.map(decode, [data] * count))
    return count / (time.perf_counter() - started)
