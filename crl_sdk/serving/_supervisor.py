"""Several worker processes behind one address, and the process that keeps them running.

Each worker is a `crl serve` of its own, which listens at the same port with SO_REUSEPORT: the
system gives each new connection to one of them. Nothing is forked, since neither gRPC nor the
engines bear it. The supervisor answers no calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import socket
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from crl_sdk.errors import ServiceError
from crl_sdk.rpc._address import split_address
from crl_sdk.serving._metrics import serve_metrics
from crl_sdk.serving._worker import HEALTH, METRICS
from crl_sdk.serving._worker_metrics import WorkerMetrics

ASK_SECONDS = 1.0
"""Seconds between two questions to each worker."""

SICK_SECONDS = 30.0
"""Seconds after which a worker is replaced that does not serve, or does not answer."""

STEADY_SECONDS = 30.0
"""A worker that has served for this long did not die right after its start."""

MAX_DEATHS = 5
"""Deaths of a worker in a row, each right after its start, after which all workers are stopped."""

_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 10.0
_SCRAPE_SECONDS = 2.0
_LINE_BYTES = 16 << 20

_log = logging.getLogger(__name__)


class _WorkerProcess:
    """A worker that was started."""

    def __init__(self, number: int, process: Process) -> None:
        self.number = number
        self.process = process
        self.started = time.monotonic()
        self.ready: asyncio.Future[dict[str, Any] | None] = (
            asyncio.get_running_loop().create_future()
        )
        self.served = self.started  # when it served last
        self.ending: asyncio.Task[None] | None = None
        self._pages: list[asyncio.Future[str]] = []
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        """Read what the worker prints, until it has closed its stdout."""
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            with contextlib.suppress(ValueError):  # some runtimes print to stdout as well
                message = json.loads(line)
                if isinstance(message, dict):
                    self._take(message)
        if not self.ready.done():
            self.ready.set_result(None)

    def _take(self, message: dict[str, Any]) -> None:
        event = message.get("event")
        if event == "serving" and not self.ready.done():
            self.ready.set_result(message)
            self.served = time.monotonic()
        elif event == HEALTH and message.get("serving"):
            self.served = time.monotonic()
        elif event == METRICS:
            waiting, self._pages = self._pages, []
            for page in waiting:
                if not page.done():
                    page.set_result(str(message.get("page")))

    def ask(self, what: str) -> None:
        """Ask for something, see `_worker.answer_supervisor`."""
        if self.process.stdin is not None and not self.process.stdin.is_closing():
            self.process.stdin.write(f"{what}\n".encode())

    async def page(self) -> str | None:
        """Return the metrics of the worker, or None if it does not answer soon."""
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._pages.append(future)
        self.ask(METRICS)
        with contextlib.suppress(asyncio.TimeoutError):
            return await asyncio.wait_for(future, _SCRAPE_SECONDS)
        return None

    async def end(self, seconds: float) -> None:
        """Let the worker finish its calls, and kill it if it takes longer."""
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()
        try:
            await asyncio.wait_for(self.process.wait(), seconds)
        except asyncio.TimeoutError:
            _log.error("worker %d does not stop: killed", self.number)
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            await self.process.wait()


class Supervisor:
    """Starts workers, replaces those that die, and stops them."""

    def __init__(
        self,
        command: Sequence[str],
        count: int,
        *,
        environment: Callable[[int], Mapping[str, str]],
        drain_seconds: float,
    ) -> None:
        """Store how to start a worker.

        Args:
            command: Command line of a worker.
            count: Number of workers.
            environment: Function that returns the environment of the worker of a number.
            drain_seconds: Seconds that running calls may take after SIGTERM.
        """
        self._command = tuple(command)
        self._count = count
        self._environment = environment
        self._end_seconds = drain_seconds + 10
        self._stopping = False
        self._metrics = WorkerMetrics()
        self.workers: dict[int, _WorkerProcess] = {}
        self.restarts = dict.fromkeys(range(count), 0)

    async def run(
        self, on_ready: Callable[[dict[str, Any], str | None], None], metrics_address: str | None
    ) -> None:
        """Serve until SIGTERM or SIGINT, then let running calls finish.

        Args:
            on_ready: Function called when all workers serve, with the ready line of the first one
                and the actual address of the page of metrics.
            metrics_address: `host:port` of the page of metrics, or None for no page.

        Raises:
            ServiceError: If a worker cannot start, or dies again and again.
        """
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        async with AsyncExitStack() as cleanup:
            registry = CollectorRegistry()
            registry.register(_WholeCollector(self, loop))
            page = serve_metrics(registry, metrics_address, cleanup)
            cleanup.push_async_callback(self._end_all)
            stopped = asyncio.create_task(_wait_for(stop))
            starting = asyncio.create_task(self._start_all())
            await asyncio.wait({stopped, starting}, return_when=asyncio.FIRST_COMPLETED)
            if stop.is_set():
                starting.cancel()
                return
            ready = await starting
            keepers = [asyncio.create_task(self._keep(i)) for i in range(self._count)]
            keepers.append(asyncio.create_task(self._watch(with_metrics=page is not None)))
            _log.info("%d workers serve on %s", self._count, ready["address"])
            on_ready(ready, page)
            try:
                await asyncio.wait({stopped, *keepers}, return_when=asyncio.FIRST_COMPLETED)
                for task in keepers:
                    if task.done():
                        task.result()  # raises why it ended
                _log.info("draining: running calls have %.0f s", self._end_seconds - 10)
            finally:
                self._stopping = True
                for task in (*keepers, stopped):
                    task.cancel()
        _log.info("stopped")

    async def pages(self) -> list[Metric]:
        """Return the metrics of all workers."""
        workers = [each for each in self.workers.values() if each.ready.done()]
        for worker, page in zip(
            workers, await asyncio.gather(*(each.page() for each in workers)), strict=True
        ):
            if page is not None and self.workers.get(worker.number) is worker:
                self._metrics.update(worker.number, page)
        return list(self._metrics.collect())

    async def _start_all(self) -> dict[str, Any]:
        """Start all workers, the first one alone, and return its ready line.

        What is wrong with the options or the bundle is then said once.
        """
        ready = await self._start(0)
        if ready is not None:
            others = await asyncio.gather(*(self._start(i) for i in range(1, self._count)))
            if None not in others:
                return ready
        ended = next(w for w in self.workers.values() if w.process.returncode is not None)
        raise ServiceError(
            f"worker {ended.number} could not start (status {ended.process.returncode}): the log "
            "above has the reason"
        )

    async def _start(self, number: int) -> dict[str, Any] | None:
        """Start a worker; return its ready line, or None if it has ended before."""
        process = await asyncio.create_subprocess_exec(
            *self._command, stdin=PIPE, stdout=PIPE, limit=_LINE_BYTES,
            env=dict(self._environment(number)),
        )  # fmt: skip
        worker = self.workers[number] = _WorkerProcess(number, process)
        ready = await worker.ready
        if ready is None:
            await process.wait()
        return ready

    async def _keep(self, number: int) -> None:
        """Start a worker again whenever it dies.

        Raises:
            ServiceError: If it dies again and again right after its start.
        """
        deaths = 0
        while True:
            worker = self.workers[number]
            status = await worker.process.wait()
            if self._stopping:
                return
            self._metrics.retire(number)
            died_early = time.monotonic() - worker.started < STEADY_SECONDS
            deaths = deaths + 1 if died_early else 1
            if deaths >= MAX_DEATHS:
                raise ServiceError(
                    f"worker {number} died {deaths} times in a row right after its start, with "
                    f"{_describe(status)} at last: all workers are stopped; the log above has the "
                    "reason"
                )
            pause = min(_FIRST_PAUSE * 2 ** (deaths - 2), _LONGEST_PAUSE) if deaths > 1 else 0.0
            _log.error(
                "worker %d ended with %s: starting another in %.1f s", number, _describe(status),
                pause,
            )  # fmt: skip
            await asyncio.sleep(pause)
            self.restarts[number] += 1
            if await self._start(number) is not None:
                _log.info("worker %d serves again", number)

    async def _watch(self, *, with_metrics: bool) -> None:
        """Ask all workers how they are, and replace those that do not serve for long."""
        rounds = 0
        while True:
            await asyncio.sleep(ASK_SECONDS)
            rounds += 1
            if with_metrics and rounds % 5 == 0:  # so that a dead worker's counts are known
                await self.pages()
            for worker in list(self.workers.values()):
                if worker.process.returncode is not None or not worker.ready.done():
                    continue
                if worker.ending is not None:
                    continue
                worker.ask(HEALTH)
                silent = time.monotonic() - worker.served
                if silent > SICK_SECONDS:
                    _log.error("worker %d has not served for %.0f s", worker.number, silent)
                    worker.ending = asyncio.create_task(worker.end(self._end_seconds))

    async def _end_all(self) -> None:
        self._stopping = True
        running = [w for w in self.workers.values() if w.process.returncode is None]
        await asyncio.gather(*(worker.end(self._end_seconds) for worker in running))


class _WholeCollector(Collector):
    """Asks all workers for their metrics when the page is read, in a thread of the page."""

    def __init__(self, supervisor: Supervisor, loop: asyncio.AbstractEventLoop) -> None:
        self._supervisor = supervisor
        self._loop = loop

    def describe(self) -> list[Metric]:
        """Return nothing, so that registering asks no worker."""
        return []

    def collect(self) -> Iterator[Metric]:
        supervisor = self._supervisor
        pages = asyncio.run_coroutine_threadsafe(supervisor.pages(), self._loop)
        yield from pages.result(2 * _SCRAPE_SECONDS)
        up = GaugeMetricFamily("crl_worker_up", "1 while the worker serves.", labels=["worker"])
        restarts = CounterMetricFamily(
            "crl_worker_restarts", "Times that the worker was started again.", labels=["worker"]
        )
        for number, worker in sorted(supervisor.workers.items()):
            up.add_metric([str(number)], int(is_up(worker)))
            restarts.add_metric([str(number)], supervisor.restarts[number])
        yield up
        yield restarts


def is_up(worker: _WorkerProcess) -> bool:
    """Return whether a worker runs and has served a moment ago."""
    recently = time.monotonic() - worker.served < 3 * ASK_SECONDS
    return worker.process.returncode is None and worker.ready.done() and recently


def reserve_port(address: str) -> tuple[str, list[socket.socket]]:
    """Reserve a port for workers, which bind it as well.

    Args:
        address: `host:port`, with port 0 for any free port.

    Returns:
        The address with the actual port, and the sockets that hold it until they are closed.

    Raises:
        ServiceError: If the port is taken, or the system cannot share a port.
    """
    parts = split_address(address)
    if parts is None or sys.platform == "win32":
        raise ServiceError(
            f"{address}: several workers cannot share it; choose --address HOST:PORT, on Linux or "
            "macOS, or --workers 1"
        )
    host, port = parts
    held: list[socket.socket] = []
    try:
        for family, kind, protocol, _, name in socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            place = (name[0], port, *name[2:])
            if port:  # a server that shares its port would let us share it: ask without sharing
                with socket.socket(family, kind, protocol) as alone:
                    alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    alone.bind(place)
            shared = socket.socket(family, kind, protocol)
            held.append(shared)
            shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                shared.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            shared.bind(place)
            port = shared.getsockname()[1]
    except OSError as error:
        for each in held:
            each.close()
        raise ServiceError(
            f"{address}: cannot listen there ({error.strerror or error}); choose another address "
            "with --address"
        ) from error
    return f"{address.rpartition(':')[0]}:{port}", held


async def _wait_for(event: asyncio.Event) -> None:
    await event.wait()


def _describe(status: int) -> str:
    """Return how a process ended, in words."""
    if status >= 0:
        return f"status {status}"
    try:
        return f"signal {signal.Signals(-status).name}"
    except ValueError:
        return f"signal {-status}"
