"""The hardware that engines can run on here: instruction sets of the processor, and GPUs."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from crl_sdk.engines import _cuda as cuda
from crl_sdk.engines._processor import find_features
from crl_sdk.errors import CrlError


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """A GPU of this machine.

    Attributes:
        name: Name that the driver reports.
        architecture: Compute capability, such as `sm89`.
        memory: Size of its memory in bytes.
    """

    name: str
    architecture: str
    memory: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """Everything about the hardware that the choice of an engine depends on.

    Attributes:
        features: Instruction sets of the processor, by Linux's names.
        gpus: GPUs that the CUDA driver finds, in its order.
        cuda: CUDA version of the driver, or the reason why there is no GPU.
    """

    features: tuple[str, ...]
    gpus: tuple[Gpu, ...]
    cuda: str

    @property
    def architecture(self) -> str | None:
        """Compute capability of the first GPU, the one that engines use; None without a GPU."""
        return self.gpus[0].architecture if self.gpus else None


def inspect_hardware() -> Hardware:
    """Return the processor's instruction sets and the GPUs. A missing driver is not an error."""
    gpus, version = _find_gpus()
    return Hardware(features=find_features(), gpus=gpus, cuda=version)


def _find_gpus() -> tuple[tuple[Gpu, ...], str]:
    """Return the GPUs, and the driver's CUDA version or the reason why there are none."""
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
