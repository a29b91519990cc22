"""ONNX Runtime's execution providers: what each is called, needs and is told.

Options are documented at onnxruntime.ai (CUDA, TensorRT) and in the header that the TensorRT-RTX
provider's package carries. **The GPU ones have not been run on hardware.**
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from crl_sdk.engines._tensorrt_plans import plans_directory
from crl_sdk.errors import EngineError
from crl_sdk.model._bundle import ModelBundle
from crl_sdk.model._manifest import Precision

Device: TypeAlias = Literal["cpu", "cuda", "tensorrt", "tensorrt-rtx"]

BATCH = (1, 8, 32)
"""Fewest, usual and most images of a run of the TensorRT providers."""

COLUMNS = (1, 256, 4096)
"""Likewise the columns of all bases."""


@dataclass(frozen=True, slots=True)
class Provider:
    """One of ONNX Runtime's providers: its name there, and how to get it."""

    name: str
    install: str


PROVIDERS: Mapping[Device, Provider] = {
    "cpu": Provider("CPUExecutionProvider", "pip install 'crl-embeddings[cpu]'"),
    "cuda": Provider(
        "CUDAExecutionProvider",
        "install crl-embeddings[gpu] instead of crl-embeddings[cpu], or choose another engine",
    ),
    "tensorrt": Provider(
        "TensorrtExecutionProvider",
        "install crl-embeddings[gpu] instead of crl-embeddings[cpu], and TensorRT's libraries",
    ),
    "tensorrt-rtx": Provider(
        "NvTensorRTRTXExecutionProvider", "pip install onnxruntime-ep-nv-tensorrt-rtx-cu12"
    ),
}

_PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"
"""The package that carries the TensorRT-RTX provider as a library to register."""


def plugin_library(device: Device) -> str | None:
    """Give the library that ONNX Runtime must register for a provider; None for built-in ones.

    Raises:
        EngineError: its package is not installed, or has another layout.
    """
    if device != "tensorrt-rtx":
        return None
    if not plugin_installed():
        raise EngineError(
            f"device 'tensorrt-rtx' needs the package {_PLUGIN}: {PROVIDERS[device].install}"
        )
    package = importlib.import_module(_PLUGIN)
    try:
        return str(package.get_library_path())
    except (AttributeError, OSError) as error:
        raise EngineError(f"{_PLUGIN} has no library of its provider ({error})") from error


def plugin_installed() -> bool:
    """Tell whether the package of the TensorRT-RTX provider is there."""
    return importlib.util.find_spec(_PLUGIN) is not None


def provider_options(bundle: ModelBundle, device: Device, precision: Precision) -> dict[str, str]:
    """Give what a provider is told for the image graph of a bundle.

    The TensorRT providers keep their engines in `engines/` of the bundle, named by the graph's
    digest, so that a graph that changed finds none of them.

    Args:
        bundle: the model.
        device: the provider.
        precision: of the graph.

    Raises:
        BundleError: the bundle has no graph in this precision.
    """
    if device == "cuda":
        return cuda_options(precision)
    if device == "cpu":
        return {}
    digest = bundle.manifest.files[bundle.image_graph(precision).name].sha256
    caches = plans_directory(bundle)
    if device == "tensorrt":
        folder = caches / f"onnxruntime-tensorrt-{precision}-{digest[:12]}"
        return {
            "device_id": "0",
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(folder),
            "trt_engine_cache_prefix": f"crl-{digest[:12]}",
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": str(folder),
            # half the tower, whose types TensorRT 10 may only follow if told so
            "trt_fp16_enable": "1" if precision == "fp16" else "0",
            **_profile(bundle, "trt"),
        }
    folder = caches / f"onnxruntime-tensorrt-rtx-{precision}-{digest[:12]}"
    return {"nv_runtime_cache_path": str(folder), **_profile(bundle, "nv")}


def cuda_options(precision: Precision) -> dict[str, str]:
    """Give what the CUDA provider is told, for any graph."""
    return {
        "device_id": "0",
        "arena_extend_strategy": "kSameAsRequested",  # no more memory than is needed
        "cudnn_conv_algo_search": "HEURISTIC",  # an exhaustive search at every new batch size
        "use_tf32": "0" if precision == "fp32" else "1",  # fp32 has ten bits of mantissa in TF32
    }


def cache_folder(options: Mapping[str, str]) -> Path | None:
    """Give the folder in which a provider keeps what it compiled; it must be there."""
    path = options.get("trt_engine_cache_path") or options.get("nv_runtime_cache_path")
    return Path(path) if path else None


def _profile(bundle: ModelBundle, prefix: str) -> dict[str, str]:
    spec, dim = bundle.preprocess, bundle.embedding_dim
    return {
        f"{prefix}_profile_{which}_shapes": (
            f"image:{images}x{spec.height}x{spec.width}x3,weight:{dim}x{columns},bias:{columns}"
        )
        for which, images, columns in zip(("min", "opt", "max"), BATCH, COLUMNS, strict=True)
    }
