"""A load generator with a closed loop (a number of callers) and an open loop (a rate of calls).

In the open loop, calls are due at random times (Poisson arrivals) that do not depend on earlier
calls, and latency counts from the moment when a call is due. A server that stalls therefore cannot
slow the generator down and hide how long callers would have waited ("coordinated omission", a term
of Gil Tene's). The generator also measures itself: how late its event loop wakes, and how much of a
core it uses.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from itertools import takewhile

from crl_benchmarks.arrivals import Burst, arrivals

Send = Callable[[int], Awaitable["Reply"]]
"""Sends call number n and returns its outcome. It never raises."""

Kind = tuple[int, tuple[str, ...]]
"""What a call asks for: the number of its images, and its criteria."""

_TICK = 0.01
"""Seconds between two measurements of the event loop's lag."""


@dataclass(slots=True)
class Reply:
    """Outcome of a call.

    Attributes:
        outcome: `ok`, `rejected` (the server is full) or `error`.
        why: Status of a failed call.
        message: What the server says about a failed call.
        stages: Seconds that the server reports, by stage.
        cached: Share of the images that the server's cache answered; None if it does not say.
        images: Number of images of the call.
        criteria: Criteria of the call.
        sent_bytes: Size of the request in bytes; 0 if it is not known.
    """

    outcome: str
    why: str = ""
    message: str = ""
    stages: dict[str, float] = field(default_factory=dict)
    cached: float | None = None
    images: int = 1
    criteria: tuple[str, ...] = ()
    sent_bytes: int = 0


@dataclass(frozen=True, slots=True)
class EndedCall:
    """A call that has ended. Its times are those of `time.perf_counter`, in seconds.

    Attributes:
        due: When the call was due. In a closed loop, that is when it was sent.
        sent: When it was sent.
        done: When it ended.
        phase: `warm_up`; `measured` if its latency counts; or `late` if a closed loop ended
            before it.
        reply: Its outcome.
    """

    due: float
    sent: float
    done: float
    phase: str
    reply: Reply


Record = Callable[[EndedCall], None]
"""Notes a call that has ended. It never raises."""


@dataclass(slots=True)
class Run:
    """Measurements of one generator.

    Attributes:
        seconds: Measured seconds, without warm-up.
        latencies: Latencies in seconds, by outcome.
        done: End of each successful call, in seconds since the end of the warm-up. A closed loop
            counts the calls that ended in the measured seconds, including those that began before:
            without them, a slow server would lose one call per caller. An open loop counts the
            calls that were due in the measured seconds.
        done_images: Images of the calls in `done`.
        due: When each successful call whose latency counts was due, in seconds since the end of the
            warm-up and in the order of `latencies["ok"]`. In a closed loop, that is when it was
            sent.
        stages: Seconds that the server reports for successful calls, by stage.
        failures: Number of failed calls, by status.
        messages: First message of each status of failed calls.
        lags: Lateness of the event loop in seconds.
        cpu: Share of one core that the generator used.
        offered: Number of calls that were due.
        cached: Share of the images of each successful call that the server's cache answered.
        unrecorded: Why calls could not be recorded, else empty.
        kinds: Latencies of successful calls in seconds, by kind.
        offered_kinds: Number of calls that were due, by kind.
    """

    seconds: float = 0.0
    done_images: int = 0
    latencies: dict[str, list[float]] = field(default_factory=dict)
    done: list[float] = field(default_factory=list)
    due: list[float] = field(default_factory=list)
    stages: dict[str, list[float]] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    lags: list[float] = field(default_factory=list)
    cpu: float = 0.0
    offered: int = 0
    cached: list[float] = field(default_factory=list)
    unrecorded: str = ""
    kinds: dict[Kind, list[float]] = field(default_factory=dict)
    offered_kinds: dict[Kind, int] = field(default_factory=dict)

    @property
    def calls_per_second(self) -> float:
        """Successful calls per second. It counts the time up to the last answer of an open loop."""
        return len(self.done) / max(self.seconds, max(self.done, default=0.0))

    def add(self, reply: Reply, latency: float, due: float) -> None:
        """Add a call whose latency counts.

        Args:
            reply: Outcome of the call.
            latency: Latency in seconds.
            due: When it was due, in seconds since the end of the warm-up.
        """
        kind = (reply.images, reply.criteria)
        self.latencies.setdefault(reply.outcome, []).append(latency)
        self.offered_kinds[kind] = self.offered_kinds.get(kind, 0) + 1
        if reply.outcome == "ok":
            self.kinds.setdefault(kind, []).append(latency)
            self.due.append(due)
            if reply.cached is not None:
                self.cached.append(reply.cached)
            for stage, seconds in reply.stages.items():
                self.stages.setdefault(stage, []).append(seconds)
        else:
            self.failures[reply.why] = self.failures.get(reply.why, 0) + 1
            self.messages.setdefault(reply.why, reply.message)


def merge(runs: list[Run]) -> Run:
    """Combine the measurements of generators that ran at the same time."""
    whole = Run(seconds=max(run.seconds for run in runs), cpu=max(run.cpu for run in runs))
    for run in runs:
        whole.offered += run.offered
        whole.done += run.done
        whole.done_images += run.done_images
        whole.due += run.due
        whole.lags += run.lags
        whole.cached += run.cached
        whole.unrecorded = whole.unrecorded or run.unrecorded
        for outcome, latencies in run.latencies.items():
            whole.latencies.setdefault(outcome, []).extend(latencies)
        for kind, latencies in run.kinds.items():
            whole.kinds.setdefault(kind, []).extend(latencies)
        for kind, count in run.offered_kinds.items():
            whole.offered_kinds[kind] = whole.offered_kinds.get(kind, 0) + count
        for stage, seconds in run.stages.items():
            whole.stages.setdefault(stage, []).extend(seconds)
        for why, count in run.failures.items():
            whole.failures[why] = whole.failures.get(why, 0) + count
            whole.messages.setdefault(why, run.messages.get(why, ""))
    return whole


async def closed_loop(
    send: Send, *, callers: int, warm_up: float, seconds: float, record: Record | None = None
) -> Run:
    """Run callers that call again as soon as they are answered.

    Args:
        send: Function that sends a call.
        callers: Number of concurrent callers.
        warm_up: Seconds before anything counts.
        seconds: Measured seconds.
        record: Function that notes each call.
    """
    run = Run(seconds=seconds)
    begins = time.perf_counter() + warm_up
    ends = begins + seconds

    async def caller(number: int) -> None:
        while (started := time.perf_counter()) < ends:
            reply = await send(number)
            done = time.perf_counter()
            if reply.outcome == "ok" and begins <= done <= ends:
                run.done.append(done - begins)
                run.done_images += reply.images
            if begins <= started and done <= ends:
                run.offered += 1
                run.add(reply, done - started, started - begins)
            if record is not None:
                phase = "warm_up" if started < begins else "measured" if done <= ends else "late"
                record(EndedCall(started, started, done, phase, reply))
            if reply.outcome != "ok":
                await asyncio.sleep(0.001)  # do not flood a server that refuses at once
            number += callers

    async with _Watch(run, begins, ends):
        await asyncio.gather(*(caller(i) for i in range(callers)))
    return run


async def open_loop(
    send: Send,
    *,
    rate: float,
    warm_up: float,
    seconds: float,
    seed: int = 0,
    burst: Burst | None = None,
    record: Record | None = None,
) -> Run:
    """Send calls at random times that do not depend on earlier calls.

    Args:
        send: Function that sends a call.
        rate: Mean number of calls per second, between bursts if there are any.
        warm_up: Seconds before anything counts.
        seconds: Measured seconds, in which the calls that count are due.
        seed: Seed of the arrival times.
        burst: Bursts of the rate, or None.
        record: Function that notes each call.
    """
    dues = takewhile(
        lambda due: due < warm_up + seconds, arrivals(rate, seed=seed, warm_up=warm_up, burst=burst)
    )
    calls = ((due, due >= warm_up) for due in dues)
    return await timed_loop(send, calls, warm_up=warm_up, seconds=seconds, record=record)


async def timed_loop(
    send: Send,
    calls: Iterable[tuple[float, bool]],
    *,
    warm_up: float,
    seconds: float,
    record: Record | None = None,
) -> Run:
    """Send calls at given times, whether or not earlier calls were answered.

    Args:
        send: Function that sends a call.
        calls: When each call is due, in seconds since the start and in order, and whether it
            counts.
        warm_up: Seconds before the measured time.
        seconds: Measured seconds.
        record: Function that notes each call.
    """
    run = Run(seconds=seconds)
    starts = time.perf_counter()
    begins = starts + warm_up
    tasks: set[asyncio.Task[None]] = set()

    async def call(number: int, due: float, counts: bool) -> None:
        sent = time.perf_counter()
        reply = await send(number)
        done = time.perf_counter()
        if counts:
            run.offered += 1
            run.add(reply, done - due, due - begins)
            if reply.outcome == "ok":
                run.done.append(done - begins)
                run.done_images += reply.images
        if record is not None:
            record(EndedCall(due, sent, done, "measured" if counts else "warm_up", reply))

    async with _Watch(run, begins, begins + seconds):
        for number, (after, counts) in enumerate(calls):
            due = starts + after
            if (early := due - time.perf_counter()) > 0:
                await asyncio.sleep(early)
            task = asyncio.create_task(call(number, due, counts))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)
    return run


class _Watch:
    """Measures how late the event loop wakes and how much of a core the process uses."""

    def __init__(self, run: Run, begins: float, ends: float) -> None:
        self._run, self._begins, self._ends = run, begins, ends

    async def __aenter__(self) -> None:
        self._used, self._since = time.process_time(), time.perf_counter()
        self._task = asyncio.create_task(self._look())

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        elapsed = time.perf_counter() - self._since
        self._run.cpu = (time.process_time() - self._used) / max(elapsed, 1e-9)

    async def _look(self) -> None:
        await asyncio.sleep(max(self._begins - time.perf_counter(), 0))
        while (now := time.perf_counter()) < self._ends:
            await asyncio.sleep(_TICK)
            self._run.lags.append(max(time.perf_counter() - now - _TICK, 0.0))
