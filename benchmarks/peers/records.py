"""What a run against peers writes down, and reads back for the README."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import msgspec

from crl_sdk.errors import InvalidInputError

SCHEMA = 1


class Environment(msgspec.Struct, frozen=True, kw_only=True):
    """A virtual environment of a peer.

    Attributes:
        name: of it.
        python: version.
        versions: of the packages that matter, as `pip freeze` tells.
        seconds: that making it took; 0 if it was there.
        skipped: why there is none, else empty.
    """

    name: str
    python: str = ""
    versions: dict[str, str] = {}
    seconds: float = 0.0
    skipped: str = ""


class EngineRow(msgspec.Struct, frozen=True, kw_only=True):
    """An engine in a process of its own.

    Attributes:
        name: of the peer.
        environment: its virtual environment.
        ours: whether it is crl's.
        precision: asked for.
        settings: what was chosen for speed.
        skipped: why there is no measurement, else empty.
        cosine_mean: with the reference, over the check pictures.
        cosine_min: likewise.
        centred_cosine_min: likewise, once the mean embedding is taken off both.
        void: why the row does not count, else empty.
        start_seconds: from the start of the process to its first embedding.
        peak_bytes: most memory the process held.
        rounds: milliseconds, the median of each round, by kind of work: `decode`, `image` (decoding
            and running one), `run N` (N images whose pixels are ready), `embed N` (from JPEGs to
            rows in batches of N, per image).
    """

    name: str
    environment: str
    ours: bool = False
    precision: str = "fp32"
    settings: str = ""
    skipped: str = ""
    cosine_mean: float | None = None
    cosine_min: float | None = None
    centred_cosine_min: float | None = None
    void: str = ""
    start_seconds: float | None = None
    peak_bytes: int | None = None
    rounds: dict[str, tuple[float, ...]] = {}

    @property
    def counts(self) -> bool:
        """Whether it was measured and agrees."""
        return not self.skipped and not self.void

    def ms(self, work: str) -> float | None:
        """Give the median over the rounds, in milliseconds; None where it was not measured."""
        return statistics.median(self.rounds[work]) if self.rounds.get(work) else None

    def per_second(self, work: str) -> float | None:
        """Give images per second of `run N` or `embed N`."""
        ms = self.ms(work)
        if ms is None:
            return None
        kind, batch = work.split()
        return 1e3 / ms * (int(batch) if kind == "run" else 1)


class ServiceRun(msgspec.Struct, frozen=True, kw_only=True):
    """A load on a service.

    Attributes:
        mode: `closed` or `open`.
        load: callers, or calls a second.
        share: of PyTriton's saturation, where the rate was chosen so.
        offered: calls that were due, over all rounds.
        failed: calls that were refused or went wrong.
        per_second: images served, median of the rounds.
        p50_ms: over the calls of all rounds; a failed one counts as one that took forever.
        p99_ms: likewise.
        p99_low_ms: of the 95 % interval.
        p99_high_ms: likewise.
        rounds_p50_ms: of each round.
        generator_cpu: largest share of a core that the generator used.
        generator_lag_ms: how late its event loop woke, at p90.
    """

    mode: str
    load: float
    share: float | None = None
    offered: int
    failed: int
    per_second: float
    p50_ms: float | None
    p99_ms: float | None
    p99_low_ms: float | None = None
    p99_high_ms: float | None = None
    rounds_p50_ms: tuple[float | None, ...] = ()
    generator_cpu: float = 0.0
    generator_lag_ms: float = 0.0


class ServiceRow(msgspec.Struct, frozen=True, kw_only=True):
    """A service.

    Attributes:
        name: of the peer.
        environment: its virtual environment.
        ours: whether it is crl's.
        precision: asked for.
        settings: what was chosen for speed.
        skipped: why there is no measurement, else empty.
        cosine_min: with the reference, over the check pictures.
        void: why the row does not count, else empty.
        start_seconds: from the start to the first embedding that a client gets, of each start.
        peak_bytes: most memory of all its processes, added up.
        runs: the loads.
    """

    name: str
    environment: str
    ours: bool = False
    precision: str = "fp32"
    settings: str = ""
    skipped: str = ""
    cosine_min: float | None = None
    void: str = ""
    start_seconds: tuple[float, ...] = ()
    peak_bytes: int | None = None
    runs: tuple[ServiceRun, ...] = ()

    @property
    def counts(self) -> bool:
        """Whether it was measured and agrees."""
        return not self.skipped and not self.void

    @property
    def saturation(self) -> float:
        """Images per second at most, of the closed loops; 0 where there was none."""
        return max((run.per_second for run in self.runs if run.mode == "closed"), default=0.0)

    def find(self, mode: str, load: float) -> ServiceRun | None:
        """Give the run of a load."""
        return next((run for run in self.runs if (run.mode, run.load) == (mode, load)), None)


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """Whether a target was held.

    Attributes:
        target: in words.
        measured: what was measured, in the unit of `required`.
        required: what it had to be.
        at_least: whether it had to be at least so much; else at most.
        unit: such as `x`, `ms`; empty for a ratio.
        against: whom, or under what load.
        missing: why nothing could be said, else empty.
    """

    target: str
    measured: float | None = None
    required: float = 1.0
    at_least: bool = True
    unit: str = "x"
    against: str = ""
    missing: str = ""

    @property
    def held(self) -> bool | None:
        """Whether it was held; None where nothing could be said."""
        if self.measured is None or math.isnan(self.measured):
            return None
        return self.measured >= self.required if self.at_least else self.measured <= self.required

    @property
    def told(self) -> str:
        """`held`, `missed by 4 %`, or why nothing can be said."""
        if self.held is None or self.measured is None:
            return f"not measured: {self.missing or 'no peer to compare with'}"
        if self.held:
            return "held"
        return f"missed by {abs(self.measured / self.required - 1):.1%}"


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """A run against peers.

    Attributes:
        schema: of this document.
        time: when it was made, UTC.
        seconds: it took.
        command: that made it.
        commit: of the repository, with `+` if files were changed.
        machine: its properties.
        settings: of the run.
        environments: of the peers and of crl.
        engines: in process.
        services: over the wire.
        verdicts: the targets.
    """

    schema: int
    time: str
    seconds: float
    command: str
    commit: str
    machine: dict[str, str]
    settings: dict[str, str]
    environments: tuple[Environment, ...]
    engines: tuple[EngineRow, ...]
    services: tuple[ServiceRow, ...]
    verdicts: tuple[Verdict, ...] = ()


def read_report(path: Path) -> Report:
    """Read a report.

    Raises:
        InvalidInputError: there is none, or it is of another form.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=Report)
    except (OSError, msgspec.MsgspecError) as error:
        raise InvalidInputError(f"{path}: expected a report of `make bench-peers`: {error}") from (
            error
        )


def write_report(report: Report, path: Path) -> None:
    """Write a report as indented JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Give how often ours fits into theirs, round by round: above 1 means that ours is faster."""
    return [their / our for our, their in zip(ours, theirs, strict=False)]
