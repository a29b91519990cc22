"""`crl bench --compare`: two reports side by side, as ratios with intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import msgspec

from crl_benchmarks.bench import SCHEMA, Figure, LoadResult, Report
from crl_sdk.errors import InvalidInputError

SHOWN = (50.0, 99.0)
"""Percentiles that are compared."""


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


def read_report(path: Path) -> Report:
    """Read a report that `crl bench --out` wrote.

    Raises:
        InvalidInputError: If the file cannot be read or has another schema.
    """
    try:
        data = path.read_bytes()
        schema = msgspec.json.decode(data).get("schema")
        if schema != SCHEMA:
            raise InvalidInputError(
                f"{path}: expected schema {SCHEMA} of crl bench, got {schema!r}: measure again"
            )
        return msgspec.json.decode(data, type=Report)
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot be read ({error.strerror})") from error
    except (msgspec.MsgspecError, AttributeError) as error:
        raise InvalidInputError(f"{path}: not a report of crl bench --out ({error})") from error


def differences(first: Report, second: Report) -> list[str]:
    """Return what else differs between two reports, so that ratios say less."""
    found = []
    for name, one, other in (
        *((f"the {key}", first.target.get(key), second.target.get(key))
          for key in ("model", "fingerprint", "engine")),
        ("the processor", first.machine.get("processor"), second.machine.get("processor")),
        *((key.replace("_", " "), first.settings.get(key), second.settings.get(key))
          for key in ("images_per_call", "median_image_bytes", "distinct_images", "criteria")),
    ):  # fmt: skip
        if one != other:
            found.append(f"{name}: {one} and {other}")
    cached = [
        max((row.cached or 0.0 for row in report.rows), default=0.0) for report in (first, second)
    ]
    if abs(cached[0] - cached[1]) > 0.01:
        found.append(f"answers from the cache: {cached[0]:.0%} and {cached[1]:.0%}")
    return found


def pairs(first: Report, second: Report) -> list[tuple[LoadResult, LoadResult]]:
    """Return the quotable runs that both reports have at the same load.

    Raises:
        InvalidInputError: If there are none.
    """
    others = {(row.mode, row.load): row for row in second.rows if row.quotable and row.served}
    found = [
        (row, others[row.mode, row.load])
        for row in first.rows
        if row.quotable and row.served and (row.mode, row.load) in others
    ]
    if not found:
        raise InvalidInputError(
            "the reports have no quotable run at the same load: measure both with the same "
            "--concurrency or --rate"
        )
    return found


def compare_throughput(first: LoadResult, second: LoadResult) -> Ratio:
    """Return the ratio of images per second, with a 95 % interval as for Poisson counts."""
    value = second.images_per_second / first.images_per_second
    half = 1.96 * math.sqrt(1 / first.served + 1 / second.served)
    return Ratio(value, value * math.exp(-half), value * math.exp(half))


def compare_latency(first: LoadResult, second: LoadResult, percent: float) -> Ratio:
    """Return the ratio of a percentile. Its interval holds the ratios of both 95 % intervals."""
    one, other = _figure(first, percent), _figure(second, percent)
    value = other.ms / max(one.ms, 1e-9)
    known = None not in (one.low, one.high, other.low, other.high)
    if not known:
        return Ratio(value, None, None)
    assert one.low is not None and one.high is not None
    assert other.low is not None and other.high is not None
    return Ratio(value, other.low / max(one.high, 1e-9), other.high / max(one.low, 1e-9))


def _figure(row: LoadResult, percent: float) -> Figure:
    return next(each for each in row.latency if each.percent == percent)
