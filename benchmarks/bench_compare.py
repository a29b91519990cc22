"""`crl bench --compare`: two reports side by side, as ratios with intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass

from crl_benchmarks.bench_report import (
    LoadResult,
    ObjectiveResult,
    Report,
    find_figure,
    show_setting,
)
from crl_sdk.errors import InvalidInputError

SHOWN = (50.0, 99.0)
"""Percentiles that are compared."""

_MAY_DIFFER = {"address", "warm_up_seconds", "measured_seconds", "generator_processes"}
"""Settings that change neither what is measured nor what the server does."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """Second report divided by the first.

    Attributes:
        value: The ratio.
        low: Lower end of its interval; None if it is not known.
        high: Upper end of its interval; None if it is not known.
    """

    value: float
    low: float | None
    high: float | None


def find_differences(first: Report, second: Report) -> list[str]:
    """Return what else differs between two reports, or is not known, so that ratios say less."""
    found = []
    for name, one, other in (
        *((f"the {key}", getattr(first.target, key), getattr(second.target, key))
          for key in ("model", "fingerprint", "engine")),
        ("the processor", first.machine.processor, second.machine.processor),
        ("the objective", *(each.objective.objective if each.objective else "none"
                            for each in (first, second))),
        ("the number of cores", first.machine.cores, second.machine.cores),
        *((key.replace("_", " "), *(each.settings.get(key, "none") for each in (first, second)))
          for key in sorted({*first.settings, *second.settings} - _MAY_DIFFER)),
    ):  # fmt: skip
        if one != other:
            found.append(f"{name}: {show_setting(one)} and {show_setting(other)}")
        elif one is None and name in ("the model", "the fingerprint", "the engine"):
            found.append(f"{name}: not known in either, it may differ")
    shares = [first.cached_share, second.cached_share]
    cached = [share or 0.0 for share in shares]
    if None in shares and "api" in first.settings:
        found.append("answers from the cache: not known")
    elif abs(cached[0] - cached[1]) > 0.01:
        found.append(f"answers from the cache: {cached[0]:.0%} and {cached[1]:.0%}")
    return found


def compare(first: Report, second: Report) -> dict[str, dict[str, Ratio]]:
    """Return the ratios of the quotable runs that both reports have at the same load.

    Returns:
        Ratios by load, then by `images_per_second` and `p50`, `p99`. If both reports have a rate
        that met the same objective, the ratio of these is there too.

    Raises:
        InvalidInputError: If there is nothing to compare.
    """
    others = {(row.mode, row.load): row for row in second.rows if row.shown}
    found = {}
    for row in first.rows:  # of several runs at one load, the last counts
        same = others.get((row.mode, row.load))
        if row.shown and same is not None:
            found[row.name] = {
                "images_per_second": compare_throughput(row, same),
                **{f"p{percent:g}": compare_latency(row, same, percent) for percent in SHOWN},
            }
    rate = _compare_objectives(first.objective, second.objective)
    if rate is not None and first.objective is not None:
        found[first.objective.objective] = {"images_per_second": rate}
    if not found:
        raise InvalidInputError(
            "the reports have no quotable run at the same load: measure both with the same "
            "--concurrency, --rate or --slo"
        )
    return found


def compare_throughput(first: LoadResult, second: LoadResult) -> Ratio:
    """Return the ratio of images per second, with a 95 % interval as for Poisson counts."""
    value = second.images_per_second / first.images_per_second
    half = 1.96 * math.sqrt(1 / first.served_calls + 1 / second.served_calls)
    return Ratio(value, value * math.exp(-half), value * math.exp(half))


def compare_latency(first: LoadResult, second: LoadResult, percent: float) -> Ratio:
    """Return the ratio of a percentile. Its interval holds the ratios of both 95 % intervals."""
    one, other = find_figure(first.latency, percent), find_figure(second.latency, percent)
    value = _divide(other.latency_ms, one.latency_ms)
    assert value is not None  # both runs served calls
    return Ratio(value, _divide(other.low_ms, one.high_ms), _divide(other.high_ms, one.low_ms))


def _compare_objectives(
    first: ObjectiveResult | None, second: ObjectiveResult | None
) -> Ratio | None:
    """Return the ratio of the highest rates, each of which was found to within 5 %."""
    if first is None or second is None or first.objective != second.objective:
        return None
    if None in (first.best, second.best):
        return None
    assert first.best is not None and second.best is not None
    value = second.best.images_per_second / first.best.images_per_second
    exact = first.higher_rates_judged and second.higher_rates_judged
    return Ratio(value, value * 0.95 if exact else None, value / 0.95 if exact else None)


def _divide(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one / max(other, 1e-6)
