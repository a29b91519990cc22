"""Finds the settings of a server that serve a bundle best on this machine: `crl tune`.

Each candidate is a server of its own. All are measured in rounds, in turns, with one caller and
with several. Those that are clearly dominated are dropped after each round. The best of the others
become finalists, whose servers run side by side. Their searches for the highest rate that meets the
objective take turns, run by run. A machine that becomes slower meanwhile is then slower for all.
"""

from __future__ import annotations

import io
import platform
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import psutil

from crl_benchmarks.bench_objective import Objective, search
from crl_benchmarks.bench_report import (
    LoadResult,
    ObjectiveResult,
    Setting,
    find_figure,
    name_load,
)
from crl_benchmarks.machine import Machine, find_machine
from crl_sdk._version import __version__
from crl_sdk.engines._machine import find_versions
from crl_sdk.errors import CrlError, InvalidInputError, ServiceError
from crl_sdk.storage._atomic_files import write_atomically

SCHEMA = 1

CALLERS = 16
"""Callers of the closed loop that compares candidates: enough to fill batches."""

_CLEARLY = 1.25
"""A candidate is dropped if another one is so many times better in rate and in latency."""

_PACKAGES = ("grpcio", "numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt")


@dataclass(frozen=True, slots=True)
class Candidate:
    """Settings of a server.

    Attributes:
        engine: Name of the engine, such as `onnx/cpu/int8`.
        threads: Threads of an engine run; None for engines that do not run on a CPU.
        max_batch: Largest number of images in one engine run.
        decode: How images are decoded, `exact` or `fast`.
    """

    engine: str
    threads: int | None
    max_batch: int
    decode: str

    def __str__(self) -> str:
        """Return the settings in one line."""
        threads = [f"{self.threads} thread{'s' if self.threads != 1 else ''}"] * bool(self.threads)
        fast = ["fast decoding"] * (self.decode == "fast")
        return ", ".join([self.engine, *threads, f"max-batch {self.max_batch}", *fast])

    @property
    def settings(self) -> dict[str, str | int]:
        """Options of `crl serve` by their long names, without dashes in front."""
        threads: dict[str, str | int] = {} if self.threads is None else {"threads": self.threads}
        return {
            "engine": self.engine, **threads, "max-batch": self.max_batch, "decode": self.decode
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Subject:
    """The running server of a candidate.

    Attributes:
        measure: Function that makes a run of a mode and a load.
        memory: Function that returns the peak of the server's memory so far, in MiB.
    """

    measure: Callable[[str, float], LoadResult]
    memory: Callable[[], float]


Open = Callable[[Candidate], AbstractContextManager[Subject]]
"""Starts the server of a candidate, and ends it with the context."""


class TuneRow(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a candidate.

    Attributes:
        engine: Name of the engine.
        threads: Threads of an engine run; None for the default.
        max_batch: Largest number of images in one engine run; None if the engine was not tried.
        decode: How images are decoded; None if the engine was not tried.
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
        return str(Candidate(self.engine, self.threads, self.max_batch, self.decode))


class TuneReport(msgspec.Struct, frozen=True, kw_only=True):
    """All candidates, with what is needed to repeat the measurement.

    Attributes:
        schema: Version of this document's format.
        time: Time of writing in UTC, ISO 8601.
        command: Command line.
        seconds: Duration of the measurement in seconds.
        machine: Machine of the servers and of the load generators.
        versions: Versions of the packages that matter, by name.
        model: Name of the model.
        fingerprint: Fingerprint of the model.
        objective: The objective, such as `p99<50ms`.
        settings: Settings of the measurement, with units in their names.
        rows: Candidates, the best first.
        ended_early: Why not everything was measured, else empty.
    """

    schema: int
    time: str
    command: str
    seconds: float
    machine: Machine
    versions: dict[str, str]
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


@dataclass(slots=True, eq=False)
class _Trial:
    """What was measured of a candidate so far.

    Attributes:
        candidate: Its settings.
        latencies: Median latency of one caller in milliseconds, by round.
        rates: Images per second of several callers, by round.
        memory: Peak of the server's memory in MiB.
        dropped: Why it was dropped, else empty.
        failed: Why it failed, else empty.
        doubt: Why the rounds may show the load generator, else empty.
        runs: Runs of the search.
    """

    candidate: Candidate
    latencies: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    memory: float | None = None
    dropped: str = ""
    failed: str = ""
    doubt: str = ""
    runs: list[LoadResult] = field(default_factory=list)

    @property
    def latency(self) -> float:
        """Median over the rounds, in milliseconds."""
        return float(np.median(self.latencies))

    @property
    def rate(self) -> float:
        """Median over the rounds, in images per second."""
        return float(np.median(self.rates))

    @property
    def known(self) -> bool:
        """Whether it is still in the race and was measured at least once."""
        return not self.failed and not self.dropped and bool(self.rates)

    def row(self, objective: Objective, why_not: str) -> TuneRow:
        """Return what is known. `why_not` says why a search is missing."""
        found = objective.conclude(self.runs) if self.runs else None
        state: Literal["measured", "dropped", "unfinished", "failed"] = "measured"
        if self.failed:
            state = "failed"
        elif self.dropped:
            state = "dropped"
        elif found is None:
            state = "unfinished"
        reason = self.failed or self.dropped or ("" if found is not None else why_not)
        settings = self.candidate
        return TuneRow(
            engine=settings.engine, threads=settings.threads, max_batch=settings.max_batch,
            decode=settings.decode, state=state, reason=reason, doubt=self.doubt,
            one_caller_p50_ms=_short(self.latency) if self.latencies else None,
            closed_images_per_second=_short(self.rate) if self.rates else None,
            memory_mib=None if self.memory is None else round(self.memory, 1),
            objective=found,
        )  # fmt: skip


class Sweep:
    """Measures candidates. What was measured is kept if it is interrupted."""

    def __init__(
        self,
        candidates: Sequence[Candidate],
        objective: Objective,
        open_candidate: Open,
        *,
        rounds: int = 2,
        finalists: int = 4,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Prepare a sweep.

        Args:
            candidates: Settings to try.
            objective: Objective to meet.
            open_candidate: Function that starts the server of a candidate.
            rounds: Number of rounds before the finalists are chosen.
            finalists: Largest number of servers that run side by side.
            tell: Function that is called with a description of each step.
        """
        self._trials = [_Trial(each) for each in candidates]
        self._objective, self._open, self._tell = objective, open_candidate, tell
        self._rounds, self._finalists = rounds, finalists

    def run(self) -> None:
        """Measure all candidates."""
        for number in range(1, self._rounds + 1):
            for trial in self._trials:
                if not trial.failed and not trial.dropped:
                    self._tell(f"round {number} of {self._rounds}: {trial.candidate}")
                    self._compare(trial)
            drop_dominated(self._trials)
        self._search(choose_finalists(self._trials, self._finalists))

    def rows(self, why_not: str = "") -> list[TuneRow]:
        """Return what is known of all candidates, the best first.

        Args:
            why_not: Reason for candidates without a search that were not dropped.
        """
        return mark([trial.row(self._objective, why_not) for trial in self._trials])

    def _compare(self, trial: _Trial) -> None:
        """Measure one caller and several, and keep both or neither."""
        try:
            with self._open(trial.candidate) as subject:
                one, several = (_quoted(subject.measure("closed", n)) for n in (1, CALLERS))
                memory = subject.memory()
        except CrlError as error:
            trial.failed = str(error)
            return
        trial.latencies.append(find_figure(one.latency, 50.0).latency_ms or 0.0)
        trial.rates.append(several.images_per_second)
        trial.memory = max(memory, trial.memory or 0.0)
        trial.doubt = one.why or several.why

    def _search(self, trials: Sequence[_Trial]) -> None:
        """Search the highest rate of each finalist, run by run in turns."""
        with ExitStack() as stack:
            opened: list[tuple[_Trial, Subject]] = []
            for trial in trials:
                self._tell(f"finalist: {trial.candidate}")
                try:
                    opened.append((trial, stack.enter_context(self._open(trial.candidate))))
                except CrlError as error:
                    trial.failed = str(error)
            turns = _Turns(len(opened))
            errors: list[BaseException] = []
            threads = [
                threading.Thread(target=self._search_one, args=(number, *each, turns, errors))
                for number, each in enumerate(opened)
            ]
            for thread in threads:
                thread.start()
            try:
                for thread in threads:
                    while thread.is_alive():
                        thread.join(0.1)  # without a limit, Ctrl-C would wait
            finally:
                turns.stop()
                for thread in threads:
                    thread.join()
            if errors:
                raise errors[0]

    def _search_one(
        self,
        number: int,
        trial: _Trial,
        subject: Subject,
        turns: _Turns,
        errors: list[BaseException],
    ) -> None:
        def measure(mode: str, load: float) -> LoadResult:
            with turns.turn(number):
                self._tell(f"{trial.candidate}: {name_load(mode, load)}")
                row = subject.measure(mode, load)
                trial.runs.append(row)
            if row.failed_calls and not row.served_calls:
                raise ServiceError(f"{row.name}: {row.why}")
            return row

        try:
            search(self._objective, measure)
            trial.memory = max(subject.memory(), trial.memory or 0.0)
        except _StoppedError:
            pass
        except CrlError as error:
            trial.failed = str(error)
        except BaseException as error:  # the thread that waits raises it
            errors.append(error)
            turns.stop()
        finally:
            turns.leave(number)


class _StoppedError(Exception):
    """The searches were stopped."""


class _Turns:
    """Lets threads work one at a time, in turns."""

    def __init__(self, number: int) -> None:
        self._waiting = list(range(number))
        self._changed = threading.Condition()
        self._stopped = False

    @contextmanager
    def turn(self, number: int) -> Iterator[None]:
        """Wait for the turn of a thread; the next one follows when the block ends.

        Raises:
            _StoppedError: If the turns were stopped.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._waiting[0] == number)
            if self._stopped:
                raise _StoppedError
        try:
            yield
        finally:
            with self._changed:
                self._waiting.remove(number)
                self._waiting.append(number)
                self._changed.notify_all()

    def leave(self, number: int) -> None:
        """Take a thread out of the turns."""
        with self._changed:
            self._waiting.remove(number)
            self._changed.notify_all()

    def stop(self) -> None:
        """Let no further turn begin."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()


def list_settings(
    engines: Sequence[str], threads: Sequence[int], batches: Sequence[int], decodes: Sequence[str]
) -> list[Candidate]:
    """Return all combinations. Engines that do not run on a CPU have no number of threads.

    Args:
        engines: Names of engines.
        threads: Numbers of threads of a run on a CPU.
        batches: Largest numbers of images in one engine run.
        decodes: Ways to decode images.
    """
    return [
        Candidate(engine, number, batch, decode)
        for engine in engines
        for number in (threads if "/cpu/" in engine else (None,))
        for batch in batches
        for decode in decodes
    ]


def drop_dominated(trials: Sequence[_Trial]) -> None:
    """Drop the candidates to which another one is clearly superior in rate and in latency."""
    known = [trial for trial in trials if trial.known]
    for trial in known:
        for other in known:
            faster, shorter = other.rate / trial.rate, trial.latency / max(other.latency, 1e-9)
            if min(faster, shorter) >= _CLEARLY:
                trial.dropped = (
                    f"{other.candidate} serves {faster:.2f} times its images/s, with one caller's "
                    f"latency {shorter:.2f} times shorter"
                )
                break


def choose_finalists(trials: Sequence[_Trial], number: int) -> list[_Trial]:
    """Return the candidates to search, and drop the others that are left.

    Those that no other one beats in rate and in latency come first, then those with the highest
    rate.

    Args:
        trials: Candidates.
        number: Largest number of finalists.
    """
    known = [trial for trial in trials if trial.known]
    front = pareto([(trial.rate, trial.latency) for trial in known])
    order = sorted(range(len(known)), key=lambda i: (i not in front, -known[i].rate))
    for i in order[number:]:
        known[i].dropped = f"not among the {number} finalists, by rate and by one caller's latency"
    return [known[i] for i in order[:number]]


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


def peak_memory(pid: int) -> float:
    """Return the peak of a process's memory in MiB; outside Linux, its memory now."""
    status = Path(f"/proc/{pid}/status")
    try:
        lines = status.read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        memory: int = psutil.Process(pid).memory_info().rss
        return memory / 2**20


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
        schema=SCHEMA,
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=command,
        seconds=round(seconds, 1),
        machine=find_machine(),
        versions={
            "crl": __version__,
            "python": platform.python_version(),
            **find_versions(_PACKAGES),
        },
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


def _quoted(row: LoadResult) -> LoadResult:
    """Return a run, all of whose calls succeeded.

    Raises:
        ServiceError: If a call failed, or none ended.
    """
    failed = row.offered_calls - row.served_calls
    if not row.offered_calls:
        raise ServiceError(f"{row.name}: {row.why}")
    if failed:
        what = "; ".join(f"{name}: {text}" for name, text in row.messages.items()) or row.why
        raise ServiceError(f"{row.name}: {failed:,} of {row.offered_calls:,} calls failed ({what})")
    return row


def _short(value: float) -> float:
    return float(f"{value:.6g}")
