"""ONNX Runtime engines for the image tower and the text tower."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from crl_sdk._lifetime import Lifetime
from crl_sdk.engines._contract import ImageEngine
from crl_sdk.engines._engine_name import EngineName
from crl_sdk.engines._family import EngineCandidate, EngineFamily
from crl_sdk.engines._hardware import Hardware
from crl_sdk.engines._onnx_providers import (
    BATCH,
    COLUMNS,
    PROVIDERS,
    Device,
    find_providers,
    provider_options,
)
from crl_sdk.engines._onnx_sessions import open_session
from crl_sdk.engines._processor import BYTE_PRODUCTS
from crl_sdk.errors import EngineError, InvalidInputError
from crl_sdk.model._bundle import ModelBundle
from crl_sdk.model._manifest import PRECISIONS, Precision
from crl_sdk.model._parity import Tolerance, failures

if TYPE_CHECKING:
    import onnxruntime as ort

_INT8 = Tolerance(cosine_mean=0.999, centred_cosine_min=0.99)
"""Parity that the bundle must have recorded for its int8 graph, if `auto` may choose it."""


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
        """Store an open session. Use `OnnxImageEngine.open` to create one.

        Args:
            session: Session of an image graph.
            name: Name of the engine.
            memory: ONNX Runtime's name of the device memory that inputs are copied to, such as
                `cuda`; None to pass arrays in host memory.
            profiled: Whether the shapes of a run must stay within `BATCH` and `COLUMNS` of
                `_onnx_providers`.
        """
        self._lifetime = Lifetime("engine")
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
            bundle: Verified bundle.
            precision: Precision of the graph to load.
            device: Where to run the graph. Another device is never used instead.
            threads: Number of threads of a run on a CPU; None for one per physical core.

        Raises:
            InvalidInputError: If the precision or device is unknown, or there is less than one
                thread.
            BundleError: If the bundle has no graph in this precision.
            EngineError: If the device is missing or the graph does not load.
            MissingDependencyError: If ONNX Runtime is not installed.
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
        name = EngineName("onnx", device, precision)
        return cls(session, name, memory=memory, profiled=profiled)

    @property
    def name(self) -> EngineName:
        """See `crl_sdk.engines.ImageEngine.name`."""
        return self._name

    @property
    def max_columns(self) -> int | None:
        """See `crl_sdk.engines.ImageEngine.max_columns`."""
        return COLUMNS[2] if self._profiled else None

    def close(self) -> None:
        """Refuse further runs. The session is freed with the last reference to this engine."""
        self._lifetime.closed = True

    def run(
        self,
        pixels: NDArray[np.uint8],
        weight: NDArray[np.float32],
        bias: NDArray[np.float32],
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """See `crl_sdk.engines.ImageEngine.run`."""
        self._lifetime.require()
        if not self._profiled:
            return self._run(pixels, weight, bias)
        columns = weight.shape[1]
        if columns > COLUMNS[2]:
            raise EngineError(
                f"expected at most {COLUMNS[2]} columns of all bases together, got {columns}: ask "
                "for fewer criteria, or choose the engine onnx/cuda"
            )
        if columns < COLUMNS[0]:  # outside its profile the provider would compile again
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
        """Store an open session. Use `OnnxTextEngine.open` to create one."""
        self._lifetime = Lifetime("engine")
        self._session = session

    @classmethod
    def open(
        cls, bundle: ModelBundle, *, device: Device = "cpu", threads: int | None = None
    ) -> OnnxTextEngine:
        """Load the text graph of a bundle.

        Args:
            bundle: Verified bundle.
            device: Where to run the graph.
            threads: Number of threads of a run on a CPU; None for one per physical core.

        Raises:
            BundleError: If the bundle has no text tower.
            EngineError: If the device is missing or the graph does not load.
            MissingDependencyError: If ONNX Runtime is not installed.
        """
        return cls(open_session(bundle.text_graph(), device=device, threads=threads))

    def run(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `crl_sdk.engines.TextEngine.run`."""
        self._lifetime.require()
        (embedding,) = _run(self._session, ["embedding"], {"tokens": tokens})
        return embedding


class _BoundRuns:
    """Runs with I/O binding. Weights stay in device memory until they change."""

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
        except Exception as error:  # ONNX Runtime's exceptions have no common base class
            raise _run_failed(feeds, error) from error

    def _keep(self, name: str, array: NDArray[Any]) -> Any:
        import onnxruntime as ort

        with self._lock:
            known = self._kept.get(name)
            if known is None or not np.array_equal(known[0], array):
                known = array.copy(), ort.OrtValue.ortvalue_from_numpy(array, self._memory, 0)
                self._kept[name] = known
            return known[1]


def _run(
    session: ort.InferenceSession, outputs: list[str], feeds: Mapping[str, NDArray[Any]]
) -> list[NDArray[np.float32]]:
    try:
        return list(session.run(outputs, feeds))
    except Exception as error:  # ONNX Runtime's exceptions have no common base class
        raise _run_failed(feeds, error) from error


def _run_failed(feeds: Mapping[str, NDArray[Any]], error: Exception) -> EngineError:
    shapes = ", ".join(f"{name} {array.shape}" for name, array in feeds.items())
    return EngineError(f"the run failed on {shapes} ({error})")


def _list_candidates(bundle: ModelBundle, hardware: Hardware) -> list[EngineCandidate]:
    providers = find_providers()
    devices: tuple[Device, ...] = ("cuda", "tensorrt", "tensorrt-rtx", "cpu")
    return [
        _candidate(bundle, device, precision, hardware, providers)
        for device in devices
        for precision in _precision_order(device)
        if precision in bundle.precisions
    ]


def _precision_order(device: Device) -> tuple[Precision, ...]:
    return ("int8", "fp32", "fp16") if device == "cpu" else ("fp16", "fp32", "int8")


def _candidate(
    bundle: ModelBundle,
    device: Device,
    precision: Precision,
    hardware: Hardware,
    providers: tuple[str, ...],
) -> EngineCandidate:
    provider, usable, reason = PROVIDERS[device], True, "runs everywhere"
    automatic = device in ("cpu", "cuda")
    if provider.name not in providers:
        usable = False
        has = ", ".join(providers) or "nothing"
        reason = f"ONNX Runtime has no {provider.name} (it has {has}): {provider.install}"
    elif device != "cpu":
        here = hardware.architecture
        usable = here is not None
        reason = f"a GPU of {here}" if here else hardware.cuda
        if usable and not automatic:
            reason = "must be chosen by name: it compiles when it first starts"
    if usable and device == "cpu" and precision == "int8":
        automatic, reason = _int8_on_cpu(bundle, hardware)
    return EngineCandidate(
        name=EngineName("onnx", device, precision),
        usable=usable,
        automatic=automatic,
        reason=reason,
        starts_slowly=device not in ("cpu", "cuda"),
    )


def _int8_on_cpu(bundle: ModelBundle, hardware: Hardware) -> tuple[bool, str]:
    """Return whether `auto` may choose int8 on this processor, and why or why not."""
    found = [name for name in hardware.features if name in BYTE_PRODUCTS]
    parity = next(graph.parity for graph in bundle.manifest.images if graph.precision == "int8")
    if not found:
        return False, f"must be chosen by name: no {', '.join(BYTE_PRODUCTS)} here to make it fast"
    if missed := failures(parity, _INT8):
        return False, f"must be chosen by name: recorded parity with fp32 {', '.join(missed)}"
    return True, f"fast with {found[0]}; recorded cosine with fp32 {parity.cosine_mean:.5f}"


def _open(bundle: ModelBundle, name: EngineName, threads: int | None) -> ImageEngine:
    return OnnxImageEngine.open(
        bundle,
        precision=cast(Precision, name.precision),
        device=cast(Device, name.device),
        threads=threads,
    )


ONNX = EngineFamily(
    runtime="onnx",
    packages=("onnxruntime", "onnxruntime-gpu"),
    list_candidates=_list_candidates,
    open=_open,
    automatic_tolerances={"int8": _INT8},
)
