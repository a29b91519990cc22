"""JPEG decoding on a GPU, by NVIDIA's nvImageCodec.

**It has not been run on hardware.** The tests run nvImageCodec's decoder for the processor.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import MutableMapping
from typing import Any

import numpy as np
from PIL import Image

from crl_sdk.errors import EngineError, MissingDependencyError

_VERBOSITY = "PYNVIMGCODEC_VERBOSITY"
"""Variable that nvImageCodec reads. It prints each damaged image at its default level."""

_log = logging.getLogger(__name__)
_mine = threading.local()


def require_gpu_decoder() -> None:
    """Check that images can be decoded on the GPU.

    Raises:
        MissingDependencyError: If nvImageCodec is not installed.
        EngineError: If it cannot use a GPU.
    """
    _decoder()


def decode_jpeg(opened: Image.Image, data: Any) -> Image.Image | None:
    """Decode a JPEG on the GPU.

    Args:
        opened: The image, opened by Pillow and not decoded.
        data: Bytes of its file.

    Returns:
        Image of mode RGB, not yet upright; None for an image that Pillow should decode: of another
        format or colour space, damaged, or not decoded because the GPU failed, which is logged.

    Raises:
        EngineError: If there is no GPU.
        MissingDependencyError: If nvImageCodec is not installed.
    """
    if not isinstance(data, bytes) or opened.format != "JPEG" or opened.mode not in ("L", "RGB"):
        return None
    if opened.mode == "RGB" and opened.info.get("adobe_transform") == 0:  # RGB in the file
        return None
    nvimgcodec, decoder, settings = _decoder()
    try:
        decoded = decoder.decode(nvimgcodec.CodeStream(data), params=settings)
        pixels = np.asarray(decoded.cpu()) if decoded is not None else np.empty(0)
    except RuntimeError as error:  # the GPU, not the image
        _log.warning("an image was decoded on the processor: %s", error)
        return None
    if pixels.shape != (opened.height, opened.width, 3) or pixels.dtype != np.uint8:
        return None
    return Image.fromarray(pixels)


def _decoder() -> tuple[Any, Any, Any]:
    """Return nvImageCodec, the decoder of this thread, and its settings.

    A decoder that two threads use at the same time loses images.
    """
    if not hasattr(_mine, "decoder"):
        nvimgcodec = _import(os.environ)
        settings = nvimgcodec.DecodeParams(
            apply_exif_orientation=False, color_spec=nvimgcodec.ColorSpec.SRGB
        )
        try:
            decoder = _open(nvimgcodec)
        except RuntimeError as error:
            raise EngineError(
                f"nvImageCodec cannot use a GPU ({error}): `crl doctor` shows what this machine "
                "has; --decode fast decodes on the processor"
            ) from error
        _mine.decoder = nvimgcodec, decoder, settings
    found: tuple[Any, Any, Any] = _mine.decoder
    return found


def _import(environment: MutableMapping[str, str]) -> Any:
    environment.setdefault(_VERBOSITY, "0")
    try:
        from nvidia import nvimgcodec
    except ImportError as error:
        raise MissingDependencyError(
            "nvidia-nvimgcodec-cu12", "gpu-decode", "--decode gpu"
        ) from error
    return nvimgcodec


def _open(nvimgcodec: Any) -> Any:
    """Return a decoder on the GPU, which may leave the entropy coding to the processor."""
    kinds = nvimgcodec.BackendKind
    return nvimgcodec.Decoder(
        max_num_cpu_threads=1,  # its callers are threads of a pool already
        backends=[
            nvimgcodec.Backend(kind)
            for kind in (kinds.HW_GPU_ONLY, kinds.GPU_ONLY, kinds.HYBRID_CPU_GPU)
        ],
        options=":fancy_upsampling=1",  # as libjpeg does
    )
