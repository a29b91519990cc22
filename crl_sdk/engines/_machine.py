"""What this machine has to run models with: processor, GPUs, runtimes. For `crl doctor`."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, get_args

import msgspec

from crl_sdk._version import __version__
from crl_sdk.engines import _cuda as cuda
from crl_sdk.engines._onnx_providers import PROVIDERS, plugin_installed
from crl_sdk.engines._processor import find_features, read_text
from crl_sdk.engines._tensorrt_plans import Runtime
from crl_sdk.engines._tensorrt_runtime import load_tensorrt
from crl_sdk.errors import CrlError

_PACKAGES = (
    "numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt-rtx-cu12-libs", "tensorrt",
    "cuda-bindings", "grpcio", "llama-cpp-python", "torch", "triton",
)  # fmt: skip


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """A GPU: name, compute capability such as `sm89`, memory in bytes."""

    name: str
    architecture: str
    memory: int


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What was found.

    Attributes:
        crl_sdk: version of this package.
        python: version.
        system: kernel and architecture.
        processor: its name.
        cores: that this process may use.
        features: instruction sets that matter here.
        memory: bytes of main memory, 0 where the system does not tell.
        gpus: through the driver; empty if there is none.
        cuda: version of CUDA that the driver supports, or why there is no GPU.
        runtimes: TensorRT flavours: version, or why it cannot be used.
        providers: of ONNX Runtime.
        packages: versions of those installed.
    """

    crl_sdk: str
    python: str
    system: str
    processor: str
    cores: int
    features: tuple[str, ...]
    memory: int
    gpus: tuple[Gpu, ...]
    cuda: str
    runtimes: dict[Runtime, str]
    providers: tuple[str, ...]
    packages: dict[str, str]


def inspect_machine() -> Machine:
    """Look at this machine. Nothing it lacks is an error."""
    info = read_text("/proc/cpuinfo")
    name = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    memory = re.search(r"^MemTotal:\s+(\d+) kB", read_text("/proc/meminfo"), re.MULTILINE)
    gpus, told = find_gpus()
    return Machine(
        crl_sdk=__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        processor=name[1] if name else platform.processor() or "unknown",
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0,
        features=find_features(),
        memory=int(memory[1]) << 10 if memory else 0,
        gpus=gpus,
        cuda=told,
        runtimes={runtime: _runtime(runtime) for runtime in get_args(Runtime)},
        providers=find_providers(),
        packages={name: found for name in _PACKAGES if (found := _version(name))},
    )


def find_gpus() -> tuple[tuple[Gpu, ...], str]:
    """Give the GPUs, and the CUDA version of the driver or why there are none."""
    try:
        cu = cuda.driver()
        number = cuda.check(cu.cuDriverGetVersion(), "asking for the driver's version")
        gpus = []
        for i in range(cuda.check(cu.cuDeviceGetCount(), "counting GPUs")):
            device = cuda.check(cu.cuDeviceGet(i), f"opening GPU {i}")
            name = cuda.check(cu.cuDeviceGetName(128, device), "asking for its name")
            memory = cuda.check(cu.cuDeviceTotalMem(device), "asking for its memory")
            gpus.append(
                Gpu(
                    name=bytes(name).split(b"\0")[0].decode("utf-8", "replace"),
                    architecture=cuda.architecture(i),
                    memory=int(memory),
                )
            )
    except CrlError as error:
        return (), str(error)
    return tuple(gpus), f"{number // 1000}.{number % 1000 // 10}"


def _runtime(runtime: Runtime) -> str:
    try:
        return load_tensorrt(runtime).version
    except CrlError as error:
        return str(error)


def find_providers() -> tuple[str, ...]:
    """Give ONNX Runtime's providers; none if it is not installed."""
    if importlib.util.find_spec("onnxruntime") is None:
        return ()
    import onnxruntime as ort

    names: Sequence[Any] = ort.get_available_providers()
    plugin = (PROVIDERS["tensorrt-rtx"].name,) if plugin_installed() else ()
    return (*map(str, names), *plugin)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
