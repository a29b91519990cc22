"""The four scenarios of MLPerf Inference against a server, driven by MLPerf's own LoadGen.

LoadGen (package `mlcommons-loadgen`) decides when each query is sent, measures it and gives the
verdict. This module sends the queries with the same calls as `crl bench`, and reads LoadGen's
summary. LoadGen runs in a process of its own, because nothing can stop it once it waits for
answers. Its interface cannot say that a query failed. A run therefore ends at its first failed
call, and has no figures.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import secrets
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from crl_benchmarks.bench_report import LoadResult, find_figure
from crl_benchmarks.load import Reply
from crl_benchmarks.mlperf_report import ScenarioResult, read_summary
from crl_benchmarks.targets import Target, connect, open_target
from crl_sdk.errors import InvalidInputError, ServiceError

SCENARIOS = {
    "single-stream": "SingleStream",
    "multi-stream": "MultiStream",
    "server": "Server",
    "offline": "Offline",
}
"""LoadGen's names of the scenarios, by the names of `--mlperf`."""


_STREAMS = 8
"""Images of a query of MultiStream, which MLPerf's rules fix."""

_PROBE_CALLERS = 8

_PROBE_CALLS = 20
"""Calls from which a probe is good enough."""

_PROBE_SECONDS = (1.0, 4.0, 16.0)
"""Durations of the probe; a longer one follows if there were too few calls."""

_SHARE = 0.7
"""Queries per second of Server without --rate, as a share of what the probe's callers got."""

_MEDIANS = 10.0
"""Latency bound of Server without --slo, in medians of one caller."""

_PREPARED = 4.0
"""LoadGen prepares its queries before a run. It ends without enough if the server is faster than
expected by more than twice this factor."""

_OFFLINE_PREPARED = 1.3
"""The same for Offline, which is one query and sends all that was prepared. LoadGen adds 10 %."""

_BUSY = 0.9
"""Share of a core from which the client may be what limits a run."""

_EXIT_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MlperfSettings:
    """Settings of all scenarios.

    Attributes:
        seconds: Least duration of a scenario in seconds.
        rate: Queries per second of Server.
        percent: Percentile of Server's latency bound, such as 99.
        bound_ms: Server's latency bound in milliseconds.
        batch: Images per call of Offline.
        callers: Calls of Offline that are under way at once.
        one_caller_ms: Expected latency of one image in milliseconds.
        images_per_second: Expected images per second of several callers.
        offline_images_per_second: Expected images per second of Offline.
    """

    seconds: float
    rate: float
    percent: float
    bound_ms: float
    batch: int
    callers: int
    one_caller_ms: float
    images_per_second: float
    offline_images_per_second: float


@dataclass(frozen=True, slots=True)
class Probe:
    """What a short closed loop has shown.

    Attributes:
        median_ms: Median latency of one caller with one image, in milliseconds.
        images_per_second: Images per second of several callers with one image.
        offline_images_per_second: Images per second of calls as Offline makes them.
    """

    median_ms: float
    images_per_second: float
    offline_images_per_second: float


@dataclass(frozen=True, slots=True)
class _Job:
    """Work of the process of one scenario.

    Attributes:
        target: Server and calls.
        scenario: LoadGen's name of the scenario.
        settings: Settings of the run.
        directory: Directory of LoadGen's logs.
    """

    target: Target
    scenario: str
    settings: MlperfSettings
    directory: Path


def parse_scenarios(text: str) -> list[str]:
    """Parse the value of `--mlperf`.

    Args:
        text: Names of scenarios, comma-separated, or `all`.

    Returns:
        LoadGen's names, in the order given and each once.

    Raises:
        InvalidInputError: If a name is not known, or there is none.

    Example:
        >>> parse_scenarios("server,offline")
        ['Server', 'Offline']
    """
    names = [part.strip() for part in text.split(",") if part.strip()]
    if names == ["all"]:
        return list(SCENARIOS.values())
    if not names or not SCENARIOS.keys() >= set(names):
        raise InvalidInputError(
            f"--mlperf: expected `all`, or some of {','.join(SCENARIOS)}; got {text!r}"
        )
    return [SCENARIOS[name] for name in dict.fromkeys(names)]


def probe(measure: Callable[[float, int, int], LoadResult], *, batch: int, callers: int) -> Probe:
    """Find out about how fast a server is, with one caller and with several.

    Args:
        measure: Function that runs a closed loop for so many seconds, with so many callers that
            send so many images at a time.
        batch: Images per call of Offline.
        callers: Calls of Offline that are under way at once.

    Raises:
        ServiceError: If a call failed, or none ended.
    """
    one, several, offline = (
        _probe(measure, *each) for each in ((1, 1), (_PROBE_CALLERS, 1), (callers, batch))
    )
    return Probe(
        find_figure(one.latency, 50.0).latency_ms or 0.0,
        several.images_per_second,
        offline.images_per_second,
    )


def _probe(
    measure: Callable[[float, int, int], LoadResult], callers: int, batch: int
) -> LoadResult:
    for seconds in _PROBE_SECONDS:
        row = measure(seconds, callers, batch)
        if row.served_calls >= _PROBE_CALLS:
            break
    failed = row.offered_calls - row.served_calls
    if failed or not row.served_calls:
        what = "; ".join(f"{name}: {text}" for name, text in row.messages.items()) or row.why
        raise ServiceError(
            f"the probe before the scenarios: {failed:,} of {row.offered_calls:,} calls of "
            f"{row.name} failed ({what})"
        )
    return row


def choose_settings(
    found: Probe,
    *,
    seconds: float,
    rate: float | None,
    bound: tuple[float, float] | None,
    batch: int,
    callers: int,
) -> MlperfSettings:
    """Return the settings of all scenarios.

    Args:
        found: Result of the probe, from which follows what was not given.
        seconds: Least duration of a scenario in seconds.
        rate: Queries per second of Server; None for 70 % of what the callers of the probe got.
        bound: Percentile and latency bound in milliseconds of Server; None for the 99th percentile
            and ten times the median of one caller.
        batch: Images per call of Offline.
        callers: Calls of Offline that are under way at once.
    """
    percent, bound_ms = bound or (99.0, _MEDIANS * found.median_ms)
    return MlperfSettings(
        seconds=seconds,
        rate=rate or _SHARE * found.images_per_second,
        percent=percent,
        bound_ms=bound_ms,
        batch=batch,
        callers=callers,
        one_caller_ms=found.median_ms,
        images_per_second=found.images_per_second,
        offline_images_per_second=found.offline_images_per_second,
    )


def run_scenario(
    target: Target, scenario: str, settings: MlperfSettings, directory: Path
) -> ScenarioResult:
    """Run a scenario to its end, or to its first failed call.

    Args:
        target: Server and calls; `batch` of it has no effect.
        scenario: LoadGen's name of the scenario.
        settings: Settings of the run.
        directory: Existing directory for LoadGen's logs. Those of an earlier run are removed.

    Raises:
        ServiceError: If the process of LoadGen ended before the run did.
        InvalidInputError: If LoadGen's logs cannot be read.
    """
    for log in directory.glob("mlperf_log_*"):
        log.unlink()
    context = multiprocessing.get_context("spawn")  # gRPC does not survive a fork
    receiving, sending = context.Pipe(duplex=False)
    job = _Job(target, scenario, settings, directory)
    child = context.Process(target=_run, args=(job, sending), name=f"loadgen-{scenario}")
    child.start()
    sending.close()
    try:
        told = receiving.recv()
        child.join(_EXIT_SECONDS)
    except EOFError as error:
        child.join(_EXIT_SECONDS)
        raise ServiceError(
            f"{scenario}: the process of LoadGen ended with status {child.exitcode}; its messages "
            f"are above, its logs in {directory}"
        ) from error
    finally:
        child.kill()
        child.join()
        receiving.close()
    if told["failure"]:
        return ScenarioResult(
            scenario=scenario, verdict="INVALID", reasons=(told["failure"],), ended=False,
            answered_images=told["answered"], figures={}, client_cpu_share=None,
            remarks=(), logs=str(directory),
        )  # fmt: skip
    summary = read_summary(directory)
    busy = told["cpu"]
    remarks = list(summary.remarks)
    if busy > _BUSY:
        remarks.append(f"the client used {busy:.0%} of a core, so that it may be what limits this")
    return ScenarioResult(
        scenario=scenario, verdict="VALID" if summary.valid else "INVALID",
        reasons=summary.reasons, ended=True, answered_images=told["answered"],
        figures=summary.figures, client_cpu_share=float(f"{busy:.3g}"), remarks=tuple(remarks),
        logs=str(directory),
    )  # fmt: skip


def _run(job: _Job, connection: Connection) -> None:
    """Run a scenario in this process and send what became of it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    os.dup2(2, 1)  # the parent's stdout is for its results
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    import mlperf_loadgen as loadgen

    answered = 0

    def fail(reply: Reply) -> NoReturn:
        message = reply.message or "the server says no more"
        failure = f"a call failed with {reply.why} ({message})"
        with suppress(OSError):  # a parent that is gone
            connection.send({"failure": failure, "answered": answered})
        os._exit(1)  # LoadGen would wait for ever

    def answer(numbers: list[int]) -> None:
        nonlocal answered
        answered += len(numbers)
        loadgen.QuerySamplesComplete(
            [loadgen.QuerySampleResponse(number, 0, 0) for number in numbers]
        )

    calls = _Calls(job, answer, fail)
    # LoadGen takes up to eight images in a row, and its list has no more than this
    samples = len(job.target.images) * -(-_STREAMS // len(job.target.images))
    sut = loadgen.ConstructSUT(calls.issue, lambda: None)
    library = loadgen.ConstructQSL(samples, samples, lambda _: None, lambda _: None)
    log = loadgen.LogSettings()
    log.log_output.outdir = str(job.directory)
    log.enable_trace = False
    # the name of a file that does not exist: LoadGen would read `audit.config` of this directory
    no_audit = str(job.directory / "no-audit.config")
    calls.start()
    started = time.perf_counter()
    loadgen.StartTestWithLogSettings(sut, library, _test_settings(loadgen, job), log, no_audit)
    cpu = calls.stop() / max(time.perf_counter() - started, 1e-9)
    loadgen.DestroyQSL(library)
    loadgen.DestroySUT(sut)
    connection.send({"failure": "", "answered": answered, "cpu": cpu})


def _end_with_the_parent() -> None:
    """End this process, which LoadGen would keep, when the one that started it is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _test_settings(loadgen: Any, job: _Job) -> Any:
    settings, test = job.settings, loadgen.TestSettings()
    test.scenario = getattr(loadgen.TestScenario, job.scenario)
    test.mode = loadgen.TestMode.PerformanceOnly
    test.min_duration_ms = round(settings.seconds * 1e3)
    test.single_stream_expected_latency_ns = _nanoseconds(settings.one_caller_ms / _PREPARED)
    several_ms = 1e3 * _STREAMS / settings.images_per_second
    test.multi_stream_expected_latency_ns = _nanoseconds(several_ms / _PREPARED)
    test.multi_stream_samples_per_query = _STREAMS
    test.server_target_qps = settings.rate
    test.server_target_latency_ns = _nanoseconds(settings.bound_ms)
    test.server_target_latency_percentile = settings.percent / 100
    test.offline_expected_qps = settings.offline_images_per_second * _OFFLINE_PREPARED
    return test


def _nanoseconds(milliseconds: float) -> int:
    return max(1, round(milliseconds * 1e6))


class _Calls:
    """Sends LoadGen's queries from an event loop in a thread of its own."""

    def __init__(
        self,
        job: _Job,
        answer: Callable[[list[int]], None],
        fail: Callable[[Reply], NoReturn],
    ) -> None:
        """Prepare the calls of a scenario.

        Args:
            job: Server, scenario and settings.
            answer: Function that is called with LoadGen's numbers of the images of a call that was
                answered.
            fail: Function that is called with the outcome of a failed call and ends the process.
        """
        self._target, self._answer, self._fail = job.target, answer, fail
        offline = job.scenario == "Offline"
        self._batch = job.settings.batch if offline else _STREAMS
        self._slots = asyncio.Semaphore(job.settings.callers) if offline else None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="calls", daemon=True)
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Start the thread and open the channel."""
        self._thread.start()
        self._wait(self._open())

    def stop(self) -> float:
        """Close the channel and end the thread; return the seconds of processor time it used."""
        used: float = self._wait(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        return used

    def issue(self, samples: Iterable[Any]) -> None:
        """Send a query. LoadGen calls this from a thread of its own."""
        numbers = [(each.id, each.index) for each in samples]
        self._loop.call_soon_threadsafe(self._send, numbers)

    def _wait(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _open(self) -> None:
        self._channel = open_target(self._target)
        self._since = time.thread_time()

    async def _close(self) -> float:
        used = time.thread_time() - self._since
        await self._channel.close()
        return used

    def _send(self, numbers: list[tuple[int, int]]) -> None:
        for first in range(0, len(numbers), self._batch):
            task = self._loop.create_task(self._call(numbers[first : first + self._batch]))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _call(self, samples: list[tuple[int, int]]) -> None:
        try:
            if self._slots is None:
                reply = await self._ask(samples)
            else:
                async with self._slots:
                    reply = await self._ask(samples)
        except Exception as error:  # LoadGen would wait for an answer for ever
            reply = Reply("error", type(error).__name__, str(error))
        if reply.outcome != "ok":
            self._fail(reply)
        self._answer([number for number, _ in samples])

    def _ask(self, samples: list[tuple[int, int]]) -> Awaitable[Reply]:
        """Send the images of a call. Images that shall differ get a new mark in each call."""
        images = self._target.images
        chosen = [images[index % len(images)] for _, index in samples]
        call = replace(self._target, images=chosen, batch=len(chosen), mark=secrets.token_bytes(8))
        return connect(call, self._channel)(0)
