"""ONNX Runtime's execution providers: their names, how to install them, and their options.

The options are documented at onnxruntime.ai (CUDA, TensorRT) and in the header inside the package
of the TensorRT-RTX provider. **The GPU providers have not been run on hardware.**
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from crl_sdk.engines._tensorrt_plans import plans_directory
from crl_sdk.errors import EngineError
from crl_sdk.model._bundle import ModelBundle
from crl_sdk.model._manifest import Precision

Device: TypeAlias = Literal["cpu", "cuda", "tensorrt", "tensorrt-rtx"]

BATCH = (1, 8, 32)
"""Minimum, usual and maximum number of images of a run with the TensorRT providers."""

COLUMNS = (1, 256, 4096)
"""Minimum, usual and maximum number of columns of all bases in such a run."""


@dataclass(frozen=True, slots=True)
class Provider:
    """An execution provider of ONNX Runtime.

    Attributes:
        name: Name of the provider in ONNX Runtime.
        install: How to get it, as the end of an error message.
    """

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
"""Package with the TensorRT-RTX provider, a library that ONNX Runtime must register."""


def find_providers() -> tuple[str, ...]:
    """Return ONNX Runtime's names of the installed providers; empty without ONNX Runtime."""
    if importlib.util.find_spec("onnxruntime") is None:
        return ()
    import onnxruntime as ort

    names: Sequence[Any] = ort.get_available_providers()
    plugin = (PROVIDERS["tensorrt-rtx"].name,) if plugin_installed() else ()
    return (*map(str, names), *plugin)


def plugin_library(device: Device) -> str | None:
    """Return the path of the library that ONNX Runtime must register; None for built-in providers.

    Raises:
        EngineError: If the package of the library is not installed or has an unknown layout.
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
        raise EngineError(
            f"expected {_PLUGIN} to have the library of its provider ({error}): "
            f"{PROVIDERS[device].install} --force-reinstall"
        ) from error


def plugin_installed() -> bool:
    """Return whether the package of the TensorRT-RTX provider is installed."""
    return importlib.util.find_spec(_PLUGIN) is not None


def provider_options(bundle: ModelBundle, device: Device, precision: Precision) -> dict[str, str]:
    """Return a provider's options for the image graph of a bundle.

    The TensorRT providers keep compiled engines in `engines/` of the bundle. The names contain the
    digest of the graph, so engines of an older graph are not found.

    Args:
        bundle: Model bundle.
        device: Device of the provider.
        precision: Precision of the graph.

    Raises:
        BundleError: If the bundle has no graph in this precision.
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
            # the fp16 graph has both types, and TensorRT 10 uses fp16 only with this flag
            "trt_fp16_enable": "1" if precision == "fp16" else "0",
            **_profile(bundle, "trt"),
        }
    folder = caches / f"onnxruntime-tensorrt-rtx-{precision}-{digest[:12]}"
    return {"nv_runtime_cache_path": str(folder), **_profile(bundle, "nv")}


def cuda_options(precision: Precision) -> dict[str, str]:
    """Return the CUDA provider's options, which suit every graph."""
    return {
        "device_id": "0",
        "arena_extend_strategy": "kSameAsRequested",  # no more memory than is needed
        "cudnn_conv_algo_search": "HEURISTIC",  # not an exhaustive search at each new batch size
        "use_tf32": "0" if precision == "fp32" else "1",  # TF32 has a mantissa of only ten bits
    }


def cache_folder(options: Mapping[str, str]) -> Path | None:
    """Return the directory in which a provider keeps compiled engines; it must exist."""
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
