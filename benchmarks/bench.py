"""Measures a server: sweeps of callers or rates, and the highest rate that holds an objective.

Generators are processes of their own, which start together and share the load. A figure is not
quoted where they were the bottleneck.
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

import grpc
import msgspec
import numpy as np

from crl_benchmarks.load import Reply, Run, closed_loop, merge, open_loop
from crl_benchmarks.quantiles import PERCENTILES, percentile
from crl_benchmarks.targets import Target, connect
from crl_sdk._version import __version__
from crl_sdk.engines._contract import ImageEngine
from crl_sdk.errors import InvalidInputError, ServiceError
from crl_sdk.model import _parity as parity
from crl_sdk.model._bundle import ModelBundle

SCHEMA = 1

_BUSY = 0.9
"""A generator that uses more of its core than this is what was measured."""

_LATE = 0.1
"""So is one whose event loop wakes later than this share of the median latency, at its own p90."""

_STEADY = 0.1
"""A run is steady if no third of it served more or fewer than this share of its mean."""

_ATTEMPTS = 3


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """A percentile in milliseconds with its 95 % interval, where the sample is large enough."""

    percent: float
    ms: float
    low: float | None
    high: float | None


class LoadResult(msgspec.Struct, frozen=True, kw_only=True):
    """One run.

    Attributes:
        mode: `closed`, `open`, or `engine` for runs in process.
        load: callers, calls a second, or images of a run.
        seconds: measured.
        offered: calls that were due.
        served: calls that went well.
        rejected: calls that the server refused because it was full.
        errors: other failures, by status.
        calls_per_second: served.
        images_per_second: served.
        latency: of what was served, in milliseconds.
        stages_ms: medians of what the server says it spent.
        steady: whether all thirds of the run served alike.
        generator_cpu: largest share of a core that a generator used.
        generator_lag_ms: how late its event loop woke, at p90.
        quotable: whether the generators were not the bottleneck.
        why: why not.
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
    quotable: bool
    why: str = ""

    def ms(self, percent: float) -> float:
        """Give a percentile of the latency, infinite if nothing was served."""
        return next((each.ms for each in self.latency if each.percent == percent), math.inf)


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All runs of a command, with what is needed to repeat it.

    Attributes:
        schema: of this document.
        time: when it was made, UTC.
        command: as it was given.
        machine: of the generators.
        versions: of what took part here.
        settings: warm-up, seconds, processes, images.
        rows: the runs.
        objective: the search's, such as `p99<50ms`.
        best: the run at the highest rate that held it; None if none did.
    """

    schema: int
    time: str
    command: str
    machine: dict[str, str]
    versions: dict[str, str]
    settings: dict[str, str]
    rows: tuple[LoadResult, ...]
    objective: str | None = None
    best: LoadResult | None = None


@dataclass(frozen=True, slots=True)
class Objective:
    """What a rate must hold: a percentile of the latency below so many milliseconds."""

    percent: float
    ms: float

    @classmethod
    def parse(cls, text: str) -> Objective:
        """Read `p99<50ms`.

        Raises:
            InvalidInputError: it has another form, or a percentile that is not reported.
        """
        found = re.fullmatch(r"p(\d+(?:\.\d+)?)<(\d+(?:\.\d+)?)ms", text.replace(" ", ""))
        if not found or float(found[1]) not in PERCENTILES or not float(found[2]):
            known = ", ".join(f"p{each:g}" for each in PERCENTILES)
            raise InvalidInputError(
                f"expected an objective such as p99<50ms, of {known}; got {text!r}"
            )
        return cls(float(found[1]), float(found[2]))

    def held(self, row: LoadResult) -> bool:
        """Tell whether a run held it; a call that failed counts as one that took forever."""
        failed = row.offered - row.served
        allowed = row.offered * (1 - self.percent / 100)
        return row.quotable and failed <= allowed and row.ms(self.percent) < self.ms


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """How each run is made: seconds of warm-up and measuring, and generator processes."""

    warm_up: float = 2.0
    seconds: float = 10.0
    processes: int = 1


@dataclass(frozen=True, slots=True)
class _Job:
    """What one generator process does in one run.

    Attributes:
        target: what is called.
        mode: `closed` or `open`.
        load: callers, or calls a second.
        warm_up: seconds.
        seconds: measured.
        seed: of the arrivals; another for each process and run, or all would share one's luck.
        starts: on the clock that all processes share.
    """

    target: Target
    mode: str
    load: float
    warm_up: float
    seconds: float
    seed: int
    starts: float


class Generators:
    """The generator processes, started once for all runs."""

    def __init__(self, target: Target, settings: BenchSettings) -> None:
        """Start them."""
        self._target, self._settings = target, settings
        self._seeds = count()
        context = multiprocessing.get_context("spawn")  # gRPC does not survive a fork
        self._pool = ProcessPoolExecutor(settings.processes, mp_context=context)

    def __enter__(self) -> Generators:
        """Use as a context manager; leaving it ends the processes."""
        return self

    def __exit__(self, *_: object) -> None:
        """End them."""
        self._pool.shutdown(cancel_futures=True)

    def measure(self, mode: str, load: float) -> LoadResult:
        """Make a run, again if it was not steady, three times at most.

        Args:
            mode: `closed` or `open`.
            load: callers, or calls a second.

        Raises:
            ServiceError: no call at all went well.
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
                f"{self._target.address}: expected answers, got {row.errors}: is a server of the "
                f"{self._target.kind} contract there, with these criteria or this model?"
            )
        return row


def search(
    objective: Objective,
    measure: Callable[[str, float], LoadResult],
    tell: Callable[[LoadResult], None],
    *,
    callers: int = 8,
) -> LoadResult | None:
    """Find the highest rate that holds an objective, to within 5 %.

    A closed loop tells the capacity; rates up to a tenth more are halved between what held and what
    did not. A rate is given up after two runs that did not hold it, since one pause of a shared
    machine spoils a tail.

    Args:
        objective: to hold.
        measure: makes a run of a mode and a load.
        tell: is shown every run.
        callers: of the closed loop.

    Returns:
        the best run, or None if no rate held.
    """
    first = measure("closed", callers)
    tell(first)
    low, high, best = 0.0, first.calls_per_second * 1.1, None
    while high > first.calls_per_second / 64 and (high - low) / high > 0.05:
        rate = (low + high) / 2
        row = measure("open", rate)
        if not objective.held(row):
            tell(row)
            row = measure("open", rate)
        tell(row)
        if objective.held(row):
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
    """Time an engine in this process, without decoding and without bases: one row per batch size.

    Args:
        bundle: its model.
        engine: to time.
        batches: images of a run.
        settings: seconds of warm-up and measuring.
        tell: is told each batch before it is timed.
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


def server_settings(target: Target, settings: BenchSettings) -> dict[str, str]:
    """Tell how a server was measured."""
    sizes = [len(data) for data in target.images]
    return {
        "address": target.address,
        "contract": target.kind,
        "asked": ", ".join(target.criteria) or target.model or "universal",
        "images of a call": str(target.batch),
        "different images": f"{len(sizes)} of {int(np.median(sizes)):,} bytes (median)",
        "warm-up": f"{settings.warm_up:g} s",
        "measured": f"{settings.seconds:g} s",
        "generator processes": str(settings.processes),
    }


def report(
    command: str, told: dict[str, str], rows: Sequence[LoadResult], **more: object
) -> Report:
    """Put runs into a document with what is needed to repeat them."""
    return Report(
        schema=SCHEMA,
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=command,
        machine={
            "system": f"{platform.system()} {platform.machine()}",
            "cores": str(multiprocessing.cpu_count()),
        },
        versions={
            "crl-sdk": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("grpcio", "protobuf", "numpy")},
        },
        settings=told,
        rows=tuple(rows),
        **more,  # type: ignore[arg-type]
    )


def _shares(mode: str, load: float, count: int) -> list[float]:
    if mode == "open":
        return [load / count] * count
    whole, rest = divmod(int(load), count)
    return [whole + (i < rest) for i in range(count)]


def _generate(job: _Job) -> Run:
    """Be one generator process for one run."""
    time.sleep(max(job.starts - time.time(), 0))

    async def run() -> Run:
        options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        async with grpc.aio.insecure_channel(job.target.address, options=options) as channel:
            send = connect(job.target, channel)
            first = job.seed * 7919  # so that processes do not send the same images together

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
        why = f"a generator used {run.cpu:.0%} of its core: use more --processes"
    elif served and lag > _LATE * served[len(served) // 2]:
        why = f"the generator woke {lag * 1e3:.1f} ms late: use more --processes or other cores"
    thirds = np.histogram(run.done, bins=3, range=(0.0, run.seconds))[0]
    mean = float(thirds.mean())
    chance = 2 * mean**0.5  # counts of random arrivals differ by this much
    # in an open loop that a server cannot keep up with, answers come after the last call was due
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
