"""What this machine is, by its properties; no name of it."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path

_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_tile", "amx_int8")
"""Flags of /proc/cpuinfo that decide how fast a model runs."""


def describe() -> dict[str, str]:
    """Give processor, cores, features, memory and system."""
    cpu = _read("/proc/cpuinfo")
    memory = re.search(r"^MemTotal:\s+(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    flags = set((_field(cpu, "flags") or "").split())
    return {
        "processor": _field(cpu, "model name") or platform.machine(),
        "family, model, stepping": ", ".join(
            _field(cpu, name) or "?" for name in ("cpu family", "model", "stepping")
        ),
        "cores": str(physical_cores()),
        "features": " ".join(name for name in _FEATURES if name in flags),
        "memory": f"{int(memory[1]) / 2**20:.0f} GiB" if memory else "?",
        "system": f"{platform.system()} {platform.machine()}",
    }


def physical_cores() -> int:
    """Count the physical cores that this process may use."""
    cpu = _read("/proc/cpuinfo")
    cores = set(re.findall(r"physical id\s*: (\d+)(?:.*\n)*?core id\s*: (\d+)", cpu))
    allowed = len(os.sched_getaffinity(0))
    return min(len(cores) or allowed, allowed)


def commit() -> str:
    """Give the commit of this checkout, with `+` where tracked files were changed."""
    here = Path(__file__).parent
    try:
        told = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
            cwd=here, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return told.stdout.strip()


def _field(text: str, name: str) -> str | None:
    found = re.search(rf"^{name}\s*: (.*)$", text, re.MULTILINE)
    return found[1].strip() if found else None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
