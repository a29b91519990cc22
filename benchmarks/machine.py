"""What a benchmark ran on: the one description that all reports of this directory use."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import msgspec
import psutil

from crl_sdk._processors import count_cores
from crl_sdk.engines._processor import find_features, find_processor_name


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Properties of a machine that decide how fast a model runs, but not its name.

    Attributes:
        processor: Name of the processor.
        cores: Number of physical cores that this process may use.
        features: Instruction sets that matter.
        memory_gib: Memory in GiB.
        system: Operating system and architecture.
    """

    processor: str
    cores: int
    features: list[str]
    memory_gib: float
    system: str


def find_machine() -> Machine:
    """Return the properties of this machine."""
    return Machine(
        processor=find_processor_name(),
        cores=count_cores(),
        features=list(find_features()),
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        system=f"{platform.system()} {platform.machine()}",
    )


def describe_machine() -> dict[str, str]:
    """Return the properties of this machine as text."""
    machine = find_machine()
    return {
        "processor": machine.processor,
        "cores": str(machine.cores),
        "features": " ".join(machine.features),
        "memory": f"{machine.memory_gib:.0f} GiB",
        "system": machine.system,
    }


def describe_commit() -> str:
    """Return the commit of this checkout, followed by `+` if tracked files were changed."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
            cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.strip()
