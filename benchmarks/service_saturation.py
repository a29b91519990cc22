"""A server under load against the same work in process, in turns in one run.

`python -m crl_benchmarks.service_saturation BUNDLE` starts `crl serve` without a cache. In each
round it measures `Embedder.embed` on the same JPEGs and threads, and the server with one caller, 8,
16 and 32 callers in closed loops. Ratios are taken within a round, so that a machine whose speed
drifts moves both sides. The load generator runs on the same cores; its share is stated.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from crl_benchmarks.images import synthetic_jpegs
from crl_benchmarks.machine import describe_commit, describe_machine
from crl_benchmarks.markdown import table
from crl_benchmarks.peers.traffic import Endpoint, Generator, Job, embed
from crl_sdk import Embedder
from crl_sdk.cli._local_server import local_server

SIZE = (640, 480)
IMAGES = 64
BATCHES = (16, 32)
CALLERS = (1, 8, 16, 32)
WARM_UP = 1.0


@dataclass(frozen=True, slots=True)
class Measured:
    """One kind of work in one round.

    Attributes:
        per_second: Images per second.
        p50_ms: Median time of a call, in milliseconds.
        cpu_ms: Processor time of the embedder's or the server's process per image.
        generator_cpu_ms: Processor time of the load generator per image.
    """

    per_second: float
    p50_ms: float
    cpu_ms: float
    generator_cpu_ms: float = 0.0


Round = dict[str, Measured]
"""Measurements of a round by name: `embed 1`, `embed 16`, …, `1 callers`, …"""


def measure(bundle: Path, engine: str, rounds: int, seconds: float) -> list[Round]:
    """Measure all rounds.

    Args:
        bundle: Directory of a bundle.
        engine: Name of an engine.
        rounds: Number of rounds.
        seconds: Duration of each measurement.

    Raises:
        AssertionError: If the server's rows differ from the embedder's by more than the rounding
            of int8 products in batches of other sizes.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        paths = []
        for number, data in enumerate(synthetic_jpegs(IMAGES, SIZE)):
            paths.append(folder / f"{number:03}.jpg")
            paths[-1].write_bytes(data)
        images = [path.read_bytes() for path in paths]
        options = ("--engine", engine, "--cache-mb", "0")
        with (
            Embedder.open(bundle, engine=engine) as embedder,
            local_server(bundle, folder / "serve.log", *options) as server,
            Generator() as generator,
        ):
            endpoint = Endpoint("crl", server.address)
            served, own = embed(endpoint, images[:8]), embedder.embed(images[:8]).universal
            assert np.abs(served - own).max() < 5e-3, "wrong rows"
            process = psutil.Process(server.pid)
            found = []
            for number in range(rounds):
                one: Round = {
                    f"embed {batch}": _in_process(embedder, images, batch, seconds)
                    for batch in (1, *BATCHES)
                }
                for callers in CALLERS:
                    job = Job(
                        endpoint, tuple(paths), "closed", callers, WARM_UP, seconds, seed=number
                    )
                    one[f"{callers} callers"] = _served(generator, job, process)
                found.append(one)
    return found


def _in_process(embedder: Embedder, images: list[bytes], batch: int, seconds: float) -> Measured:
    given = images[:1] if batch == 1 else images
    times: list[float] = []
    begun, used = time.perf_counter(), time.process_time()
    while (started := time.perf_counter()) < begun + seconds:
        embedder.embed(given, batch_size=batch)
        times.append(time.perf_counter() - started)
    count = len(times) * len(given)
    return Measured(
        per_second=count / (time.perf_counter() - begun),
        p50_ms=1e3 * statistics.median(times),
        cpu_ms=1e3 * (time.process_time() - used) / count,
    )


def _served(generator: Generator, job: Job, process: psutil.Process) -> Measured:
    used = _cpu_seconds(process)
    run = generator.measure(job)
    rate = run.calls_per_second
    return Measured(
        per_second=rate,
        p50_ms=1e3 * statistics.median(run.latencies["ok"]),
        cpu_ms=1e3 * (_cpu_seconds(process) - used) / (rate * (job.seconds + job.warm_up)),
        generator_cpu_ms=1e3 * run.cpu / rate,
    )


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def best_in_process(one: Round) -> float:
    """Return the highest rate of the embedder in a round, over the batch sizes."""
    return max(one[f"embed {batch}"].per_second for batch in BATCHES)


def summary(rounds: Sequence[Round]) -> dict[str, float]:
    """Return the two figures that count, as medians over the rounds.

    Returns:
        `saturation`: the server's highest rate as a share of the embedder's; and `overhead_ms`:
        what a call of one caller takes beyond `Embedder.embed` of the same image.
    """
    shares = [
        max(one[f"{callers} callers"].per_second for callers in CALLERS) / best_in_process(one)
        for one in rounds
    ]
    extra = [one["1 callers"].p50_ms - one["embed 1"].p50_ms for one in rounds]
    return {
        "saturation": round(statistics.median(shares), 3),
        "overhead_ms": round(statistics.median(extra), 3),
    }


def markdown(engine: str, rounds: Sequence[Round]) -> str:
    """Return the results of an engine."""
    found = summary(rounds)
    rows = []
    for name in rounds[0]:
        each = [one[name] for one in rounds]
        shares = [one[name].per_second / best_in_process(one) for one in rounds]
        middle = {
            field: statistics.median(getattr(one, field) for one in each)
            for field in Measured.__slots__
        }
        rows.append(
            (
                name, f"{middle['per_second']:.1f}", f"{statistics.median(shares):.3f}",
                f"{min(shares):.3f}–{max(shares):.3f}", f"{middle['p50_ms']:.1f}",
                f"{middle['cpu_ms']:.1f}",
                f"{middle['generator_cpu_ms']:.2f}" if middle["generator_cpu_ms"] else "",
            )
        )  # fmt: skip
    return "\n\n".join(
        [
            f"## {engine}",
            f"One caller takes {found['overhead_ms']:.2f} ms more than `Embedder.embed` of the "
            f"same image. At saturation the server serves {found['saturation']:.3f} of what "
            "`Embedder.embed` does.",
            table(
                ("work", "images/s", "of the best in process", "lowest and highest round",
                 "p50 of a call, ms", "processor time per image, ms", "load generator, ms"),
                rows,
            ),
        ]
    )  # fmt: skip


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--engines", default="onnx/cpu/int8,onnx/cpu/fp32")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--out", type=Path, help="path of the page to write")
    options = parser.parse_args()
    machine = describe_machine()
    parts = [
        "# A server against the same work in process",
        f"`make bench-service` at {describe_commit()}, on {machine['processor']} "
        f"({machine['cores']} cores, {machine['features']}). {options.bundle.name} with random "
        f"weights; {IMAGES} synthetic JPEGs of {SIZE[0]}×{SIZE[1]}; medians of {options.rounds} "
        f"rounds of {options.seconds:g} s for each kind of work. Engine, server and load generator "
        "share the cores. A call in process holds 64 images, except in `embed 1`; a call of the "
        "service holds one.",
    ]
    for engine in options.engines.split(","):
        rounds = measure(options.bundle, engine, options.rounds, options.seconds)
        parts.append(markdown(engine, rounds))
        print(parts[-1], flush=True)
    if options.out:
        options.out.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
