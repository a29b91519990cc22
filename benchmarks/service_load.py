"""What the service does for minutes at 80 % of what it can (soak), or at ten times that (overload).

`python -m crl_benchmarks.service_load overload` and `… soak` start `crl serve` as a process of its
own, find its capacity with a closed loop, then send calls at random times (Poisson arrivals) that
do not wait for answers. Latency counts from the moment a call was due, so that a generator that
lags is seen in the figures, and its own lag is reported. The engine has one thread, so that the
generator has a core on a machine of two. Served rows are compared with the embedder's. The server's
memory is read from /proc, what it computed from its metrics. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import random
import re
import tempfile
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from crl_benchmarks.service_overhead import CRITERION, TEXTS, new_picture
from crl_sdk import Client, Embedder, __version__, demo_bundle, wire
from crl_sdk.cli.local_server import local_server
from crl_sdk.pb.crl.v1 import embedding_pb2, embedding_pb2_grpc
from crl_sdk.preprocess import load_pixels

IMAGES = 16
"""Images of one call: on two cores the generator must not be what is measured."""
POOL = 32
"""Different calls; the server's cache is off."""


@dataclass(slots=True)
class Calls:
    """What became of calls: seconds since each was due, by outcome; lag of the generator."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    lags: list[float] = field(default_factory=list)
    wrong: int = 0

    def add(self, outcome: str, seconds: float) -> None:
        """Count a call."""
        self.seconds.setdefault(outcome, []).append(seconds)

    def summary(self, duration: float) -> dict[str, Any]:
        """Tell counts, rates and percentiles."""
        counts = Counter({outcome: len(times) for outcome, times in self.seconds.items()})
        told: dict[str, Any] = {
            "offered_calls": counts.total(),
            "offered_per_second": round(counts.total() / duration, 1),
            "wrong_rows": self.wrong,
            "generator_lag_p99_ms": _ms(self.lags, 99),
        }
        for outcome, times in sorted(self.seconds.items()):
            told[f"{outcome}_calls"] = len(times)
            told[f"{outcome}_p50_ms"] = _ms(times, 50)
            told[f"{outcome}_p99_ms"] = _ms(times, 99)
        return told


class Load:
    """A server's calls, ready to be sent, with the rows that they must give."""

    def __init__(self, address: str, deadline: float) -> None:
        """Render and embed the pictures of all calls."""
        self.address, self.deadline = address, deadline
        self.requests: list[embedding_pb2.EmbedRequest] = []
        self.rows: list[np.ndarray] = []
        with Embedder.open(demo_bundle()) as embedder:
            spec = embedder.bundle.preprocess
            for call in range(POOL):
                files = [new_picture(call * IMAGES + i, 96) for i in range(IMAGES)]
                images = [embedding_pb2.Image(encoded=data) for data in files]
                self.requests.append(
                    embedding_pb2.EmbedRequest(images=images, criteria=[CRITERION])
                )
                pixels = np.stack([load_pixels(data, spec) for data in files])
                self.rows.append(embedder.embed_pixels(pixels))

    async def call(self, stub: Any, number: int, due: float, calls: Calls) -> None:
        """Send a call and count what becomes of it."""
        request = self.requests[number % POOL]
        try:
            reply = await stub.Embed(request, timeout=self.deadline)
        except grpc.aio.AioRpcError as error:
            calls.add(error.code().name.lower(), time.monotonic() - due)
            return
        calls.add("served", time.monotonic() - due)
        expected = self.rows[number % POOL]
        calls.wrong += bool(np.abs(wire.decode(reply.universal) - expected).max() > 1e-5)

    async def closed(self, callers: int, seconds: float) -> float:
        """Let some callers call again and again; give calls per second."""
        calls = Calls()
        async with grpc.aio.insecure_channel(self.address) as channel:
            stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)
            ends = time.monotonic() + seconds

            async def caller(number: int) -> None:
                while time.monotonic() < ends:
                    await self.call(stub, number, time.monotonic(), calls)
                    number += callers

            await asyncio.gather(*(caller(i) for i in range(callers)))
        assert not calls.wrong, "wrong rows"
        return len(calls.seconds.get("served", [])) / seconds

    async def open(self, rate: float, seconds: float) -> Calls:
        """Send calls at random times, `rate` a second, whatever becomes of those before."""
        calls, tasks = Calls(), set()
        times = random.Random(0)
        async with grpc.aio.insecure_channel(self.address) as channel:
            stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)
            due = started = time.monotonic()
            number = 0
            while due - started < seconds:
                await asyncio.sleep(max(due - time.monotonic(), 0))
                calls.lags.append(time.monotonic() - due)
                task = asyncio.create_task(self.call(stub, number, due, calls))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                due += times.expovariate(rate)
                number += 1
            await asyncio.gather(*tasks)
        return calls


async def watch_memory(pid: int, samples: list[tuple[float, float]]) -> None:
    """Note the server's resident memory twice a second, as (seconds, MB), until cancelled."""
    started = time.monotonic()
    while True:
        samples.append((time.monotonic() - started, _status_mb(pid, "VmRSS")))
        await asyncio.sleep(0.5)


async def measure(
    mode: str, load: Load, pid: int, page: str, *, seconds: float, probe_seconds: float
) -> dict[str, Any]:
    """Find the capacity, put the load on, and see whether the server is what it was."""
    capacity = await load.closed(callers=4, seconds=probe_seconds)
    before = _embedded(page)
    samples: list[tuple[float, float]] = []
    watcher = asyncio.create_task(watch_memory(pid, samples))
    rate = capacity * (0.8 if mode == "soak" else 10)
    calls = await load.open(rate, seconds)
    watcher.cancel()
    computed = _embedded(page) - before
    served = len(calls.seconds.get("served", [])) * IMAGES
    after = await load.closed(callers=4, seconds=probe_seconds)
    times, memory = np.array(samples).T
    half = len(times) // 2
    grown = (memory[-1] - memory[half]) / max(times[-1] - times[half], 1) * 60
    return {
        "mode": mode,
        "seconds": seconds,
        "images_per_call": IMAGES,
        "deadline_ms": load.deadline * 1e3,
        "capacity_calls_per_second": round(capacity, 1),
        **calls.summary(seconds),
        "images_served": served,
        "images_computed": computed,
        "rss_start_mb": round(float(memory[0]), 1),
        "rss_middle_mb": round(float(memory[half]), 1),
        "rss_end_mb": round(float(memory[-1]), 1),
        "rss_peak_mb": round(_status_mb(pid, "VmHWM"), 1),
        "rss_growth_second_half_mb_per_minute": round(float(grown), 3),
        "capacity_after_calls_per_second": round(after, 1),
    }


def run(
    mode: str, seconds: float, deadline: float, max_queue: int, probe_seconds: float = 8.0
) -> dict[str, Any]:
    """Start a server, put the load on and give the figures."""
    with (
        tempfile.TemporaryDirectory() as folder,
        local_server(
            demo_bundle(), Path(folder) / "serve.log", "--cache-mb", "0",
            "--max-queue", str(max_queue), "--metrics", "127.0.0.1:0", "--threads", "1",
        ) as server,
    ):  # fmt: skip
        with Client(server.address) as client:
            client.create_basis(CRITERION, TEXTS)
        load = Load(server.address, deadline)
        page = f"http://{server.metrics}/metrics"
        return asyncio.run(
            measure(mode, load, server.pid, page, seconds=seconds, probe_seconds=probe_seconds)
        )


def _embedded(page: str) -> int:
    """Read how many images have gone through the engine."""
    with urllib.request.urlopen(page) as answer:
        text = answer.read().decode()
    found = re.search(r"^crl_batch_size_sum ([0-9.e+]+)", text, re.MULTILINE)
    return round(float(found[1])) if found else 0


def _status_mb(pid: int, name: str) -> float:
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    found = re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)
    assert found, status
    return int(found[1]) / 1024


def _ms(values: list[float], percentile: float) -> float:
    return round(float(np.percentile(values, percentile)) * 1e3, 2)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mode", choices=["soak", "overload"])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--deadline", type=float, default=1.0, help="of a call, in seconds")
    parser.add_argument("--max-queue", type=int, default=128)
    arguments = parser.parse_args()
    result = run(arguments.mode, arguments.seconds, arguments.deadline, arguments.max_queue)
    for name, value in result.items():
        print(f"{name:36} {value}")
    versions = {"crl_sdk": __version__, "grpc": grpc.__version__, "machine": platform.machine()}
    print(json.dumps(result | versions))


if __name__ == "__main__":
    main()
