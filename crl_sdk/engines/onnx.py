"""ONNX Runtime engines for the image and the text tower."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from crl_sdk.bundle import ModelBundle
from crl_sdk.errors import EngineError, InvalidInputError, MissingDependencyError
from crl_sdk.manifest import PRECISIONS, Precision

if TYPE_CHECKING:
    import onnxruntime as ort

Device: TypeAlias = Literal["cpu", "cuda"]

_PROVIDERS: dict[Device, str] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

_log = logging.getLogger(__name__)


class OnnxImageEngine:
    """An image graph in an ONNX Runtime session; see `crl_sdk.engines.ImageEngine`."""

    def __init__(self, session: ort.InferenceSession, description: str) -> None:
        """Store an open session; `OnnxImageEngine.open` makes one."""
        self._session = session
        self._description = description

    @classmethod
    def open(
        cls,
        bundle: ModelBundle,
        *,
        precision: Precision | Literal["auto"] = "auto",
        device: Device = "cpu",
        threads: int | None = None,
    ) -> OnnxImageEngine:
        """Load the image graph of a bundle.

        Args:
            bundle: a verified bundle.
            precision: of the graph; `auto` takes fp32 on a CPU and fp16 on a GPU, or what the
                bundle has, and logs the choice.
            device: where to run; a missing one is an error, never replaced by another.
            threads: of one run; None for one per physical core.

        Raises:
            BundleError: the bundle has no graph in this precision.
            EngineError: the device is missing or the graph does not load.
            MissingDependencyError: ONNX Runtime is not installed.
        """
        chosen = _choose_precision(bundle, device) if precision == "auto" else precision
        if chosen not in PRECISIONS:
            raise InvalidInputError(
                f"expected a precision in {PRECISIONS} or 'auto', got {chosen!r}"
            )
        session = open_session(
            bundle.image_graph(chosen), device=device, threads=threads, precision=chosen
        )
        return cls(session, f"onnx/{device}/{chosen}")

    @property
    def description(self) -> str:
        """Runtime, device and precision."""
        return self._description

    def run(
        self,
        pixels: NDArray[np.uint8],
        weight: NDArray[np.float32],
        bias: NDArray[np.float32],
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """See `crl_sdk.engines.ImageEngine.run`."""
        feeds: dict[str, NDArray[Any]] = {"image": pixels, "weight": weight, "bias": bias}
        embedding, projected = _run(self._session, ["embedding", "projected"], feeds)
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


def open_session(
    graph: Path,
    *,
    device: Device = "cpu",
    threads: int | None = None,
    precision: Precision = "fp32",
) -> ort.InferenceSession:
    """Load a graph into ONNX Runtime, on this device or not at all.

    Args:
        graph: an ONNX file.
        device: where to run.
        threads: of one run; None for one per physical core.
        precision: of the graph.

    Raises:
        EngineError: the device is missing or the graph does not load.
        InvalidInputError: an unknown device, or fewer than one thread.
        MissingDependencyError: ONNX Runtime is not installed.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise MissingDependencyError("onnxruntime", "cpu", "running a model") from error
    if device not in _PROVIDERS:
        raise InvalidInputError(f"expected a device in {tuple(_PROVIDERS)}, got {device!r}")
    if threads is not None and threads < 1:
        raise InvalidInputError(f"expected threads >= 1, got {threads}")
    provider = _PROVIDERS[device]
    available = ort.get_available_providers()
    if provider not in available:
        raise EngineError(
            f"device {device!r} needs ONNX Runtime's {provider}, this installation has "
            f"{', '.join(available)}: install crl-sdk[gpu] instead of crl-sdk[cpu], "
            "or choose another device"
        )
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    if device == "cpu" and precision == "fp16":
        # ONNX Runtime 1.32's layout pass (NchwcTransformer) crashes on half-precision ViTs, and
        # its blocked convolutions are for fp32 alone
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    try:
        session = ort.InferenceSession(str(graph), options, providers=[provider])
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


def _choose_precision(bundle: ModelBundle, device: Device) -> Precision:
    order: tuple[Precision, ...] = ("fp32", "fp16", "int8")
    if device == "cuda":
        order = ("fp16", "fp32", "int8")
    chosen = next(precision for precision in order if precision in bundle.precisions)
    _log.info(
        "precision auto: %s on %s, first of %s that the bundle has",
        chosen,
        device,
        ", ".join(order),
    )
    return chosen


def _run(
    session: ort.InferenceSession, outputs: list[str], feeds: Mapping[str, NDArray[Any]]
) -> list[NDArray[np.float32]]:
    try:
        return list(session.run(outputs, feeds))
    except Exception as error:  # ONNX Runtime has no common base of its exceptions
        shapes = ", ".join(f"{name} {array.shape}" for name, array in feeds.items())
        raise EngineError(f"the run failed on {shapes} ({error})") from error
