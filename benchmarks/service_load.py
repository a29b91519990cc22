"""Behaviour of the server over minutes at 80 % of its capacity (soak) or ten times it (overload).

Run `python -m crl_benchmarks.service_load overload`, or the same with `soak`. The benchmark starts
`crl serve` as a separate process and measures its capacity with a closed loop. Then it sends calls
at random times (Poisson arrivals), whether or not earlier calls have been answered. Latency counts
from the time at which a call was due. A generator that lags therefore shows in the figures, and its
own lag is reported as well. The engine has one thread, so that on a machine with two cores the
generator has one of them. Rows in replies are compared with the embedder's. The number of computed
images comes from the server's metrics. The last line of output is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import tempfile
import time
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
from prometheus_client.parser import text_string_to_metric_families

from crl_benchmarks.load import Reply, Run, closed_loop, open_loop
from crl_benchmarks.service_overhead import CRITERION, TEXTS, new_image
from crl_benchmarks.targets import failed
from crl_sdk import Client, Embedder, __version__, demo_bundle
from crl_sdk.cli._local_server import local_server
from crl_sdk.model._preprocess import load_pixels
from crl_sdk.pb.crl.v1 import embedding_pb2, embedding_pb2_grpc
from crl_sdk.rpc import decode_tensor

IMAGES = 16
"""Images of one call; enough that the server, not the generator, is the bottleneck."""
POOL = 32
"""Number of different calls. The server's cache is off."""


def summary(run: Run) -> dict[str, Any]:
    """Return counts, rates and percentiles of served, rejected and failed calls."""
    figures: dict[str, Any] = {
        "offered_calls": run.offered,
        "offered_per_second": round(run.offered / run.seconds, 1),
        "failures": run.failures,
        "generator_lag_p99_ms": _ms(run.lags, 99),
    }
    for outcome, times in sorted(run.latencies.items()):
        name = "served" if outcome == "ok" else outcome
        figures[f"{name}_calls"] = len(times)
        figures[f"{name}_p50_ms"] = _ms(times, 50)
        figures[f"{name}_p99_ms"] = _ms(times, 99)
    return figures


class Load:
    """Prepared calls of a server, with the rows that their replies must hold."""

    def __init__(self, address: str, deadline: float) -> None:
        """Render and embed the images of all calls.

        Args:
            address: Address of the server.
            deadline: Deadline of a call, in seconds.
        """
        self.address, self.deadline = address, deadline
        self.wrong = 0
        self.requests: list[embedding_pb2.EmbedRequest] = []
        self.rows: list[np.ndarray] = []
        with Embedder.open(demo_bundle()) as embedder:
            spec = embedder.bundle.preprocess
            for call in range(POOL):
                files = [new_image(call * IMAGES + i, 96) for i in range(IMAGES)]
                images = [embedding_pb2.Image(encoded=data) for data in files]
                self.requests.append(
                    embedding_pb2.EmbedRequest(images=images, criteria=[CRITERION])
                )
                pixels = np.stack([load_pixels(data, spec) for data in files])
                self.rows.append(embedder.embed_pixels(pixels))

    async def call(self, stub: Any, number: int) -> Reply:
        """Send a call, and count it in `wrong` if its rows are not as expected."""
        try:
            reply = await stub.Embed(self.requests[number % POOL], timeout=self.deadline)
        except grpc.aio.AioRpcError as error:
            return failed(error)
        expected = self.rows[number % POOL]
        self.wrong += bool(np.abs(decode_tensor(reply.universal) - expected).max() > 1e-5)
        return Reply("ok")

    async def closed(self, callers: int, seconds: float) -> float:
        """Run a number of callers in a closed loop; return calls per second."""
        async with grpc.aio.insecure_channel(self.address) as channel:
            stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)
            send = partial(self.call, stub)
            run = await closed_loop(send, callers=callers, warm_up=1, seconds=seconds)
        assert not self.wrong, "wrong rows"
        return run.calls_per_second

    async def open(self, rate: float, seconds: float) -> Run:
        """Send calls at random times, `rate` per second on average."""
        async with grpc.aio.insecure_channel(self.address) as channel:
            stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)
            return await open_loop(partial(self.call, stub), rate=rate, warm_up=0, seconds=seconds)


async def watch_memory(pid: int, samples: list[tuple[float, float]]) -> None:
    """Append (seconds, resident memory of the server in MiB) ten times a second."""
    started = time.monotonic()
    process = psutil.Process(pid)
    while True:
        samples.append((time.monotonic() - started, process.memory_info().rss / 2**20))
        await asyncio.sleep(0.1)


async def measure(
    mode: str, load: Load, pid: int, page: str, *, seconds: float, probe_seconds: float
) -> dict[str, Any]:
    """Measure the capacity, apply the load, and measure the capacity again."""
    capacity = await load.closed(callers=4, seconds=probe_seconds)
    before = _computed_images(page)
    samples: list[tuple[float, float]] = []
    watcher = asyncio.create_task(watch_memory(pid, samples))
    rate = capacity * (0.8 if mode == "soak" else 10)
    run = await load.open(rate, seconds)
    watcher.cancel()
    computed = _computed_images(page) - before
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
        "rss_peak_mb": round(float(memory.max()), 1),
        "rss_growth_second_half_mb_per_minute": round(float(grown), 3),
        "capacity_after_calls_per_second": round(after, 1),
    }


def run(
    mode: str, seconds: float, deadline: float, max_queue: int, probe_seconds: float = 8.0
) -> dict[str, Any]:
    """Start a server, apply the load and return the figures."""
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


def _computed_images(page: str) -> int:
    """Return the number of images that the engine has run on, from the metrics page."""
    with urllib.request.urlopen(page) as response:
        text = response.read().decode()
    values = [
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "crl_batch_size_sum"
    ]
    return round(values[0]) if values else 0


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
