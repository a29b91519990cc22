"""The report of `crl bench`: its runs, and what is needed to repeat and to compare them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import msgspec

from crl_benchmarks.metrics_page import ServerMetrics
from crl_benchmarks.report_head import ReportHead
from crl_benchmarks.sensors import DeviceUse
from crl_sdk.errors import InvalidInputError
from crl_sdk.storage._atomic_files import read_record

SCHEMA = 3

LOAD_UNITS = {
    "closed": "callers",
    "open": "calls/s",
    "engine": "images",
    "replay": "times the recorded speed",
}
"""Unit of `LoadResult.load`, by mode."""

MOSTLY_CACHED = 0.05
"""Share of images from the cache above which a claim says so."""

Setting = str | int | float | bool | list[str] | None


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """A percentile of the latency.

    Attributes:
        percent: Such as 99.
        latency_ms: Value in milliseconds; None if it falls on a failed call, which never ended.
        low_ms: Lower end of the 95 % interval in milliseconds; None if it has none.
        high_ms: Upper end of the 95 % interval in milliseconds; None if there are too few calls for
            one, or if it falls on a failed call.
    """

    percent: float
    latency_ms: float | None
    low_ms: float | None
    high_ms: float | None


class Slice(msgspec.Struct, frozen=True, kw_only=True):
    """The successful calls that were due in a part of the measured time.

    Attributes:
        begin_seconds: Beginning of the part, in seconds since the end of the warm-up.
        length_seconds: Its length.
        served_calls: Number of the calls.
        p50_ms: Median of their latency; None without calls.
        p99_ms: 99th percentile of their latency; None without calls.
    """

    begin_seconds: float
    length_seconds: float
    served_calls: int
    p50_ms: float | None
    p99_ms: float | None


class CallKind(msgspec.Struct, frozen=True, kw_only=True):
    """Latency of the calls that ask for the same.

    Attributes:
        name: Criteria and number of images, such as `color+shape, 1 image`.
        criteria: Criteria.
        images: Number of images.
        offered_calls: Number of calls that were due.
        served_calls: Number of successful calls.
        latency: Percentiles of the latency of successful calls; empty if there are none.
    """

    name: str
    criteria: tuple[str, ...]
    images: int
    offered_calls: int
    served_calls: int
    latency: tuple[Figure, ...]


class LoadResult(msgspec.Struct, frozen=True, kw_only=True):
    """Result of one run.

    Attributes:
        mode: `closed`, `open` or `replay`, or `engine` for runs in this process.
        load: Number of callers (closed), calls per second (open), factor of the recorded speed
            (replay), or images per run (engine).
        load_unit: Unit of `load`.
        measured_seconds: Measured seconds.
        offered_calls: Number of calls that were due.
        served_calls: Number of successful calls.
        rejected_calls: Number of calls that the server refused because it was full.
        failed_calls: Number of other failures, by status.
        messages: First message of each status of failed and refused calls.
        calls_per_second: Successful calls per second.
        images_per_second: Images of successful calls per second.
        latency: Percentiles of the latency of successful calls; empty if there are none.
        latency_of_all_calls: The same of all calls. A failed or refused call never ended.
        server_p50_ms: Median milliseconds that the server reports, by stage.
        steady: Whether all thirds of the run served about the same number of calls.
        generator_cpu_share: Largest share of a core that a generator used.
        generator_late_ms: 90th percentile of the lateness of the generators' event loops.
        cached_share: Share of the images that the server's cache answered; None if it does not say.
        quotable: Whether the figures are the server's: the generators were not the bottleneck.
        why: Reason why the run is not quotable, else empty.
        devices: What the devices of this machine did: power, temperature, clocks.
        server_metrics: What changed on the server's Prometheus page, or None.
        kinds: The same calls by what they ask for, the most frequent kind first; empty if all ask
            for the same.
        slices: The same calls by the time at which they were due: each second, or tenths of a run
            below ten seconds. In a closed loop, a call is due when it is sent.
    """

    mode: str
    load: float
    load_unit: str
    measured_seconds: float
    offered_calls: int
    served_calls: int
    rejected_calls: int
    failed_calls: dict[str, int]
    messages: dict[str, str]
    calls_per_second: float
    images_per_second: float
    latency: tuple[Figure, ...]
    latency_of_all_calls: tuple[Figure, ...]
    server_p50_ms: dict[str, float]
    steady: bool
    generator_cpu_share: float
    generator_late_ms: float
    cached_share: float | None
    quotable: bool
    why: str = ""
    devices: tuple[DeviceUse, ...] = ()
    server_metrics: ServerMetrics | None = None
    kinds: tuple[CallKind, ...] = ()
    slices: tuple[Slice, ...] = ()

    @property
    def shown(self) -> bool:
        """Whether the run has figures to quote."""
        return self.quotable and self.served_calls > 0

    @property
    def name(self) -> str:
        """The load with its unit, such as `8 callers`."""
        return name_load(self.mode, self.load)


class Subject(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured. A field is None if the server does not say it.

    Attributes:
        model: Name of the model.
        fingerprint: Fingerprint of the model.
        engine: Runtime, device and precision, such as `onnx/cpu/int8`; with KServe, the platform.
        server: Name and version of the server.
    """

    model: str | None = None
    fingerprint: str | None = None
    engine: str | None = None
    server: str | None = None


class ObjectiveResult(msgspec.Struct, frozen=True, kw_only=True):
    """What the search for an objective has shown.

    Attributes:
        objective: The objective, such as `p99<50ms`.
        percent: Its percentile, such as 99.
        bound_ms: Its bound in milliseconds.
        outcome: `met`, `met_in_too_few_calls`, `met_at_no_rate` or `not_judged`.
        text: The outcome in words.
        needed_calls: Number of calls from which the percentile can be bounded.
        higher_rates_judged: Whether the next higher rate missed the objective; if not, `best` is
            only a lower bound.
        best: Run at the highest rate that met the objective, or None.
    """

    objective: str
    percent: float
    bound_ms: float
    outcome: str
    text: str
    needed_calls: int
    higher_rates_judged: bool
    best: LoadResult | None


class ColdStart(msgspec.Struct, frozen=True, kw_only=True):
    """The first calls of a new connection, one after the other and without a warm-up.

    The connection is cold. Whether the server is depends on what it did before.

    Attributes:
        calls_ms: Latency of each call in order; None for a call that failed. The first one includes
            the connection itself, with TLS if it is used.
        failed_calls: Number of failures, by status.
        first_server_ms: Milliseconds that the server reports for the first call, by stage; empty if
            it failed, or if the server does not say.
        later_p50_ms: Median of the successful calls after the first; None if there are none.
        later_max_ms: Maximum of these.
    """

    calls_ms: tuple[float | None, ...]
    failed_calls: dict[str, int]
    first_server_ms: dict[str, float]
    later_p50_ms: float | None
    later_max_ms: float | None


class Report(ReportHead, frozen=True, kw_only=True):
    """All runs of a command, with what is needed to repeat it.

    Attributes:
        target: What was measured.
        settings: Settings of the measurement, with units in their names.
        cached_share: Largest share of the images of a run that the server's cache answered; None if
            the server does not say.
        rows: Results of the runs.
        objective: Result of the search, or None.
        ended_early: Why not all runs were made, else empty.
        cold: The first calls of a new connection, or None.
    """

    target: Subject
    settings: dict[str, Setting]
    cached_share: float | None
    rows: tuple[LoadResult, ...]
    objective: ObjectiveResult | None = None
    ended_early: str = ""
    cold: ColdStart | None = None


def find_figure(figures: Sequence[Figure], percent: float) -> Figure:
    """Return a percentile among figures, without a value if it is not there."""
    none = Figure(percent=percent, latency_ms=None, low_ms=None, high_ms=None)
    return next((each for each in figures if each.percent == percent), none)


def name_load(mode: str, load: float) -> str:
    """Return a load with its unit.

    Example:
        >>> name_load("closed", 1), name_load("closed", 8), name_load("open", 20)
        ('1 caller', '8 callers', '20 calls/s')
    """
    unit = LOAD_UNITS[mode]
    return f"{show_rate(load)} {unit.removesuffix('s') if load == 1 and mode != 'open' else unit}"


def show_rate(value: float) -> str:
    """Return a rate with at least four digits.

    Example:
        >>> show_rate(9.3333), show_rate(12345.6)
        ('9.333', '12346')
    """
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def show_ms(value: float) -> str:
    """Return milliseconds with about three digits.

    Example:
        >>> show_ms(0.1234), show_ms(12.345), show_ms(2345.6)
        ('0.12', '12.3', '2346')
    """
    digits = 2 - math.floor(math.log10(max(value, 1e-3)))
    return f"{value:.{max(0, min(2, digits))}f}"


def show_latency(figure: Figure) -> str:
    """Return a percentile in milliseconds, with a question mark if the calls are too few."""
    if figure.latency_ms is None:
        return "-"
    return f"{show_ms(figure.latency_ms)}{'' if figure.high_ms is not None else '?'}"


def show_setting(value: object) -> str:
    """Return a setting or another fact of a report as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    return "not known" if value is None else str(value)


def read_report(path: Path) -> Report:
    """Read a report that `crl bench --out` wrote.

    Raises:
        InvalidInputError: If the file cannot be read or has another schema.
    """
    remedy = "measure again with crl bench --out"
    return read_record(path, Report, SCHEMA, InvalidInputError, remedy)
