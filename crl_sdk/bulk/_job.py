"""A job: many pictures into a directory of embeddings, part by part, resumed after any end."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType

import msgspec

from crl_sdk._embedder import Embedder
from crl_sdk.basis._basis import Basis
from crl_sdk.bulk._part import (
    BASES,
    PartCounts,
    PartTask,
    make_part,
    open_job_embedder,
    part_path,
)
from crl_sdk.bulk._plan import PLAN, make_plan, read_plan
from crl_sdk.bulk._sources import ParquetColumns
from crl_sdk.errors import InvalidInputError
from crl_sdk.model._image_files import LeaveOut
from crl_sdk.model._image_formats import parse_formats
from crl_sdk.model._preprocess import Decode
from crl_sdk.projection._row_dtypes import RowDtype, require_row_dtype
from crl_sdk.storage._atomic_files import (
    make_directory,
    remove_leftovers,
    write_atomically,
    write_record,
)
from crl_sdk.stored._directory import (
    ABOUT,
    ERROR,
    MANIFEST,
    RESERVED,
    SCHEMA,
    EmbeddingDirectory,
    Manifest,
    import_pyarrow,
)

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_LOCK = "lock"

DEFAULT_PART_ROWS = 10_000
"""Largest number of rows of a part."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a job is.

    Attributes:
        rows: Number of rows so far, those of earlier runs included.
        errors: Number of images that could not be read so far.
        total: Number of rows in the end; None if an archive is among the sources.
        parts: Number of complete parts.
        all_parts: Number of parts in the end.
    """

    rows: int
    errors: int
    total: int | None
    parts: int
    all_parts: int


class BulkJob:
    """Embeds sources into a directory. Use as a context manager; a second job there is refused.

    Sources are directories, tar archives such as shards of WebDataset, Parquet files with images or
    paths, text files of paths, and image files. `BulkJob.create` lists them once. The parts are
    then made one by one, each written beside its place and renamed. After any end, `BulkJob.resume`
    goes on with the same bases, engine and batches, so that the rows are the same.

    Attributes:
        path: Directory of embeddings.
        manifest: What it holds.

    Example:
        >>> from tempfile import mkdtemp
        >>> from PIL import Image
        >>> from crl_sdk import demo_bundle
        >>> folder = Path(mkdtemp())
        >>> (folder / "pictures").mkdir()
        >>> Image.new("RGB", (96, 96)).save(folder / "pictures" / "black.png")
        >>> job = BulkJob.create(folder / "embedded", [folder / "pictures"], demo_bundle())
        >>> with job:
        ...     job.run().rows
        1
    """

    def __init__(self, path: Path, manifest: Manifest, lock: int | None) -> None:
        """Store an open job. Use `BulkJob.create` or `BulkJob.resume`."""
        self.path, self.manifest, self._lock = path, manifest, lock

    @classmethod
    def create(
        cls,
        path: Path,
        sources: Sequence[Path],
        bundle: Path,
        bases: Sequence[Basis] = (),
        *,
        engine: str = "auto",
        threads: int | None = None,
        decode: Decode = "exact",
        formats: str = "",
        dtype: RowDtype = "float32",
        batch_size: int = 32,
        part_rows: int = DEFAULT_PART_ROWS,
        columns: ParquetColumns = ParquetColumns(),  # noqa: B008 - it is frozen
        leave_out: LeaveOut = lambda _: None,
    ) -> BulkJob:
        """Begin a job: check everything, list the sources, and keep the bases.

        Args:
            path: Directory to write to: new, or empty.
            sources: Directories, `.tar` archives, `.parquet` files, `.txt` lists of paths, and
                image files.
            bundle: Model bundle.
            bases: Bases, each of which gets a column.
            engine: Engine, see `Embedder.open`.
            threads: Threads of an engine run on a CPU; None for one per core.
            decode: How images are decoded, see `crl_sdk.model.load_pixels`.
            formats: Further formats of images, such as `jpeg2000,tga`.
            dtype: Dtype of the embeddings.
            batch_size: Number of images of an engine run.
            part_rows: Largest number of rows of a part. An archive is always one part.
            columns: Columns of Parquet files; empty to look for usual names.
            leave_out: Called with each directory and file that is left out.

        Raises:
            InvalidInputError: If the directory holds something, a source is missing, there is no
                picture, a criterion has the name of another column, or an option is malformed.
            BasisMismatchError: If a basis was made for another model.
            CrlError: If the bundle or the engine cannot be opened.
        """
        check_new(path)
        if batch_size < 1 or part_rows < 1:
            raise InvalidInputError(
                f"expected batch_size and part_rows >= 1, got {batch_size} and {part_rows}"
            )
        for basis in bases:
            require_row_dtype(dtype, basis.projection.post)
            require_column_name(basis.criterion)
        with Embedder.open(bundle, engine=engine, threads=threads) as embedder:
            for basis in bases:
                embedder.add_basis(basis)
            chosen, model = embedder.engine, embedder.bundle
            dim = model.embedding_dim
        manifest = Manifest(
            schema=SCHEMA, job=uuid.uuid4().hex, model=model.manifest.name,
            fingerprint=model.fingerprint, bundle=str(Path(bundle).resolve()), engine=chosen,
            threads=threads, decode=decode, formats=formats, dtype=dtype, dim=dim,
            criteria={basis.criterion: basis.sha256() for basis in bases}, batch_size=batch_size,
            part_rows=part_rows, sources=tuple(map(os.fspath, sources)),
            directory=str(Path.cwd()), columns=(columns.image, columns.path, columns.id),
        )  # fmt: skip
        about = path / ABOUT
        make_directory(about / BASES, InvalidInputError)
        lock = _take_lock(path)
        with ExitStack() as undo:
            undo.callback(_release, lock)
            check_new(path)  # another process may have been faster
            undo.callback(shutil.rmtree, about, ignore_errors=True)
            for basis in bases:
                keep_basis(path, basis)
            job = cls(path, manifest, lock)
            job.replace_manifest(manifest)
            job._plan(leave_out)
            undo.pop_all()
        return job

    @classmethod
    def resume(cls, path: Path, leave_out: LeaveOut = lambda _: None) -> BulkJob:
        """Go on with a job that ended early. A complete one has nothing left to do.

        Args:
            path: Directory of embeddings.
            leave_out: Called with each directory and file that is left out, if the sources have not
                been listed to the end.

        Raises:
            InvalidInputError: If there is no job, another process works on it, or a part belongs to
                another job.
        """
        manifest = EmbeddingDirectory.open(path).manifest
        lock = _take_lock(path)
        try:
            manifest = EmbeddingDirectory.open(path).manifest  # as the last owner left it
            job = cls(path, manifest, lock)
            remove_leftovers(path, "part-*.parquet")
            if manifest.parts is None:
                job._plan(leave_out)
            else:
                count_parts(path, manifest)  # so that a foreign part is found before any work
        except BaseException:
            _release(lock)
            raise
        return job

    def __enter__(self) -> BulkJob:
        """Return the job itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Free the directory for other jobs."""
        self.close()

    def close(self) -> None:
        """Free the directory for other jobs. Idempotent."""
        _release(self._lock)
        self._lock = None

    def pending(self) -> Iterator[PartTask]:
        """Yield the parts that are not there yet, in order."""
        for number, unit in enumerate(read_plan(self.path / ABOUT / PLAN)):
            if not part_path(self.path, number).exists():
                yield PartTask(self.path, number, unit)

    @property
    def total(self) -> int | None:
        """Number of rows in the end; None if an archive is among the sources."""
        counts = [unit.count for unit in read_plan(self.path / ABOUT / PLAN)]
        known = [count for count in counts if count is not None]
        return sum(known) if len(known) == len(counts) else None

    def run(self, progress: Callable[[Progress], None] = lambda _: None) -> PartCounts:
        """Make all parts that are not there yet, in this process.

        Args:
            progress: Called after each batch.

        Returns:
            What all parts hold together.

        Raises:
            InvalidInputError: If a source cannot be read, or a part cannot be written. What is
                complete stays.
            EngineError: If the engine fails.
        """
        done, errors, parts = count_parts(self.path, self.manifest)
        total, all_parts = self.total, self.manifest.parts or 0
        progress(Progress(done, errors, total, parts, all_parts))
        if parts < all_parts:
            with open_job_embedder(self.path) as embedder:
                for task in self.pending():
                    before = Progress(done, errors, total, parts, all_parts)
                    counts = make_part(
                        task, embedder, self.manifest, partial(_tell, progress, before)
                    )
                    done, errors, parts = done + counts.rows, errors + counts.errors, parts + 1
        return self.finish()

    def finish(self) -> PartCounts:
        """Check that all parts are there, and note their rows.

        Raises:
            InvalidInputError: If a part is missing or belongs to another job.
        """
        missing = next(self.pending(), None)
        if missing is not None:
            raise InvalidInputError(
                f"{missing.path}: this part is missing; run the same crl embed with --resume"
            )
        remove_leftovers(self.path, "part-*.parquet")  # of kills
        rows, errors, _ = count_parts(self.path, self.manifest)
        self.replace_manifest(msgspec.structs.replace(self.manifest, rows=rows, errors=errors))
        return PartCounts(rows, errors)

    def parts(self) -> list[Path]:
        """Return the paths of the parts that are there, in order."""
        return EmbeddingDirectory(self.path, self.manifest).parts()

    def replace_manifest(self, manifest: Manifest) -> None:
        """Write another manifest."""
        write_record(self.path / ABOUT / MANIFEST, manifest, InvalidInputError)
        self.manifest = manifest

    def _plan(self, leave_out: LeaveOut) -> None:
        working = Path(self.manifest.directory)
        parts = make_plan(
            self.path / ABOUT / PLAN,
            [Path(source) for source in self.manifest.sources],
            working=working,
            formats=parse_formats(self.manifest.formats),
            part_rows=self.manifest.part_rows,
            columns=ParquetColumns(*self.manifest.columns),
            leave_out=leave_out,
        )
        self.replace_manifest(msgspec.structs.replace(self.manifest, parts=parts))


def _tell(progress: Callable[[Progress], None], before: Progress, part: PartCounts) -> None:
    progress(replace(before, rows=before.rows + part.rows, errors=before.errors + part.errors))


def check_new(path: Path) -> None:
    """Check that a job can begin in a directory.

    Raises:
        InvalidInputError: If it holds something, or is a file.
    """
    if (path / ABOUT / MANIFEST).exists():
        raise InvalidInputError(
            f"{path}: holds a job already; go on with --resume, or choose another directory"
        )
    if path.exists() and not path.is_dir():
        raise InvalidInputError(f"{path}: expected a new directory, found a file; choose another")
    if path.is_dir() and any(entry.name != ABOUT for entry in path.iterdir()):
        raise InvalidInputError(f"{path}: expected an empty directory; choose another")


def require_column_name(criterion: str) -> None:
    """Check that a criterion can name a column.

    Raises:
        InvalidInputError: If another column has this name.
    """
    if criterion in RESERVED:
        raise InvalidInputError(
            f"the criterion {criterion!r} has the name of another column: make its basis under "
            "another name, with crl basis create"
        )


def keep_basis(path: Path, basis: Basis) -> None:
    """Keep a basis beside the parts that it is used for."""
    write_atomically(
        path / ABOUT / BASES / f"{basis.sha256()}.safetensors", basis.to_bytes(), InvalidInputError
    )


def count_parts(path: Path, manifest: Manifest) -> tuple[int, int, int]:
    """Return the numbers of rows, errors and parts that are there.

    Raises:
        InvalidInputError: If a part is damaged or belongs to another job.
    """
    pa, parquet = import_pyarrow("reading .parquet files")
    rows = errors = parts = 0
    for part in EmbeddingDirectory(path, manifest).parts():
        try:
            found = parquet.read_metadata(part)
        except (pa.ArrowException, OSError) as error:
            raise InvalidInputError(
                f"{part}: not a readable part ({error}); delete it and run the same crl embed with "
                "--resume"
            ) from error
        job = (found.metadata or {}).get(b"crl_job", b"").decode()
        if job != manifest.job:
            raise InvalidInputError(
                f"{part}: belongs to another job; move it away, and run the same crl embed with "
                "--resume"
            )
        rows += found.num_rows
        parts += 1
        for group in range(found.num_row_groups):
            each = found.row_group(group)
            leaf = next(
                each.column(i)
                for i in range(each.num_columns)
                if each.column(i).path_in_schema == ERROR
            )
            errors += each.num_rows - leaf.statistics.null_count
    return rows, errors, parts


def _take_lock(path: Path) -> int | None:
    if fcntl is None:
        return None
    lock = os.open(path / ABOUT / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise InvalidInputError(
            f"{path}: another process works on this job; wait for it, or choose another directory"
        ) from error
    return lock


def _release(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)
