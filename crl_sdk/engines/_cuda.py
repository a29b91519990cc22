"""The GPU of this machine through NVIDIA's own bindings (`cuda-python`); no torch."""

from __future__ import annotations

import ctypes
import logging
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from crl_sdk.errors import EngineError, MissingDependencyError

_log = logging.getLogger(__name__)

_NON_BLOCKING = 1
"""`CU_STREAM_NON_BLOCKING`: a stream that does not wait for the default one."""

_OUT_OF_MEMORY = 2
"""`CUDA_ERROR_OUT_OF_MEMORY`."""


def driver() -> Any:
    """Give the CUDA driver's bindings, initialised.

    Raises:
        MissingDependencyError: cuda-python is not installed.
        EngineError: there is no driver, or it finds no GPU.
    """
    try:
        from cuda.bindings import driver as bindings
    except ImportError as error:
        raise MissingDependencyError("cuda-bindings", "tensorrt-rtx", "using a GPU") from error
    try:
        (status,) = bindings.cuInit(0)
    except Exception as error:  # of cuda.pathfinder: the library is not there
        raise EngineError(
            "expected an NVIDIA driver (libcuda.so.1), found none: install the driver of your GPU, "
            "or choose --engine onnx/cpu"
        ) from error
    if status != bindings.CUresult.CUDA_SUCCESS:
        raise EngineError(
            f"the NVIDIA driver is there but does not start ({status.name}): see whether "
            "`nvidia-smi` lists a GPU"
        )
    return bindings


def check(result: tuple[Any, ...], what: str) -> Any:
    """Give what a call of the driver returned, without its status.

    Raises:
        EngineError: it failed.
    """
    status, *values = result
    if int(status) != 0:
        advice = (
            "the GPU's memory is full: close other programs on it, or compile with a smaller "
            "--batch and --max-columns"
            if int(status) == _OUT_OF_MEMORY
            else "`crl doctor` tells what is there"
        )
        raise EngineError(f"{what} failed ({status.name}): {advice}")
    return values[0] if len(values) == 1 else tuple(values)


def architecture(device: int = 0) -> str:
    """Give the compute capability of a GPU, such as `sm89`.

    Raises:
        EngineError: there is no driver or no such GPU.
        MissingDependencyError: cuda-python is not installed.
    """
    cu = driver()
    handle = check(cu.cuDeviceGet(device), f"opening GPU {device}")
    attribute = cu.CUdevice_attribute
    major = check(
        cu.cuDeviceGetAttribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, handle),
        "asking for its compute capability",
    )
    minor = check(
        cu.cuDeviceGetAttribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, handle),
        "asking for its compute capability",
    )
    return f"sm{major}{minor}"


class CudaDevice:
    """A GPU with memory and one stream; all it gave is freed by `close` or with it.

    It uses the primary context, which is the one TensorRT uses. Any thread may call it, one at a
    time.
    """

    def __init__(self, cu: Any, device: int, context: Any, stream: Any) -> None:
        """Store the handles; `CudaDevice.open` makes them."""
        self._cu = cu
        self._context = context
        self._stream = stream
        releases: list[Callable[[], Any]] = [  # none may refer to self, or it is never freed
            partial(cu.cuDevicePrimaryCtxRelease, device),
            partial(cu.cuStreamDestroy, stream),
        ]
        self._releases = releases
        self._memory: dict[int, Any] = {}
        self._finalizer = weakref.finalize(self, _release, cu, context, releases, self._memory)
        self._finalizer.atexit = False  # the driver frees everything when the process ends

    @classmethod
    def open(cls, ordinal: int = 0) -> CudaDevice:
        """Open a GPU, by its number among those of `CUDA_VISIBLE_DEVICES`.

        Raises:
            EngineError: there is no driver or no such GPU.
            MissingDependencyError: cuda-python is not installed.
        """
        cu = driver()
        device = check(cu.cuDeviceGet(ordinal), f"opening GPU {ordinal}")
        context = check(cu.cuDevicePrimaryCtxRetain(device), "making a CUDA context")
        try:
            check(cu.cuCtxSetCurrent(context), "entering the CUDA context")
            stream = check(cu.cuStreamCreate(_NON_BLOCKING), "making a CUDA stream")
        except BaseException:
            cu.cuDevicePrimaryCtxRelease(device)
            raise
        return cls(cu, device, context, stream)

    @property
    def stream(self) -> int:
        """The stream's handle, as TensorRT takes it."""
        return int(self._stream)

    def enter(self) -> None:
        """Make its context that of the calling thread, before anything else is asked of it.

        Raises:
            EngineError: it is closed, or the driver refuses.
        """
        if not self._finalizer.alive:
            raise EngineError("this engine is closed: open another")
        check(self._cu.cuCtxSetCurrent(self._context), "entering the CUDA context")

    def close(self) -> None:
        """Free everything. Idempotent."""
        self._finalizer()

    def allocate(self, size: int, what: str) -> int:
        """Give the address of device memory.

        Args:
            size: bytes.
            what: for the error message.

        Raises:
            EngineError: there is not enough.
        """
        pointer = check(
            self._cu.cuMemAlloc(max(size, 1)), f"{what}: {size:,} bytes of the GPU's memory"
        )
        self._memory[int(pointer)] = pointer
        return int(pointer)

    def free(self, address: int) -> None:
        """Free device memory before the rest is.

        Raises:
            EngineError: the driver refuses.
        """
        check(self._cu.cuMemFree(self._memory.pop(address)), "freeing the GPU's memory")

    def pinned(self, shape: Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
        """Give a zeroed array in page-locked host memory, which the GPU copies from and to.

        Raises:
            EngineError: there is not enough.
        """
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        address = check(
            self._cu.cuMemHostAlloc(max(size, 1), 0), f"{size:,} bytes of page-locked memory"
        )
        self._releases.append(partial(self._cu.cuMemFreeHost, address))
        raw = (ctypes.c_uint8 * max(size, 1)).from_address(int(address))
        array: NDArray[Any] = np.ctypeslib.as_array(raw)[:size].view(dtype).reshape(tuple(shape))
        array[...] = 0
        return array

    def upload(self, target: int, source: NDArray[Any]) -> None:
        """Copy a contiguous array to device memory, in the stream's order.

        Raises:
            EngineError: the driver refuses.
        """
        check(
            self._cu.cuMemcpyHtoDAsync(target, source.ctypes.data, source.nbytes, self._stream),
            "copying to the GPU",
        )

    def download(self, target: NDArray[Any], source: int) -> None:
        """Copy device memory to a contiguous array, in the stream's order.

        Raises:
            EngineError: the driver refuses.
        """
        check(
            self._cu.cuMemcpyDtoHAsync(target.ctypes.data, source, target.nbytes, self._stream),
            "copying from the GPU",
        )

    def wait(self) -> None:
        """Wait for all that was put into the stream.

        Raises:
            EngineError: something of it failed.
        """
        check(self._cu.cuStreamSynchronize(self._stream), "running on the GPU")

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record what a function puts into the stream as a CUDA graph.

        Returns:
            A function that puts all of it into the stream at once.

        Raises:
            EngineError: the driver refuses, or what `work` raised.
        """
        cu = self._cu
        mode = cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        check(cu.cuStreamBeginCapture(self._stream, mode), "beginning a CUDA graph")
        try:
            work()
        except BaseException:
            _, graph = cu.cuStreamEndCapture(self._stream)
            if graph is not None and int(graph):
                cu.cuGraphDestroy(graph)
            raise
        graph = check(cu.cuStreamEndCapture(self._stream), "recording a CUDA graph")
        try:
            runnable = check(cu.cuGraphInstantiate(graph, 0), "making a CUDA graph runnable")
        finally:
            cu.cuGraphDestroy(graph)
        self._releases.append(partial(cu.cuGraphExecDestroy, runnable))
        return lambda: check(cu.cuGraphLaunch(runnable, self._stream), "launching a CUDA graph")

    def function(self, image: bytes, name: str) -> Any:
        """Load machine code (cubin) or PTX, and give a function of it.

        Raises:
            EngineError: the driver cannot use the code.
        """
        module = check(self._cu.cuModuleLoadData(image), "loading a kernel")
        self._releases.append(partial(self._cu.cuModuleUnload, module))
        return check(self._cu.cuModuleGetFunction(module, name.encode()), f"finding {name}")

    def launch(
        self,
        function: Any,
        *,
        grid: tuple[int, int],
        threads: int,
        shared: int,
        arguments: Sequence[tuple[int, Any]],
    ) -> None:
        """Put a kernel into the stream.

        Args:
            function: from `function`.
            grid: blocks in x and y.
            threads: of a block.
            shared: bytes of shared memory of a block.
            arguments: values with their ctypes, in the kernel's order.

        Raises:
            EngineError: the driver refuses.
        """
        values, types = zip(*arguments, strict=True)
        check(
            self._cu.cuLaunchKernel(
                function, *grid, 1, threads, 1, 1, shared, self._stream, (values, types), 0
            ),
            "launching a kernel",
        )


def _release(
    cu: Any, context: Any, releases: list[Callable[[], Any]], memory: dict[int, Any]
) -> None:
    """Free in reverse order; a failure is logged, since whoever closes can do nothing about it."""
    cu.cuCtxSetCurrent(context)
    releases += [partial(cu.cuMemFree, pointer) for pointer in memory.values()]
    while releases:
        status, *_ = releases.pop()()
        if int(status) != 0:
            _log.warning("freeing something of the GPU failed (%s)", status.name)
