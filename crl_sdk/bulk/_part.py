"""One part of a job: its pictures are read, embedded and written to a Parquet file."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crl_sdk._embedder import Embedder
from crl_sdk._embeddings import Embeddings
from crl_sdk.basis._basis import Basis
from crl_sdk.bulk._plan import PLAN, Unit, read_unit
from crl_sdk.bulk._sources import Picture
from crl_sdk.errors import ImageError, InvalidInputError
from crl_sdk.model._bundle import ModelBundle
from crl_sdk.model._image_formats import parse_formats
from crl_sdk.model._preprocess import ImageLimits
from crl_sdk.projection._row_dtypes import encode_rows
from crl_sdk.storage._atomic_files import new_file
from crl_sdk.stored._directory import (
    ABOUT,
    ERROR,
    ID,
    PATH,
    UNIVERSAL,
    EmbeddingDirectory,
    Manifest,
    import_pyarrow,
)

_GROUP_ROWS = 2048
"""Number of rows of a row group, which is in memory until it is written."""

BASIS_VERSION = "crl_basis:"
"""Beginning of the names under which a part keeps the SHA-256 of the basis of each criterion."""

BASES = "bases"
"""Name of the directory of the job's bases, in `_crl`."""


@dataclass(frozen=True, slots=True)
class PartCounts:
    """What a part holds.

    Attributes:
        rows: Number of rows.
        errors: Number of images that could not be read.
    """

    rows: int
    errors: int


@dataclass(frozen=True, slots=True)
class PartTask:
    """What a process needs to make a part; it can be pickled.

    Attributes:
        directory: Directory of embeddings. The process must see it, and all sources, at this path.
        number: Number of the part.
        unit: Its unit of the plan.
    """

    directory: Path
    number: int
    unit: Unit

    @property
    def path(self) -> Path:
        """Path of the part."""
        return part_path(self.directory, self.number)


def part_path(directory: Path, number: int) -> Path:
    """Return the path of a part."""
    return directory / f"part-{number:05d}.parquet"


def open_job_embedder(directory: Path) -> Embedder:
    """Open the model of a job with its engine and bases, as every process that makes parts does.

    Raises:
        InvalidInputError: If the directory holds no job, or the bundle is another one now.
        CrlError: If the bundle, the engine or a basis cannot be opened.
    """
    manifest = EmbeddingDirectory.open(directory).manifest
    bundle = ModelBundle.open(Path(manifest.bundle))
    if bundle.fingerprint != manifest.fingerprint:
        raise InvalidInputError(
            f"{directory}: was begun with the model {manifest.fingerprint[:12]}, and "
            f"{manifest.bundle} holds {bundle.fingerprint[:12]} now: embed into a new directory"
        )
    embedder = Embedder.open(
        bundle, engine=manifest.engine, threads=manifest.threads, decode=manifest.decode,
        limits=ImageLimits(formats=parse_formats(manifest.formats)),
    )  # fmt: skip
    try:
        for name, sha256 in manifest.criteria.items():
            embedder.add_basis(load_job_basis(directory, name, sha256))
    except BaseException:
        embedder.close()
        raise
    return embedder


def load_job_basis(directory: Path, criterion: str, sha256: str) -> Basis:
    """Return the basis that a job uses for a criterion, whatever became of it elsewhere.

    Raises:
        InvalidInputError: If it is another one than the job began with.
    """
    path = directory / ABOUT / BASES / f"{sha256}.safetensors"
    basis = Basis.load(path)
    if basis.sha256() != sha256 or basis.criterion != criterion:
        raise InvalidInputError(f"{path}: was changed; embed into a new directory")
    return basis


def make_part(
    task: PartTask,
    embedder: Embedder,
    manifest: Manifest,
    progress: Callable[[PartCounts], None] = lambda _: None,
) -> PartCounts:
    """Make a part, unless it is there.

    Args:
        task: Part to make.
        embedder: Model with the bases of the job, from `open_job_embedder`.
        manifest: Manifest of the job.
        progress: Called after each batch with what the part holds so far.

    Raises:
        InvalidInputError: If a source or the plan cannot be read, or the part cannot be written.
        EngineError: If the engine fails.
    """
    formats = embedder.limits.formats
    pictures = read_unit(
        task.directory / ABOUT / PLAN, task.unit, working=Path(manifest.directory), formats=formats
    )
    waiting: deque[Picture] = deque()
    rows = errors = 0
    criteria = list(manifest.criteria)
    with (
        new_file(task.path, InvalidInputError) as file,
        PartWriter(file, embedder, manifest, task.number) as writer,
    ):
        for batch in embedder.embed_batches(
            _remember(pictures, waiting), criteria, batch_size=manifest.batch_size
        ):
            taken = [waiting.popleft() for _ in range(len(batch.universal))]
            writer.write(taken, batch)
            rows += len(taken)
            errors += len(batch.errors)
            progress(PartCounts(rows, errors))
    return PartCounts(rows, errors)


def _remember(
    pictures: Iterator[Picture], waiting: deque[Picture]
) -> Iterator[Path | bytes | ImageError]:
    for picture in pictures:
        waiting.append(Picture(picture.id, picture.path, b""))  # without its bytes
        yield picture.image


class PartWriter:
    """Writes the rows of a part in groups. Use as a context manager."""

    def __init__(self, file: Any, embedder: Embedder, manifest: Manifest, number: int) -> None:
        """Begin a part.

        Args:
            file: File to write to.
            embedder: Model with the bases of the job.
            manifest: Manifest of the job.
            number: Number of the part.
        """
        self._pa, self._parquet = import_pyarrow("writing .parquet files")
        self._dtype = manifest.dtype
        sizes = {UNIVERSAL: manifest.dim}
        for name in manifest.criteria:
            sizes[name] = embedder.bases[name].projection.output_dim
        self._schema = part_schema(self._pa, manifest, sizes, number)
        self._writer = open_writer(self._parquet, file, self._schema)
        self._columns: list[dict[str, Any]] = []
        self._rows = 0

    def write(self, pictures: Sequence[Picture], batch: Embeddings) -> None:
        """Add the rows of a batch.

        Args:
            pictures: Pictures of the batch.
            batch: Their embeddings.
        """
        self._columns.append(
            {
                ID: [picture.id for picture in pictures],
                PATH: [picture.path for picture in pictures],
                ERROR: [_reason(batch.errors.get(i)) for i in range(len(pictures))],
                UNIVERSAL: batch.universal,
                **batch.conditional,
            }
        )
        self._rows += len(pictures)
        if self._rows >= _GROUP_ROWS:
            self._flush()

    def __enter__(self) -> PartWriter:
        """Return the writer itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Write what is left and the end of the file, unless the block failed."""
        if error is not None:
            with suppress(Exception):  # or it closes itself later, when there is no file
                self._writer.close()
            return
        if self._rows:
            self._flush()
        self._writer.close()

    def _flush(self) -> None:
        columns = []
        for field in self._schema:
            parts = [each[field.name] for each in self._columns]
            if field.name in (ID, PATH, ERROR):
                columns.append(self._pa.array(list(chain(*parts)), field.type))
            else:
                columns.append(list_column(self._pa, np.concatenate(parts), self._dtype))
        self._writer.write_table(self._pa.table(columns, schema=self._schema))
        self._columns, self._rows = [], 0


def open_writer(parquet: Any, file: Any, schema: Any) -> Any:
    """Return a writer of a part.

    Args:
        parquet: `pyarrow.parquet`.
        file: File to write to.
        schema: Schema of the part.
    """
    return parquet.ParquetWriter(
        file, schema, compression="zstd", use_dictionary=[PATH, ERROR],
        write_statistics=[ID, PATH, ERROR],
    )  # fmt: skip


def part_schema(pa: Any, manifest: Manifest, sizes: dict[str, int], number: int) -> Any:
    """Return the schema of a part.

    Args:
        pa: `pyarrow`.
        manifest: Manifest of the job.
        sizes: Lengths of the embeddings, by column.
        number: Number of the part.
    """
    number_type = pa.from_numpy_dtype(np.dtype(manifest.dtype))
    return pa.schema(
        [
            pa.field(ID, pa.string(), nullable=False),
            pa.field(PATH, pa.string(), nullable=False),
            *(pa.field(name, pa.list_(number_type, size)) for name, size in sizes.items()),
            pa.field(ERROR, pa.string()),
        ],
        metadata={
            "crl_fingerprint": manifest.fingerprint, "crl_job": manifest.job,
            "crl_part": str(number),
            **{f"{BASIS_VERSION}{name}": sha256 for name, sha256 in manifest.criteria.items()},
        },
    )  # fmt: skip


def list_column(pa: Any, rows: NDArray[np.float32], dtype: str) -> Any:
    """Return embeddings as a column of lists of one length. Rows of NaN become null.

    Args:
        pa: `pyarrow`.
        rows: Embeddings, shape (n, m), float32.
        dtype: Dtype of the column.
    """
    failed = np.isnan(rows).any(axis=1)
    values = pa.array(encode_rows(rows, dtype).ravel())
    mask = pa.array(failed) if failed.any() else None
    return pa.FixedSizeListArray.from_arrays(values, rows.shape[1], mask=mask)


def _reason(error: ImageError | None) -> str | None:
    return None if error is None else error.reason
