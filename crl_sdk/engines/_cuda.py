"""Access to an NVIDIA GPU through the CUDA driver's Python bindings, `cuda-python`."""

from __future__ import annotations

import ctypes
import logging
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from crl_sdk._lifetime import Lifetime
from crl_sdk.errors import EngineError, MissingDependencyError

_log = logging.getLogger(__name__)

_NON_BLOCKING = 1
"""`CU_STREAM_NON_BLOCKING`: the stream does not wait for the default stream."""

_DISABLE_TIMING = 2
"""`CU_EVENT_DISABLE_TIMING`: the event only orders work, which is cheaper."""

_DEVICE_MAP = 2
"""`CU_MEMHOSTALLOC_DEVICEMAP`: the GPU can address the memory."""

_OUT_OF_MEMORY = 2
"""`CUDA_ERROR_OUT_OF_MEMORY`."""

_LOST = frozenset({46, 101, 214, 226, 700, 702, *range(714, 721), 999})
"""Errors after which a process cannot use the GPU any more: the device is unavailable, missing or
has failed, or code on it broke the context."""


def driver() -> Any:
    """Return the bindings of the CUDA driver, initialised.

    Raises:
        MissingDependencyError: If cuda-python is not installed.
        EngineError: If there is no driver, or the driver finds no GPU.
    """
    try:
        from cuda.bindings import driver as bindings
    except ImportError as error:
        raise MissingDependencyError("cuda-bindings", "tensorrt-rtx", "using a GPU") from error
    try:
        (status,) = bindings.cuInit(0)
    except Exception as error:  # from cuda.pathfinder: the library is missing
        raise EngineError(
            "expected an NVIDIA driver (libcuda.so.1), found none: install the driver of your GPU, "
            "or choose --engine onnx/cpu"
        ) from error
    if status != bindings.CUresult.CUDA_SUCCESS:
        raise EngineError(
            f"the NVIDIA driver is installed but does not start ({status.name}): check whether "
            "`nvidia-smi` lists a GPU"
        )
    return bindings


def check(result: tuple[Any, ...], what: str) -> Any:
    """Return the values of a driver call without its status.

    Args:
        result: Result of the call: a status, then values.
        what: Description of the call for the error message, such as `opening GPU 0`.

    Raises:
        EngineError: If the call failed.
    """
    status, *values = result
    if int(status) != 0:
        if int(status) == _OUT_OF_MEMORY:
            advice = (
                "the GPU's memory is full: close other programs on it, or compile with a smaller "
                "--batch and --max-columns"
            )
        elif int(status) in _LOST:
            advice = (
                "the GPU is lost for this process: start the process again, and if that fails too, "
                "see whether nvidia-smi lists the GPU"
            )
        else:
            advice = "`crl doctor` shows what this machine has"
        raise EngineError(f"{what} failed ({status.name}): {advice}")
    return values[0] if len(values) == 1 else tuple(values)


def architecture(device: int = 0) -> str:
    """Return the compute capability of a GPU, such as `sm89`.

    Raises:
        EngineError: If there is no driver or no such GPU.
        MissingDependencyError: If cuda-python is not installed.
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
    """A GPU with its streams and the memory that was allocated on it.

    Work is put into `stream` unless a method is given another one, from `new_stream`. Streams know
    nothing of each other: events order their work.

    `close` frees all memory, and so does deleting the object. The object uses the primary context,
    as TensorRT does. Any thread may call it, but only one at a time.
    """

    def __init__(self, cu: Any, device: int, context: Any, stream: Any) -> None:
        """Store the handles. Use `CudaDevice.open` to create a device."""
        self._cu = cu
        self._device = device
        self._context = context
        self._stream = stream
        releases: list[Callable[[], Any]] = [  # a reference to self would keep it alive
            partial(cu.cuDevicePrimaryCtxRelease, device),
            partial(cu.cuStreamDestroy, stream),
        ]
        self._lifetime = Lifetime("engine")
        self._releases = releases
        self._memory: dict[int, Any] = {}
        self._finalizer = weakref.finalize(self, _release, cu, context, releases, self._memory)
        self._finalizer.atexit = False  # the driver frees everything when the process ends

    @classmethod
    def open(cls, ordinal: int = 0) -> CudaDevice:
        """Open a GPU.

        Args:
            ordinal: Number of the GPU among those of `CUDA_VISIBLE_DEVICES`.

        Raises:
            EngineError: If there is no driver or no such GPU.
            MissingDependencyError: If cuda-python is not installed.
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
        """Handle of the main stream, in the form that TensorRT accepts."""
        return int(self._stream)

    @property
    def is_integrated(self) -> bool:
        """Whether the GPU has the memory of the processor, as on Jetson.

        Raises:
            EngineError: If the driver call fails.
        """
        attribute = self._cu.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_INTEGRATED
        return bool(
            check(self._cu.cuDeviceGetAttribute(attribute, self._device), "asking for its memory")
        )

    def new_stream(self) -> Any:
        """Return another stream, which lives as long as this object.

        Raises:
            EngineError: If the driver call fails.
        """
        stream = check(self._cu.cuStreamCreate(_NON_BLOCKING), "making a CUDA stream")
        self._releases.append(partial(self._cu.cuStreamDestroy, stream))
        return stream

    def new_event(self) -> Any:
        """Return an event, which lives as long as this object.

        Raises:
            EngineError: If the driver call fails.
        """
        event = check(self._cu.cuEventCreate(_DISABLE_TIMING), "making a CUDA event")
        self._releases.append(partial(self._cu.cuEventDestroy, event))
        return event

    def record(self, event: Any, stream: Any = None) -> None:
        """Let an event happen when a stream has done what was queued in it so far.

        Raises:
            EngineError: If the driver call fails.
        """
        check(self._cu.cuEventRecord(event, self._queue(stream)), "recording a CUDA event")

    def hold(self, stream: Any, event: Any) -> None:
        """Let a stream do what is queued from now on only after an event.

        Raises:
            EngineError: If the driver call fails.
        """
        check(self._cu.cuStreamWaitEvent(self._queue(stream), event, 0), "ordering CUDA streams")

    def wait_for(self, event: Any) -> None:
        """Wait until an event has happened.

        Raises:
            EngineError: If an operation that was queued before it failed.
        """
        check(self._cu.cuEventSynchronize(event), "running on the GPU")

    def _queue(self, stream: Any) -> Any:
        return self._stream if stream is None else stream

    def enter(self) -> None:
        """Make the GPU's context current in the calling thread. Call it before other methods.

        Raises:
            ClosedError: If the GPU is closed.
            ForkError: If this process was forked after the GPU had been opened.
            EngineError: If the driver call fails.
        """
        self._lifetime.require()
        check(self._cu.cuCtxSetCurrent(self._context), "entering the CUDA context")

    def close(self) -> None:
        """Free all memory and handles. Idempotent."""
        self._lifetime.closed = True
        self._finalizer()

    def allocate(self, size: int, what: str) -> int:
        """Allocate device memory and return its address.

        Args:
            size: Number of bytes.
            what: Purpose of the memory, for the error message.

        Raises:
            EngineError: If there is not enough memory.
        """
        pointer = check(
            self._cu.cuMemAlloc(max(size, 1)), f"{what}: {size:,} bytes of the GPU's memory"
        )
        self._memory[int(pointer)] = pointer
        return int(pointer)

    def free(self, address: int) -> None:
        """Free the device memory at an address that `allocate` returned.

        Raises:
            EngineError: If the driver call fails.
        """
        check(self._cu.cuMemFree(self._memory.pop(address)), "freeing the GPU's memory")

    def pinned(self, shape: Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
        """Return a zeroed array in page-locked host memory, from and to which the GPU can copy.

        Raises:
            EngineError: If there is not enough memory.
        """
        return self._host_memory(shape, dtype, flags=0)[0]

    def mapped(self, shape: Sequence[int], dtype: DTypeLike) -> tuple[NDArray[Any], int]:
        """Return a zeroed array in page-locked memory, and the address by which the GPU uses it.

        On a GPU that has the memory of the processor, nothing is copied then.

        Raises:
            EngineError: If there is not enough memory, or the GPU cannot address it.
        """
        array, pointer = self._host_memory(shape, dtype, flags=_DEVICE_MAP)
        address = check(self._cu.cuMemHostGetDevicePointer(pointer, 0), "mapping memory")
        return array, int(address)

    def _host_memory(
        self, shape: Sequence[int], dtype: DTypeLike, *, flags: int
    ) -> tuple[NDArray[Any], Any]:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        pointer = check(
            self._cu.cuMemHostAlloc(max(size, 1), flags), f"{size:,} bytes of page-locked memory"
        )
        self._releases.append(partial(self._cu.cuMemFreeHost, pointer))
        raw = (ctypes.c_uint8 * max(size, 1)).from_address(int(pointer))
        array: NDArray[Any] = np.ctypeslib.as_array(raw)[:size].view(dtype).reshape(tuple(shape))
        array[...] = 0
        return array, pointer

    def upload(self, target: int, source: NDArray[Any], stream: Any = None) -> None:
        """Queue a copy of a contiguous array to device memory.

        Raises:
            EngineError: If the driver call fails.
        """
        check(
            self._cu.cuMemcpyHtoDAsync(
                target, source.ctypes.data, source.nbytes, self._queue(stream)
            ),
            "copying to the GPU",
        )

    def download(self, target: NDArray[Any], source: int, stream: Any = None) -> None:
        """Queue a copy of device memory to a contiguous array.

        Raises:
            EngineError: If the driver call fails.
        """
        check(
            self._cu.cuMemcpyDtoHAsync(
                target.ctypes.data, source, target.nbytes, self._queue(stream)
            ),
            "copying from the GPU",
        )

    def wait(self, stream: Any = None) -> None:
        """Wait until a stream has done everything that was queued.

        Raises:
            EngineError: If a queued operation failed.
        """
        check(self._cu.cuStreamSynchronize(self._queue(stream)), "running on the GPU")

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record the operations that a function queues, as a CUDA graph.

        Args:
            work: Function that queues operations. Its own errors are passed on.

        Returns:
            Function that queues all recorded operations at once.

        Raises:
            EngineError: If a driver call fails.
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
        """Load machine code (cubin) or PTX, and return one of its functions.

        Raises:
            EngineError: If the driver cannot use the code.
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
        """Queue a kernel.

        Args:
            function: Kernel to launch, from `function`.
            grid: Number of blocks in x and y.
            threads: Number of threads in a block.
            shared: Bytes of shared memory for each block.
            arguments: Arguments of the kernel in its order, each a value and its ctypes type.

        Raises:
            EngineError: If the driver call fails.
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
    """Free everything in reverse order. Failures are logged, since a caller cannot handle them."""
    cu.cuCtxSetCurrent(context)
    releases += [partial(cu.cuMemFree, pointer) for pointer in memory.values()]
    while releases:
        status, *_ = releases.pop()()
        if int(status) != 0:
            _log.warning("freeing GPU memory or a handle failed (%s)", status.name)
