"""Directories of stored embeddings: parts in Parquet, and what describes them.

`crl embed --out DIR` writes them (`crl_sdk.bulk`). The parts lie in the directory itself and can be
read by anything that reads Parquet. What describes them lies in `_crl`, which readers of Parquet
leave out because of its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from crl_sdk.errors import InvalidInputError, MissingDependencyError
from crl_sdk.model._preprocess import Decode
from crl_sdk.projection._row_dtypes import RowDtype
from crl_sdk.storage._atomic_files import read_record

ABOUT = "_crl"
"""Name of the directory that describes the parts."""

MANIFEST = "manifest.json"
"""Name of the description, in `ABOUT`."""

PART_PATTERN = "part-*.parquet"
"""Pattern of the names of the parts."""

SCHEMA = 1

ID, PATH, UNIVERSAL, ERROR = "id", "path", "universal", "error"
"""Names of columns. The others are criteria, which cannot have these names."""

RESERVED = frozenset({ID, PATH, UNIVERSAL, ERROR})

_REMEDY = "expected a directory that crl embed --out wrote"


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a directory of embeddings holds, and how it is made.

    Attributes:
        schema: Version of this format.
        job: Random identifier of the job, which every part repeats.
        model: Name of the model.
        fingerprint: Fingerprint of the model.
        bundle: Path of the bundle.
        engine: Name of the engine, such as `onnx/cpu/int8`.
        threads: Threads of an engine run on a CPU; None for one per core.
        decode: How images are decoded.
        formats: Further formats of images.
        dtype: Dtype of the embeddings.
        dim: Length of a universal embedding.
        criteria: SHA-256 of the basis of each criterion. The bases are kept in `_crl/bases`.
        batch_size: Number of images of an engine run.
        part_rows: Largest number of rows of a part, except for those of a tar archive.
        sources: What was embedded, as on the command line.
        directory: Working directory, to which `sources` and the paths in them are relative.
        columns: Names of the columns of Parquet sources: image, path and id; empty for the default.
        parts: Number of parts; None while the sources are being listed.
        rows: Number of rows; None until all parts are written.
        errors: Number of images that could not be read; None until all parts are written.
    """

    schema: int
    job: str
    model: str
    fingerprint: str
    bundle: str
    engine: str
    threads: int | None
    decode: Decode
    formats: str
    dtype: RowDtype
    dim: int
    criteria: dict[str, str]
    batch_size: int
    part_rows: int
    sources: tuple[str, ...]
    directory: str
    columns: tuple[str, str, str] = ("", "", "")
    parts: int | None = None
    rows: int | None = None
    errors: int | None = None


@dataclass(frozen=True, slots=True)
class EmbeddingDirectory:
    """A directory of embeddings.

    Attributes:
        path: Path of the directory.
        manifest: What it holds.
    """

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path) -> EmbeddingDirectory:
        """Open a directory, complete or not.

        Raises:
            InvalidInputError: If it is not a directory of embeddings.
        """
        file = path / ABOUT / MANIFEST
        manifest = read_record(file, Manifest, SCHEMA, InvalidInputError, _REMEDY)
        return cls(path, manifest)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the model."""
        return self.manifest.fingerprint

    @property
    def criteria(self) -> tuple[str, ...]:
        """Criteria that have a column in every part."""
        return tuple(self.manifest.criteria)

    def parts(self) -> list[Path]:
        """Return the paths of the parts that are there, in order."""
        found = self.path.glob(PART_PATTERN)
        return sorted(found, key=lambda path: (len(path.name), path.name))

    def require_complete(self) -> None:
        """Check that all parts are there.

        Raises:
            InvalidInputError: If the job has not ended, or a part is missing.
        """
        found, expected = len(self.parts()), self.manifest.parts
        if expected is None or found != expected or self.manifest.rows is None:
            raise InvalidInputError(
                f"{self.path}: expected {'all' if expected is None else expected} parts, found "
                f"{found}: the job has not ended; run the same crl embed with --resume"
            )

    def batches(self, columns: Sequence[str], *, rows: int = 4096) -> Iterator[Any]:
        """Yield rows in order, those of failed images included, whose embeddings are null.

        Args:
            columns: Names of columns: `id`, `path`, `universal`, `error` or criteria.
            rows: Largest number of rows of a batch.

        Yields:
            Record batches of pyarrow.

        Raises:
            InvalidInputError: If a part is damaged or lacks a column.
            MissingDependencyError: If pyarrow is not installed.
        """
        for part in self.parts():
            pa, parquet = import_pyarrow("reading .parquet files")
            try:
                with parquet.ParquetFile(part, pre_buffer=False) as opened:
                    missing = sorted(set(columns) - set(opened.schema_arrow.names))
                    if missing:
                        raise InvalidInputError(
                            f"{part}: expected a column {missing[0]!r}, found "
                            f"{opened.schema_arrow.names}"
                        )
                    yield from opened.iter_batches(batch_size=rows, columns=list(columns))
            except (pa.ArrowException, OSError) as error:
                raise _damaged(part, error) from error

    def read(self) -> tuple[NDArray[Any], list[str]]:
        """Return all universal embeddings and the names of their rows, without failed images.

        Returns:
            Embeddings, shape (n, d), of the dtype of the directory; and n ids.

        Raises:
            InvalidInputError: If a part is missing or damaged.
            MissingDependencyError: If pyarrow is not installed.
        """
        self.require_complete()
        arrays: list[NDArray[Any]] = [np.zeros((0, self.manifest.dim), self.manifest.dtype)]
        names: list[str] = []
        for batch in self.batches([ID, UNIVERSAL]):
            good = batch.filter(batch.column(UNIVERSAL).is_valid())
            arrays.append(to_numpy(good.column(UNIVERSAL)))
            names += good.column(ID).to_pylist()
        return np.concatenate(arrays), names


def to_numpy(column: Any) -> NDArray[Any]:
    """Return a column of lists of one length, without nulls, as an array of shape (n, m)."""
    values = column.flatten().to_numpy(zero_copy_only=False)
    rows: NDArray[Any] = values.reshape(len(column), column.type.list_size)
    return rows


def import_pyarrow(purpose: str) -> tuple[Any, Any]:
    """Return `pyarrow` and `pyarrow.parquet`.

    Raises:
        MissingDependencyError: If pyarrow is not installed.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingDependencyError("pyarrow", "parquet", purpose) from error
    return pyarrow, parquet


def _damaged(part: Path, error: Exception) -> InvalidInputError:
    return InvalidInputError(
        f"{part}: not a readable part ({error}); delete it and run the same crl embed with --resume"
    )
