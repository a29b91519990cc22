"""OpenVINO runs the image tower of a bundle's fp32 graph on a CPU, in fp32 or in bf16."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from crl_sdk.engines._engine_name import EngineName
from crl_sdk.engines._processor import find_features
from crl_sdk.errors import EngineError, InvalidInputError, MissingDependencyError
from crl_sdk.model._bundle import ModelBundle

if TYPE_CHECKING:
    import openvino

RunPrecision: TypeAlias = Literal["bf16", "fp32"]
"""What OpenVINO computes in. The graph is the fp32 one for both; a bundle knows nothing of bf16."""

RUN_PRECISIONS: tuple[RunPrecision, ...] = get_args(RunPrecision)

_BF16 = ("avx512_bf16", "amx_bf16")
"""Without one of them OpenVINO computes in fp32, or imitates bf16 slowly, and says nothing."""

_HINTS = {"bf16": "bf16", "fp32": "f32"}
_TELEMETRY = "openvino_telemetry"


class OpenVinoImageEngine:
    """A compiled image tower; see `crl_sdk.engines.ImageEngine`.

    The tower ends in the unit embedding, and NumPy projects it: in bf16 OpenVINO would multiply by
    the bases in bf16 too, and be off by 1e-3 where a product in fp32 costs microseconds.
    """

    def __init__(
        self,
        request: openvino.InferRequest,
        name: EngineName,
        image_shape: tuple[int, int, int],
    ) -> None:
        """Store a request of a compiled tower; `OpenVinoImageEngine.open` makes one.

        Args:
            request: pixels (b, H, W, 3) uint8 → embeddings (b, d) float32.
            name: Name of the engine.
            image_shape: (H, W, 3).
        """
        self._request = request
        self._name = name
        self._image_shape = image_shape
        self._lock = threading.Lock()  # one run takes all cores: several at a time gain nothing

    @classmethod
    def open(
        cls, bundle: ModelBundle, *, precision: RunPrecision, threads: int | None = None
    ) -> OpenVinoImageEngine:
        """Compile the image tower of a bundle.

        Args:
            bundle: a verified bundle.
            precision: to compute in.
            threads: of one run; None for one per physical core.

        Raises:
            InvalidInputError: an unknown precision, or fewer than one thread.
            BundleError: the bundle has no fp32 graph.
            EngineError: the processor has no instructions for bf16, or the graph does not compile.
            MissingDependencyError: OpenVINO is not installed.
        """
        if precision not in RUN_PRECISIONS:
            raise InvalidInputError(f"expected a precision in {RUN_PRECISIONS}, got {precision!r}")
        if threads is not None and threads < 1:
            raise InvalidInputError(f"expected threads >= 1, got {threads}")
        graph = bundle.image_graph("fp32")
        if (lacking := lacking_instructions(precision)) is not None:
            raise EngineError(f"{precision}: {lacking}; choose openvino/cpu/fp32 or onnx/cpu")
        runtime, hint = _load(), _HINTS[precision]
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": hint,
            "INFERENCE_NUM_THREADS": threads or 0,  # 0: one per physical core
            "NUM_STREAMS": 1,
            "ENABLE_HYPER_THREADING": False,
            "ENABLE_CPU_PINNING": False,  # no faster, and others want the cores too
        }
        try:
            core = runtime.Core()
            tower = _tower(runtime, core.read_model(graph))
            compiled = core.compile_model(tower, "CPU", options)
            taken = compiled.get_property("INFERENCE_PRECISION_HINT")
            request = compiled.create_infer_request()
        except RuntimeError as error:  # it has no exceptions of its own
            raise EngineError(
                f"{graph}: OpenVINO cannot compile it in {precision} ({error}); export the model "
                "again, or choose onnx/cpu"
            ) from error
        if taken != getattr(runtime.Type, hint):
            raise EngineError(
                f"{graph}: expected OpenVINO to compute in {precision}, it would in {taken}: "
                "choose openvino/cpu/fp32 or onnx/cpu"
            )
        spec = bundle.preprocess
        return cls(request, EngineName("openvino", "cpu", precision), (spec.height, spec.width, 3))

    @property
    def name(self) -> EngineName:
        """See `crl_sdk.engines.ImageEngine.name`."""
        return self._name

    def close(self) -> None:
        """See `crl_sdk.engines.ImageEngine.close`; a model is freed with its last reference."""

    def run(
        self,
        pixels: NDArray[np.uint8],
        weight: NDArray[np.float32],
        bias: NDArray[np.float32],
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """See `crl_sdk.engines.ImageEngine.run`."""
        if pixels.dtype != np.uint8 or pixels.shape[1:] != self._image_shape:
            raise EngineError(  # OpenVINO would convert another dtype in silence
                f"the run failed on image {pixels.shape} {pixels.dtype}: expected "
                f"(b, {', '.join(map(str, self._image_shape))}) uint8, see crl_sdk.model"
            )
        try:
            embedding = self._embed(pixels) if len(pixels) else np.empty((0, len(weight)), "f4")
            return embedding, embedding @ weight + bias
        except (RuntimeError, ValueError) as error:  # of OpenVINO, of NumPy
            raise EngineError(
                f"the run failed on image {pixels.shape}, weight {weight.shape}, bias {bias.shape} "
                f"({error})"
            ) from error

    def _embed(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        with self._lock:
            # the next run writes over the request's own outputs: these are copies
            outputs = self._request.infer([pixels], share_outputs=False)
        embedding: NDArray[np.float32] = outputs[0]
        return embedding


def lacking_instructions(precision: RunPrecision) -> str | None:
    """Say which instructions this processor lacks for a precision; None if it has them."""
    if precision == "bf16" and not set(_BF16) & set(find_features()):
        return f"this processor has neither {' nor '.join(_BF16)}"
    return None


def _load() -> Any:
    """Import OpenVINO.

    Importing it sends an event to its makers. Without the module that does so, which is hidden for
    as long as the import takes, OpenVINO goes on with a stub of its own.

    Raises:
        MissingDependencyError: it is not installed.
    """
    absent = object()
    known = sys.modules.get(_TELEMETRY, absent)
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment] # Python's way to refuse an import
    try:
        import openvino
    except ImportError as error:
        raise MissingDependencyError("openvino", "openvino", "an engine openvino/cpu") from error
    finally:
        if known is absent:
            sys.modules.pop(_TELEMETRY, None)
        else:
            sys.modules[_TELEMETRY] = known  # type: ignore[assignment]
    return openvino


def _tower(runtime: Any, model: openvino.Model) -> openvino.Model:
    """Cut a graph down to pixels in, unit embeddings out."""
    return runtime.Model([model.output("embedding")], [model.input("image").node])
