"""ONNX Runtime sessions: load a graph on a device, or raise an error that says what is missing."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crl_sdk._processors import count_cores, is_limited
from crl_sdk.engines._onnx_providers import (
    PROVIDERS,
    Device,
    cache_folder,
    cuda_options,
    plugin_library,
)
from crl_sdk.engines._processor import BYTE_PRODUCTS, find_features
from crl_sdk.errors import EngineError, InvalidInputError, MissingDependencyError
from crl_sdk.model._manifest import Precision

if TYPE_CHECKING:
    import onnxruntime as ort

_SPIN = "20"
"""Microseconds that a thread of ONNX Runtime waits for work before it sleeps. Its default of one
millisecond keeps cores from the threads that decode images; not waiting at all makes single images
slower (benchmarks/LOG.md). Older releases ignore the setting."""


def needs_wide_sums(machine: str, features: Sequence[str]) -> bool:
    """Return whether ONNX Runtime must be told to add products of bytes without overflow.

    On x86 processors without VNNI and AMX, its default adds pairs of products in 16 bits. Sums
    above 32,767 are cut there, and int8 embeddings are wrong (a cosine of 0.88 with fp32 less the
    mean, where 0.99 is right). On processors with VNNI the setting makes int8 half as fast.

    Args:
        machine: Architecture, as `platform.machine()` names it.
        features: Instruction sets of the processor; empty if they are not known.
    """
    return machine.lower() in ("x86_64", "amd64") and not set(BYTE_PRODUCTS) & set(features)


def open_session(
    graph: Path,
    *,
    device: Device = "cpu",
    threads: int | None = None,
    precision: Precision = "fp32",
    options: Mapping[str, str] | None = None,
) -> ort.InferenceSession:
    """Load a graph into ONNX Runtime on a device. Another device is never used instead.

    Args:
        graph: Path of an ONNX file.
        device: Where to run the graph.
        threads: Number of threads of a run on a CPU; None for one per physical core that this
            process may use.
        precision: Precision of the graph.
        options: Options of the provider; None for options that suit every graph.

    Raises:
        EngineError: If the device is missing or the graph does not load.
        InvalidInputError: If the device is unknown or there is less than one thread.
        MissingDependencyError: If ONNX Runtime is not installed.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise MissingDependencyError("onnxruntime", "cpu", "running a model") from error
    if device not in PROVIDERS:
        raise InvalidInputError(f"expected a device in {tuple(PROVIDERS)}, got {device!r}")
    if threads is not None and threads < 1:
        raise InvalidInputError(f"expected threads >= 1, got {threads}")
    session_options = ort.SessionOptions()
    session_options.log_severity_level = 3
    session_options.intra_op_num_threads = threads or default_threads()
    session_options.inter_op_num_threads = 1
    session_options.enable_mem_pattern = False  # it would keep memory for each batch size
    session_options.add_session_config_entry("session.intra_op.spin_duration_us", _SPIN)
    if needs_wide_sums(platform.machine(), find_features()):
        session_options.add_session_config_entry("session.x64quantprecision", "1")
    if device == "cpu" and precision == "fp16":
        # The layout pass (NchwcTransformer) of ONNX Runtime 1.32 crashes on half-precision ViTs,
        # and its blocked convolutions are for fp32 only.
        session_options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    provider = PROVIDERS[device].name
    chosen = dict(options) if options is not None else _default_options(device, precision)
    if (folder := cache_folder(chosen)) is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EngineError(
                f"{folder}: cannot be created ({error.strerror}); {provider} keeps its engines "
                "there: make the bundle's directory writable"
            ) from error
    if (library := plugin_library(device)) is not None:
        _register(ort, session_options, library, provider, chosen)
        providers = None  # the session options have it
    else:
        providers = [(provider, chosen)]
        available = ort.get_available_providers()
        if provider not in available:
            raise EngineError(
                f"device {device!r} needs ONNX Runtime's {provider}, this installation has "
                f"{', '.join(available)}: {PROVIDERS[device].install}"
            )
    try:
        session = ort.InferenceSession(str(graph), session_options, providers=providers)
    except Exception as error:  # ONNX Runtime's exceptions have no common base class
        raise EngineError(
            f"{graph}: ONNX Runtime cannot load it on {device} ({error}); export the model again"
        ) from error
    if session.get_providers()[0] != provider:
        raise EngineError(
            f"{graph}: ONNX Runtime fell back from {provider} to "
            f"{', '.join(session.get_providers())}: check the driver and CUDA libraries, "
            "or choose another device"
        )
    return session


def default_threads() -> int:
    """Return the number of threads of a run: 0, for the runtime's own choice, on a whole machine.

    ONNX Runtime and OpenVINO then run one thread per physical core. They do not know the quotas of
    containers, so that the number is given where a quota or an affinity mask limits this process.
    """
    return count_cores() if is_limited() else 0


def _default_options(device: Device, precision: Precision) -> dict[str, str]:
    return cuda_options(precision) if device == "cuda" else {}


def _register(
    ort: Any,
    session_options: ort.SessionOptions,
    library: str,
    provider: str,
    chosen: dict[str, str],
) -> None:
    """Register a provider that comes as a library, and add its first device to the session."""
    try:
        if not any(each.ep_name == provider for each in ort.get_ep_devices()):
            ort.register_execution_provider_library(provider, library)
        devices = [each for each in ort.get_ep_devices() if each.ep_name == provider]
        if devices:
            session_options.add_provider_for_devices(devices[:1], chosen)
    except Exception as error:  # ONNX Runtime's exceptions have no common base class
        raise EngineError(
            f"{library}: ONNX Runtime cannot load it ({error}); it needs an NVIDIA driver and the "
            "ONNX Runtime it was made for"
        ) from error
    if not devices:
        raise EngineError(f"{provider} finds no GPU that it supports: `crl doctor` lists what can")
