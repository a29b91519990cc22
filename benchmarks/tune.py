"""Finds the settings of a server that serve a bundle best on this machine: `crl tune`.

Each candidate is a server of its own. All are measured in rounds, in turns, with one caller and
with several. Those that are clearly dominated are dropped after each round. The best of the others
become finalists, whose servers run side by side. Their searches for the highest rate that meets the
objective take turns, run by run. A machine that becomes slower meanwhile is then slower for all.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import psutil

from crl_benchmarks.bench_objective import Objective, search
from crl_benchmarks.bench_report import (
    LoadResult,
    find_figure,
    name_load,
)
from crl_benchmarks.tune_report import Candidate, TuneRow, mark, pareto
from crl_sdk.errors import CrlError, ServiceError

CALLERS = 16
"""Callers of the closed loop that compares candidates: enough to fill batches."""

_CLEARLY = 1.25
"""A candidate is dropped if another one is so many times better in rate and in latency."""


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
            decode=settings.decode, workers=settings.workers, state=state, reason=reason,
            doubt=self.doubt,
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
    engines: Sequence[str],
    threads: Sequence[int],
    batches: Sequence[int],
    decodes: Sequence[str],
    *,
    workers: Sequence[int] = (1,),
    cores: int = 1,
) -> list[Candidate]:
    """Return all combinations that make sense.

    Engines that do not run on a CPU have no number of threads. Several workers together have no
    more threads than there are cores; if all numbers of threads are too many, each worker has its
    part of the cores.

    Args:
        engines: Names of engines.
        threads: Numbers of threads of a run on a CPU.
        batches: Largest numbers of images in one engine run.
        decodes: Ways to decode images.
        workers: Numbers of processes.
        cores: Number of cores.
    """

    def threads_of(engine: str, count: int) -> Sequence[int | None]:
        if "/cpu/" not in engine:
            return (None,)
        if count == 1:
            return threads
        return [each for each in threads if each * count <= cores] or [max(cores // count, 1)]

    return [
        Candidate(engine, number, batch, decode, count)
        for engine in engines
        for count in workers
        for number in threads_of(engine, count)
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


def peak_memory(pid: int) -> float:
    """Return the peak memory of a process and its children together, in MiB.

    Outside Linux it is their memory now.
    """
    children = psutil.Process(pid).children(recursive=True)
    return _peak_memory(pid) + sum(_peak_memory(child.pid) for child in children)


def _peak_memory(pid: int) -> float:
    status = Path(f"/proc/{pid}/status")
    try:
        lines = status.read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        try:
            memory: int = psutil.Process(pid).memory_info().rss
        except psutil.NoSuchProcess:  # it has ended meanwhile
            return 0.0
        return memory / 2**20


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
