"""Percentiles of latencies with distribution-free confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

PERCENTILES = (50.0, 90.0, 99.0, 99.9)


@dataclass(frozen=True, slots=True)
class Percentile:
    """A percentile of a sample.

    Attributes:
        percent: Such as 99.
        value: Value in the unit of the sample.
        low: Lower end of the 95 % interval; None if the sample is too small.
        high: Upper end of the 95 % interval; None if the sample is too small.
    """

    percent: float
    value: float
    low: float | None
    high: float | None


def percentile(sorted_values: Sequence[float], percent: float) -> Percentile:
    """Return a percentile with its 95 % interval from order statistics.

    The number of n values below the p-quantile is binomial, B(n, p). The ends of the interval are
    the values of rank n·p ± 1.96·√(n·p·(1 − p)), by the normal approximation (Conover, Practical
    Nonparametric Statistics, 1999, section 3.2). The values of one run are not quite independent,
    so that the true interval is somewhat wider.

    Args:
        sorted_values: Values in ascending order, at least one.
        percent: Between 0 and 100.
    """
    n, p = len(sorted_values), percent / 100
    half = NormalDist().inv_cdf(0.975) * (n * p * (1 - p)) ** 0.5
    low, high = int(np.floor(n * p - half)), int(np.ceil(n * p + half))
    value = float(np.percentile(sorted_values, percent))
    return Percentile(
        percent=percent,
        value=value,
        # with few values the estimate may lie outside of these ranks
        low=min(float(sorted_values[low]), value) if low >= 0 else None,
        high=max(float(sorted_values[high]), value) if high < n else None,
    )


def values_needed(percent: float) -> int:
    """Return the size of a sample from which the interval of a percentile has an upper end.

    Example:
        >>> values_needed(50), values_needed(99)
        (8, 563)
    """
    n = 1
    while percentile(range(n), percent).high is None:
        n += 1 + n // 400
    while n > 1 and percentile(range(n - 1), percent).high is not None:
        n -= 1
    return n
