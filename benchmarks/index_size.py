"""`make bench-index`: how long a search in the exact `Index` takes, and its memory, by its size.

One thread of BLAS: two would wait for each other beside other work. The vectors are random, which
makes no difference to a search that compares all rows.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from crl_benchmarks.machine import describe_commit, describe_machine
from crl_benchmarks.markdown import table
from crl_sdk.tasks import Index

SIZES = ((10_000, 12), (10_000, 512), (100_000, 12), (100_000, 512),
         (1_000_000, 12), (1_000_000, 64), (1_000_000, 512))  # fmt: skip
WARM_UP, SEARCHES = 3, 20


def measure(rows: int, columns: int) -> tuple[float, float, float]:
    """Return the median and the least milliseconds of a search, and the megabytes of the rows."""
    data = np.random.default_rng(0).standard_normal((rows, columns), dtype=np.float32)
    index = Index({"color": data})
    seconds = []
    for i in range(WARM_UP + SEARCHES):
        started = time.perf_counter()
        found = index.nearest({"color": data[i]}, n=10)
        seconds.append(time.perf_counter() - started)
        if found.positions[0] != i:
            raise AssertionError(f"row {i} is not the nearest to itself")
    times = 1e3 * np.array(seconds[WARM_UP:])
    return float(np.median(times)), float(times.min()), (data.nbytes + 4 * rows) / 1e6


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    rows = []
    with threadpool_limits(1, user_api="blas"):
        for count, columns in SIZES:
            median, least, size = measure(count, columns)
            rows.append(
                [f"{count:,}", str(columns), f"{median:.1f}", f"{least:.1f}", f"{size:,.0f}"]
            )
            print(*rows[-1], flush=True)
    machine = ", ".join(f"{key} {value}" for key, value in describe_machine().items())
    out.write_text(
        f"""# Size of an exact index

`make bench-index`, commit {describe_commit()}. {machine}. One thread.
Processes that wanted to run in the last 5 minutes: {os.getloadavg()[1]:.1f}. More than the cores
means that other work slowed this: the fastest of {SEARCHES} searches is then nearer to the truth.

A search for the ten nearest rows by one criterion in `crl_sdk.tasks.Index`, and the memory of its
rows in float32. Several criteria take the sum of their times.

{table(["rows", "values", "p50 ms", "fastest ms", "MB"], rows)}
""",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
