"""The same requests through Triton's ensemble and through `crl serve`, in turns in one run.

`make bench-triton` runs this in the environment of `make test-triton`. Both servers are started;
unmodified tritonclient sends both the same JPEGs over gRPC in closed loops. One is measured while
the other waits, and each round begins with the other one. Triton runs the repository of `crl
export-triton --backend python`, because PyTriton's wheel has no other backend.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from crl_benchmarks.images import synthetic_jpegs
from crl_benchmarks.machine import describe_commit, describe_machine
from crl_benchmarks.markdown import table
from crl_benchmarks.pytriton_server import run_triton
from crl_export.triton_server.repository import Options, export_repository
from crl_sdk import Embedder, ModelBundle
from crl_sdk.basis import BasisDirectory
from crl_sdk.cli._local_server import local_server

SIZE, IMAGES = (640, 480), 64
CALLERS = (1, 8, 16)
WARM_UP = 1.0
TEXTS = ("red", "green", "blue", "yellow")
TOLERANCE = 1e-5
"""Largest difference of an element between the two servers, in fp32."""


@dataclass(frozen=True, slots=True)
class Server:
    """A server that is measured.

    Attributes:
        name: Name in the table.
        address: Address of its gRPC port.
        model: Name of the model to call.
        pid: Process id; its children count too.
    """

    name: str
    address: str
    model: str
    pid: int


@dataclass(frozen=True, slots=True)
class Measured:
    """One server with a number of callers in one round.

    Attributes:
        per_second: Images per second.
        p50_ms: Median time of a call, in milliseconds.
        p99_ms: 99th percentile.
        cpu_ms: Processor time of the server per image, in milliseconds.
    """

    per_second: float
    p50_ms: float
    p99_ms: float
    cpu_ms: float


def call(client: Any, model: str, image: bytes) -> Any:
    """Return the conditional embedding of an image."""
    import tritonclient.grpc as triton

    given = triton.InferInput("IMAGE", [1, 1], "BYTES")
    given.set_data_from_numpy(np.array([[image]], dtype=object))
    wanted = [triton.InferRequestedOutput("CONDITIONAL")]
    return client.infer(model, [given], outputs=wanted).as_numpy("CONDITIONAL")


def measure(server: Server, images: Sequence[bytes], callers: int, seconds: float) -> Measured:
    """Measure a server under closed loops, after a warm-up."""
    import tritonclient.grpc as triton

    latencies: list[list[float]] = [[] for _ in range(callers)]
    starts = time.perf_counter() + WARM_UP
    ends = starts + seconds

    def loop(number: int) -> None:
        with triton.InferenceServerClient(server.address) as client:
            at = number
            while (begun := time.perf_counter()) < ends:
                call(client, server.model, images[at % len(images)])
                at += callers
                if begun >= starts:
                    latencies[number].append(time.perf_counter() - begun)

    threads = [threading.Thread(target=loop, args=(number,)) for number in range(callers)]
    for thread in threads:
        thread.start()
    time.sleep(max(0.0, starts - time.perf_counter()))
    used = _cpu_seconds(server.pid)
    for thread in threads:
        thread.join()
    took, used = time.perf_counter() - starts, _cpu_seconds(server.pid) - used
    times = sorted(each for one in latencies for each in one)
    return Measured(
        per_second=len(times) / took,
        p50_ms=1e3 * statistics.median(times),
        p99_ms=1e3 * times[int(0.99 * (len(times) - 1))],
        cpu_ms=1e3 * used / len(times),
    )


def _cpu_seconds(pid: int) -> float:
    process = psutil.Process(pid)
    times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return float(sum(each.user + each.system for each in times))


def run(bundle: Path, rounds: int, seconds: float) -> str:
    """Measure both servers with a bundle, and return a section of the page.

    Raises:
        AssertionError: If the rows of the two servers differ by more than `TOLERANCE`.
    """
    import tritonclient.grpc as triton

    images = synthetic_jpegs(IMAGES, SIZE)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        opened = ModelBundle.open(bundle)
        with Embedder.open(opened, engine="onnx/cpu/fp32") as embedder:
            basis = embedder.create_basis("color", TEXTS)
        path = BasisDirectory(folder / "bases").path_of("color", basis.fingerprint)
        path.parent.mkdir(parents=True)
        basis.save(path)
        options = Options(backend="python")
        export_repository(opened, folder / "bases", folder / "repository", options)
        served = ("--engine", "onnx/cpu/fp32", "--cache-mb", "0", "--bases", str(folder / "bases"))
        with (
            run_triton(folder / "repository", folder) as running,
            local_server(bundle, folder / "serve.log", *served) as own,
        ):
            servers = [
                Server("Triton", running.grpc, "crl_color", running.pid),
                Server("crl serve", own.address, "crl.color", own.pid),
            ]
            rows = []
            for server in servers:
                with triton.InferenceServerClient(server.address) as client:
                    rows.append([call(client, server.model, image) for image in images[:8]])
            difference = float(np.abs(np.concatenate(rows[0]) - np.concatenate(rows[1])).max())
            assert difference <= TOLERANCE, f"the servers differ by {difference}"
            found: dict[tuple[int, str], list[Measured]] = {}
            loads = []
            for number in range(rounds):
                loads.append(os.getloadavg()[0])
                for callers in CALLERS:
                    for server in servers if number % 2 == 0 else servers[::-1]:
                        measured = measure(server, images, callers, seconds)
                        found.setdefault((callers, server.name), []).append(measured)
    return _section(opened.manifest.name, found, difference, statistics.median(loads))


def _section(
    name: str, found: dict[tuple[int, str], list[Measured]], difference: float, load: float
) -> str:
    rows = []
    for (callers, server), measured in found.items():
        own = found[callers, "crl serve"]
        ratios = [a.per_second / b.per_second for a, b in zip(measured, own, strict=True)]
        middle = {
            each: statistics.median(getattr(one, each) for one in measured)
            for each in Measured.__slots__
        }
        rows.append(
            (
                str(callers), server, f"{middle['per_second']:.1f}",
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})",
                f"{middle['p50_ms']:.1f}", f"{middle['p99_ms']:.1f}", f"{middle['cpu_ms']:.1f}",
            )
        )  # fmt: skip
    head = (
        "callers", "server", "images/s", "of crl serve (lowest–highest round)", "p50, ms",
        "p99, ms", "processor time per image, ms",
    )  # fmt: skip
    return (
        f"## {name}\n\nLargest difference between the rows of the two servers: {difference:.1e}. "
        f"Load average when rounds began: {load:.1f} (median).\n\n{table(head, rows)}"
    )


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--out", type=Path, help="path of the page to write")
    options = parser.parse_args()
    machine = describe_machine()
    parts = [
        "# Triton's ensemble beside crl serve",
        f"`make bench-triton` at {describe_commit()}, on {machine['processor']} "
        f"({machine['cores']} cores, {machine['features']}). {IMAGES} synthetic JPEGs of "
        f"{SIZE[0]}×{SIZE[1]}, one in each call, to conditional embeddings in fp32; medians of "
        f"{options.rounds} rounds of {options.seconds:g} s. Triton is PyTriton's binary with its "
        "python backend: every step is a process that runs a `model.py`, the tower with ONNX "
        "Runtime in it. **Triton's own onnxruntime backend was not run.** `crl serve` ran without "
        "its cache. Both are called by the same tritonclient, on the same cores.",
    ]
    for bundle in options.bundles:
        parts.append(run(bundle, options.rounds, options.seconds))
        print(parts[-1], flush=True)
    if options.out:
        options.out.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
