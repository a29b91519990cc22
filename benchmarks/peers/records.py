"""The report of a comparison with peers, and its file."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import msgspec

from crl_sdk.engines._ranking import RankedEngine
from crl_sdk.errors import InvalidInputError

SCHEMA = 1


class Environment(msgspec.Struct, frozen=True, kw_only=True):
    """A virtual environment of a peer.

    Attributes:
        name: Name of the environment.
        python: Version of Python.
        versions: Versions of the packages that matter, by name.
        seconds: Time that creating it took; 0 if it existed.
        skipped: Reason why it could not be created, else empty.
    """

    name: str
    python: str = ""
    versions: dict[str, str] = {}
    seconds: float = 0.0
    skipped: str = ""


class EngineRow(msgspec.Struct, frozen=True, kw_only=True):
    """An engine in a process of its own.

    Attributes:
        name: Name of the peer.
        environment: Name of its virtual environment.
        ours: Whether it is an engine of crl.
        precision: Requested precision.
        settings: Settings chosen for speed.
        skipped: Reason why there is no measurement, else empty.
        cosine_mean: Mean cosine with the reference over the checked images.
        cosine_min: Smallest cosine with the reference over the checked images.
        centred_cosine_min: Smallest cosine after the mean embedding is subtracted from both.
        void: Reason why the row does not count, else empty.
        start_seconds: Time from the start of the process to its first embedding.
        peak_bytes: Peak memory of the process.
        rounds: Medians of the rounds in milliseconds, by kind of work: `decode`, `image` (decoding
            and running one image), `run N` (a batch of N decoded images), `embed N` (JPEGs in
            batches of N, decoding included; time per image).
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
        """Whether it was measured and agrees with the reference."""
        return not self.skipped and not self.void

    def ms(self, work: str) -> float | None:
        """Return the median over the rounds in milliseconds, or None if it was not measured."""
        return statistics.median(self.rounds[work]) if self.rounds.get(work) else None

    def per_second(self, work: str) -> float | None:
        """Return the images per second of `run N` or `embed N`, or None if it was not measured."""
        ms = self.ms(work)
        if ms is None:
            return None
        kind, batch = work.split()
        return 1e3 / ms * (int(batch) if kind == "run" else 1)


class ServiceRun(msgspec.Struct, frozen=True, kw_only=True):
    """A load on a service.

    Attributes:
        mode: `closed` or `open`.
        load: Number of callers (closed) or calls per second (open).
        share: The rate as a share of PyTriton's saturation, if it was chosen so.
        offered: Number of calls that were due, over all rounds.
        failed: Number of calls that were refused or failed.
        per_second: Images served per second, median of the rounds.
        p50_ms: Median latency over the calls of all rounds. A failed call counts as infinite.
        p99_ms: 99th percentile of the latency over the calls of all rounds.
        p99_low_ms: Lower end of the 95 % interval of `p99_ms`.
        p99_high_ms: Upper end of the 95 % interval of `p99_ms`.
        rounds_p50_ms: Median latency of each round.
        generator_cpu: Largest share of a core that the load generator used.
        generator_lag_ms: 90th percentile of the lateness of the generator's event loop.
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
        name: Name of the peer.
        environment: Name of its virtual environment.
        ours: Whether it is a service of crl.
        precision: Requested precision.
        settings: Settings chosen for speed.
        skipped: Reason why there is no measurement, else empty.
        cosine_min: Smallest cosine with the reference over the checked images.
        void: Reason why the row does not count, else empty.
        start_seconds: Time from each start to the first embedding that a client receives.
        peak_bytes: Sum of the peak memory of all its processes.
        runs: Measurements, one per load.
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
        """Whether it was measured and agrees with the reference."""
        return not self.skipped and not self.void

    @property
    def saturation(self) -> float:
        """Highest images per second of the closed loops; 0 without one."""
        return max((run.per_second for run in self.runs if run.mode == "closed"), default=0.0)

    def find(self, mode: str, load: float) -> ServiceRun | None:
        """Return the measurement of a load, or None."""
        return next((run for run in self.runs if (run.mode, run.load) == (mode, load)), None)


class TargetResult(msgspec.Struct, frozen=True, kw_only=True):
    """Whether a target was reached.

    Attributes:
        target: Description of the target.
        measured: Measured value, in the unit of `required`.
        required: Required value.
        at_least: Whether `required` is a minimum; otherwise it is a maximum.
        unit: Unit of both values, such as `x` or `ms`.
        against: Peer or load that was compared with.
        missing: Reason why the target could not be measured, else empty.
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
        """Whether the target was reached; None if it could not be measured."""
        if self.measured is None or math.isnan(self.measured):
            return None
        return self.measured >= self.required if self.at_least else self.measured <= self.required

    @property
    def outcome(self) -> str:
        """`held`, `missed by 4 %`, or the reason why it could not be measured."""
        if self.held is None or self.measured is None:
            return f"not measured: {self.missing or 'no peer to compare with'}"
        if self.held:
            return "held"
        return f"missed by {abs(self.measured / self.required - 1):.1%}"


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """A comparison with peers.

    Attributes:
        schema: Version of this document's format.
        time: Time of writing in UTC, ISO 8601.
        seconds: Duration of the run.
        command: Command that made it.
        commit: Commit of the repository, followed by `+` if files were changed.
        machine: Properties of the machine.
        settings: Settings of the run.
        environments: Environments of crl and of the peers.
        engines: Measurements of engines.
        services: Measurements of services.
        targets: Results of the targets. The file calls them `verdicts`.
        ranking: Engines of crl as `crl verify --all` measured them before; `auto` takes the first.
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
    targets: tuple[TargetResult, ...] = msgspec.field(default=(), name="verdicts")
    ranking: tuple[RankedEngine, ...] = ()


def read_report(path: Path) -> Report:
    """Read a report.

    Raises:
        InvalidInputError: If the file is missing or has another format.
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
    """Return their time divided by ours, per round. Above 1 means that ours is faster."""
    return [their / our for our, their in zip(ours, theirs, strict=False)]
