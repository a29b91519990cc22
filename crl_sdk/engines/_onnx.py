"""ONNX Runtime engines for the image and the text tower."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from crl_sdk.engines._engine_name import EngineName
from crl_sdk.engines._onnx_providers import (
    BATCH,
    COLUMNS,
    PROVIDERS,
    Device,
    cache_folder,
    cuda_options,
    plugin_library,
    provider_options,
)
from crl_sdk.errors import EngineError, InvalidInputError, MissingDependencyError
from crl_sdk.model._bundle import ModelBundle
from crl_sdk.model._manifest import PRECISIONS, Precision

if TYPE_CHECKING:
    import onnxruntime as ort


_SPIN = "20"
"""Microseconds that a thread of ONNX Runtime waits for work before it sleeps. Its own default of a
millisecond keeps the cores from those who decode pictures; no wait at all makes single images
slower (benchmarks/LOG.md). Releases that do not know the setting ignore it."""


class OnnxImageEngine:
    """An image graph in an ONNX Runtime session; see `crl_sdk.engines.ImageEngine`."""

    def __init__(
        self,
        session: ort.InferenceSession,
        name: EngineName,
        *,
        memory: str | None = None,
        profiled: bool = False,
    ) -> None:
        """Store an open session; `OnnxImageEngine.open` makes one.

        Args:
            session: of an image graph.
            name: Name of the engine.
            memory: ONNX Runtime's name of the memory that inputs are bound in, such as `cuda`;
                None to hand it arrays.
            profiled: whether runs must keep to the shapes of `providers.BATCH` and `COLUMNS`.
        """
        self._session = session
        self._name = name
        self._bound = _BoundRuns(session, memory) if memory is not None else None
        self._profiled = profiled

    @classmethod
    def open(
        cls,
        bundle: ModelBundle,
        *,
        precision: Precision = "fp32",
        device: Device = "cpu",
        threads: int | None = None,
    ) -> OnnxImageEngine:
        """Load the image graph of a bundle.

        Args:
            bundle: a verified bundle.
            precision: of the graph; `crl_sdk.engines` chooses one where none is asked for.
            device: where to run; a missing one is an error, never replaced by another.
            threads: of one run; None for one per physical core.

        Raises:
            BundleError: the bundle has no graph in this precision.
            EngineError: the device is missing or the graph does not load.
            MissingDependencyError: ONNX Runtime is not installed.
        """
        if precision not in PRECISIONS:
            raise InvalidInputError(f"expected a precision in {PRECISIONS}, got {precision!r}")
        options = provider_options(bundle, device, precision) if device in PROVIDERS else {}
        session = open_session(
            bundle.image_graph(precision),
            device=device,
            threads=threads,
            precision=precision,
            options=options,
        )
        memory = "cuda" if device != "cpu" else None
        profiled = device in ("tensorrt", "tensorrt-rtx")
        return cls(session, EngineName("onnx", device, precision), memory=memory, profiled=profiled)

    @property
    def name(self) -> EngineName:
        """See `crl_sdk.engines.ImageEngine.name`."""
        return self._name

    def close(self) -> None:
        """See `crl_sdk.engines.ImageEngine.close`; a session is freed with its last reference."""

    def run(
        self,
        pixels: NDArray[np.uint8],
        weight: NDArray[np.float32],
        bias: NDArray[np.float32],
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """See `crl_sdk.engines.ImageEngine.run`."""
        if not self._profiled:
            return self._run(pixels, weight, bias)
        columns = weight.shape[1]
        if columns > COLUMNS[2]:
            raise EngineError(
                f"expected at most {COLUMNS[2]} columns of all bases together, got {columns}: ask "
                "for fewer criteria, or choose the engine onnx/cuda"
            )
        if columns < COLUMNS[0]:  # beyond its profile the provider would compile again
            weight, bias = np.zeros((len(weight), 1), np.float32), np.zeros(1, np.float32)
        starts = range(0, max(1, len(pixels)), BATCH[2])
        parts = [self._run(pixels[start : start + BATCH[2]], weight, bias) for start in starts]
        embedding, projected = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return embedding, projected[:, :columns]

    def _run(
        self,
        pixels: NDArray[np.uint8],
        weight: NDArray[np.float32],
        bias: NDArray[np.float32],
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        feeds: dict[str, NDArray[Any]] = {"image": pixels, "weight": weight, "bias": bias}
        outputs = ["embedding", "projected"]
        if self._bound is not None:
            embedding, projected = self._bound.run(outputs, feeds)
        else:
            embedding, projected = _run(self._session, outputs, feeds)
        return embedding, projected


class OnnxTextEngine:
    """A text graph in an ONNX Runtime session; see `crl_sdk.engines.TextEngine`."""

    def __init__(self, session: ort.InferenceSession) -> None:
        """Store an open session; `OnnxTextEngine.open` makes one."""
        self._session = session

    @classmethod
    def open(
        cls, bundle: ModelBundle, *, device: Device = "cpu", threads: int | None = None
    ) -> OnnxTextEngine:
        """Load the text graph of a bundle; the arguments are those of `OnnxImageEngine.open`.

        Raises:
            BundleError: the bundle is image-only.
            EngineError: the device is missing or the graph does not load.
            MissingDependencyError: ONNX Runtime is not installed.
        """
        return cls(open_session(bundle.text_graph(), device=device, threads=threads))

    def run(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `crl_sdk.engines.TextEngine.run`."""
        (embedding,) = _run(self._session, ["embedding"], {"tokens": tokens})
        return embedding


class _BoundRuns:
    """Runs with I/O binding: weights stay on the device while they are the same."""

    def __init__(self, session: ort.InferenceSession, memory: str) -> None:
        self._session = session
        self._memory = memory
        self._kept: dict[str, tuple[NDArray[Any], Any]] = {}
        self._lock = threading.Lock()

    def run(
        self, outputs: list[str], feeds: Mapping[str, NDArray[Any]]
    ) -> list[NDArray[np.float32]]:
        import onnxruntime as ort

        try:
            binding = self._session.io_binding()
            for name, array in feeds.items():
                value = (
                    ort.OrtValue.ortvalue_from_numpy(array, self._memory, 0)
                    if name == "image"
                    else self._keep(name, array)
                )
                binding.bind_ortvalue_input(name, value)
            for name in outputs:
                binding.bind_output(name, "cpu")
            self._session.run_with_iobinding(binding)
            return list(binding.copy_outputs_to_cpu())
        except Exception as error:  # ONNX Runtime has no common base of its exceptions
            raise _run_failed(feeds, error) from error

    def _keep(self, name: str, array: NDArray[Any]) -> Any:
        import onnxruntime as ort

        with self._lock:
            known = self._kept.get(name)
            if known is None or not np.array_equal(known[0], array):
                known = array.copy(), ort.OrtValue.ortvalue_from_numpy(array, self._memory, 0)
                self._kept[name] = known
            return known[1]


def open_session(
    graph: Path,
    *,
    device: Device = "cpu",
    threads: int | None = None,
    precision: Precision = "fp32",
    options: Mapping[str, str] | None = None,
) -> ort.InferenceSession:
    """Load a graph into ONNX Runtime, on this device or not at all.

    Args:
        graph: an ONNX file.
        device: where to run.
        threads: of one run; None for one per physical core.
        precision: of the graph.
        options: what the provider is told; None for what any graph needs.

    Raises:
        EngineError: the device is missing or the graph does not load.
        InvalidInputError: an unknown device, or fewer than one thread.
        MissingDependencyError: ONNX Runtime is not installed.
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
    session_options.intra_op_num_threads = threads or 0
    session_options.inter_op_num_threads = 1
    session_options.enable_mem_pattern = False  # it keeps a plan, and memory, for each batch size
    session_options.add_session_config_entry("session.intra_op.spin_duration_us", _SPIN)
    if device == "cpu" and precision == "fp16":
        # ONNX Runtime 1.32's layout pass (NchwcTransformer) crashes on half-precision ViTs, and
        # its blocked convolutions are for fp32 alone
        session_options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    provider = PROVIDERS[device].name
    told = dict(options) if options is not None else _default_options(device, precision)
    if (folder := cache_folder(told)) is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EngineError(
                f"{folder}: cannot be made ({error.strerror}); {provider} keeps its engines there: "
                "make the bundle's directory writable"
            ) from error
    if (library := plugin_library(device)) is not None:
        _register(ort, session_options, library, provider, told)
        providers = None  # they are in the options
    else:
        providers = [(provider, told)]
        available = ort.get_available_providers()
        if provider not in available:
            raise EngineError(
                f"device {device!r} needs ONNX Runtime's {provider}, this installation has "
                f"{', '.join(available)}: {PROVIDERS[device].install}"
            )
    try:
        session = ort.InferenceSession(str(graph), session_options, providers=providers)
    except Exception as error:  # ONNX Runtime has no common base of its exceptions
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


def _default_options(device: Device, precision: Precision) -> dict[str, str]:
    return cuda_options(precision) if device == "cuda" else {}


def _register(
    ort: Any, options: ort.SessionOptions, library: str, provider: str, told: dict[str, str]
) -> None:
    """Register a provider that comes as a library, and take its devices."""
    try:
        if not any(each.ep_name == provider for each in ort.get_ep_devices()):
            ort.register_execution_provider_library(provider, library)
        devices = [each for each in ort.get_ep_devices() if each.ep_name == provider]
        if devices:
            options.add_provider_for_devices(devices[:1], told)
    except Exception as error:  # ONNX Runtime has no common base of its exceptions
        raise EngineError(
            f"{library}: ONNX Runtime cannot load it ({error}); it needs an NVIDIA driver and the "
            "ONNX Runtime it was made for"
        ) from error
    if not devices:
        raise EngineError(f"{provider} finds no GPU that it supports: `crl doctor` lists what can")


def _run(
    session: ort.InferenceSession, outputs: list[str], feeds: Mapping[str, NDArray[Any]]
) -> list[NDArray[np.float32]]:
    try:
        return list(session.run(outputs, feeds))
    except Exception as error:  # ONNX Runtime has no common base of its exceptions
        raise _run_failed(feeds, error) from error


def _run_failed(feeds: Mapping[str, NDArray[Any]], error: Exception) -> EngineError:
    shapes = ", ".join(f"{name} {array.shape}" for name, array in feeds.items())
    return EngineError(f"the run failed on {shapes} ({error})")
