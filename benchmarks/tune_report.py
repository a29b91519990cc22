"""The report of `crl tune`: its candidates, the best of them, and their picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from crl_benchmarks.bench_objective import Objective
from crl_benchmarks.bench_report import ObjectiveResult, Setting
from crl_benchmarks.report_head import ReportHead, find_head
from crl_sdk.errors import InvalidInputError
from crl_sdk.storage._atomic_files import write_atomically

SCHEMA = 2

_PACKAGES = ("grpcio", "numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt")


@dataclass(frozen=True, slots=True)
class Candidate:
    """Settings of a server.

    Attributes:
        engine: Name of the engine, such as `onnx/cpu/int8`.
        threads: Threads of an engine run; None for engines that do not run on a CPU.
        max_batch: Largest number of images in one engine run.
        decode: How images are decoded, `exact` or `fast`.
        workers: Number of processes.
    """

    engine: str
    threads: int | None
    max_batch: int
    decode: str
    workers: int = 1

    def __str__(self) -> str:
        """Return the settings in one line."""
        threads = [f"{self.threads} thread{'s' if self.threads != 1 else ''}"] * bool(self.threads)
        fast = ["fast decoding"] * (self.decode == "fast")
        several = [f"{self.workers} workers"] * (self.workers > 1)
        return ", ".join([self.engine, *several, *threads, f"max-batch {self.max_batch}", *fast])

    @property
    def settings(self) -> dict[str, str | int]:
        """Options of `crl serve` by their long names, without dashes in front."""
        threads: dict[str, str | int] = {} if self.threads is None else {"threads": self.threads}
        workers: dict[str, str | int] = {"workers": self.workers} if self.workers > 1 else {}
        return {
            "engine": self.engine, **workers, **threads, "max-batch": self.max_batch,
            "decode": self.decode,
        }  # fmt: skip


class TuneRow(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a candidate.

    Attributes:
        engine: Name of the engine.
        threads: Threads of an engine run; None for the default.
        max_batch: Largest number of images in one engine run; None if the engine was not tried.
        decode: How images are decoded; None if the engine was not tried.
        workers: Number of processes.
        state: `measured` (with the search for the objective), `dropped` (as others were better),
            `unfinished` (as the measurement ended early), `failed` or `not_tried`.
        reason: Why it was not measured to the end, else empty.
        doubt: Why the first two figures may be those of the load generator, else empty.
        one_caller_p50_ms: Median latency of one caller in milliseconds; median of the rounds.
        closed_images_per_second: Images per second of several callers; median of the rounds.
        memory_mib: Peak of the server's memory in MiB.
        objective: Result of the search, with the run at the highest rate that met the objective.
        pareto: Whether no other candidate is better in rate and in one caller's latency.
        best: Whether it has the highest rate that met the objective.
    """

    engine: str
    threads: int | None
    max_batch: int | None
    decode: str | None
    workers: int = 1
    state: Literal["measured", "dropped", "unfinished", "failed", "not_tried"]
    reason: str
    doubt: str = ""
    one_caller_p50_ms: float | None = None
    closed_images_per_second: float | None = None
    memory_mib: float | None = None
    objective: ObjectiveResult | None = None
    pareto: bool = False
    best: bool = False

    @property
    def rate(self) -> float | None:
        """Images per second at the highest rate that met the objective, or None."""
        if self.objective is None or self.objective.best is None:
            return None
        return self.objective.best.images_per_second

    @property
    def name(self) -> str:
        """The settings in one line."""
        if self.max_batch is None or self.decode is None:
            return self.engine
        return str(Candidate(self.engine, self.threads, self.max_batch, self.decode, self.workers))


class TuneReport(ReportHead, frozen=True, kw_only=True):
    """All candidates, with what is needed to repeat the measurement.

    Attributes:
        seconds: Duration of the measurement in seconds.
        model: Name of the model.
        fingerprint: Fingerprint of the model.
        objective: The objective, such as `p99<50ms`.
        settings: Settings of the measurement, with units in their names.
        rows: Candidates, the best first.
        ended_early: Why not everything was measured, else empty.
    """

    seconds: float
    model: str
    fingerprint: str
    objective: str
    settings: dict[str, Setting]
    rows: tuple[TuneRow, ...]
    ended_early: str = ""

    @property
    def best(self) -> TuneRow | None:
        """The candidate with the highest rate that met the objective, or None."""
        return next((row for row in self.rows if row.best), None)


def pareto(points: Sequence[tuple[float, float]]) -> set[int]:
    """Return the indices of points that no other point beats.

    Args:
        points: Rate and latency of each. More of the first and less of the second is better.

    Example:
        >>> sorted(pareto([(10.0, 5.0), (20.0, 9.0), (9.0, 6.0)]))
        [0, 1]
    """
    return {
        i
        for i, (rate, latency) in enumerate(points)
        if not any(
            other >= rate and short <= latency and (other, short) != (rate, latency)
            for other, short in points
        )
    }


def mark(rows: Sequence[TuneRow]) -> list[TuneRow]:
    """Return rows in order, the highest rate that met the objective first, with their marks."""
    states = ("measured", "unfinished", "dropped", "failed", "not_tried")
    ordered = sorted(
        rows,
        key=lambda row: (
            states.index(row.state), -(row.rate or 0.0), -(row.closed_images_per_second or 0.0)
        ),
    )  # fmt: skip
    points = [
        (row.rate, row.one_caller_p50_ms, i)
        for i, row in enumerate(ordered)
        if row.state == "measured" and row.rate is not None and row.one_caller_p50_ms is not None
    ]
    front = {points[i][2] for i in pareto([(rate, latency) for rate, latency, _ in points])}
    best = points[0][2] if points else None
    return [
        msgspec.structs.replace(row, pareto=i in front, best=i == best)
        for i, row in enumerate(ordered)
    ]


def tune_report(
    command: str,
    *,
    model: str,
    fingerprint: str,
    objective: Objective,
    settings: dict[str, Setting],
    rows: Sequence[TuneRow],
    seconds: float,
    ended_early: str = "",
) -> TuneReport:
    """Return a report of candidates.

    Args:
        command: Command line.
        model: Name of the model.
        fingerprint: Fingerprint of the model.
        objective: Objective to meet.
        settings: Settings of the measurement.
        rows: Candidates, the best first.
        seconds: Duration of the measurement in seconds.
        ended_early: Why not everything was measured.
    """
    return TuneReport(
        **find_head(SCHEMA, command, _PACKAGES),
        seconds=round(seconds, 1),
        model=model,
        fingerprint=fingerprint,
        objective=str(objective),
        settings=settings,
        rows=tuple(rows),
        ended_early=ended_early,
    )


def check_pareto(path: Path) -> None:
    """Check before any work that a picture can have this path.

    Raises:
        InvalidInputError: If its suffix is another one.
    """
    if path.suffix != ".png":
        raise InvalidInputError(f"{path}: expected a path that ends in .png")


def write_pareto(report: TuneReport, path: Path) -> None:
    """Draw the rate at the objective against one caller's latency.

    Args:
        report: Report with at least one candidate that met the objective.
        path: Path of the PNG file.

    Raises:
        InvalidInputError: If no candidate met the objective, or the file cannot be written.
    """
    shown = [
        (row, row.one_caller_p50_ms, row.rate)
        for row in report.rows
        if row.state == "measured" and row.rate is not None and row.one_caller_p50_ms is not None
    ]
    if not shown:
        raise InvalidInputError(f"{path}: expected a candidate that met the objective, got none")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for row, latency, rate in shown:
        axes.plot(
            [latency], [rate], "*" if row.best else "o", label=row.name,
            markersize=12 if row.best else 7, fillstyle="full" if row.pareto else "none",
        )  # fmt: skip
    front = sorted((latency, rate) for row, latency, rate in shown if row.pareto)
    axes.plot(*zip(*front, strict=True), "-", color="grey", linewidth=0.8, zorder=0)
    axes.set(
        xlabel="one caller's median latency, ms", ylabel=f"images per second at {report.objective}"
    )
    axes.set(xlim=(0, None), ylim=(0, None))  # small differences look small
    axes.set_title(f"{report.model} on {report.machine.processor}", fontsize=9)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=8)
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=150, metadata={"Software": None})
    write_atomically(path, target.getvalue(), InvalidInputError)
