"""The GPU of this machine through NVIDIA's own bindings (`cuda-python`); no torch."""

from __future__ import annotations

from typing import Any

from crl_sdk.errors import EngineError, MissingDependencyError


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
            "or choose --device cpu"
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
        raise EngineError(f"{what} failed ({status.name}): `crl doctor` tells what is there")
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
