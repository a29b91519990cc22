"""What a benchmark ran on: the one description that all reports of this directory use."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import psutil

from crl_sdk.engines._processor import find_features, find_processor_name


def describe_machine() -> dict[str, str]:
    """Return properties of this machine that decide how fast a model runs, but not its name."""
    return {
        "processor": find_processor_name(),
        "cores": str(count_physical_cores()),
        "features": " ".join(find_features()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.machine()}",
    }


def count_physical_cores() -> int:
    """Return the number of physical cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # psutil ignores the limits of a container
        allowed = len(os.sched_getaffinity(0))
    else:
        allowed = psutil.cpu_count() or 1
    return min(psutil.cpu_count(logical=False) or allowed, allowed)


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
