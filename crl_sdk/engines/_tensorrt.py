"""TensorRT engine: runs a compiled plan on a GPU, with one CUDA graph for each shape of a run.

**It has not been run on hardware.** The tests use a simulated driver and a simulated TensorRT. On a
GPU, `crl verify BUNDLE --engine tensorrt-rtx` compares it with the fp32 graph.
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
from crl_sdk.errors import ClosedError, EngineError, PlanError
from crl_sdk.model._bundle import ModelBundle
from crl_sdk.model._manifest import Precision
from crl_sdk.storage._atomic_files import write_atomically

_log = logging.getLogger(__name__)

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
    """What a run of one bucket needs: its part of the page-locked memory, and how to start it."""

    pixels: NDArray[np.uint8]
    embedding: NDArray[np.float32]
    projected: NDArray[np.float32]
    launch: Callable[[], None]
    context: Any


@dataclass(frozen=True, slots=True)
class _Pinned:
    """Page-locked memory for the largest run.

    Attributes:
        pixels: Images, shape (b, H, W, 3), uint8.
        embedding: Universal embeddings, shape (b, d), float32.
        projected: Projected columns, shape (b * K,), float32.
    """

    pixels: NDArray[np.uint8]
    embedding: NDArray[np.float32]
    projected: NDArray[np.float32]


class TensorRTImageEngine:
    """A plan on a GPU; see `crl_sdk.engines.ImageEngine`.

    A run of b images uses the smallest bucket that holds them: 1, 2, 4, … up to the plan's maximum.
    More images are split into several runs. The rows beyond b are computed and ignored. The number
    of columns K is rounded up to a bucket in the same way.

    Each bucket has a CUDA graph: copy the pixels from page-locked memory, run the plan, copy the
    results back. All buckets share the same memory, since only one run is active at a time.
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
        """Free the GPU's memory. Idempotent. A later run raises `ClosedError`."""
        with self._lock:
            self._shapes.clear()  # contexts must go before the engine and the memory they use
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

    def _shape(self, bucket: int, columns: int) -> _Shape:
        """Return the buffers and the graph of a bucket; the first use records it."""
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

        enqueue()  # TensorRT's first run of a shape does work that must not be recorded
        gpu.wait()
        launch: Callable[[], None] = enqueue
        try:
            launch = gpu.capture(enqueue)
        except EngineError as error:
            _log.warning("%s; runs of %d images go without a CUDA graph, slower", error, bucket)
        return _Shape(pixels, embedding, projected, launch, context)

    def _context(self, bucket: int, columns: int) -> Any:
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
            context.set_tensor_address(name, address) for name, address in self._addresses.items()
        ]
        if not all(taken) or context.infer_shapes():
            raise EngineError(f"{self.name}: TensorRT refused the shapes {shapes}")
        return context

    def _upload(
        self, weight: NDArray[np.float32], bias: NDArray[np.float32], shape: _Shape
    ) -> None:
        """Copy the packed bases to the GPU if they have changed since the last run."""
        if self._baked is not None:
            return
        wanted = np.zeros((len(weight) + 1, shape.projected.shape[1]), np.float32)
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
