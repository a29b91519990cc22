"""TensorRT engine: runs a compiled plan on a GPU, with one CUDA graph for each shape of a run.

**It has not been run on hardware.** The tests use a simulated driver and a simulated TensorRT. On a
GPU, `crl verify BUNDLE --engine tensorrt-rtx` compares it with the fp32 graph.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from crl_sdk.basis._basis import Basis
from crl_sdk.engines import _cuda as cuda
from crl_sdk.engines._contract import Finish
from crl_sdk.engines._engine_name import EngineName
from crl_sdk.engines._tensorrt_plans import (
    Plan,
    PlanRuntime,
    choose_plan,
    load_plan,
    plans_directory,
)
from crl_sdk.engines._tensorrt_runtime import TensorRTRuntime, load_tensorrt
from crl_sdk.errors import ClosedError, EngineError, ForkError, PlanError
from crl_sdk.model._bundle import ModelBundle
from crl_sdk.model._manifest import Precision
from crl_sdk.storage._atomic_files import write_atomically

_log = logging.getLogger(__name__)

_LANES = 2
"""Number of runs that may be under way."""

_MIN_COLUMNS = 64
"""Minimum number of columns of a run, so that few graphs serve all numbers of columns."""


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A deserialised engine, and the objects that must live as long as it."""

    engine: Any
    runtime: Any
    logger: Any


@dataclass(frozen=True, slots=True)
class _Shape:
    """How to start a run of one bucket, and the context that the graph needs."""

    launch: Callable[[], None]
    context: Any


@dataclass(frozen=True, slots=True)
class _Lane:
    """The buffers of one run. While one lane's run computes, the other lane's pixels are copied.

    Attributes:
        pixels: Images in page-locked memory, shape (b, H, W, 3), uint8.
        embedding: Universal embeddings in page-locked memory, shape (b, d), float32.
        projected: Projected columns in page-locked memory, shape (b * K,), float32.
        addresses: Addresses of the three in device memory, by the name of the tensor.
        uploaded: Event: the pixels are in device memory.
        computed: Event: the results are in device memory.
        done: Event: the results are in page-locked memory.
        shapes: Recorded graphs, by number of images and columns.
    """

    pixels: NDArray[np.uint8]
    embedding: NDArray[np.float32]
    projected: NDArray[np.float32]
    addresses: dict[str, int]
    uploaded: Any
    computed: Any
    done: Any
    shapes: dict[tuple[int, int], _Shape]


class TensorRTImageEngine:
    """A plan on a GPU; see `crl_sdk.engines.ImageEngine`.

    A run of b images uses the smallest bucket that holds them: 1, 2, 4, … up to the plan's maximum.
    More images are split into several runs. The rows beyond b are computed and ignored. The number
    of columns K is rounded up to a bucket in the same way.

    Two runs may be under way, each in a lane with buffers of its own. Three streams copy pixels to
    the GPU, run the plan, and copy results back; events order them, so that the pixels of a run are
    copied while the run before it computes. Each bucket of a lane has a CUDA graph of its part in
    the middle. Intermediate results share one memory, since one run computes at a time. A GPU that
    has the memory of the processor, as on Jetson, uses page-locked memory itself, without copies.
    """

    def __init__(
        self,
        tensorrt: TensorRTRuntime,
        gpu: cuda.CudaDevice,
        plan: Plan,
        loaded: _Loaded,
        baked: Basis | None,
    ) -> None:
        """Store a loaded plan. Use `TensorRTImageEngine.open` to load one."""
        self.plan = plan
        self._tensorrt = tensorrt
        self._gpu = gpu
        self._loaded: _Loaded | None = loaded
        self._baked = baked
        self._lock = threading.Lock()
        self._lanes: tuple[_Lane, ...] = ()
        self._free: queue.SimpleQueue[_Lane] = queue.SimpleQueue()
        self._in: Any = None
        self._out: Any = None
        self._mapped = False
        self._config: Any = None
        self._cache: Any = None
        self._addresses: dict[str, int] = {}
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
        """Load the plan that runs on this machine, and record a CUDA graph for each batch size.

        Args:
            bundle: Verified bundle.
            runtime: TensorRT to use.
            precision: Required precision; `auto` prefers fp16 to fp32.
            baked: Basis that must be compiled into the plan; None for a plan that takes any bases.
            directory: Directory of the plans; `engines` in the bundle by default.

        Raises:
            EngineError: If there is no driver or GPU, its memory is full, or TensorRT fails.
            PlanError: If no plan runs here, or it is damaged or out of date. The message has the
                command that compiles one.
            MissingDependencyError: If this TensorRT or cuda-python is not installed.
        """
        here = cuda.architecture()  # before TensorRT, whose error would say less
        tensorrt = load_tensorrt(runtime)
        folder = directory or plans_directory(bundle)
        plan = choose_plan(
            bundle,
            folder,
            runtime=runtime,
            runtime_version=tensorrt.version,
            architecture=here,
            precision=precision,
            baked=baked.sha256() if baked is not None else None,
        )
        data = load_plan(bundle, folder, plan)
        gpu = cuda.CudaDevice.open()
        try:
            opened = cls(tensorrt, gpu, plan, _deserialise(tensorrt, plan, data), baked)
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

    @property
    def max_columns(self) -> int:
        """See `crl_sdk.engines.ImageEngine.max_columns`."""
        return self._columns(0) if self._baked is not None else self.plan.spec.max_columns

    def close(self) -> None:
        """Free the GPU's memory. Idempotent. Later runs and those under way raise `ClosedError`."""
        with self._lock:
            if self._loaded is not None:
                self._quiet()
            for lane in self._lanes:  # contexts must go before the engine and the memory they use
                lane.shapes.clear()
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
        most = self.plan.spec.batch[2]
        embedding = np.empty((len(pixels), len(weight)), np.float32)
        projected = np.empty((len(pixels), weight.shape[1]), np.float32)
        under_way: list[tuple[slice, Finish]] = []

        def finish() -> None:
            part, wait = under_way.pop(0)
            embedding[part], projected[part] = wait()

        try:
            for start in range(0, len(pixels), most):
                part = slice(start, min(start + most, len(pixels)))
                lane = self._take_lane(wait=not under_way)
                if lane is None:  # this thread must not wait for a lane while it holds the other
                    finish()
                    lane = self._take_lane(wait=True)
                assert lane is not None
                under_way.append((part, self._start(lane, pixels[part], weight, bias)))
            while under_way:
                finish()
        finally:
            for _, wait in under_way:  # after an error: free the lanes
                with suppress(EngineError, ClosedError):
                    wait()
        return embedding, projected

    def start(
        self,
        pixels: NDArray[np.uint8],
        weight: NDArray[np.float32],
        bias: NDArray[np.float32],
    ) -> Finish:
        """See `crl_sdk.engines.PipelinedEngine.start`.

        More images than the plan takes are run before it returns.
        """
        self._check(pixels, weight, bias)
        if len(pixels) > self.plan.spec.batch[2] or not len(pixels):
            result = self.run(pixels, weight, bias)
            return lambda: result
        lane = self._take_lane(wait=True)
        assert lane is not None
        return self._start(lane, pixels, weight, bias)

    def _take_lane(self, *, wait: bool) -> _Lane | None:
        """Return a free lane, or None if there is none and the caller does not wait."""
        try:
            return self._free.get(block=wait)
        except queue.Empty:
            return None

    def _start(
        self,
        lane: _Lane,
        pixels: NDArray[np.uint8],
        weight: NDArray[np.float32],
        bias: NDArray[np.float32],
    ) -> Finish:
        """Queue a run in a lane, which is free again once the returned function was called."""
        count, columns = len(pixels), weight.shape[1]
        gpu = self._gpu
        try:
            with self._lock:
                gpu.enter()
                bucket, wide = self._bucket(count), self._columns(columns)
                shape = self._shape(lane, bucket, wide)
                self._upload(weight, bias, wide)
                np.copyto(lane.pixels[:count], pixels)
                self._queue(lane, bucket, wide, shape.launch)
        except BaseException:
            self._quiet()  # what was queued still uses the lane
            self._free.put(lane)
            raise

        def finish() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
            try:
                with self._lock:  # so that the memory is not freed meanwhile
                    gpu.enter()
                    gpu.wait_for(lane.done)
                    projected = lane.projected[: bucket * wide].reshape(bucket, wide)
                    return lane.embedding[:count].copy(), projected[:count, :columns].copy()
            finally:
                self._free.put(lane)

        return finish

    def _queue(self, lane: _Lane, bucket: int, columns: int, launch: Callable[[], None]) -> None:
        """Queue the copy of the pixels, the run and the copies of results, each in its stream."""
        gpu = self._gpu
        if self._mapped:
            launch()
            gpu.record(lane.done)
            return
        gpu.upload(lane.addresses["image"], lane.pixels[:bucket], self._in)
        gpu.record(lane.uploaded, self._in)
        gpu.hold(None, lane.uploaded)
        launch()
        gpu.record(lane.computed)
        gpu.hold(self._out, lane.computed)
        gpu.download(lane.embedding[:bucket], lane.addresses["embedding"], self._out)
        gpu.download(lane.projected[: bucket * columns], lane.addresses["projected"], self._out)
        gpu.record(lane.done, self._out)

    def _quiet(self) -> None:
        """Wait until no run is under way."""
        # a device that fails runs nothing any more, and a closed one has been waited for
        with suppress(EngineError, ClosedError, ForkError):
            self._gpu.enter()
            for stream in (self._in, None, self._out):
                self._gpu.wait(stream)

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
            raise ClosedError("the engine is closed: make a new one")
        return self._loaded.engine

    def _tensor(self, name: str) -> Any:
        return next(each for each in (*self.plan.inputs, *self.plan.outputs) if each.name == name)

    def _bucket(self, images: int) -> int:
        return next(bucket for bucket in self._buckets() if bucket >= images)

    def _buckets(self) -> Iterator[int]:
        """Yield the batch sizes: the minimum, then powers of two, then the maximum."""
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
            return 1  # the minimum of a plan
        wanted = max(_MIN_COLUMNS, 1 << (columns - 1).bit_length())
        return min(wanted, self.plan.spec.max_columns)

    def _prepare(self, cache_file: Path) -> None:
        """Allocate all memory, and record the graphs of all batch sizes without columns."""
        gpu, spec = self._gpu, self.plan.spec
        dim, floats = self._tensor("embedding").shape[1], np.dtype(np.float32).itemsize
        columns = self._columns(spec.max_columns)
        self._mapped = gpu.is_integrated
        self._in, self._out = gpu.new_stream(), gpu.new_stream()
        if self._baked is None:
            sizes = {"weight": dim * columns * floats, "bias": columns * floats}
            self._addresses = {name: gpu.allocate(size, name) for name, size in sizes.items()}
        size = int(self._engine.device_memory_size_v2)
        self._scratch = gpu.allocate(size, "intermediate results")
        self._lanes = tuple(self._make_lane(dim, columns) for _ in range(_LANES))
        known = self._runtime_config(cache_file)
        for lane in self._lanes:
            for bucket in self._buckets():
                self._shape(lane, bucket, self._columns(0))
            self._free.put(lane)
        if self._cache is not None:
            self._keep(cache_file, known)

    def _make_lane(self, dim: int, columns: int) -> _Lane:
        gpu, most = self._gpu, self.plan.spec.batch[2]
        shapes: dict[str, tuple[tuple[int, ...], type[np.generic]]] = {
            "image": ((most, *self._tensor("image").shape[1:]), np.uint8),
            "embedding": ((most, dim), np.float32),
            "projected": ((most * columns,), np.float32),
        }
        arrays, addresses = {}, {}
        for name, (shape, dtype) in shapes.items():
            if self._mapped:
                arrays[name], addresses[name] = gpu.mapped(shape, dtype)
            else:
                arrays[name] = gpu.pinned(shape, dtype)
                addresses[name] = gpu.allocate(arrays[name].nbytes, name)
        return _Lane(
            arrays["image"], arrays["embedding"], arrays["projected"], addresses,
            gpu.new_event(), gpu.new_event(), gpu.new_event(), {},
        )  # fmt: skip

    def _runtime_config(self, cache_file: Path) -> bytes:
        """Configure TensorRT-RTX, and return the kernels that it compiled for this GPU before."""
        if self._tensorrt.runtime != "tensorrt-rtx":
            return b""
        trt = self._tensorrt.module
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        # specialise kernels before our own CUDA graph is recorded
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
            _log.info("%s: from another GPU, driver or TensorRT-RTX; replaced", cache_file)
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

    def _shape(self, lane: _Lane, bucket: int, columns: int) -> _Shape:
        """Return the graph of a bucket in a lane; the first use records it."""
        key = (bucket, columns)
        if key not in lane.shapes:
            lane.shapes[key] = self._record(lane, bucket, columns)
        return lane.shapes[key]

    def _record(self, lane: _Lane, bucket: int, columns: int) -> _Shape:
        gpu, context = self._gpu, self._context(lane, bucket, columns)

        def enqueue() -> None:
            if not context.execute_async_v3(gpu.stream):
                raise EngineError(f"{self.name}: TensorRT refused a run of {bucket} images")

        enqueue()  # TensorRT's first run of a shape does work that must not be recorded
        gpu.wait()
        launch: Callable[[], None] = enqueue
        try:
            launch = gpu.capture(enqueue)
        except EngineError as error:
            _log.warning("%s; runs of %d images go without a CUDA graph, slower", error, bucket)
        return _Shape(launch, context)

    def _context(self, lane: _Lane, bucket: int, columns: int) -> Any:
        """Return a new execution context. Each graph needs one, with the shapes of its bucket."""
        trt = self._tensorrt.module
        context = self._engine.create_execution_context(
            self._config
            if self._config is not None
            else trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        if context is None:
            raise EngineError(f"{self.name}: TensorRT could not create an execution context")
        context.set_device_memory(self._scratch, int(self._engine.device_memory_size_v2))
        image = self._tensor("image").shape[1:]
        shapes: dict[str, tuple[int, ...]] = {"image": (bucket, *image)}
        if self._baked is None:
            dim = self._tensor("embedding").shape[1]
            shapes |= {"weight": (dim, columns), "bias": (columns,)}
        taken = [context.set_input_shape(name, shape) for name, shape in shapes.items()]
        taken += [
            context.set_tensor_address(name, address)
            for name, address in {**self._addresses, **lane.addresses}.items()
        ]
        if not all(taken) or context.infer_shapes():
            raise EngineError(f"{self.name}: TensorRT refused the shapes {shapes}")
        return context

    def _upload(self, weight: NDArray[np.float32], bias: NDArray[np.float32], columns: int) -> None:
        """Copy the packed bases to the GPU if they have changed since the last run.

        The copy is queued behind the runs under way, which still use the bases before.
        """
        if self._baked is not None:
            return
        wanted = np.zeros((len(weight) + 1, columns), np.float32)
        wanted[:-1, : weight.shape[1]] = weight
        wanted[-1, : weight.shape[1]] = bias
        if self._weights is not None and np.array_equal(self._weights, wanted):
            return
        self._weights = None  # if a copy fails, the next run must copy again
        self._gpu.upload(self._addresses["weight"], wanted[:-1])
        self._gpu.upload(self._addresses["bias"], wanted[-1])
        self._gpu.wait()  # `wanted` is not page-locked, so the copy must end before it is changed
        self._weights = wanted


def _deserialise(tensorrt: TensorRTRuntime, plan: Plan, data: bytes) -> _Loaded:
    """Load a plan into TensorRT, and check its inputs and outputs against its record."""
    log = tensorrt.logger()
    runtime = tensorrt.module.Runtime(log)
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        reason = " ".join("; ".join(log.errors[-3:]).split()) or "it gave no reason"
        raise PlanError(
            f"{plan.spec.stem}: {plan.spec.runtime} {tensorrt.version} does not load it "
            f"({reason}); compile it again with crl compile --force"
        )
    names = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
    expected = {each.name for each in (*plan.inputs, *plan.outputs)}
    if names != expected:
        raise PlanError(
            f"{plan.spec.stem}: expected tensors {sorted(expected)}, its engine has "
            f"{sorted(names)}; compile it again with crl compile --force"
        )
    return _Loaded(engine, runtime, log)
