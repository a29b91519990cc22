"""Projection of stored embeddings, compared with copies, BLAS and plain NumPy on this machine.

`python -m crl_benchmarks.reprojection` writes 1,000,000 × 512 float32 embeddings to a temporary
file and projects them onto several sets of criteria. In every round the following take turns, first
those in memory and then those with files:

- `memory`, `mapped`: `crl_sdk.projection.project_rows` from arrays in memory to arrays in memory,
  and from the newly mapped file to new files. The page cache is warm.
- `copy`, `mapped copy`: a copy by threads that moves as many bytes as the projection, half of them
  read and half written, in memory and from the newly mapped file to a new file.
- `read`: reading one number per cache line of the embeddings in memory, by threads.
- `numpy`: `Projection.apply` on the whole array for each criterion in memory, in two rounds only.
- `peak`: a large square matrix product in float32 with BLAS's default number of threads.

All results are compared with NumPy's in the same run. The last line of the output is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_info

from crl_benchmarks.machine import describe_machine
from crl_sdk import Projection, __version__
from crl_sdk._processors import count_processors
from crl_sdk.projection._project_rows import project_rows

TOLERANCE = {"float32": 1e-5, "float16": 1e-3}
WARM_UP = 1
NUMPY_ROUNDS = 2
_PEAK_SIZE = 3072
_STEP = 65536  # rows that are created or compared at once


@dataclass(frozen=True, slots=True)
class Case:
    """A set of criteria that all have the same number of texts."""

    criteria: int
    texts: int
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """Name in the tables."""
        return f"{self.criteria} × {self.texts}, {self.dtype}"


CASES = (Case(10, 40), Case(10, 40, "float16"), Case(1, 40), Case(1, 8), Case(1, 1))


class Bench:
    """The embeddings of one run, and the operations that are timed on them."""

    def __init__(self, rows: int, dim: int, directory: Path, threads: int) -> None:
        """Create the embeddings in a file and in memory."""
        self.directory, self.threads = directory, threads
        (directory / "new").mkdir()
        self.pool = ThreadPoolExecutor(threads)
        self.path = directory / "universal.npy"
        rng = np.random.default_rng(0)
        self.universal = np.empty((rows, dim), np.float32)
        for start in range(0, rows, _STEP):
            part = self.universal[start : start + _STEP]
            rng.standard_normal(out=part, dtype=np.float32)
            part /= np.linalg.norm(part, axis=1, keepdims=True)
        with self.path.open("wb") as file:
            np.save(file, self.universal)
            file.flush()
            os.fsync(file.fileno())
        self.square = rng.standard_normal((_PEAK_SIZE, _PEAK_SIZE), dtype=np.float32)
        self.product = np.empty_like(self.square)

    def parts(self, size: int) -> Iterator[slice]:
        """Yield one slice of `range(size)` per thread."""
        ends = [size * i // self.threads for i in range(self.threads + 1)]
        return itertools.starmap(slice, itertools.pairwise(ends))

    def each(self, size: int, work: Callable[[slice], Any]) -> None:
        """Run `work` on one slice per thread."""
        list(self.pool.map(work, self.parts(size)))

    def copy(self, target: NDArray[Any], source: NDArray[Any]) -> None:
        """Copy with all threads, one long piece each: the fastest way of those tried."""
        self.each(len(source), lambda part: np.copyto(target[part], source[part]))

    def read(self) -> None:
        """Read one number per cache line."""
        lines = self.universal.reshape(-1)[::16]
        self.each(len(lines), lambda part: lines[part].max())

    def peak(self) -> None:
        """Multiply two large square matrices."""
        np.matmul(self.square, self.square, out=self.product)

    def map_new(self, name: str, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        """Map a new file with allocated space, as `crl project` does."""
        path = self.directory / "new" / name
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        with path.open("w+b") as file:
            os.posix_fallocate(file.fileno(), 0, size)
            return np.memmap(file, dtype, "r+", 0, shape)

    def forget_new_files(self) -> None:
        """Remove the new files, since writing them to the disk would disturb the next timing."""
        for path in (self.directory / "new").iterdir():
            path.unlink()


def projections(case: Case, dim: int) -> list[Projection]:
    """Return random projections with a bias and rows of unit length."""
    rng = np.random.default_rng(case.texts)
    return [
        Projection(
            rng.standard_normal((dim, case.texts), dtype=np.float32),
            0.1 * rng.standard_normal(case.texts, dtype=np.float32),
        )
        for _ in range(case.criteria)
    ]


def time_of(run: Callable[[], object]) -> float:
    """Return the seconds of one run."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def measure(bench: Bench, case: Case, rounds: int) -> dict[str, Any]:
    """Time one case.

    Args:
        bench: Embeddings and operations.
        case: Criteria to project onto.
        rounds: Number of timed rounds.

    Returns:
        Bytes moved and FLOPs; for each operation the seconds of all rounds and their median; and
        the ratios between operations, as medians over the rounds.

    Raises:
        AssertionError: If a result differs from NumPy's by more than `TOLERANCE`.
    """
    rows, dim = bench.universal.shape
    maps = projections(case, dim)
    shape = (rows, case.texts)
    out = [np.zeros(shape, case.dtype) for _ in maps]
    moved = bench.universal.nbytes + sum(array.nbytes for array in out)
    source = np.ones(moved // 2, np.uint8)
    target = np.zeros_like(source)
    with (bench.directory / "copied").open("wb") as file:
        file.write(source.data)
        os.fsync(file.fileno())
    expected: list[NDArray[Any]] = []

    def mapped() -> None:
        universal = np.load(bench.path, mmap_mode="r")
        new = [bench.map_new(f"{i}.npy", shape, case.dtype) for i in range(len(maps))]
        project_rows(universal, maps, new, threads=bench.threads)

    def mapped_copy() -> None:
        mapped_source = np.memmap(bench.directory / "copied", np.uint8, "r")
        bench.copy(bench.map_new("copy", source.shape, "uint8"), mapped_source)

    def straightforward() -> None:
        expected.clear()
        expected.extend(each.apply(bench.universal) for each in maps)

    in_memory: dict[str, Callable[[], object]] = {
        "memory": lambda: project_rows(bench.universal, maps, out, threads=bench.threads),
        "copy": lambda: bench.copy(target, source),
        "read": bench.read,
        "peak": bench.peak,
        "numpy": straightforward,
    }
    in_files: dict[str, Callable[[], object]] = {"mapped": mapped, "mapped copy": mapped_copy}
    seconds: dict[str, list[float]] = {name: [] for name in (*in_memory, *in_files)}
    for contestants in (in_memory, in_files):
        for number in range(WARM_UP + rounds):
            for name, run in contestants.items():
                if name == "numpy" and number >= WARM_UP + NUMPY_ROUNDS:
                    continue
                taken = time_of(run)
                if number >= WARM_UP:
                    seconds[name].append(taken)
                bench.forget_new_files()
    written = [np.empty(shape, case.dtype) for _ in maps]
    project_rows(np.load(bench.path, mmap_mode="r"), maps, written)
    assert (target == source).all()
    worst = max(
        difference(a, b)
        for results in (out, written)
        for a, b in zip(results, expected, strict=True)
    )
    assert worst <= TOLERANCE[case.dtype], f"{case.name}: {worst} from NumPy's"
    return summary(bench, case, moved, seconds) | {"largest_difference": worst}


def difference(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """Return the largest absolute difference."""
    return max(
        float(np.abs(found[i : i + _STEP] - expected[i : i + _STEP]).max())
        for i in range(0, len(found), _STEP)
    )


def summary(
    bench: Bench, case: Case, moved: int, seconds: dict[str, list[float]]
) -> dict[str, Any]:
    """Return rates and ratios. A ratio is the median of the ratios of the rounds."""
    rows, dim = bench.universal.shape
    flops = 2 * rows * dim * case.criteria * case.texts

    def ratio(ours: str, other: str, scale: float = 1.0) -> float:
        pairs = zip(seconds[ours], seconds[other], strict=False)  # NumPy has fewer rounds
        return round(statistics.median(scale * b / a for a, b in pairs), 3)

    middle = {name: statistics.median(values) for name, values in seconds.items()}
    of_peak = flops / (2 * _PEAK_SIZE**3)
    result: dict[str, Any] = {
        "case": case.name,
        "gigabytes_moved": round(moved / 1e9, 3),
        "gflop": round(flops / 1e9, 1),
        "seconds": {name: round(value, 4) for name, value in middle.items()},
        "seconds_of_all_rounds": {
            name: [round(value, 4) for value in values] for name, values in seconds.items()
        },
        "read_gb_per_s": round(bench.universal.nbytes / middle["read"] / 1e9, 1),
        "peak_gflop_per_s": round(2 * _PEAK_SIZE**3 / middle["peak"] / 1e9, 1),
    }
    for ours, copy in (("memory", "copy"), ("mapped", "mapped copy")):
        result[ours] = {
            "gb_per_s": round(moved / middle[ours] / 1e9, 2),
            "copy_gb_per_s": round(moved / middle[copy] / 1e9, 2),
            "of_copy": ratio(ours, copy),
            "gflop_per_s": round(flops / middle[ours] / 1e9, 1),
            "of_peak": ratio(ours, "peak", of_peak),
            "times_numpy": ratio(ours, "numpy"),
            "limit": "memory" if middle[copy] > of_peak * middle["peak"] else "arithmetic",
        }
    return result


def cold(bench: Bench, case: Case) -> float:
    """Return the seconds of one projection from the mapped file with no page in the cache."""
    with bench.path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    maps = projections(case, bench.universal.shape[1])
    universal = np.load(bench.path, mmap_mode="r")
    return time_of(lambda: project_rows(universal, maps, threads=bench.threads))


def run(rows: int, dim: int, cases: Sequence[Case], rounds: int, directory: Path) -> dict[str, Any]:
    """Run all cases on embeddings in a file in `directory`, and return the report."""
    bench = Bench(rows, dim, directory, count_processors())
    records = [measure(bench, case, rounds) for case in cases]
    last = cases[-1]
    blas = [info for info in threadpool_info() if info["user_api"] == "blas"]
    return {
        "command": "make bench-project",
        "rows": rows,
        "dim": dim,
        "rounds": rounds,
        "warm_up": WARM_UP,
        "crl_sdk": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "blas": [f"{lib['internal_api']} {lib['version']} ({lib['architecture']})" for lib in blas],
        "machine": describe_machine(),
        "threads": bench.threads,
        "cold": {"case": last.name, "seconds": round(cold(bench, last), 3)},
        "cases": records,
    }  # fmt: skip


def markdown(document: dict[str, Any]) -> str:
    """Return the report as Markdown tables."""
    machine = document["machine"]
    peak = statistics.median(case["peak_gflop_per_s"] for case in document["cases"])
    lines = [
        "# Re-projection of stored embeddings",
        "",
        f"`{document['command']}` on {machine['processor']}, {machine['cores']} cores "
        f"({machine['features']}), {', '.join(document['blas'])}, NumPy "
        f"{document['numpy']}, crl {document['crl_sdk']}: {document['rows']:,} × "
        f"{document['dim']} float32 embeddings. Medians of {document['rounds']} rounds in which "
        f"all took turns, after {document['warm_up']} of warm-up. BLAS peak {peak:.0f} GFLOP/s, "
        f"by a product of {_PEAK_SIZE} × {_PEAK_SIZE} matrices.",
    ]
    for ours, title in (
        ("memory", "From and to memory"),
        ("mapped", "From a mapped file to new mapped files, page cache warm"),
    ):
        lines += [
            "",
            f"## {title}",
            "",
            "| criteria × texts | GB moved | seconds | GB/s | copy, GB/s | ratio | GFLOP/s "
            "| of BLAS peak | limit | NumPy, seconds | times as fast |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for case in document["cases"]:
            found = case[ours]
            lines.append(
                f"| {case['case']} | {case['gigabytes_moved']:.2f} | {case['seconds'][ours]:.3f} "
                f"| {found['gb_per_s']:.1f} | {found['copy_gb_per_s']:.1f} "
                f"| {found['of_copy']:.2f} "
                f"| {found['gflop_per_s']:.0f} | {found['of_peak']:.2f} | {found['limit']} "
                f"| {case['seconds']['numpy']:.2f} | {found['times_numpy']:.1f} |"
            )
    reads = statistics.median(case["read_gb_per_s"] for case in document["cases"])
    worst = max(case["largest_difference"] for case in document["cases"])
    lines += [
        "",
        "GB moved: each embedding read once, each result written once; a copy of as many bytes "
        "reads half of them and writes half. Limit: what takes longer alone at the rates of this "
        f"run, the copy or the arithmetic. Reading alone reaches {reads:.0f} GB/s. Largest "
        f"difference from NumPy's results {worst:.1e}. From the disk, with no page in the cache: "
        f"{document['cold']['seconds']:.2f} seconds for {document['cold']['case']}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", type=int, help="index of a single case to run, from 0")
    parser.add_argument("--directory", type=Path, help="directory for the temporary files")
    parser.add_argument("--out", type=Path, help="path of the results without suffix")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        cases = CASES if arguments.only is None else [CASES[arguments.only]]
        document = run(arguments.rows, arguments.dim, cases, arguments.rounds, Path(folder))
    text = markdown(document)
    if arguments.out:
        arguments.out.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
        arguments.out.with_suffix(".md").write_text(text)
    print(text)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
