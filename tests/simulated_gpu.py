"""A CUDA driver and a TensorRT, simulated on the CPU, as strict as their documentation.

Queued operations run only when a stream or an event is waited for, and then only those that it
depends on: other streams have not moved. Code that reads results too early, or that forgets to
order two streams, reads garbage. Every address must lie in allocated memory, every call must come
from a thread that has entered the context, and memory that is never freed is detected. A test
compares the names and parameters of the calls with the installed bindings.
"""

from __future__ import annotations

import ctypes
import threading
from enum import IntEnum
from itertools import count
from types import SimpleNamespace

import numpy as np


class CUresult(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_INVALID_IMAGE = 200
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_NOT_FOUND = 500
    CUDA_ERROR_LAUNCH_FAILED = 719
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900


OK = CUresult.CUDA_SUCCESS
INVALID = CUresult.CUDA_ERROR_INVALID_VALUE


SILENT = (
    "cuStreamSynchronize", "cuGraphLaunch", "cuLaunchKernel", "cuMemcpyHtoDAsync", "cuEventRecord",
    "cuEventSynchronize", "cuStreamWaitEvent",
)  # fmt: skip
"""Calls that return only a status."""


class Driver:
    """Stands in for `cuda.bindings.driver`, with one GPU."""

    CUresult = CUresult
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)
    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=75,
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=76,
        CU_DEVICE_ATTRIBUTE_INTEGRATED=18,
    )

    def __init__(self, capability=(8, 9), memory=1 << 30, kernel=None, integrated=False):
        self.integrated, self.events, self.moved = integrated, {}, 0
        self.capability, self.free, self.kernel = capability, memory, kernel
        self.buffers = {}
        self.kinds = {}
        self.streams = {}
        self.recording = {}
        self.graphs = {}
        self.runnable = {}
        self.modules = {}
        self.contexts = 0
        self.launched = []
        self.fail = {}
        self.lost = False  # whether the GPU answers every call with an error
        self._names = count(1000)
        self._here = threading.local()

    def __getattribute__(self, name):
        """Fail calls from threads without a context, and calls that a test wants to fail."""
        member = object.__getattribute__(self, name)
        if not name.startswith("cu") or name in ("cuInit", "cuCtxSetCurrent") or (
            name.startswith(("cuDevice", "cuDriver"))
        ):  # fmt: skip
            return member

        def call(*arguments):
            nothing = (None,) * (name not in SILENT)
            if self.lost:
                return (CUresult.CUDA_ERROR_LAUNCH_FAILED, *nothing)
            if self.fail.get(name):
                if name == "cuStreamEndCapture":  # a failed recording has ended too
                    self.recording.clear()
                return (self.fail[name], *nothing)
            if not getattr(self._here, "context", None):
                return (CUresult.CUDA_ERROR_INVALID_CONTEXT, *nothing)
            return member(*arguments)

        return call

    def cuInit(self, Flags):
        return (OK,)

    def cuDriverGetVersion(self):
        return OK, 13000

    def cuDeviceGetCount(self):
        return OK, 1

    def cuDeviceGet(self, ordinal):
        return (OK, 0) if ordinal == 0 else (CUresult(201), None)

    def cuDeviceGetName(self, length, dev):
        return OK, b"Simulated\0" + bytes(length - 10)

    def cuDeviceTotalMem(self, dev):
        return OK, self.free

    def cuDeviceGetAttribute(self, attrib, dev):
        return OK, int(self.integrated) if attrib == 18 else self.capability[attrib - 75]

    def cuDevicePrimaryCtxRetain(self, dev):
        self.contexts += 1
        return OK, 7

    def cuDevicePrimaryCtxRelease(self, dev):
        self.contexts -= 1
        return (OK,)

    def cuCtxSetCurrent(self, ctx):
        assert ctx == 7
        self._here.context = ctx
        return (OK,)

    def cuMemAlloc(self, bytesize):
        if bytesize > self.free:
            return CUresult.CUDA_ERROR_OUT_OF_MEMORY, None
        self.free -= bytesize
        return self._allocate(bytesize, "device")

    def cuMemFree(self, dptr):
        self.free += len(self.buffers[dptr])
        return self._release(dptr, "device")

    def cuMemHostAlloc(self, bytesize, Flags):
        assert Flags in (0, 2)  # 2: CU_MEMHOSTALLOC_DEVICEMAP
        return self._allocate(bytesize, "mapped" if Flags else "host")

    def cuMemHostGetDevicePointer(self, p, Flags):
        assert Flags == 0
        return (OK, p) if self.kinds[p] == "mapped" else (INVALID, None)

    def cuMemFreeHost(self, p):
        return self._release(p, self.kinds.get(p))

    def cuMemcpyHtoDAsync(self, dstDevice, srcHost, ByteCount, hStream):
        target = self.device(dstDevice, ByteCount)
        self.moved += ByteCount
        self.put(hStream, lambda: ctypes.memmove(target, srcHost, ByteCount))
        return (OK,)

    def cuMemcpyDtoHAsync(self, dstHost, srcDevice, ByteCount, hStream):
        source = self.device(srcDevice, ByteCount)
        self.put(hStream, lambda: ctypes.memmove(dstHost, source, ByteCount))
        return (OK,)

    def cuStreamCreate(self, Flags):
        assert Flags == 1  # CU_STREAM_NON_BLOCKING
        name = next(self._names)
        self.streams[name] = []
        return OK, name

    def cuStreamDestroy(self, hStream):
        del self.streams[hStream]
        return (OK,)

    def cuStreamSynchronize(self, hStream):
        if hStream in self.recording:
            return (CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,)
        self.advance(hStream, len(self.streams[hStream]))
        return (OK,)

    def cuEventCreate(self, Flags):
        assert Flags == 2  # CU_EVENT_DISABLE_TIMING
        name = next(self._names)
        self.events[name] = None
        return OK, name

    def cuEventDestroy(self, hEvent):
        del self.events[hEvent]
        return (OK,)

    def cuEventRecord(self, hEvent, hStream):
        self.events[hEvent] = mark = SimpleNamespace(happened=False, stream=hStream)
        self.put(hStream, lambda: setattr(mark, "happened", True))
        return (OK,)

    def cuStreamWaitEvent(self, hStream, hEvent, Flags):
        assert Flags == 0
        mark = self.events[hEvent]  # as it was recorded last; without a record there is no wait
        if mark is not None:
            self.put(hStream, lambda: self.reach(mark))
        return (OK,)

    def cuEventSynchronize(self, hEvent):
        mark = self.events[hEvent]
        if mark is not None:
            self.reach(mark)
        return (OK,)

    def cuStreamBeginCapture(self, hStream, mode):
        assert mode == 1
        self.recording[hStream] = []
        return (OK,)

    def cuStreamEndCapture(self, hStream):
        name = next(self._names)
        self.graphs[name] = self.recording.pop(hStream)
        return OK, name

    def cuGraphInstantiate(self, hGraph, flags):
        name = next(self._names)
        self.runnable[name] = list(self.graphs[hGraph])
        return OK, name

    def cuGraphDestroy(self, hGraph):
        del self.graphs[hGraph]
        return (OK,)

    def cuGraphExecDestroy(self, hGraphExec):
        del self.runnable[hGraphExec]
        return (OK,)

    def cuGraphLaunch(self, hGraphExec, hStream):
        self.launched.append(hGraphExec)
        for work in self.runnable[hGraphExec]:
            self.put(hStream, work)
        return (OK,)

    def cuModuleLoadData(self, image):
        if not image.startswith((b"\x7fELF", b"//")):
            return CUresult.CUDA_ERROR_INVALID_IMAGE, None
        name = next(self._names)
        self.modules[name] = image
        return OK, name

    def cuModuleGetFunction(self, hmod, name):
        found = name in self.modules[hmod]
        return (OK, (hmod, name)) if found else (CUresult.CUDA_ERROR_NOT_FOUND, None)

    def cuModuleUnload(self, hmod):
        del self.modules[hmod]
        return (OK,)

    def cuLaunchKernel(  # noqa: PLR0917
        self, f, gridDimX, gridDimY, gridDimZ, blockDimX, blockDimY, blockDimZ,
        sharedMemBytes, hStream, kernelParams, extra,
    ):  # fmt: skip
        values, types = kernelParams
        assert len(values) == len(types) and extra == 0
        assert (gridDimZ, blockDimY, blockDimZ) == (1, 1, 1) and sharedMemBytes <= 48 << 10
        launch = SimpleNamespace(
            function=f, image=self.modules[f[0]], grid=(gridDimX, gridDimY), threads=blockDimX,
            shared=sharedMemBytes, arguments=list(zip(values, types, strict=True)),
        )  # fmt: skip
        self.put(hStream, lambda: self.kernel(self, launch))
        return (OK,)

    # --- helpers ---

    def advance(self, stream, count):
        """Do the next operations of a stream."""
        for work in [self.streams[stream].pop(0) for _ in range(count)]:
            work()

    def reach(self, mark):
        """Advance the stream in which an event was recorded until it happens, and no further."""
        while not mark.happened:
            self.advance(mark.stream, 1)

    def put(self, stream, work):
        self.recording.get(stream, self.streams[stream]).append(work)

    def device(self, address, size):
        """Return an address of device memory; the bytes must lie within one allocation."""
        for start, buffer in self.buffers.items():
            if start <= address and address + size <= start + len(buffer):
                assert self.kinds[start] in ("device", "mapped"), (
                    "memory of the host, not of the GPU"
                )
                return address
        raise AssertionError(f"{size} bytes at {address} are not within an allocation")

    def view(self, address, shape, dtype):
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        raw = (ctypes.c_uint8 * size).from_address(self.device(address, size))
        return np.ctypeslib.as_array(raw).view(dtype).reshape(shape)

    def nothing_left(self):
        return not (
            self.buffers or self.streams or self.events or self.graphs or self.runnable
            or self.modules or self.contexts or self.recording
        )  # fmt: skip

    def _allocate(self, size, kind):
        buffer = (ctypes.c_uint8 * size)(*(b"\xab" * min(size, 64)))  # garbage, as on a GPU
        address = ctypes.addressof(buffer)
        self.buffers[address], self.kinds[address] = buffer, kind
        return OK, address

    def _release(self, address, kind):
        assert self.kinds.pop(address) == kind
        del self.buffers[address]
        return (OK,)


def tensorrt(driver: Driver, reference, plan: bytes, batch, columns):
    """Return a stand-in for the module `tensorrt_rtx`, whose engines compute with another engine.

    Args:
        driver: Simulated driver that holds the memory.
        reference: Image engine that computes the results.
        plan: The only plan data that it loads.
        batch: Minimum and maximum number of images of the plan.
        columns: Minimum and maximum number of columns of the plan.
    """
    trt = SimpleNamespace(
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user"),
        DynamicShapesKernelSpecializationStrategy=SimpleNamespace(EAGER="eager"),
        CudaGraphStrategy=SimpleNamespace(DISABLED="disabled"),
        scratch=4096,
        contexts=[],
        caches_read=[],
    )

    class IRuntimeCache:
        data = b""

        def deserialize(self, blob):
            trt.caches_read.append(blob)
            return blob == b"kernels for this GPU"

        def serialize(self):
            return b"kernels for this GPU"

    class IRuntimeConfig:
        dynamic_shapes_kernel_specialization_strategy = "lazy"
        cuda_graph_strategy = "disabled"
        allocation, cache = "static", None

        def set_execution_context_allocation_strategy(self, strategy):
            self.allocation = strategy

        def create_runtime_cache(self):
            return IRuntimeCache()

        def set_runtime_cache(self, cache):
            self.cache = cache
            return True

    class IExecutionContext:
        def __init__(self):
            self.shapes, self.addresses, self.memory, self.warm = {}, {}, None, False
            trt.contexts.append(self)

        def set_device_memory(self, memory, size):
            assert size >= trt.scratch
            self.memory = driver.device(memory, size)

        def set_input_shape(self, name, shape):
            limits = batch if name == "image" else columns
            self.shapes[name] = shape
            return limits[0] <= (shape[0] if name == "image" else shape[-1]) <= limits[1]

        def set_tensor_address(self, name, memory):
            self.addresses[name] = memory
            return name in ("image", "weight", "bias", "embedding", "projected")

        def infer_shapes(self):
            return [name for name in ("image", "weight", "bias") if name not in self.shapes]

        def execute_async_v3(self, stream_handle):
            if stream_handle in driver.recording and not self.warm:
                return False  # the first run does what a graph cannot hold
            self.warm = True
            shapes, addresses, memory = dict(self.shapes), dict(self.addresses), self.memory
            assert memory is not None, "no memory for intermediate results"

            def work():
                ctypes.memset(driver.device(memory, trt.scratch), 0xCD, trt.scratch)
                read = {
                    name: driver.view(addresses[name], shape, dtype)
                    for (name, shape), dtype in zip(
                        shapes.items(), (np.uint8, np.float32, np.float32), strict=True
                    )
                }
                results = reference.run(read["image"], read["weight"], read["bias"])
                for name, result in zip(("embedding", "projected"), results, strict=True):
                    driver.view(addresses[name], result.shape, np.float32)[...] = result

            driver.put(stream_handle, work)
            return True

    class ICudaEngine:
        num_io_tensors = 5
        device_memory_size_v2 = trt.scratch

        def get_tensor_name(self, index):
            return ("image", "weight", "bias", "embedding", "projected")[index]

        def create_runtime_config(self):
            return IRuntimeConfig()

        def create_execution_context(self, how):
            if isinstance(how, IRuntimeConfig):
                assert how.allocation == "user"
                assert how.dynamic_shapes_kernel_specialization_strategy == "eager"
            else:
                assert how == "user"
            return IExecutionContext()

    class Runtime:
        def __init__(self, logger):
            self._logger = logger

        def deserialize_cuda_engine(self, serialized_engine):
            if serialized_engine != plan:
                self._logger.errors.append("the magic tag does not match")
                return None
            return ICudaEngine()

    trt.Runtime = Runtime
    trt.classes = (Runtime, ICudaEngine, IExecutionContext, IRuntimeConfig, IRuntimeCache)
    return trt
