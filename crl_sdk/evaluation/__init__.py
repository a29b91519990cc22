"""Benchmarks of the paper: readers of its data sets, and its protocols on arrays.

The protocols follow the code published with Conditional Representation Learning, arXiv 2510.04564
(github.com/XLearning-SCU/2025-NeurIPS-CRL, read in November 2026).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from crl_sdk._lazy import lazy_names

if TYPE_CHECKING:
    from crl_sdk.evaluation._benchmarks import BENCHMARKS, Benchmark
    from crl_sdk.evaluation._mean_std import MeanStd
    from crl_sdk.evaluation._published_scores import PublishedScores, read_published

__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "MeanStd",
    "PublishedScores",
    "read_published",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "_benchmarks": ("BENCHMARKS", "Benchmark"),
        "_mean_std": ("MeanStd",),
        "_published_scores": ("PublishedScores", "read_published"),
    },
    extra="tasks",
)
