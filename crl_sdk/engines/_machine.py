"""What this machine has to run models with: processor, GPUs, runtimes. `crl doctor` prints it."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import get_args

import msgspec
import psutil

from crl_sdk._processors import find_processors
from crl_sdk._version import __version__
from crl_sdk.engines import _registry as registry
from crl_sdk.engines._hardware import Gpu, inspect_hardware
from crl_sdk.engines._onnx_providers import find_providers
from crl_sdk.engines._processor import find_processor_name
from crl_sdk.engines._tensorrt_plans import PlanRuntime
from crl_sdk.engines._tensorrt_runtime import load_tensorrt
from crl_sdk.errors import CrlError

_PACKAGES = ("cuda-bindings", "grpcio", "llama-cpp-python", "torch", "triton", "xllamacpp")


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Hardware and software of this machine.

    Attributes:
        crl_sdk: Version of this package.
        python: Version of Python.
        system: Operating system, its release, and the processor architecture.
        processor: Name of the processor.
        processors: Number of processors of the machine, two for a core with two threads.
        allowed: Number of those on which this process may run.
        quota: Processor time per time that a container allows, such as 1.5; None without a limit.
        threads: Number of threads that the SDK uses, from `allowed` and `quota`.
        cores: Number of threads of an engine run on a CPU: one for each core that may be used.
        features: Instruction sets of the processor that matter to inference.
        memory: Size of the main memory in bytes.
        gpus: GPUs that the CUDA driver finds; empty without a driver.
        cuda: CUDA version of the driver, or the reason why there is no GPU.
        runtimes: By TensorRT runtime, its version or the reason why it cannot be used.
        providers: Execution providers of ONNX Runtime; empty if it is not installed.
        packages: Versions of the installed packages that matter, by name.
    """

    crl_sdk: str
    python: str
    system: str
    processor: str
    processors: int
    allowed: int
    quota: float | None
    threads: int
    cores: int
    features: tuple[str, ...]
    memory: int
    gpus: tuple[Gpu, ...]
    cuda: str
    runtimes: dict[PlanRuntime, str]
    providers: tuple[str, ...]
    packages: dict[str, str]


def inspect_machine() -> Machine:
    """Return what this machine has. Nothing that it lacks is an error."""
    hardware, processors = inspect_hardware(), find_processors()
    packages = [each for family in registry.FAMILIES for each in family.packages]
    return Machine(
        crl_sdk=__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        processor=find_processor_name(),
        processors=processors.machine,
        allowed=processors.allowed,
        quota=processors.quota,
        threads=processors.number,
        cores=processors.cores,
        features=hardware.features,
        memory=psutil.virtual_memory().total,
        gpus=hardware.gpus,
        cuda=hardware.cuda,
        runtimes={runtime: _describe_runtime(runtime) for runtime in get_args(PlanRuntime)},
        providers=find_providers(),
        packages=find_versions(("numpy", *packages, *_PACKAGES)),
    )


def _describe_runtime(runtime: PlanRuntime) -> str:
    try:
        return load_tensorrt(runtime).version
    except CrlError as error:
        return str(error)


def find_versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed, by name."""
    found = {}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
