"""OpenVINO engine: the image tower of a bundle's fp32 graph on a CPU, computed in fp32 or bf16."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast, get_args

import numpy as np
from numpy.typing import NDArray

from crl_sdk._lifetime import ForkGuard, Lifetime
from crl_sdk.engines._contract import ImageEngine
from crl_sdk.engines._engine_name import EngineName
from crl_sdk.engines._family import EngineCandidate, EngineFamily
from crl_sdk.engines._hardware import Hardware
from crl_sdk.engines._onnx_sessions import default_threads
from crl_sdk.engines._processor import find_features
from crl_sdk.errors import EngineError, InvalidInputError, MissingDependencyError
from crl_sdk.model._bundle import ModelBundle
from crl_sdk.model._parity import TOLERANCES, Tolerance

if TYPE_CHECKING:
    import openvino

RunPrecision: TypeAlias = Literal["bf16", "fp32"]
"""Precisions that OpenVINO computes in. Both use the fp32 graph; a bundle has none in bf16."""

RUN_PRECISIONS: tuple[RunPrecision, ...] = get_args(RunPrecision)

_BF16 = ("avx512_bf16", "amx_bf16")
"""Instruction sets for bf16. Without them OpenVINO silently uses fp32, or emulates bf16 slowly."""

_BF16_TOLERANCE = Tolerance(cosine_mean=0.9995, centred_cosine_min=0.99)
"""Measured in bf16: the demo model had a cosine of 0.99997 on average and 0.9992 at least after
centring on 256 synthetic images, and 0.99999 and 0.9999 on 200 of its own scenes. ViT-B/32 with
random weights had 0.99996 and 0.9998."""

_HINTS = {"bf16": "bf16", "fp32": "f32"}
_TELEMETRY = "openvino_telemetry"


class OpenVinoImageEngine:
    """A compiled image tower; see `crl_sdk.engines.ImageEngine`.

    The compiled model ends in the unit embedding, and NumPy computes the projection. In bf16,
    OpenVINO would also multiply by the bases in bf16, with errors of 1e-3, while the product in
    fp32 takes microseconds.
    """

    def __init__(
        self,
        request: openvino.InferRequest,
        name: EngineName,
        image_shape: tuple[int, int, int],
    ) -> None:
        """Store a request of a compiled model. Use `OpenVinoImageEngine.open` to create one.

        Args:
            request: Inference request, from pixels (b, H, W, 3) uint8 to embeddings (b, d) float32.
            name: Name of the engine.
            image_shape: Shape of one image, (H, W, 3).
        """
        self._lifetime = Lifetime("engine")
        self._request = request
        self._name = name
        self._image_shape = image_shape
        self._lock = threading.Lock()  # a run uses all cores, so parallel runs would not be faster

    @classmethod
    def open(
        cls, bundle: ModelBundle, *, precision: RunPrecision, threads: int | None = None
    ) -> OpenVinoImageEngine:
        """Compile the image tower of a bundle.

        Args:
            bundle: Verified bundle.
            precision: Precision to compute in.
            threads: Number of threads of a run; None for one per physical core.

        Raises:
            InvalidInputError: If the precision is unknown or there is less than one thread.
            BundleError: If the bundle has no fp32 graph.
            EngineError: If the processor has no bf16 instructions, or the graph does not compile.
            ForkError: If OpenVINO was used before this process was forked.
            MissingDependencyError: If OpenVINO is not installed.
        """
        if precision not in RUN_PRECISIONS:
            raise InvalidInputError(f"expected a precision in {RUN_PRECISIONS}, got {precision!r}")
        if threads is not None and threads < 1:
            raise InvalidInputError(f"expected threads >= 1, got {threads}")
        graph = bundle.image_graph("fp32")
        if (missing := missing_instructions(precision, find_features())) is not None:
            raise EngineError(f"{precision}: {missing}; choose openvino/cpu/fp32 or onnx/cpu")
        _threads.use()
        runtime, hint = _load(), _HINTS[precision]
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": hint,
            "INFERENCE_NUM_THREADS": threads or default_threads(),
            "NUM_STREAMS": 1,
            "ENABLE_HYPER_THREADING": False,
            "ENABLE_CPU_PINNING": False,  # not faster, and image decoding needs the cores too
        }
        try:
            core = _core(runtime)
            tower = _tower(runtime, core.read_model(graph))
            compiled = core.compile_model(tower, "CPU", options)
            actual = compiled.get_property("INFERENCE_PRECISION_HINT")
            request = compiled.create_infer_request()
        except RuntimeError as error:  # OpenVINO has no exception classes
            raise EngineError(
                f"{graph}: OpenVINO cannot compile it in {precision} ({error}); export the model "
                "again, or choose onnx/cpu"
            ) from error
        if actual != getattr(runtime.Type, hint):
            raise EngineError(
                f"{graph}: expected OpenVINO to compute in {precision}, but it would use {actual}: "
                "choose openvino/cpu/fp32 or onnx/cpu"
            )
        spec = bundle.preprocess
        name = EngineName("openvino", "cpu", precision)
        return cls(request, name, (spec.height, spec.width, 3))

    @property
    def name(self) -> EngineName:
        """See `crl_sdk.engines.ImageEngine.name`."""
        return self._name

    @property
    def max_columns(self) -> None:
        """See `crl_sdk.engines.ImageEngine.max_columns`."""
        return None

    def close(self) -> None:
        """Refuse further runs. The model is freed with the last reference to this engine."""
        self._lifetime.closed = True

    def run(
        self,
        pixels: NDArray[np.uint8],
        weight: NDArray[np.float32],
        bias: NDArray[np.float32],
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """See `crl_sdk.engines.ImageEngine.run`."""
        self._lifetime.require()
        if pixels.dtype != np.uint8 or pixels.shape[1:] != self._image_shape:
            raise EngineError(  # OpenVINO would silently convert another dtype
                f"the run failed on image {pixels.shape} {pixels.dtype}: expected "
                f"(b, {', '.join(map(str, self._image_shape))}) uint8, see crl_sdk.model"
            )
        try:
            embedding = self._embed(pixels) if len(pixels) else np.empty((0, len(weight)), "f4")
            return embedding, embedding @ weight + bias
        except (RuntimeError, ValueError) as error:  # from OpenVINO, from NumPy
            raise EngineError(
                f"the run failed on image {pixels.shape}, weight {weight.shape}, bias {bias.shape} "
                f"({error})"
            ) from error

    def _embed(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        with self._lock:
            # copies, since the next run overwrites the request's own outputs
            outputs = self._request.infer([pixels], share_outputs=False)
        embedding: NDArray[np.float32] = outputs[0]
        return embedding


def missing_instructions(precision: RunPrecision, features: Sequence[str]) -> str | None:
    """Return what a processor lacks for a precision, as part of an error; None if nothing.

    Args:
        precision: Precision to compute in.
        features: Instruction sets of the processor.
    """
    if precision == "bf16" and not set(_BF16) & set(features):
        return f"this processor has neither {' nor '.join(_BF16)}"
    return None


def _load() -> Any:
    """Import OpenVINO without its telemetry.

    The import sends an event to OpenVINO's developers. The module that sends it is hidden during
    the import; OpenVINO then uses a stub that it carries.

    Raises:
        MissingDependencyError: If OpenVINO is not installed.
    """
    absent = object()
    known = sys.modules.get(_TELEMETRY, absent)
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment] # makes its import fail
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


_cores: dict[tuple[int, Any], Any] = {}
"""OpenVINO's core of each process that has made one, by process and class."""

_threads = ForkGuard("OpenVINO", "choose the engine onnx/cpu")
"""OpenVINO's threads are not in a child, where compiling a model would wait for them for ever."""


def _core(runtime: Any) -> Any:
    """Return the core of this process, which is never freed.

    A core sets a stack for signals and restores the one before when it is freed. If cores are not
    freed in reverse order, that one is freed memory, and the next signal ends the process.
    """
    key = os.getpid(), runtime.Core
    core = _cores.get(key)
    return core if core is not None else _cores.setdefault(key, runtime.Core())


def _tower(runtime: Any, model: openvino.Model) -> openvino.Model:
    """Return the part of a graph from the pixels to the unit embeddings."""
    return runtime.Model([model.output("embedding")], [model.input("image").node])


def _list_candidates(bundle: ModelBundle, hardware: Hardware) -> list[EngineCandidate]:
    if "fp32" not in bundle.precisions:
        return []
    return [_candidate(bundle, precision, hardware) for precision in RUN_PRECISIONS]


def _candidate(bundle: ModelBundle, precision: RunPrecision, hardware: Hardware) -> EngineCandidate:
    name, usable = EngineName("openvino", "cpu", precision), False
    if find_spec("openvino") is None:
        reason = "OpenVINO is not installed: pip install 'crl-embeddings[openvino]'"
    elif (missing := missing_instructions(precision, hardware.features)) is not None:
        reason = missing
    else:
        usable = True
        reason = (
            "must be chosen by name: the bundle records no parity for it; "
            f"crl verify {bundle.path} --engine {name} measures it here"
        )
    return EngineCandidate(name=name, usable=usable, automatic=False, reason=reason)


def _open(bundle: ModelBundle, name: EngineName, threads: int | None) -> ImageEngine:
    precision = cast(RunPrecision, name.precision)
    return OpenVinoImageEngine.open(bundle, precision=precision, threads=threads)


OPENVINO = EngineFamily(
    runtime="openvino",
    packages=("openvino",),
    list_candidates=_list_candidates,
    open=_open,
    tolerances={"fp32": TOLERANCES["fp32"], "bf16": _BF16_TOLERANCE},
)
