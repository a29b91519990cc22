"""Percentiles of latencies with their confidence intervals, which assume no distribution."""

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
        percent: such as 99.
        value: in the unit of the sample.
        low: of the 95 % interval; None where the sample is too small for one.
        high: likewise.
    """

    percent: float
    value: float
    low: float | None
    high: float | None


def percentile(sorted_values: Sequence[float], percent: float) -> Percentile:
    """Give a percentile with its interval from order statistics.

    How many of n values lie below the p-th quantile is binomial (n, p); the interval lies between
    the values whose ranks hold 95 % of it, by the normal approximation (Conover, Practical
    Nonparametric Statistics, 1999, section 3.2). Values of one run follow each other in time and
    are not quite independent, so that the truth is somewhat wider.

    Args:
        sorted_values: ascending, at least one.
        percent: between 0 and 100.
    """
    n, p = len(sorted_values), percent / 100
    half = NormalDist().inv_cdf(0.975) * (n * p * (1 - p)) ** 0.5
    low, high = int(np.floor(n * p - half)), int(np.ceil(n * p + half))
    return Percentile(
        percent=percent,
        value=float(np.percentile(sorted_values, percent)),
        low=float(sorted_values[low]) if low >= 0 else None,
        high=float(sorted_values[high]) if high < n else None,
    )
