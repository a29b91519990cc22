"""One process against several workers at one address, in turns in one run.

`python -m crl_benchmarks.workers BUNDLE` starts `crl serve` once as one process with two threads,
and once with two workers of one thread each. In each round it measures both under closed loops of
callers that have a connection each. Ratios are taken within a round, so that a machine whose speed
drifts moves both sides.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import itertools
import multiprocessing
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil

from crl_benchmarks.images import synthetic_jpegs
from crl_benchmarks.machine import describe_commit, describe_machine
from crl_benchmarks.markdown import table
from crl_sdk.cli._local_server import local_server
from crl_sdk.pb.crl.v1 import embedding_pb2, embedding_pb2_grpc

SIZE = (640, 480)
IMAGES = 64
CALLERS = 16
WARM_UP = 1.0

CORES = (2, 8, 16, 32, 64, 128)
WORKERS = (1, 2, 4, 8)
CORE_MS = (16.9, 4.0)
"""Processor time of an image: of int8 ViT-B/32 and JPEGs of 120 KB (LOG.md), and of less work."""

EVENT_LOOP_SECONDS = 0.45e-3
"""Processor time of the event loop per image, from LOG.md."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One way to serve in one round.

    Attributes:
        per_second: Images per second.
        p50_ms: Median time of a call, in milliseconds.
        p99_ms: 99th percentile of it.
        cpu_ms: Processor time of all processes of the server per image.
        pss_mb: Memory of all processes of the server in MiB, shared pages divided among them.
    """

    per_second: float
    p50_ms: float
    p99_ms: float
    cpu_ms: float
    pss_mb: float


def measure(
    bundle: Path, engine: str, workers: int, rounds: int, seconds: float
) -> list[tuple[Measured, Measured]]:
    """Measure both ways in each round, the first one in turn.

    Args:
        bundle: Directory of a bundle.
        engine: Name of an engine.
        workers: Number of workers.
        rounds: Number of rounds.
        seconds: Duration of each measurement.
    """
    images = synthetic_jpegs(IMAGES, SIZE)
    options = ("--engine", engine, "--cache-mb", "0")
    with (
        tempfile.TemporaryDirectory() as folder,
        local_server(bundle, Path(folder) / "one.log", *options) as one,
        local_server(
            bundle, Path(folder) / "many.log", *options, "--workers", str(workers)
        ) as many,
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as generator,
    ):
        found = []
        for number in range(rounds):
            order = (one, many) if number % 2 == 0 else (many, one)
            results = {}
            for server in order:
                processes = _processes(server.pid)
                used = sum(_cpu_seconds(each) for each in processes)
                load = generator.submit(_load, server.address, images, seconds)
                times, calls = load.result()
                used = sum(_cpu_seconds(each) for each in processes) - used
                cuts = statistics.quantiles(times, n=100)
                results[server.pid] = Measured(
                    per_second=len(times) / seconds,
                    p50_ms=1e3 * cuts[49],
                    p99_ms=1e3 * cuts[98],
                    cpu_ms=1e3 * used / calls,
                    pss_mb=sum(each.memory_full_info().pss for each in processes) / 2**20,
                )
            found.append((results[one.pid], results[many.pid]))
            print(found[-1], flush=True)
        return found


def _processes(pid: int) -> list[psutil.Process]:
    parent = psutil.Process(pid)
    return [parent, *parent.children(recursive=True)]


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _load(address: str, images: Sequence[bytes], seconds: float) -> tuple[list[float], int]:
    """Call from callers with a connection each.

    Returns:
        Times of the calls that ended after the warm-up, in seconds, and the number of all calls.
    """
    return asyncio.run(_call(address, images, seconds))


async def _call(address: str, images: Sequence[bytes], seconds: float) -> tuple[list[float], int]:
    numbers = itertools.count()
    started = time.monotonic()
    times: list[float] = []
    calls = 0

    async def caller() -> None:
        nonlocal calls
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(address, options=options) as channel:
            stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)
            while (begun := time.monotonic()) < started + WARM_UP + seconds:
                data = images[next(numbers) % len(images)]
                image = embedding_pb2.Image(encoded=data)
                await stub.Embed(embedding_pb2.EmbedRequest(images=[image]))
                calls += 1
                ended = time.monotonic()
                if started + WARM_UP <= ended < started + WARM_UP + seconds:
                    times.append(ended - begun)

    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    return times, calls


def markdown(workers: int, engine: str, rounds: Sequence[tuple[Measured, Measured]]) -> str:
    """Return the results of an engine."""
    ratios = [many.per_second / one.per_second for one, many in rounds]
    rows = []
    for name, found in (
        ("one process", [one for one, _ in rounds]),
        (f"{workers} workers", [many for _, many in rounds]),
    ):
        middle = {
            field: statistics.median(getattr(each, field) for each in found)
            for field in Measured.__slots__
        }
        rows.append(
            (
                name, f"{middle['per_second']:.1f}", f"{middle['p50_ms']:.0f}",
                f"{middle['p99_ms']:.0f}", f"{middle['cpu_ms']:.1f}", f"{middle['pss_mb']:.0f}",
            )
        )  # fmt: skip
    return "\n\n".join(
        [
            f"## {engine}",
            f"{workers} workers serve {statistics.median(ratios):.3f} of the images that one "
            f"process serves (lowest and highest round {min(ratios):.3f}–{max(ratios):.3f}).",
            table(
                ("server", "images/s", "p50 of a call, ms", "p99, ms",
                 "processor time per image, ms", "memory (PSS), MiB"),
                rows,
            ),
        ]
    )  # fmt: skip


def simulate(
    cores: int, core_ms: float, workers: int, connections: int, *, seconds: float = 2.0
) -> float:
    """Return the images per second of a simulated server.

    Each connection has one image under way and belongs to one worker, drawn by chance. An image
    takes `EVENT_LOOP_SECONDS` in the event loop of the worker, one image at a time, and then the
    rest of its time on any core of the worker. The event loop needs a core as well.

    Args:
        cores: Number of cores, divided among the workers.
        core_ms: Processor time of an image, in milliseconds.
        workers: Number of workers.
        connections: Number of connections.
        seconds: Simulated time.
    """
    draw = random.Random(connections)
    spread = [draw.randrange(workers) for _ in range(connections)]
    rest = core_ms / 1e3 - EVENT_LOOP_SECONDS
    served = 0
    for worker in range(workers):
        idle = cores // workers + (worker < cores % workers)
        arrived, accepted = spread.count(worker), 0  # images before the event loop, and after it
        loop_is_free = True
        ends: list[tuple[float, bool]] = []  # when something ends, and whether in the event loop
        now = 0.0
        while now < seconds:
            while idle and (accepted or (arrived and loop_is_free)):
                idle -= 1
                if arrived and loop_is_free:
                    arrived, loop_is_free = arrived - 1, False
                    heapq.heappush(ends, (now + EVENT_LOOP_SECONDS, True))
                else:
                    accepted -= 1
                    heapq.heappush(ends, (now + rest, False))
            if not ends:
                break
            now, in_loop = heapq.heappop(ends)
            idle += 1
            if in_loop:
                accepted, loop_is_free = accepted + 1, True
            else:
                arrived += 1
                served += now < seconds
    return served / seconds


def simulated_markdown(core_ms: float) -> str:
    """Return a table of simulated servers for images of some processor time, in milliseconds."""
    rows = [
        (
            str(cores), f"{cores / core_ms * 1e3:,.0f}", f"{1 / EVENT_LOOP_SECONDS:,.0f}",
            *(
                f"{simulate(cores, core_ms, n, 16 * cores):,.0f}" if n <= cores else ""
                for n in WORKERS
            ),
        )
        for cores in CORES
    ]  # fmt: skip
    names = [f"{n} workers" if n > 1 else "1 process" for n in WORKERS]
    return "\n\n".join(
        [
            f"## Simulated: {core_ms:g} ms of processor time for an image",
            table(("cores", "cores alone would", "one event loop would", *names), rows),
        ]
    )


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--engines", default="onnx/cpu/int8")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--out", type=Path, help="path of the page to write")
    options = parser.parse_args()
    machine = describe_machine()
    parts = [
        "# One process against several workers",
        f"`make bench-workers` at {describe_commit()}, on {machine['processor']} "
        f"({machine['cores']} cores, {machine['features']}). {options.bundle.name} with random "
        f"weights; {IMAGES} synthetic JPEGs of {SIZE[0]}×{SIZE[1]}; {CALLERS} callers with a "
        f"connection each, one image in a call; medians of {options.rounds} rounds of "
        f"{options.seconds:g} s for each. One process runs its engine with all cores, each worker "
        "with its part. Servers and load generator share the cores.",
    ]
    for engine in options.engines.split(","):
        rounds = measure(options.bundle, engine, options.workers, options.rounds, options.seconds)
        load = psutil.getloadavg()[0]
        parts.append(markdown(options.workers, engine, rounds))
        parts.append(
            f"Load average of the machine at the end: {load:.1f}, of which this measurement is "
            f"about {machine['cores']}. Rates fall when other work shares the cores; processor "
            "time per image hardly changes."
        )
        print(parts[-1], flush=True)
    parts.append(
        "## How far it scales\n\nNot measured: a simulation of the two things that bound a server, "
        f"its cores and its event loops of {EVENT_LOOP_SECONDS * 1e3:g} ms per image. The images "
        "per second of 16 connections for each core, one image at a time on each, are below. "
        "Connections belong to workers by chance. It knows neither memory bandwidth nor what "
        "threads of one engine lose to each other."
    )
    parts += [simulated_markdown(core_ms) for core_ms in CORE_MS]
    if options.out:
        options.out.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
