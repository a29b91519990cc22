"""The processor's name and instruction sets, which decide what kernels a runtime can use.

This is the one place that reads `/proc/cpuinfo`: psutil reports neither.
"""

from __future__ import annotations

import platform
import re
from pathlib import Path

_FEATURES = (
    "avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16",
    "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip
"""Linux's names of the instruction sets that matter to inference, of x86-64 and then of Arm."""


BYTE_PRODUCTS = ("avx512_vnni", "avx_vnni", "amx_int8")
"""Instruction sets of x86 processors that multiply bytes fast, and add the products in 32 bits."""


def find_features() -> tuple[str, ...]:
    """Return the instruction sets that matter to inference; empty where the system hides them."""
    words = set(re.sub(r"^(?!flags|Features).*$", "", _read(), flags=re.MULTILINE).split())
    return tuple(feature for feature in _FEATURES if feature in words)


def find_processor_name() -> str:
    """Return the processor's name, or `unknown`."""
    name = re.search(r"^model name\s*:\s*(.+)$", _read(), re.MULTILINE)
    return name[1] if name else platform.processor() or "unknown"


def _read() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return ""
