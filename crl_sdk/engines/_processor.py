"""The instruction sets of this processor: what decides which kernels a runtime takes."""

from __future__ import annotations

import re
from pathlib import Path

_FEATURES = (
    "avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16",
    "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip
"""Linux's names of those that matter here: of x86-64, then of Arm."""


def find_features() -> tuple[str, ...]:
    """Give the processor's instruction sets that matter here; none where the system hides them."""
    info = read_text("/proc/cpuinfo")
    words = set(re.sub(r"^(?!flags|Features).*$", "", info, flags=re.MULTILINE).split())
    return tuple(feature for feature in _FEATURES if feature in words)


def read_text(path: str) -> str:
    """Read what the system tells in a file; nothing where it has no such file."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
