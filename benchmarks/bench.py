"""Measures a server: sweeps of callers or rates, and the highest rate that meets an objective.

The load comes from separate generator processes, which start together and share it. A run in which
a generator was the bottleneck is marked as not quotable.
"""

from __future__ import annotations

import asyncio
import math
import multiprocessing
import platform
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from itertools import count

import msgspec
import numpy as np

from crl_benchmarks.load import Reply, Run, closed_loop, merge, open_loop
from crl_benchmarks.machine import describe_machine
from crl_benchmarks.quantiles import PERCENTILES, percentile, values_needed
from crl_benchmarks.targets import Target, connect, open_target
from crl_sdk._version import __version__
from crl_sdk.engines._contract import ImageEngine
from crl_sdk.errors import InvalidInputError, ServiceError
from crl_sdk.model import _parity as parity
from crl_sdk.model._bundle import ModelBundle

SCHEMA = 2

_BUSY = 0.9
"""Share of a core above which a generator counts as the bottleneck."""

_LATE = 0.1
"""A generator is a bottleneck too if p90 of its lag exceeds this share of the median latency …"""

_LATE_SECONDS = 0.002
"""… and this many seconds, which a healthy event loop may be late."""

_STEADY = 0.1
"""A run is steady if the calls served in each third differ from the mean by at most this share."""

_ATTEMPTS = 3


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """A percentile of the latency.

    Attributes:
        percent: Such as 99.
        ms: Value in milliseconds.
        low: Lower end of the 95 % interval in milliseconds; None if the sample is too small.
        high: Upper end of the 95 % interval in milliseconds; None if the sample is too small.
    """

    percent: float
    ms: float
    low: float | None
    high: float | None


class LoadResult(msgspec.Struct, frozen=True, kw_only=True):
    """Result of one run.

    Attributes:
        mode: `closed` or `open`, or `engine` for runs in this process.
        load: Number of callers (closed), calls per second (open), or images per run (engine).
        seconds: Measured seconds.
        offered: Number of calls that were due.
        served: Number of successful calls.
        rejected: Number of calls that the server refused because it was full.
        errors: Number of other failures, by status.
        calls_per_second: Successful calls per second.
        images_per_second: Images of successful calls per second.
        latency: Percentiles of the latency of successful calls.
        stages_ms: Median milliseconds that the server reports, by stage.
        steady: Whether all thirds of the run served about the same number of calls.
        generator_cpu: Largest share of a core that a generator used.
        generator_lag_ms: 90th percentile of the lateness of the generators' event loops.
        cached: Share of the images that the server's cache answered; None if it does not say.
        quotable: Whether the generators were not the bottleneck.
        why: Reason why the run is not quotable, else empty.
    """

    mode: str
    load: float
    seconds: float
    offered: int
    served: int
    rejected: int
    errors: dict[str, int]
    calls_per_second: float
    images_per_second: float
    latency: tuple[Figure, ...]
    stages_ms: dict[str, float]
    steady: bool
    generator_cpu: float
    generator_lag_ms: float
    cached: float | None
    quotable: bool
    why: str = ""

    def ms(self, percent: float) -> float:
        """Return a percentile of the latency in milliseconds, infinite if no call succeeded."""
        return next((each.ms for each in self.latency if each.percent == percent), math.inf)

    def shows(self, percent: float) -> bool:
        """Return whether there are enough calls to bound a percentile from above."""
        return any(each.percent == percent and each.high is not None for each in self.latency)


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All runs of a command, with what is needed to repeat it.

    Attributes:
        schema: Version of this document's format.
        time: Time of writing in UTC, ISO 8601.
        command: Command line.
        machine: Properties of the machine of the generators.
        versions: Versions of the packages that matter, by name.
        target: What was measured: model, engine, fingerprint, version; as far as it is known.
        settings: Settings of the measurement, with units in their names.
        rows: Results of the runs.
        objective: Objective of the search, such as `p99<50ms`.
        best: Run at the highest rate that met the objective, or None.
        verdict: Outcome of the search in words; empty without one.
    """

    schema: int
    time: str
    command: str
    machine: dict[str, str]
    versions: dict[str, str]
    target: dict[str, str]
    settings: dict[str, str | float]
    rows: tuple[LoadResult, ...]
    objective: str | None = None
    best: LoadResult | None = None
    verdict: str = ""


@dataclass(frozen=True, slots=True)
class Objective:
    """An upper bound for a percentile of the latency.

    Attributes:
        percent: Such as 99.
        ms: Bound in milliseconds.
    """

    percent: float
    ms: float

    @classmethod
    def parse(cls, text: str) -> Objective:
        """Parse text such as `p99<50ms`.

        Raises:
            InvalidInputError: If the text has another form, or the percentile is not reported.
        """
        found = re.fullmatch(r"p(\d+(?:\.\d+)?)<(\d+(?:\.\d+)?)ms", text.replace(" ", ""))
        if not found or float(found[1]) not in PERCENTILES or not float(found[2]):
            known = ", ".join(f"p{each:g}" for each in PERCENTILES)
            raise InvalidInputError(
                f"expected an objective such as p99<50ms with one of {known}; got {text!r}"
            )
        return cls(float(found[1]), float(found[2]))

    def is_met(self, row: LoadResult) -> bool:
        """Return whether a run met it. The latency of a failed call counts as infinite."""
        failed = row.offered - row.served
        allowed = row.offered * (1 - self.percent / 100)
        return row.quotable and failed <= allowed and row.ms(self.percent) < self.ms

    def verdict(self, rows: Sequence[LoadResult], best: LoadResult | None) -> tuple[str, bool]:
        """Return what a search has shown, in words, and whether it could judge.

        Args:
            rows: All runs of the search.
            best: Run at the highest rate that met the objective, or None.
        """
        unjudged = [row.why for row in rows if row.mode == "open" and not row.quotable]
        if best is None and unjudged:
            return f"could not be judged: {unjudged[-1]}", False
        if best is None:
            return "met at no rate", True
        met = f"met at {best.calls_per_second:.4g} calls/s ({best.images_per_second:.4g} images/s)"
        if best.shows(self.percent):
            return met, True
        needed = values_needed(self.percent)
        seconds = math.ceil(1.1 * needed / max(best.calls_per_second, 1e-9))
        return (
            f"{met} in {best.served} calls, which are too few to show it: p{self.percent:g} needs "
            f"{needed}, so use --seconds {seconds}", True,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """Settings of each run.

    Attributes:
        warm_up: Seconds before anything counts.
        seconds: Measured seconds.
        processes: Number of generator processes.
    """

    warm_up: float = 2.0
    seconds: float = 10.0
    processes: int = 1


@dataclass(frozen=True, slots=True)
class _Job:
    """Work of one generator process in one run.

    Attributes:
        target: Server and calls.
        mode: `closed` or `open`.
        load: Number of callers (closed) or calls per second (open).
        warm_up: Seconds before anything counts.
        seconds: Measured seconds.
        seed: Seed of the arrival times, different for each process and run.
        starts: Start time on the wall clock, which all processes share.
    """

    target: Target
    mode: str
    load: float
    warm_up: float
    seconds: float
    seed: int
    starts: float


class Generators:
    """The generator processes, started once for all runs. Use as a context manager."""

    def __init__(self, target: Target, settings: BenchSettings) -> None:
        """Prepare the processes; they start at the first run."""
        self._target, self._settings = target, settings
        self._seeds = count()
        context = multiprocessing.get_context("spawn")  # gRPC does not survive a fork
        self._pool = ProcessPoolExecutor(settings.processes, mp_context=context)

    def __enter__(self) -> Generators:
        """Return the generators themselves."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the processes."""
        self._pool.shutdown(cancel_futures=True)

    def measure(self, mode: str, load: float) -> LoadResult:
        """Make a run, and repeat it up to twice if it was not steady.

        Args:
            mode: `closed` or `open`.
            load: Number of callers (closed) or calls per second (open).

        Returns:
            The result of the last attempt.

        Raises:
            ServiceError: If no call succeeded.
        """
        for _ in range(_ATTEMPTS):
            row = self._measure(mode, load)
            if row.steady:
                break
        return row

    def _measure(self, mode: str, load: float) -> LoadResult:
        settings = self._settings
        processes = settings.processes if mode == "open" else min(settings.processes, int(load))
        shares = _shares(mode, load, processes)
        starts = time.time() + 0.3
        jobs = [
            _Job(
                self._target, mode, share, settings.warm_up, settings.seconds,
                next(self._seeds), starts,
            )
            for share in shares
        ]  # fmt: skip
        run = merge(list(self._pool.map(_generate, jobs)))
        row = _row(mode, load, run, self._target.batch)
        if not row.served and row.errors:
            raise ServiceError(
                f"{self._target.address}: expected successful calls, got {row.errors}; check that "
                f"a server with the {self._target.kind} API, and these criteria or this model, "
                "runs there"
            )
        return row


def search(
    objective: Objective,
    measure: Callable[[str, float], LoadResult],
    tell: Callable[[LoadResult], None],
    *,
    callers: int = 8,
) -> LoadResult | None:
    """Find the highest rate that meets an objective, to within 5 %.

    A closed loop measures the capacity. Bisection then searches rates up to 1.1 times the capacity.
    A rate fails only after two runs that do not meet the objective, since one pause of a shared
    machine spoils a tail.

    Args:
        objective: Objective to meet.
        measure: Function that makes a run of a mode and a load.
        tell: Function that is called with every result.
        callers: Number of callers of the closed loop.

    Returns:
        The run at the highest rate that met the objective, or None.
    """
    first = measure("closed", callers)
    tell(first)
    low, high, best = 0.0, first.calls_per_second * 1.1, None
    while high > first.calls_per_second / 64 and (high - low) / high > 0.05:
        rate = (low + high) / 2
        row = measure("open", rate)
        if not objective.is_met(row):
            tell(row)
            row = measure("open", rate)
        tell(row)
        if objective.is_met(row):
            low, best = rate, row
        else:
            high = rate
    return best


def engine_rows(
    bundle: ModelBundle,
    engine: ImageEngine,
    batches: Sequence[int],
    settings: BenchSettings,
    tell: Callable[[int], None],
) -> list[LoadResult]:
    """Time an engine in this process, without decoding and without bases.

    Args:
        bundle: Bundle of the engine.
        engine: Engine to time.
        batches: Batch sizes.
        settings: Seconds of warm-up and measuring.
        tell: Function that is called with each batch size before it is timed.

    Returns:
        One result per batch size.
    """
    weight = np.zeros((bundle.embedding_dim, 0), np.float32)
    bias = np.zeros(0, np.float32)
    drawn = parity.images(bundle.preprocess)
    rows = []
    for batch in batches:
        tell(batch)
        pixels = np.resize(drawn, (batch, *drawn.shape[1:]))
        begins = time.perf_counter() + settings.warm_up
        engine.run(pixels, weight, bias)
        while time.perf_counter() < begins:
            engine.run(pixels, weight, bias)
        run, begins = Run(lags=[0.0]), time.perf_counter()
        while run.seconds < settings.seconds or run.offered < 3:
            started = time.perf_counter()
            engine.run(pixels, weight, bias)
            now = time.perf_counter()
            run.offered += 1
            run.add(Reply("ok"), now - started, now - begins)
            run.seconds = now - begins
        rows.append(_row("engine", batch, run, batch))
    return rows


def server_settings(target: Target, settings: BenchSettings) -> dict[str, str | float]:
    """Return the settings of a server's measurement for the report."""
    return {
        "address": target.address,
        "api": target.kind,
        "criteria": ", ".join(target.criteria),
        "images_per_call": target.batch,
        "different_images": len(target.images),
        "median_image_bytes": int(np.median([len(data) for data in target.images])),
        "distinct_images": "yes" if target.distinct else "no",
        "warm_up_seconds": settings.warm_up,
        "measured_seconds": settings.seconds,
        "generator_processes": settings.processes,
    }


def report(
    command: str,
    target: dict[str, str],
    settings: dict[str, str | float],
    rows: Sequence[LoadResult],
    **more: object,
) -> Report:
    """Return a report of runs.

    Args:
        command: Command line.
        target: What was measured.
        settings: Settings of the measurement.
        rows: Results of the runs.
        **more: `objective`, `best` and `verdict` of a search.
    """
    return Report(
        schema=SCHEMA,
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=command,
        machine=describe_machine(),
        versions={
            "crl": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("grpcio", "protobuf", "numpy")},
        },
        target=target,
        settings=settings,
        rows=tuple(rows),
        **more,  # type: ignore[arg-type]
    )


def _shares(mode: str, load: float, count: int) -> list[float]:
    if mode == "open":
        return [load / count] * count
    whole, rest = divmod(int(load), count)
    return [whole + (i < rest) for i in range(count)]


def _generate(job: _Job) -> Run:
    """Make one run in a generator process."""
    time.sleep(max(job.starts - time.time(), 0))

    async def run() -> Run:
        async with open_target(job.target) as channel:
            send = connect(job.target, channel)
            # processes send different images at the same time, and distinct ones in all runs
            first = job.seed * (2**40 if job.target.distinct else 7919)

            async def shifted(number: int) -> Reply:
                return await send(first + number)

            if job.mode == "closed":
                return await closed_loop(
                    shifted, callers=int(job.load), warm_up=job.warm_up, seconds=job.seconds
                )
            return await open_loop(
                shifted, rate=job.load, warm_up=job.warm_up, seconds=job.seconds, seed=job.seed
            )

    return asyncio.run(run())


def _row(mode: str, load: float, run: Run, batch: int) -> LoadResult:
    served = sorted(run.latencies.get("ok", []))
    lag = float(np.percentile(run.lags, 90)) if run.lags else run.seconds  # it never woke
    why = ""
    if run.cpu > _BUSY:
        why = f"a generator used {run.cpu:.0%} of its core; use more --processes"
    elif served and lag > max(_LATE * served[len(served) // 2], _LATE_SECONDS):
        why = f"a generator woke {lag * 1e3:.1f} ms late; use more --processes or other cores"
    thirds = np.histogram(run.done, bins=3, range=(0.0, run.seconds))[0]
    mean = float(thirds.mean())
    chance = 2 * mean**0.5  # random arrivals differ by this much
    # if a server cannot keep up with an open loop, answers come after the last call was due
    rate = len(served) / max(run.seconds, max(run.done, default=0.0))
    steady = mean > 0 and float(np.abs(thirds - mean).max()) <= max(_STEADY * mean, chance)
    return LoadResult(
        mode=mode,
        load=load,
        seconds=run.seconds,
        offered=run.offered,
        served=len(served),
        rejected=len(run.latencies.get("rejected", [])),
        errors={
            name: count for name, count in run.failures.items() if name != "RESOURCE_EXHAUSTED"
        },
        calls_per_second=round(rate, 2),
        images_per_second=round(rate * batch, 2),
        latency=tuple(_figure(served, percent) for percent in PERCENTILES if served),
        stages_ms={
            stage: round(float(np.median(seconds)) * 1e3, 3)
            for stage, seconds in run.stages.items()
        },
        steady=steady,
        generator_cpu=round(run.cpu, 3),
        generator_lag_ms=round(lag * 1e3, 3),
        cached=round(float(np.mean(run.cached)), 4) if run.cached else None,
        quotable=not why,
        why=why,
    )


def _figure(served: Sequence[float], percent: float) -> Figure:
    found = percentile(served, percent)
    return Figure(
        percent=percent,
        ms=round(found.value * 1e3, 3),
        low=None if found.low is None else round(found.low * 1e3, 3),
        high=None if found.high is None else round(found.high * 1e3, 3),
    )
