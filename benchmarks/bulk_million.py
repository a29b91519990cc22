"""A million thumbnails embedded by a job that is killed five times and resumed.

`python -m crl_benchmarks.bulk_million` renders the thumbnails (`crl_benchmarks.thumbnails`), starts
`crl embed SHARDS --out DIR` with the demo model, kills it with SIGKILL five times and goes on with
`--resume`. Then it checks that each picture has one row, that exactly the files that were cut off
have an error, and that the parts which were being made when the job was killed are equal, bit for
bit, to parts that are made in one go. Memory is read once a second.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
from numpy.typing import NDArray

from crl_benchmarks.machine import describe_commit, describe_machine
from crl_benchmarks.markdown import table
from crl_benchmarks.thumbnails import EVERY, SHARD, count_cut, write_shards
from crl_sdk.stored._directory import EmbeddingDirectory

_SEED = 25


@dataclass(slots=True)
class Run:
    """One process of the job.

    Attributes:
        began: Number of parts that were there when it began.
        ended: Number of parts that were there when it ended.
        seconds: How long it ran.
        memory: Seconds since the job began, parts that were there, and resident memory in MiB.
        killed: Whether it was killed.
    """

    began: int
    ended: int = 0
    seconds: float = 0.0
    memory: list[tuple[float, int, float]] = field(default_factory=list)
    killed: bool = False


def run_job(
    command: Sequence[str], out: Path, parts: int, *, kills: int, grace: float, log: Path
) -> tuple[list[Run], list[int]]:
    """Run a job, kill it, and resume it until it ends by itself.

    Args:
        command: The command, without `--resume`.
        out: Directory that it writes.
        parts: Number of parts of the complete job.
        kills: How often it is killed, the first time soon after its start.
        grace: Largest number of seconds between the part that a kill waits for and the kill.
        log: File that takes what the command prints.

    Returns:
        The runs, and the numbers of the parts that were being made at the kills.

    Raises:
        RuntimeError: If the job fails.
    """
    chance = random.Random(_SEED)
    runs: list[Run] = []
    interrupted: list[int] = []
    started = time.perf_counter()
    while True:
        run = Run(count_parts(out))
        goal = parts * len(runs) // (kills + 1) if len(runs) < kills else None
        wait = chance.uniform(0.0, grace)
        with log.open("a") as file:
            process = subprocess.Popen(
                [*command, *(["--resume"] if runs else [])], stdout=file, stderr=subprocess.STDOUT
            )
        begun = time.perf_counter()
        reached: float | None = None
        while process.poll() is None:
            now, done = time.perf_counter(), count_parts(out)
            if not run.memory or now - started - run.memory[-1][0] >= 1:
                run.memory.append((now - started, done, resident_mib(process.pid)))
            if goal is not None and done >= goal:
                reached = now if reached is None else reached
                if now - reached >= wait:
                    process.kill()
                    process.wait()
                    run.killed = True
                    break
            time.sleep(0.05)
        run.seconds, run.ended = time.perf_counter() - begun, count_parts(out)
        runs.append(run)
        print(
            f"run {len(runs)}: {'killed' if run.killed else 'ended'} after {run.seconds:.1f} s, "
            f"{run.ended} of {parts} parts",
            flush=True,
        )
        if run.killed:
            interrupted.append(min(run.ended, parts - 1))
            continue
        if process.returncode not in (0, 1):  # 1: pictures that cannot be read
            raise RuntimeError(f"exit status {process.returncode}, see {log}")
        return runs, interrupted


def count_parts(out: Path) -> int:
    """Return the number of complete parts of a directory."""
    return sum(1 for _ in out.glob("part-*.parquet"))


def resident_mib(pid: int) -> float:
    """Return the resident memory of a process in MiB; NaN if it has ended."""
    try:
        return float(psutil.Process(pid).memory_info().rss / 2**20)
    except psutil.Error:
        return float("nan")


def check_rows(out: Path, count: int) -> tuple[int, int]:
    """Check that each picture has one row, and that exactly the files cut off have an error.

    Args:
        out: Directory of the job.
        count: Number of pictures.

    Returns:
        Numbers of rows and of errors.

    Raises:
        AssertionError: If a row is missing, doubled, or wrong about its error.
    """
    seen = np.zeros(count, np.int64)
    failed = np.zeros(count, bool)
    directory = EmbeddingDirectory.open(out)
    directory.require_complete()
    for batch in directory.batches(["id", "universal", "error"], rows=65536):
        indices = np.array([int(name[-13:-4]) for name in batch.column("id").to_pylist()])
        np.add.at(seen, indices, 1)
        failed[indices] = batch.column("error").is_valid().to_numpy(zero_copy_only=False)
        empty = batch.column("universal").is_null().to_numpy(zero_copy_only=False)
        assert (empty == failed[indices]).all(), "an embedding beside an error, or neither"
    assert (seen == 1).all(), f"{(seen == 0).sum()} lost, {(seen > 1).sum()} doubled"
    assert (np.flatnonzero(failed) % EVERY == EVERY - 1).all(), "an error of a good file"
    assert failed.sum() == count_cut(count), "a file that is cut off has no error"
    return int(seen.sum()), int(failed.sum())


def read_universal(part: Path) -> tuple[list[str], NDArray[np.uint8]]:
    """Return the ids of a part and the bytes of its embeddings; failed rows are zeros."""
    from pyarrow import parquet

    rows = parquet.read_table(part, columns=["id", "universal"])
    column = rows["universal"].combine_chunks()
    size = column.type.list_size
    values = np.zeros((len(column), size), np.float32)
    good = column.is_valid().to_numpy(zero_copy_only=False)
    flat = column.flatten().to_numpy(zero_copy_only=False)
    values[good] = flat.reshape(-1, size)
    return rows["id"].to_pylist(), values.view(np.uint8)


def write_plot(runs: Sequence[Run], path: Path) -> None:
    """Draw memory and progress over time, with a line at each kill."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 3.5))
    right = axis.twinx()
    for run in runs:
        times = [at for at, _, _ in run.memory]
        axis.plot(times, [mib for _, _, mib in run.memory], color="C0")
        right.plot(times, [parts for _, parts, _ in run.memory], color="C1", linewidth=1)
        if run.killed and times:
            axis.axvline(times[-1], color="0.6", linestyle=":")
    axis.set(xlabel="seconds", ylabel="resident memory, MiB", ylim=(0, None))
    right.set(ylabel="parts on the disk", ylim=(0, None))
    axis.yaxis.label.set_color("C0")
    right.yaxis.label.set_color("C1")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def report(
    runs: Sequence[Run], count: int, errors: int, *, size: int, compared: int, engine: str
) -> str:
    """Return the report in Markdown."""
    machine = describe_machine()
    seconds = sum(run.seconds for run in runs)
    peaks = [max(mib for _, _, mib in run.memory) for run in runs]
    rows = [
        [
            str(i), "killed" if run.killed else "ended", f"{run.seconds:.1f}",
            f"{run.began} → {run.ended}", f"{middle(run):.0f}", f"{peak:.0f}",
        ]
        for i, (run, peak) in enumerate(zip(runs, peaks, strict=True), 1)
    ]  # fmt: skip
    shown = table(["run", "end", "seconds", "parts", "memory, median MiB", "peak MiB"], rows)
    return f"""# {count:,} thumbnails, killed and resumed

Made with `python -m crl_benchmarks.bulk_million --count {count}` at {describe_commit()} on
{machine["processor"]}, {machine["cores"]} cores, {machine["memory"]}: {engine}.

{shown}

- **Rows**: {count:,} pictures, {count:,} rows; none lost, none doubled. {errors:,} files are cut
  off on purpose; exactly those have an error.
- **Bit for bit**: the {compared} parts that were being made at the kills equal parts that were made
  in one go.
- **Rate**: {count / seconds:,.0f} pictures per second over all {len(runs)} runs ({seconds:,.0f} s),
  starts and the work lost to the kills included.
- **Memory**: at most {max(peaks):.0f} MiB. [Curve](bulk-million.png).
- **Size**: {size / 2**20:,.0f} MiB in {runs[-1].ended} parts.
"""


def middle(run: Run) -> float:
    """Return the median of the memory of a run, in MiB."""
    return float(np.nanmedian([mib for _, _, mib in run.memory]))


def demonstrate(
    work: Path,
    count: int,
    *,
    shard: int = SHARD,
    kills: int = 5,
    grace: float = 8.0,
    engine: str = "auto",
) -> tuple[list[Run], str]:
    """Render, embed, kill, resume and check.

    Args:
        work: Directory for all files. Thumbnails that are there are not rendered again.
        count: Number of pictures.
        shard: Number of pictures of a shard.
        kills: How often the job is killed.
        grace: Seconds that a part takes, more or less.
        engine: Engine; the bundle is that of `CRL_BUNDLE`, or the demo model.

    Returns:
        The runs, and the report in Markdown.

    Raises:
        AssertionError: If a row is missing, doubled or wrong.
        RuntimeError: If the job fails.
    """
    shards = write_shards(work / f"thumbnails-{count}", count, shard=shard)
    out, again, log = work / "embedded", work / "again", work / "log.txt"
    for old in (out, again):
        shutil.rmtree(old, ignore_errors=True)
    log.unlink(missing_ok=True)
    crl = [sys.executable, "-m", "crl_sdk", "embed", "--engine", engine]
    command = [*crl, *map(str, shards), "--out", str(out)]
    runs, interrupted = run_job(command, out, len(shards), kills=kills, grace=grace, log=log)
    rows, errors = check_rows(out, count)
    compared = sorted(set(interrupted))
    print(f"{rows:,} rows, {errors:,} errors; parts {compared} are made again", flush=True)
    with log.open("a") as file:
        subprocess.run(
            [*crl, *(str(shards[i]) for i in compared), "--out", str(again)],
            stdout=file, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
    embedded = EmbeddingDirectory.open(out)
    parts = embedded.parts()
    for number, part in zip(compared, EmbeddingDirectory.open(again).parts(), strict=True):
        names, values = read_universal(parts[number])
        other_names, other = read_universal(part)
        assert names == other_names and (values == other).all(), f"{parts[number]} differs"
    size = sum(part.stat().st_size for part in parts)
    used = f"{embedded.manifest.model}, {embedded.manifest.engine}"
    return runs, report(runs, count, errors, size=size, compared=len(compared), engine=used)


def main() -> None:
    """Write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--work", type=Path, default=Path("build/bulk-million"))
    parser.add_argument("--out", type=Path, help="Path of the report, without its suffix.")
    arguments = parser.parse_args()
    runs, text = demonstrate(
        arguments.work, arguments.count, kills=arguments.kills, engine=arguments.engine
    )
    print(text)
    if arguments.out is not None:
        arguments.out.with_suffix(".md").write_text(text, encoding="utf-8")
        write_plot(runs, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
