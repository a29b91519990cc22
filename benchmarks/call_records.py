"""The file of `crl bench --requests`: one record for each call, as JSON lines or Parquet.

Each generator process appends its records to a file of its own while it runs. The files are put
together at the end, so that what was recorded stays if a run is interrupted or a generator dies.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from crl_benchmarks.load import EndedCall
from crl_sdk.errors import InvalidInputError, MissingDependencyError
from crl_sdk.storage._atomic_files import new_file

SCHEMA = 1

_FLUSH_SECONDS = 1.0
"""A process that is killed loses the records of at most this time."""


class CallRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A call of a load generator.

    Attributes:
        run: Number of the run, from 1. A run that is repeated has a number each time.
        mode: Mode of the run, such as `closed` or `open`.
        load: Load of the run: callers (closed) or calls per second (open).
        phase: `warm_up`; `measured` if its latency counts; or `late` if a closed loop ended before
            it.
        due_seconds: When the call was due, in seconds since the start of the records. In a closed
            loop, that is when it was sent.
        sent_seconds: When it was sent.
        latency_ms: Milliseconds from the time it was due to its answer.
        outcome: `ok`, `rejected` (the server was full) or `error`.
        status: Status of the call, such as `OK` or `UNAVAILABLE`.
        images: Number of images of the call.
        criteria: Criteria of the call.
        sent_bytes: Size of the request in bytes.
        cached_share: Share of its images that the server's cache answered; None if it does not say.
        server_ms: Milliseconds that the server reports, by stage.
    """

    run: int
    mode: str
    load: float
    phase: str
    due_seconds: float
    sent_seconds: float
    latency_ms: float
    outcome: str
    status: str
    images: int
    criteria: tuple[str, ...]
    sent_bytes: int
    cached_share: float | None
    server_ms: dict[str, float]


class RecordsHeader(msgspec.Struct, frozen=True, kw_only=True):
    """What all records of a file share: its first line, or the metadata of a Parquet file.

    Attributes:
        schema: Version of the format.
        started: Time from which seconds count, in UTC, ISO 8601.
        command: Command line.
        address: Address of the server.
    """

    schema: int
    started: str
    command: str
    address: str


@dataclass(frozen=True, slots=True)
class Part:
    """Where one generator process puts the records of one run.

    Attributes:
        path: Path of its file.
        run: Number of the run.
        mode: Mode of the run.
        load: Load of the whole run.
        origin: Time from which seconds count, of `time.perf_counter`, which all processes share.
    """

    path: Path
    run: int
    mode: str
    load: float
    origin: float


class PartWriter:
    """Appends the records of one process. Use as a context manager. It never raises.

    Attributes:
        problem: Why a call could not be recorded, else empty. Later calls are not recorded then.
    """

    def __init__(self, part: Part) -> None:
        """Open the file."""
        self.problem = ""
        self._part, self._flushed = part, time.perf_counter()
        self._file: BinaryIO | None = None
        try:
            self._file = part.path.open("wb")
        except OSError as error:
            self._give_up(error)

    def __enter__(self) -> PartWriter:
        """Return the writer itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        if self._file is not None:
            try:
                self._file.close()
            except OSError as error:
                self._give_up(error)

    def __call__(self, call: EndedCall) -> None:
        """Append the record of a call."""
        if self._file is None:
            return
        part, reply = self._part, call.reply
        record = CallRecord(
            run=part.run,
            mode=part.mode,
            load=part.load,
            phase=call.phase,
            due_seconds=round(call.due - part.origin, 6),
            sent_seconds=round(call.sent - part.origin, 6),
            latency_ms=round((call.done - call.due) * 1e3, 3),
            outcome=reply.outcome,
            status=reply.why or "OK",
            images=reply.images,
            criteria=reply.criteria,
            sent_bytes=reply.sent_bytes,
            cached_share=reply.cached,
            server_ms={stage: round(value * 1e3, 3) for stage, value in reply.stages.items()},
        )
        try:
            self._file.write(msgspec.json.encode(record) + b"\n")
            if call.done - self._flushed > _FLUSH_SECONDS:
                self._file.flush()
                self._flushed = call.done
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.problem = self.problem or str(error.strerror or error)
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):
                file.close()


class CallRecords:
    """The records of a command, and the file that they are written to at the end.

    Attributes:
        failed: Whether the file could not be written, or not all calls were recorded.
    """

    def __init__(self, path: Path, *, command: str, address: str) -> None:
        """Start the clock.

        Args:
            path: File to write, ending in `.jsonl` or `.parquet`.
            command: Command line, for the header.
            address: Address of the server, for the header.
        """
        self.failed = False
        self._path, self._origin = path, time.perf_counter()
        started = datetime.now(timezone.utc).isoformat(timespec="microseconds")
        self._header = RecordsHeader(
            schema=SCHEMA, started=started, command=command, address=address
        )
        self._directory: Path | None = None
        self._runs: list[list[Part]] = []
        self._problem = ""

    def begin_run(self, mode: str, load: float, processes: int) -> list[Part]:
        """Return where each generator process of a new run puts its records.

        Raises:
            InvalidInputError: If there is no place for them.
        """
        if self._directory is None:
            try:
                made = tempfile.mkdtemp(prefix=f".{self._path.name}.parts-", dir=self._path.parent)
            except OSError as error:
                raise InvalidInputError(
                    f"{self._path}: cannot be written ({error.strerror}); choose another directory"
                ) from error
            self._directory = Path(made)
        run = len(self._runs) + 1
        parts = [
            Part(self._directory / f"{run}-{process}.jsonl", run, mode, load, self._origin)
            for process in range(processes)
        ]
        self._runs.append(parts)
        return parts

    def note_problem(self, problem: str) -> None:
        """Keep why a generator process could not record its calls; an empty text is none."""
        self._problem = self._problem or problem

    def write(self) -> int:
        """Put the records together, in the order in which the calls were due.

        Returns:
            Number of calls. No file is written if no run began.

        Raises:
            InvalidInputError: If the file cannot be written, or not all calls were recorded. The
                message names the directory that still has the records.
        """
        if self._directory is None:
            return 0
        write = _write_parquet if self._path.suffix == ".parquet" else _write_lines
        try:
            with new_file(self._path, InvalidInputError) as file:
                count = write(file, self._header, map(_read_run, self._runs))
        except InvalidInputError as error:
            self.failed = True
            raise InvalidInputError(f"{error}. The records are in {self._directory}") from error
        shutil.rmtree(self._directory, ignore_errors=True)
        if self._problem:
            self.failed = True
            raise InvalidInputError(
                f"{self._path}: not all calls were recorded ({self._problem}); "
                "choose a directory with more free space"
            )
        return count


def check_records_path(path: Path) -> None:
    """Check before any call that records can be written to a file of this name.

    Raises:
        InvalidInputError: If its suffix is another one.
        MissingDependencyError: If pyarrow is needed for `.parquet` and not installed.
    """
    if path.suffix not in (".jsonl", ".parquet"):
        raise InvalidInputError(
            f"--requests: expected a path that ends in .jsonl or .parquet, got {str(path)!r}"
        )
    if path.suffix == ".parquet":
        _pyarrow()


def _read_run(parts: Sequence[Part]) -> list[CallRecord]:
    """Return the records of a run. A line that a dying process did not finish is left out."""
    decoder = msgspec.json.Decoder(CallRecord)
    records = []
    for part in parts:
        if part.path.exists():  # a process may have died before its first call
            with part.path.open("rb") as file:
                for line in file:
                    with suppress(msgspec.DecodeError):
                        records.append(decoder.decode(line))
    return sorted(records, key=lambda record: record.due_seconds)


def _write_lines(file: BinaryIO, header: RecordsHeader, runs: Iterator[list[CallRecord]]) -> int:
    encoder, count = msgspec.json.Encoder(), 0
    file.write(encoder.encode(header) + b"\n")
    for records in runs:
        file.write(encoder.encode_lines(records))
        count += len(records)
    return count


def _write_parquet(file: BinaryIO, header: RecordsHeader, runs: Iterator[list[CallRecord]]) -> int:
    pa, parquet = _pyarrow()
    kinds = {
        "run": pa.int32(), "images": pa.int32(), "sent_bytes": pa.int64(),
        "criteria": pa.list_(pa.string()), "server_ms": pa.map_(pa.string(), pa.float64()),
        **dict.fromkeys(("mode", "phase", "outcome", "status"), pa.string()),
    }  # fmt: skip
    fields = [(name, kinds.get(name, pa.float64())) for name in CallRecord.__struct_fields__]
    schema = pa.schema(fields, metadata={"crl_bench": msgspec.json.encode(header)})
    count = 0
    with parquet.ParquetWriter(file, schema) as writer:
        for records in runs:
            rows = [
                {**msgspec.to_builtins(record), "server_ms": list(record.server_ms.items())}
                for record in records
            ]
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
            count += len(records)
    return count


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingDependencyError("pyarrow", "parquet", "writing .parquet files") from error
    return pyarrow, parquet
