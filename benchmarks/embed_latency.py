"""Measure the cost of conditional embeddings over universal embeddings: latency of the engine.

`python -m crl_benchmarks.embed_latency [BUNDLE]` times engine runs with no, one and ten criteria
for each batch size. The settings take turns, so that noise affects all alike. The conditional
columns are compared with NumPy. The last line of the output is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from crl_sdk import ModelBundle, Projection, __version__, demo_bundle
from crl_sdk.engines._contract import ImageEngine
from crl_sdk.engines._selection import open_engine
from crl_sdk.projection._projection import normalise_rows, pack

COLUMNS = 40  # texts of a typical basis
CRITERIA = (0, 1, 10)


def measure(
    bundle: ModelBundle, batch_sizes: tuple[int, ...], repeats: int, name: str = "auto"
) -> list[dict[str, Any]]:
    """Time engine runs with 0, 1 and 10 bases.

    Args:
        bundle: The model.
        batch_sizes: Numbers of images per run.
        repeats: Number of runs per setting.
        name: Name of the engine.

    Returns:
        One record per batch size. For each number of criteria it holds the p50 and p99 latency in
        milliseconds, and the median ratio to the run without criteria.

    Raises:
        AssertionError: If a projected column differs from NumPy's by more than 1e-4.
    """
    engine = open_engine(bundle, name)
    spec, rng = bundle.preprocess, np.random.default_rng(0)
    packed = {count: _packed(bundle.embedding_dim, count, rng) for count in CRITERIA}
    records = []
    for batch in batch_sizes:
        pixels = rng.integers(0, 256, (batch, spec.height, spec.width, 3), np.uint8)
        runs = {count: _runner(engine, pixels, *packed[count]) for count in CRITERIA}
        for count, run in runs.items():
            embedding, projected = run()
            weight, bias = packed[count]
            expected = embedding @ weight + bias
            assert np.abs(projected - expected).max(initial=0) < 1e-4, "wrong projection"
        times = np.array([[_time(runs[count]) for count in CRITERIA] for _ in range(repeats)])
        records.append(
            {"batch": batch, "engine": str(engine.name)}
            | {
                f"criteria_{count}": {
                    "p50_ms": round(float(np.percentile(times[:, i], 50)) * 1e3, 3),
                    "p99_ms": round(float(np.percentile(times[:, i], 99)) * 1e3, 3),
                    "ratio": round(float(np.median(times[:, i] / times[:, 0])), 3),
                }
                for i, count in enumerate(CRITERIA)
            }
        )
    return records


def _packed(d: int, count: int, rng: np.random.Generator) -> tuple[Any, Any]:
    if count == 0:
        return np.zeros((d, 0), np.float32), np.zeros(0, np.float32)
    shape = (d, COLUMNS)
    projections = [
        Projection(rng.standard_normal(shape).astype(np.float32), np.zeros(COLUMNS, np.float32))
        for _ in range(count)
    ]
    return pack(projections)[:2]


def _runner(engine: ImageEngine, pixels: Any, weight: Any, bias: Any) -> Callable[[], Any]:
    def run() -> Any:
        embedding, projected = engine.run(pixels, weight, bias)
        for start in range(0, weight.shape[1], COLUMNS):
            normalise_rows(projected[:, start : start + COLUMNS], "l2")
        return embedding, projected

    return run


def _time(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", nargs="?", type=Path, default=demo_bundle())
    parser.add_argument("--batches", default="1,16", help="comma-separated batch sizes")
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--engine", default="auto")
    arguments = parser.parse_args()
    bundle = ModelBundle.open(arguments.bundle)
    batches = tuple(int(part) for part in arguments.batches.split(","))
    records = measure(bundle, batches, arguments.repeats, arguments.engine)
    print(f"{bundle.manifest.name}, {arguments.repeats} runs each; {COLUMNS} texts per criterion")
    print("| batch | criteria | p50 ms | p99 ms | ratio to none |\n|---|---|---|---|---|")
    for record in records:
        for count in CRITERIA:
            row = record[f"criteria_{count}"]
            print(
                f"| {record['batch']} | {count} | {row['p50_ms']} | {row['p99_ms']} "
                f"| {row['ratio']} |"
            )
    machine = {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "crl_sdk": __version__,
    }
    print(json.dumps({"model": bundle.manifest.name, **machine, "records": records}))


if __name__ == "__main__":
    main()
