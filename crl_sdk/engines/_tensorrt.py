"""TensorRT engine: a compiled plan on this machine's GPU, one CUDA graph per shape of a run.

**Not run on hardware.** The tests run it against a simulated driver and TensorRT; on a GPU,
`crl verify BUNDLE --engine tensorrt-rtx` compares it with the fp32 graph.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from crl_sdk.basis._basis import Basis
from crl_sdk.engines import _cuda as cuda
from crl_sdk.engines._engine_name import EngineName
from crl_sdk.engines._tensorrt_plans import (
    Plan,
    PlanRuntime,
    choose_plan,
    load_plan,
    plans_directory,
)
from crl_sdk.engines._tensorrt_runtime import TensorRTRuntime, load_tensorrt
from crl_sdk.errors import EngineError, PlanError
from crl_sdk.model._bundle import ModelBundle
from crl_sdk.model._manifest import Precision
from crl_sdk.storage._atomic_files import write_atomically

_log = logging.getLogger(__name__)

_FEWEST_COLUMNS = 64
"""Runs with fewer columns use this many, so that few graphs serve all numbers of columns."""


@dataclass(frozen=True, slots=True)
class _Loaded:
    """An engine of TensorRT's with what must live as long as it."""

    engine: Any
    runtime: Any
    logger: Any


@dataclass(frozen=True, slots=True)
class _Shape:
    """All that a run of one bucket needs: its part of the page-locked memory, and what runs it."""

    pixels: NDArray[np.uint8]
    embedding: NDArray[np.float32]
    projected: NDArray[np.float32]
    launch: Callable[[], None]
    context: Any


@dataclass(frozen=True, slots=True)
class _Pinned:
    """Page-locked memory for the largest run: (b, H, W, 3) uint8, (b, d) and (b * K,) float32."""

    pixels: NDArray[np.uint8]
    embedding: NDArray[np.float32]
    projected: NDArray[np.float32]


class TensorRTImageEngine:
    """A plan on a GPU; see `crl_sdk.engines.ImageEngine`.

    A run of b images uses the smallest bucket that holds them: 1, 2, 4, … up to the plan's most
    images; more are run in turn. What the rows beyond b hold is computed and thrown away. The
    columns K have buckets likewise. A bucket has a CUDA graph: copy the pixels from page-locked
    memory, run, copy the results. Buckets share all memory, since one run is under way at a time.
    """

    def __init__(
        self,
        toolkit: TensorRTRuntime,
        gpu: cuda.CudaDevice,
        plan: Plan,
        loaded: _Loaded,
        baked: Basis | None,
    ) -> None:
        """Store an engine that is loaded; `TensorRTImageEngine.open` loads one."""
        self.plan = plan
        self._toolkit = toolkit
        self._gpu = gpu
        self._loaded: _Loaded | None = loaded
        self._baked = baked
        self._lock = threading.Lock()
        self._shapes: dict[tuple[int, int], _Shape] = {}
        self._config: Any = None
        self._cache: Any = None
        self._addresses: dict[str, int] = {}
        self._pinned: _Pinned | None = None
        self._scratch = 0
        self._weights: NDArray[np.float32] | None = None

    @classmethod
    def open(
        cls,
        bundle: ModelBundle,
        *,
        runtime: PlanRuntime = "tensorrt-rtx",
        precision: Precision | Literal["auto"] = "auto",
        baked: Basis | None = None,
        directory: Path | None = None,
    ) -> TensorRTImageEngine:
        """Load the plan of a bundle that fits this machine, and record a graph for each batch.

        Args:
            bundle: a verified bundle.
            runtime: which TensorRT.
            precision: `auto` takes fp16 before fp32.
            baked: take the plan that has this basis fixed in it.
            directory: of the plans; `engines` in the bundle by default.

        Raises:
            EngineError: there is no driver or GPU, its memory is full, or TensorRT refuses.
            PlanError: no plan fits, or it is damaged or stale; the message has the command that
                compiles one.
            MissingDependencyError: this TensorRT or cuda-python is not installed.
        """
        here = cuda.architecture()  # before TensorRT, which says less of what is missing
        toolkit = load_tensorrt(runtime)
        folder = directory or plans_directory(bundle)
        plan = choose_plan(
            bundle,
            folder,
            runtime=runtime,
            runtime_version=toolkit.version,
            architecture=here,
            precision=precision,
            baked=baked.sha256() if baked is not None else None,
        )
        data = load_plan(bundle, folder, plan)
        gpu = cuda.CudaDevice.open()
        try:
            opened = cls(toolkit, gpu, plan, _deserialise(toolkit, plan, data), baked)
            opened._prepare(folder / f"{plan.spec.stem}.{here}.cache")
        except BaseException:
            gpu.close()
            raise
        _log.info("%s: %s on %s", opened.name, plan.spec.stem, here)
        return opened

    @property
    def name(self) -> EngineName:
        """See `crl_sdk.engines.ImageEngine.name`."""
        return EngineName(self.plan.spec.runtime, "cuda", self.plan.spec.precision)

    def close(self) -> None:
        """Free the GPU's memory; later runs are refused. Idempotent."""
        with self._lock:
            self._shapes.clear()  # contexts go before the engine and the memory they use
            self._config = self._cache = self._loaded = None
            self._gpu.close()

    def run(
        self,
        pixels: NDArray[np.uint8],
        weight: NDArray[np.float32],
        bias: NDArray[np.float32],
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """See `crl_sdk.engines.ImageEngine.run`."""
        self._check(pixels, weight, bias)
        rows, columns = len(pixels), weight.shape[1]
        dim = weight.shape[0]
        embedding = np.empty((rows, dim), np.float32)
        projected = np.empty((rows, columns), np.float32)
        most = self.plan.spec.batch[2]
        with self._lock:
            self._gpu.enter()
            for start in range(0, rows, most):
                part = slice(start, min(start + most, rows))
                count = part.stop - start
                shape = self._shape(self._bucket(count), self._columns(columns))
                self._upload(weight, bias, shape)
                np.copyto(shape.pixels[:count], pixels[part])
                shape.launch()
                self._gpu.wait()
                embedding[part] = shape.embedding[:count]
                projected[part] = shape.projected[:count, :columns]
        return embedding, projected

    def _check(
        self,
        pixels: NDArray[np.uint8],
        weight: NDArray[np.float32],
        bias: NDArray[np.float32],
    ) -> None:
        spec = self.plan.spec
        image = self._tensor("image").shape[1:]
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1:] != image:
            raise EngineError(
                f"expected pixels (b, {', '.join(map(str, image))}) uint8, got {pixels.shape} "
                f"{pixels.dtype}"
            )
        dim = self._tensor("embedding").shape[1]
        columns = weight.shape[-1]
        if weight.shape != (dim, columns) or bias.shape != (columns,):
            raise EngineError(
                f"expected weight ({dim}, K) and bias (K,), got {weight.shape} and {bias.shape}"
            )
        if self._baked is not None:
            fixed = self._baked.projection
            if columns and not (
                np.array_equal(fixed.weight, weight) and np.array_equal(fixed.bias, bias)
            ):
                raise EngineError(
                    f"expected the basis {self._baked.criterion!r}, which is fixed in this plan, "
                    f"got {columns} other columns: compile a plan without --baked"
                )
        elif columns > spec.max_columns:
            raise EngineError(
                f"expected at most {spec.max_columns} columns of all bases together, got "
                f"{columns}: compile again with --max-columns {columns}, or ask for fewer criteria"
            )

    @property
    def _engine(self) -> Any:
        if self._loaded is None:
            raise EngineError("this engine is closed: open another")
        return self._loaded.engine

    def _tensor(self, name: str) -> Any:
        return next(each for each in (*self.plan.inputs, *self.plan.outputs) if each.name == name)

    def _bucket(self, images: int) -> int:
        return next(bucket for bucket in self._buckets() if bucket >= images)

    def _buckets(self) -> Iterator[int]:
        """Give the sizes of batches: the fewest, then powers of two, then the most."""
        fewest, _, most = self.plan.spec.batch
        bucket = fewest
        while bucket < most:
            yield bucket
            bucket = 1 << bucket.bit_length()
        yield most

    def _columns(self, columns: int) -> int:
        if self._baked is not None:
            return self._baked.projection.output_dim
        if not columns:
            return 1  # the fewest a plan takes
        wanted = max(_FEWEST_COLUMNS, 1 << (columns - 1).bit_length())
        return min(wanted, self.plan.spec.max_columns)

    def _prepare(self, cache_file: Path) -> None:
        """Allocate the GPU's memory and record the graphs of all batches without columns."""
        spec = self.plan.spec
        image, dim = self._tensor("image").shape[1:], self._tensor("embedding").shape[1]
        most, floats = spec.batch[2], np.dtype(np.float32).itemsize
        columns = self._columns(spec.max_columns)
        sizes = {
            "image": most * int(np.prod(image)),
            "embedding": most * dim * floats,
            "projected": most * columns * floats,
        }
        if self._baked is None:
            sizes |= {"weight": dim * columns * floats, "bias": columns * floats}
        self._addresses = {name: self._gpu.allocate(size, name) for name, size in sizes.items()}
        self._pinned = _Pinned(
            self._gpu.pinned((most, *image), np.uint8),
            self._gpu.pinned((most, dim), np.float32),
            self._gpu.pinned((most * columns,), np.float32),
        )
        size = int(self._engine.device_memory_size_v2)
        self._scratch = self._gpu.allocate(size, "intermediate results")
        known = self._runtime_config(cache_file)
        for bucket in self._buckets():
            self._shape(bucket, self._columns(0))
        if self._cache is not None:
            self._keep(cache_file, known)

    def _runtime_config(self, cache_file: Path) -> bytes:
        """Tell TensorRT-RTX how to run, with what it compiled for this GPU the last time."""
        if self._toolkit.runtime != "tensorrt-rtx":
            return b""
        trt = self._toolkit.module
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        # kernels for exactly this shape, there before the graph is recorded; the graph is ours
        config.dynamic_shapes_kernel_specialization_strategy = (
            trt.DynamicShapesKernelSpecializationStrategy.EAGER
        )
        config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
        cache = config.create_runtime_cache()
        try:
            known = cache_file.read_bytes()
        except OSError:
            known = b""
        if known and not cache.deserialize(known):
            _log.info("%s: of another GPU, driver or TensorRT-RTX; made anew", cache_file)
            known = b""
        config.set_runtime_cache(cache)
        self._config, self._cache = config, cache
        return known

    def _keep(self, cache_file: Path, known: bytes) -> None:
        data = bytes(self._cache.serialize())
        if data == known:
            return
        try:
            write_atomically(cache_file, data, PlanError)
        except PlanError as error:
            _log.warning("%s; every start compiles the kernels for this GPU again", error)

    def _shape(self, bucket: int, columns: int) -> _Shape:
        """Give the buffers and the graph of a bucket; the first use records it."""
        key = (bucket, columns)
        if key not in self._shapes:
            self._shapes[key] = self._record(bucket, columns)
        return self._shapes[key]

    def _record(self, bucket: int, columns: int) -> _Shape:
        gpu, addresses, pinned = self._gpu, self._addresses, self._pinned
        assert pinned is not None  # since `_prepare`
        context = self._context(bucket, columns)
        pixels, embedding = pinned.pixels[:bucket], pinned.embedding[:bucket]
        projected = pinned.projected[: bucket * columns].reshape(bucket, columns)

        def enqueue() -> None:
            gpu.upload(addresses["image"], pixels)
            if not context.execute_async_v3(gpu.stream):
                raise EngineError(f"{self.name}: TensorRT refused a run of {bucket} images")
            gpu.download(embedding, addresses["embedding"])
            gpu.download(projected, addresses["projected"])

        enqueue()  # what TensorRT does once per shape must not be recorded
        gpu.wait()
        launch: Callable[[], None] = enqueue
        try:
            launch = gpu.capture(enqueue)
        except EngineError as error:
            _log.warning("%s; runs of %d images go without a CUDA graph, slower", error, bucket)
        return _Shape(pixels, embedding, projected, launch, context)

    def _context(self, bucket: int, columns: int) -> Any:
        """Make an execution context of its own, since a graph keeps the shapes of its context."""
        trt = self._toolkit.module
        context = self._engine.create_execution_context(
            self._config
            if self._config is not None
            else trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        if context is None:
            raise EngineError(f"{self.name}: TensorRT made no execution context")
        context.set_device_memory(self._scratch, int(self._engine.device_memory_size_v2))
        image = self._tensor("image").shape[1:]
        shapes: dict[str, tuple[int, ...]] = {"image": (bucket, *image)}
        if self._baked is None:
            dim = self._tensor("embedding").shape[1]
            shapes |= {"weight": (dim, columns), "bias": (columns,)}
        taken = [context.set_input_shape(name, shape) for name, shape in shapes.items()]
        taken += [
            context.set_tensor_address(name, address) for name, address in self._addresses.items()
        ]
        if not all(taken) or context.infer_shapes():
            raise EngineError(f"{self.name}: TensorRT refused the shapes {shapes}")
        return context

    def _upload(
        self, weight: NDArray[np.float32], bias: NDArray[np.float32], shape: _Shape
    ) -> None:
        """Bring the packed bases to the GPU, unless they are there: they seldom change."""
        if self._baked is not None:
            return
        wanted = np.zeros((len(weight) + 1, shape.projected.shape[1]), np.float32)
        wanted[:-1, : weight.shape[1]] = weight
        wanted[-1, : weight.shape[1]] = bias
        if self._weights is not None and np.array_equal(self._weights, wanted):
            return
        self._weights = None  # should a copy fail, the next run copies again
        self._gpu.upload(self._addresses["weight"], wanted[:-1])
        self._gpu.upload(self._addresses["bias"], wanted[-1])
        self._gpu.wait()  # `wanted` is not page-locked, and is gone when this returns
        self._weights = wanted


def _deserialise(toolkit: TensorRTRuntime, plan: Plan, data: bytes) -> _Loaded:
    """Load a plan into TensorRT, and see that it has the inputs and outputs of its record."""
    log = toolkit.logger()
    runtime = toolkit.module.Runtime(log)
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        told = " ".join("; ".join(log.errors[-3:]).split()) or "it gave no reason"
        raise PlanError(
            f"{plan.spec.stem}: {plan.spec.runtime} {toolkit.version} does not load it "
            f"({told}); compile it again with crl compile --force"
        )
    names = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
    expected = {each.name for each in (*plan.inputs, *plan.outputs)}
    if names != expected:
        raise PlanError(
            f"{plan.spec.stem}: expected tensors {sorted(expected)}, its engine has "
            f"{sorted(names)}; compile it again with crl compile --force"
        )
    return _Loaded(engine, runtime, log)
