"""A load generator: closed loop (so many callers) or open loop (so many calls a second).

In the open loop calls are due at random times (Poisson arrivals), whatever became of those before,
and latency counts from the moment a call was due: a server that stalls cannot hold the generator
back and hide what callers would have waited (coordinated omission, as Gil Tene named it). The
generator watches itself: how late its event loop wakes, and how much of a core it uses.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

Send = Callable[[int], Awaitable["Reply"]]
"""Sends the call of a number and gives what became of it; it never raises."""

_TICK = 0.01
"""Seconds between looks at how late the event loop wakes."""


@dataclass(slots=True)
class Reply:
    """What became of a call: `ok`, `rejected` (the server is full) or `error`, and why.

    Attributes:
        outcome: one of the three.
        why: the status of a call that failed.
        stages: seconds that the server says it spent, by stage.
    """

    outcome: str
    why: str = ""
    stages: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class Run:
    """What one generator measured.

    Attributes:
        seconds: measured, warm-up not counted.
        latencies: seconds, by outcome.
        done: when each call that went well was done, in seconds since the measuring began.
        stages: seconds the server spent on calls that went well, by stage.
        failures: how often each status came.
        lags: seconds that the event loop woke too late.
        cpu: share of one core that the generator used.
        offered: calls that were due.
    """

    seconds: float = 0.0
    latencies: dict[str, list[float]] = field(default_factory=dict)
    done: list[float] = field(default_factory=list)
    stages: dict[str, list[float]] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)
    lags: list[float] = field(default_factory=list)
    cpu: float = 0.0
    offered: int = 0

    def add(self, reply: Reply, latency: float, done: float) -> None:
        """Count a call."""
        self.latencies.setdefault(reply.outcome, []).append(latency)
        if reply.outcome == "ok":
            self.done.append(done)
            for stage, seconds in reply.stages.items():
                self.stages.setdefault(stage, []).append(seconds)
        else:
            self.failures[reply.why] = self.failures.get(reply.why, 0) + 1


def merge(runs: list[Run]) -> Run:
    """Add up what several generators measured at the same time."""
    whole = Run(seconds=max(run.seconds for run in runs), cpu=max(run.cpu for run in runs))
    for run in runs:
        whole.offered += run.offered
        whole.done += run.done
        whole.lags += run.lags
        for outcome, latencies in run.latencies.items():
            whole.latencies.setdefault(outcome, []).extend(latencies)
        for stage, seconds in run.stages.items():
            whole.stages.setdefault(stage, []).extend(seconds)
        for why, count in run.failures.items():
            whole.failures[why] = whole.failures.get(why, 0) + count
    return whole


async def closed_loop(send: Send, *, callers: int, warm_up: float, seconds: float) -> Run:
    """Let so many callers call again as soon as they are answered.

    Args:
        send: the calls.
        callers: at the same time.
        warm_up: seconds before anything counts.
        seconds: that count.
    """
    run = Run(seconds=seconds)
    begins = time.perf_counter() + warm_up
    ends = begins + seconds

    async def caller(number: int) -> None:
        while (started := time.perf_counter()) < ends:
            reply = await send(number)
            done = time.perf_counter()
            if begins <= started and done <= ends:
                run.offered += 1
                run.add(reply, done - started, done - begins)
            if reply.outcome != "ok":
                await asyncio.sleep(0.001)  # a server that refuses at once is not asked at once
            number += callers

    async with _Watch(run, begins, ends):
        await asyncio.gather(*(caller(i) for i in range(callers)))
    return run


async def open_loop(
    send: Send, *, rate: float, warm_up: float, seconds: float, seed: int = 0
) -> Run:
    """Send calls at random times, whatever becomes of those before.

    Args:
        send: the calls.
        rate: calls a second, on average.
        warm_up: seconds before anything counts.
        seconds: in which calls that count are due.
        seed: of the times.
    """
    run = Run(seconds=seconds)
    begins = time.perf_counter() + warm_up
    ends = begins + seconds
    arrivals = random.Random(seed)
    tasks: set[asyncio.Task[None]] = set()

    async def call(number: int, due: float) -> None:
        reply = await send(number)
        done = time.perf_counter()
        if begins <= due:
            run.offered += 1
            run.add(reply, done - due, done - begins)

    async with _Watch(run, begins, ends):
        number, due = 0, begins - warm_up
        while (due := due + arrivals.expovariate(rate)) < ends:
            if (early := due - time.perf_counter()) > 0:
                await asyncio.sleep(early)
            task = asyncio.create_task(call(number, due))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            number += 1
        await asyncio.gather(*tasks)
    return run


class _Watch:
    """Notes how late the event loop wakes and how much of a core the process uses."""

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
