"""Measures a server with a number of callers or a rate of calls, or an engine in this process.

The load comes from separate generator processes, which start together and share it. A run in which
a generator was the bottleneck is marked as not quotable.
"""

from __future__ import annotations

import asyncio
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import count
from typing import TypeVar

import msgspec
import numpy as np

from crl_benchmarks.arrivals import Burst
from crl_benchmarks.bench_report import (
    LOAD_UNITS,
    SCHEMA,
    CallKind,
    ColdStart,
    Figure,
    LoadResult,
    ObjectiveResult,
    Report,
    Setting,
    Slice,
    Subject,
)
from crl_benchmarks.call_records import CallRecords, Part, PartWriter
from crl_benchmarks.calls import Call, Mix, Trace, TracedCall
from crl_benchmarks.images import describe_sizes
from crl_benchmarks.load import Reply, Run, closed_loop, merge, open_loop, timed_loop
from crl_benchmarks.metrics_page import MetricsPage, summarise
from crl_benchmarks.quantiles import PERCENTILES, percentile
from crl_benchmarks.report_head import find_head
from crl_benchmarks.sampling import Sampling
from crl_benchmarks.sensors import Reading, Sensors
from crl_benchmarks.targets import Target, open_calls
from crl_sdk.engines._contract import ImageEngine
from crl_sdk.errors import ServiceError
from crl_sdk.model import _parity as parity
from crl_sdk.model._bundle import ModelBundle

T = TypeVar("T")

_BUSY = 0.9
"""Share of a core above which a generator counts as the bottleneck."""

_LATE = 0.1
"""A generator is a bottleneck too if p90 of its lag exceeds this share of the median latency …"""

_LATE_SECONDS = 0.002
"""… and this many seconds, which a healthy event loop may be late."""

_STEADY = 0.1
"""A run is steady if the calls served in each third differ from the mean by at most this share."""

_ATTEMPTS = 3

_MOST_SLICES = 600
"""Number of slices of a long run."""


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """Settings of each run.

    Attributes:
        warm_up: Seconds before anything counts.
        seconds: Measured seconds.
        processes: Number of generator processes.
        burst: Bursts of the rate of open loops, or None.
        trace: Trace to replay, or None. `warm_up` and `seconds` are then its own.
        mix: Criteria of calls that differ, or None.
    """

    warm_up: float = 2.0
    seconds: float = 10.0
    processes: int = 1
    burst: Burst | None = None
    trace: Trace | None = None
    mix: Mix | None = None


@dataclass(frozen=True, slots=True)
class _Job:
    """Work of one generator process in one run.

    Attributes:
        target: Server and calls.
        mode: `closed`, `open` or `replay`.
        load: Number of callers (closed) or calls per second (open).
        warm_up: Seconds before anything counts.
        seconds: Measured seconds.
        seed: Seed of the arrival times, different for each process and run.
        starts: Start time on the wall clock, which all processes share.
        part: Where to put a record of each call, or None.
        burst: Bursts of the rate of an open loop, or None.
        calls: Calls to replay.
        mix: Criteria of calls that differ, or None.
    """

    target: Target
    mode: str
    load: float
    warm_up: float
    seconds: float
    seed: int
    starts: float
    part: Part | None = None
    burst: Burst | None = None
    calls: tuple[TracedCall, ...] = ()
    mix: Mix | None = None


class Generators:
    """The generator processes, started once for all runs. Use as a context manager."""

    def __init__(
        self,
        target: Target,
        settings: BenchSettings,
        *,
        records: CallRecords | None = None,
        sensors: Sensors | None = None,
        metrics: MetricsPage | None = None,
    ) -> None:
        """Prepare the processes; they start at the first run.

        Args:
            target: Server and calls.
            settings: Settings of each run.
            records: Where to record each call, or None.
            sensors: Sensors to read during each run, or None.
            metrics: Page of the server's metrics to read during each run, or None.
        """
        self._target, self._settings, self._records = target, settings, records
        self._sensors, self._metrics = sensors, metrics
        self._seeds = count(1)  # the first call, which `probe` makes, has 0
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

        A trace is replayed once.

        Args:
            mode: `closed`, `open` or `replay`.
            load: Number of callers (closed), calls per second (open), or factor of the recorded
                speed (replay).

        Returns:
            The result of the last attempt.

        Raises:
            ServiceError: If a generator process ended.
        """
        for _ in range(1 if mode == "replay" else _ATTEMPTS):
            row = self._measure(mode, load)
            if row.steady or not row.served_calls:
                break
        return row

    def _measure(self, mode: str, load: float) -> LoadResult:
        settings = self._settings
        traced = settings.trace.calls if settings.trace is not None else ()
        most = {"closed": int(load), "replay": len(traced)}.get(mode, settings.processes)
        processes = min(settings.processes, most)
        shares = _shares(mode, load, processes)
        parts: Sequence[Part | None] = [None] * len(shares)
        if self._records is not None:
            parts = self._records.begin_run(mode, load, len(shares))
        starts = time.time() + 0.3
        jobs = [
            _Job(
                self._target, mode, share, settings.warm_up, settings.seconds,
                next(self._seeds), starts, part, settings.burst, traced[i::processes],
                settings.mix,
            )
            for i, (share, part) in enumerate(zip(shares, parts, strict=True))
        ]  # fmt: skip
        begins, seconds = starts + settings.warm_up, settings.seconds
        read = self._sensors.read if self._sensors is not None else None
        scrape = self._metrics.scrape if self._metrics is not None else None
        try:
            with (
                _sampled(read, begins, seconds) as readings,
                _sampled(scrape, begins, seconds) as scrapes,
            ):
                run = merge(list(self._pool.map(_generate, jobs)))
        except BrokenProcessPool as error:
            raise ServiceError(
                "a generator process ended; check that there is enough memory, or use fewer images "
                "with --count, or fewer --processes"
            ) from error
        if self._records is not None:
            self._records.note_problem(run.unrecorded)
        uneven = mode == "replay" or (mode == "open" and settings.burst is not None)
        images = run.done_images / len(run.done) if run.done else self._target.batch
        row = _row(mode, load, run, images, uneven=uneven)
        if scrapes is not None:
            changed = summarise([scrape for _, scrape in scrapes.samples])
            row = msgspec.structs.replace(row, server_metrics=changed)
        return _with_devices(row, self._sensors, readings)


@contextmanager
def _sampled(
    read: Callable[[], T] | None, begins: float, seconds: float
) -> Iterator[Sampling[T] | None]:
    """Yield readings, which are complete at the end of the block."""
    if read is None:
        yield None
        return
    with Sampling(read, begins=begins, seconds=seconds) as sampling:
        yield sampling


def _with_devices(
    row: LoadResult, sensors: Sensors | None, sampling: Sampling[list[Reading]] | None
) -> LoadResult:
    """Return a row with what the devices of this machine did."""
    if sensors is None or sampling is None:
        return row
    devices = sensors.summarise(sampling.samples, row.images_per_second)
    return msgspec.structs.replace(row, devices=devices)


def engine_rows(
    bundle: ModelBundle,
    engine: ImageEngine,
    batches: Sequence[int],
    settings: BenchSettings,
    tell: Callable[[int], None],
    *,
    sensors: Sensors | None = None,
) -> list[LoadResult]:
    """Time an engine in this process, without decoding and without bases.

    Args:
        bundle: Bundle of the engine.
        engine: Engine to time.
        batches: Batch sizes.
        settings: Seconds of warm-up and measuring.
        tell: Function that is called with each batch size before it is timed.
        sensors: Sensors to read during each run, or None.

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
        read = sensors.read if sensors is not None else None
        with _sampled(read, time.time(), settings.seconds) as sampling:
            while run.seconds < settings.seconds or run.offered < 3:
                started = time.perf_counter()
                engine.run(pixels, weight, bias)
                now = time.perf_counter()
                run.offered += 1
                run.add(Reply("ok"), now - started, started - begins)
                run.done.append(now - begins)
                run.seconds = now - begins
        rows.append(_with_devices(_row("engine", batch, run, batch), sensors, sampling))
    return rows


async def measure_cold(target: Target, calls: int) -> ColdStart:
    """Make the first calls of a new connection, one after the other.

    Args:
        target: Server and calls.
        calls: Number of calls.
    """
    latencies: list[float | None] = []
    failed: dict[str, int] = {}
    first: dict[str, float] = {}
    async with open_calls(replace(target, connections=1)) as send:
        for number in range(1, calls + 1):  # `probe` sends number 0
            started = time.perf_counter()
            reply = await send(number, target.call)
            latency = _short((time.perf_counter() - started) * 1e3)
            latencies.append(latency if reply.outcome == "ok" else None)
            if number == 1:
                first = {stage: _short(value * 1e3) for stage, value in reply.stages.items()}
            if reply.outcome != "ok":
                failed[reply.why] = failed.get(reply.why, 0) + 1
    later = [each for each in latencies[1:] if each is not None]
    return ColdStart(
        calls_ms=tuple(latencies),
        failed_calls=failed,
        first_server_ms=first,
        later_p50_ms=_short(float(np.median(later))) if later else None,
        later_max_ms=max(later, default=None),
    )


def server_settings(target: Target, settings: BenchSettings) -> dict[str, Setting]:
    """Return the settings of a server's measurement for the report."""
    described: dict[str, Setting] = {
        "address": target.address,
        "api": target.kind,
        "criteria": list(target.criteria),
        "images_per_call": target.batch,
        "different_images": len(target.images),
        **describe_sizes(target.images),
        "distinct": target.distinct,
        "timeout_seconds": target.timeout,
        "warm_up_seconds": settings.warm_up,
        "measured_seconds": settings.seconds,
        "generator_processes": settings.processes,
        "connections": target.connections * settings.processes,
    }
    if settings.burst is not None:
        described["burst"] = str(settings.burst)
    if settings.mix is not None:
        described["mix"] = str(settings.mix)
    if settings.trace is not None:
        described["images_per_call"] = "as recorded"
        described["replay"] = str(settings.trace.path)
    return described


def report(
    command: str,
    target: Subject,
    settings: dict[str, Setting],
    rows: Sequence[LoadResult],
    *,
    objective: ObjectiveResult | None = None,
    ended_early: str = "",
    cold: ColdStart | None = None,
) -> Report:
    """Return a report of runs.

    Args:
        command: Command line.
        target: What was measured.
        settings: Settings of the measurement.
        rows: Results of the runs.
        objective: Result of a search.
        ended_early: Why not all runs were made.
        cold: The first calls of a new connection.
    """
    cached = [row.cached_share for row in rows if row.cached_share is not None]
    return Report(
        **find_head(SCHEMA, command, ("grpcio", "protobuf", "numpy")),
        target=target,
        settings=settings,
        cached_share=max(cached, default=None),
        rows=tuple(rows),
        objective=objective,
        ended_early=ended_early,
        cold=cold,
    )


def _shares(mode: str, load: float, count: int) -> list[float]:
    if mode == "replay":
        return [load] * count
    if mode == "open":
        return [load / count] * count
    whole, rest = divmod(int(load), count)
    return [whole + (i < rest) for i in range(count)]


def _generate(job: _Job) -> Run:
    """Make one run in a generator process."""
    time.sleep(max(job.starts - time.time(), 0))

    async def run(record: PartWriter | None) -> Run:
        async with open_calls(job.target) as send:
            # processes send different images at the same time, and distinct ones in all runs
            first = job.seed * (2**40 if job.target.distinct else 7919)

            mixed = job.mix.draw(job.seed) if job.mix is not None else [job.target.criteria]

            async def shifted(number: int) -> Reply:
                call = Call(job.target.batch, mixed[number % len(mixed)])
                if job.calls:
                    call = job.calls[number].call
                return await send(first + number, call)

            if job.calls:
                timed = [(each.due, each.counts) for each in job.calls]
                return await timed_loop(
                    shifted, timed, warm_up=job.warm_up, seconds=job.seconds, record=record
                )
            if job.mode == "closed":
                return await closed_loop(
                    shifted, callers=int(job.load), warm_up=job.warm_up, seconds=job.seconds,
                    record=record,
                )  # fmt: skip
            return await open_loop(
                shifted, rate=job.load, warm_up=job.warm_up, seconds=job.seconds, seed=job.seed,
                burst=job.burst, record=record,
            )  # fmt: skip

    with ExitStack() as stack:
        record = stack.enter_context(PartWriter(job.part)) if job.part is not None else None
        measured = asyncio.run(run(record))
    if record is not None:
        measured.unrecorded = record.problem
    return measured


def _row(mode: str, load: float, run: Run, images: float, *, uneven: bool = False) -> LoadResult:
    """Return the result of a run.

    Args:
        mode: Mode of the run.
        load: Its load.
        run: Its measurements.
        images: Mean number of images of a call.
        uneven: Whether calls are due unevenly. The run is then steady if it serves them in the
            third of its time in which they are due.
    """
    served = sorted(run.latencies.get("ok", []))
    lag = float(np.percentile(run.lags, 90)) if run.lags else run.seconds  # it never woke
    thirds = np.histogram(run.done, bins=3, range=(0.0, run.seconds))[0]
    mean = float(thirds.mean())
    wanted = np.histogram(run.due, bins=3, range=(0.0, run.seconds))[0] if uneven else mean
    chance = 2 * mean**0.5  # random arrivals differ by this much
    rate = run.calls_per_second
    why = _doubt(run, served, lag)
    failed = run.offered - len(served)
    return LoadResult(
        mode=mode,
        load=load,
        load_unit=LOAD_UNITS[mode],
        measured_seconds=run.seconds,
        offered_calls=run.offered,
        served_calls=len(served),
        rejected_calls=len(run.latencies.get("rejected", [])),
        failed_calls={
            name: count for name, count in run.failures.items() if name != "RESOURCE_EXHAUSTED"
        },
        messages=run.messages,
        calls_per_second=_short(rate),
        images_per_second=_short(rate * images),
        latency=tuple(_figure(served, 0, percent) for percent in PERCENTILES if served),
        latency_of_all_calls=tuple(
            _figure(served, failed, percent) for percent in PERCENTILES if run.offered
        ),
        server_p50_ms={
            stage: _short(float(np.median(seconds)) * 1e3) for stage, seconds in run.stages.items()
        },
        steady=mean > 0 and float(np.abs(thirds - wanted).max()) <= max(_STEADY * mean, chance),
        generator_cpu_share=_short(run.cpu),
        generator_late_ms=_short(lag * 1e3),
        cached_share=_short(float(np.mean(run.cached))) if run.cached else None,
        quotable=not why,
        why=why,
        kinds=_kinds(run),
        slices=_slices(run),
    )


def _slices(run: Run) -> tuple[Slice, ...]:
    """Return the successful calls of a run by the time at which they were due."""
    length = min(max(run.seconds / _MOST_SLICES, 1.0), run.seconds / 10)
    count = max(math.ceil(run.seconds / length - 1e-9), 1) if length else 0
    slices: list[list[float]] = [[] for _ in range(count)]
    for due, latency in zip(run.due, run.latencies.get("ok", []), strict=False):
        slices[min(max(int(due / length), 0), count - 1)].append(latency)
    return tuple(
        Slice(
            begin_seconds=_short(i * length),
            length_seconds=_short(min(length, run.seconds - i * length)),
            served_calls=len(latencies),
            p50_ms=_short(float(np.percentile(latencies, 50)) * 1e3) if latencies else None,
            p99_ms=_short(float(np.percentile(latencies, 99)) * 1e3) if latencies else None,
        )
        for i, latencies in enumerate(slices)
    )


def _kinds(run: Run) -> tuple[CallKind, ...]:
    """Return the calls of a run by what they ask for, unless all ask for the same."""
    if len(run.offered_kinds) < 2:
        return ()
    found = []
    for (images, criteria), offered in run.offered_kinds.items():
        served = sorted(run.kinds.get((images, criteria), []))
        found.append(
            CallKind(
                name=Call(images, criteria).name,
                criteria=criteria,
                images=images,
                offered_calls=offered,
                served_calls=len(served),
                latency=tuple(_figure(served, 0, percent) for percent in PERCENTILES if served),
            )
        )
    return tuple(sorted(found, key=lambda kind: -kind.offered_calls))


def _doubt(run: Run, served: Sequence[float], lag: float) -> str:
    """Return why the figures of a run are not those of the server, else an empty text."""
    if not run.offered:
        return "no call ended in the measured time; use more --seconds"
    if not served and "rejected" not in run.latencies:
        name, count = max(run.failures.items(), key=lambda each: each[1])
        message = run.messages.get(name) or "the server says no more"
        return f"no call succeeded: {count:,} of {run.offered:,} ended with {name} ({message})"
    if run.cpu > _BUSY:
        return f"a generator used {run.cpu:.0%} of its core; use more --processes"
    if served and lag > max(_LATE * served[len(served) // 2], _LATE_SECONDS):
        return f"a generator woke {lag * 1e3:.1f} ms late; use more --processes or other cores"
    return ""


def _figure(served: Sequence[float], failed: int, percent: float) -> Figure:
    """Return a percentile of ascending seconds and of failed calls, which never ended."""
    longest = served[-1] if served else -1.0
    found = percentile([*served, *[longest + 1.0] * failed], percent)

    def milliseconds(value: float | None) -> float | None:
        return None if value is None or value > longest else _short(value * 1e3)

    return Figure(
        percent=percent,
        latency_ms=milliseconds(found.value),
        low_ms=milliseconds(found.low),
        high_ms=milliseconds(found.high),
    )


def _short(value: float) -> float:
    """Return a value without digits that mean nothing."""
    return float(f"{value:.6g}")
