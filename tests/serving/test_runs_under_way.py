"""The batcher with an engine that takes a second run while the first one is under way."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

from crl_sdk.errors import EngineError
from crl_sdk.serving._admission import Admission
from crl_sdk.serving._batcher import Batcher

PROBE = np.zeros((1, 2, 2, 3), np.uint8)


class Runs:
    """An engine whose runs end when a test says so. It notes what happens, in order."""

    def __init__(self):
        self.events: list[str] = []
        self.gates: list[threading.Event] = []
        self.fails: set[int] = set()

    def start(self, pixels):
        number, gate = len(self.gates), threading.Event()
        self.gates.append(gate)
        self.events.append(f"start {number}: {len(pixels)}")
        if -number in self.fails:
            raise EngineError(f"run {number} does not start")

        def finish():
            gate.wait(30)
            self.events.append(f"finish {number}")
            if number in self.fails:
                raise EngineError(f"run {number} failed")
            return pixels[:, 0, 0, :1].astype(np.float32)

        return finish


@pytest.fixture
def runs():
    return Runs()


def served(runs, work, runs_at_once=2):
    """Run a test with a started batcher, whose batches hold at most four images."""

    async def main():
        batcher = Batcher(
            runs.start, PROBE, drop=Admission(256, 1024, queued=lambda: 0).drop, max_batch=4,
            runs_at_once=runs_at_once,
        )  # fmt: skip
        batcher.start(asyncio.get_running_loop())

        def submit(count, first=0):
            images = [np.full((2, 2, 3), first + i, np.uint8) for i in range(count)]
            return batcher.submit(images, deadline=None, client="")

        try:
            await asyncio.wait_for(work(batcher, submit), 60)
        finally:
            for gate in runs.gates:
                gate.set()
            await asyncio.to_thread(batcher.stop)

    asyncio.run(main())


async def until(condition):
    while not condition():
        await asyncio.sleep(0.005)


def test_a_full_batch_starts_while_the_last_one_is_under_way(runs):
    async def work(batcher, submit):
        one = submit(1)
        await until(lambda: len(runs.gates) == 1)
        few = submit(3, first=1)  # not a full batch: it waits for more
        await asyncio.sleep(0.05)
        assert len(runs.gates) == 1
        more = submit(6, first=4)
        runs.gates[0].set()
        await asyncio.gather(*one)
        await until(lambda: len(runs.gates) == 3)  # the second and the third, both under way
        assert runs.events == ["start 0: 1", "finish 0", "start 1: 4", "start 2: 4"]
        assert batcher.running_seconds > 0 and batcher.depth == 1
        runs.gates[2].set()  # results come in the order of the runs
        await asyncio.sleep(0.05)
        assert "finish 2" not in runs.events
        runs.gates[1].set()
        await until(lambda: len(runs.gates) == 4)
        runs.gates[3].set()
        rows = await asyncio.gather(*few, *more)
        assert [row.row[0] for row in rows] == list(range(1, 10))
        assert [row.batch_size for row in rows] == [4] * 8 + [1]

    served(runs, work)
    assert runs.events[-1] == "finish 3"


def test_an_engine_that_takes_one_run_gets_one(runs):
    async def work(batcher, submit):
        images = submit(12)
        await until(lambda: len(runs.gates) == 1)
        await asyncio.sleep(0.05)
        assert len(runs.gates) == 1
        for number in range(3):
            await until(lambda n=number: len(runs.gates) > n)
            runs.gates[number].set()
        await asyncio.gather(*images)

    served(runs, work, runs_at_once=1)
    assert runs.events == [f"{what} {n}{': 4' * (what == 'start')}"
                           for n in range(3) for what in ("start", "finish")]  # fmt: skip


@pytest.mark.parametrize("where", ["start", "finish"])
def test_a_failed_run_fails_its_own_images(runs, where):
    """The other run under way is delivered; then the engine must run on the probe."""

    async def work(batcher, submit):
        runs.fails = {1 if where == "finish" else -1}
        images = submit(8)
        await until(lambda: len(runs.gates) == 2)
        runs.gates[0].set()
        runs.gates[1].set()
        results = await asyncio.gather(*images, return_exceptions=True)
        assert [isinstance(each, EngineError) for each in results] == [False] * 4 + [True] * 4
        await until(lambda: len(runs.gates) == 3)  # the probe
        runs.gates[2].set()
        await until(lambda: batcher.failed is None)
        last = submit(1)
        await until(lambda: len(runs.gates) == 4)
        runs.gates[3].set()
        await asyncio.gather(*last)

    served(runs, work)
    assert "start 2: 1" in runs.events


def test_a_stop_finishes_what_is_under_way_and_what_waits(runs):
    async def work(batcher, submit):
        images = submit(9)
        await until(lambda: len(runs.gates) == 2)
        stopping = asyncio.create_task(asyncio.to_thread(batcher.stop))
        for number in range(3):
            await until(lambda n=number: len(runs.gates) > n)
            runs.gates[number].set()
        await stopping
        await asyncio.gather(*images)

    served(runs, work)
