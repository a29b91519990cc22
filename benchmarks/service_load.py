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
import re
import tempfile
import time
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from crl_benchmarks.load import Reply, Run, closed_loop, open_loop
from crl_benchmarks.service_overhead import CRITERION, TEXTS, new_picture
from crl_benchmarks.targets import failed
from crl_sdk import Client, Embedder, __version__, demo_bundle
from crl_sdk.cli._local_server import local_server
from crl_sdk.model._preprocess import load_pixels
from crl_sdk.pb.crl.v1 import embedding_pb2, embedding_pb2_grpc
from crl_sdk.rpc import decode_tensor

IMAGES = 16
"""Images of one call: on two cores the generator must not be what is measured."""
POOL = 32
"""Different calls; the server's cache is off."""


def summary(run: Run) -> dict[str, Any]:
    """Tell counts, rates and percentiles of what was served, rejected and failed."""
    told: dict[str, Any] = {
        "offered_calls": run.offered,
        "offered_per_second": round(run.offered / run.seconds, 1),
        "failures": run.failures,
        "generator_lag_p99_ms": _ms(run.lags, 99),
    }
    for outcome, times in sorted(run.latencies.items()):
        name = "served" if outcome == "ok" else outcome
        told[f"{name}_calls"] = len(times)
        told[f"{name}_p50_ms"] = _ms(times, 50)
        told[f"{name}_p99_ms"] = _ms(times, 99)
    return told


class Load:
    """A server's calls, ready to be sent, with the rows that they must give."""

    def __init__(self, address: str, deadline: float) -> None:
        """Render and embed the pictures of all calls."""
        self.address, self.deadline = address, deadline
        self.wrong = 0
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

    async def call(self, stub: Any, number: int) -> Reply:
        """Send a call and compare what it gives."""
        try:
            reply = await stub.Embed(self.requests[number % POOL], timeout=self.deadline)
        except grpc.aio.AioRpcError as error:
            return failed(error)
        expected = self.rows[number % POOL]
        self.wrong += bool(np.abs(decode_tensor(reply.universal) - expected).max() > 1e-5)
        return Reply("ok")

    async def closed(self, callers: int, seconds: float) -> float:
        """Let some callers call again and again; give calls per second."""
        async with grpc.aio.insecure_channel(self.address) as channel:
            stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)
            send = partial(self.call, stub)
            run = await closed_loop(send, callers=callers, warm_up=0, seconds=seconds)
        assert not self.wrong, "wrong rows"
        return len(run.latencies.get("ok", [])) / seconds

    async def open(self, rate: float, seconds: float) -> Run:
        """Send calls at random times, `rate` a second, whatever becomes of those before."""
        async with grpc.aio.insecure_channel(self.address) as channel:
            stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)
            return await open_loop(partial(self.call, stub), rate=rate, warm_up=0, seconds=seconds)


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
    run = await load.open(rate, seconds)
    watcher.cancel()
    computed = _embedded(page) - before
    served = len(run.latencies.get("ok", [])) * IMAGES
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
        **summary(run),
        "wrong_rows": load.wrong,
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
