"""The paper's benchmarks: readers of its data sets, and its protocols on arrays.

The protocols are those of the code published with Conditional Representation Learning, arXiv
2510.04564 (github.com/XLearning-SCU/2025-NeurIPS-CRL, read in November 2026).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from crl_sdk._lazy import lazy_names

if TYPE_CHECKING:
    from crl_sdk.evaluation._benchmarks import BENCHMARKS, Benchmark
    from crl_sdk.evaluation._figures import Figure
    from crl_sdk.evaluation._published import Published, read_published

__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "Figure",
    "Published",
    "read_published",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "_benchmarks": (
            "BENCHMARKS",
            "Benchmark",
        ),
        "_figures": ("Figure",),
        "_published": (
            "Published",
            "read_published",
        ),
    },
    extra="tasks",
)
