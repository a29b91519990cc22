"""Rows of stored embeddings, batch by batch, with the ids under which they go into a store."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crl_sdk.errors import InvalidInputError
from crl_sdk.projection._row_dtypes import decode_rows
from crl_sdk.stored._directory import (
    ABOUT,
    ID,
    PART_PATTERN,
    PATH,
    UNIVERSAL,
    EmbeddingDirectory,
    import_pyarrow,
    to_numpy,
)
from crl_sdk.stored._reader import StoredEmbeddings

_PURPOSE = "reading .parquet files"

_HASHES_PER_PASS = 1 << 24
"""Ids whose hashes are held at once to find ids that occur twice: 128 MB."""


@dataclass(frozen=True, slots=True, eq=False)
class RowBatch:
    """Some rows of stored embeddings.

    Attributes:
        ids: Ids.
        paths: Paths of the images.
        universal: Universal embeddings, shape (n, d), float32; NaN where an image failed.
    """

    ids: list[str]
    paths: list[str]
    universal: NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class StoredRows:
    """Stored embeddings that are read batch by batch.

    The id of a row is its column `id`, else its path, else `row 3`.

    Attributes:
        path: File or directory.
        fingerprint: Fingerprint of the model that made them; None if the files do not say.
        dim: Length d of the universal embeddings.
        files: Parquet files in order. Empty for an array.
        array: The memory-mapped array, shape (n, d); None for Parquet files.
        names: Paths of the rows of the array; empty if they are unknown.
        size: Number of rows.
    """

    path: Path
    fingerprint: str | None
    dim: int
    size: int
    files: tuple[Path, ...] = ()
    array: NDArray[Any] | None = None
    names: tuple[str, ...] = ()

    @classmethod
    def open(cls, path: Path) -> StoredRows:
        """Open a file or directory of `crl embed`, an array, or other `part-*.parquet` files.

        Raises:
            InvalidInputError: If it is not complete or cannot be read, or its parts are of several
                models.
            MissingDependencyError: If pyarrow is needed and not installed.
        """
        if (path / ABOUT).is_dir():
            directory = EmbeddingDirectory.open(path)
            directory.require_complete()
            return cls._open_parquet(path, tuple(directory.parts()))
        if path.is_dir():
            files = tuple(sorted(path.glob(PART_PATTERN)))
            if not files:
                raise InvalidInputError(
                    f"{path}: expected a directory of {PART_PATTERN}, as crl embed --out DIR "
                    "writes, found none"
                )
            return cls._open_parquet(path, files)
        if path.suffix == ".parquet":
            return cls._open_parquet(path, (path,))
        stored = StoredEmbeddings.open(path)
        rows, dim = stored.embeddings.shape
        names: tuple[str, ...] = ()
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                if PATH in arrays.files and len(arrays[PATH]) == rows:
                    names = tuple(map(str, arrays[PATH]))
        return cls(path, stored.fingerprint, dim, rows, (), stored.embeddings, names)

    @classmethod
    def _open_parquet(cls, path: Path, files: tuple[Path, ...]) -> StoredRows:
        _, parquet = import_pyarrow(_PURPOSE)
        prints, dims, size = set(), set(), 0
        for file in files:
            with _reading(file), parquet.ParquetFile(file) as opened:
                schema = opened.schema_arrow
                if UNIVERSAL not in schema.names:
                    raise InvalidInputError(f"expected a column {UNIVERSAL!r}, got {schema.names}")
                kind = schema.field(UNIVERSAL).type
                if not hasattr(kind, "list_size"):
                    raise InvalidInputError(
                        f"expected a column {UNIVERSAL!r} of lists of one length, got {kind}"
                    )
                found = (schema.metadata or {}).get(b"crl_fingerprint")
                prints.add(found.decode() if found else None)
                dims.add(kind.list_size)
                size += opened.metadata.num_rows
        if len(prints) > 1 or len(dims) > 1:
            raise InvalidInputError(
                f"{path}: parts are of {len(prints)} models and of {sorted(dims)} values a row: "
                "keep the parts of one model in a directory"
            )
        return cls(path, prints.pop(), dims.pop(), size, files)

    def batches(self, size: int) -> Iterator[RowBatch]:
        """Yield the rows in order, at most `size` at once."""
        if self.array is not None:
            for start in range(0, self.size, size):
                block = np.asarray(self.array[start : start + size])
                paths = list(self.names[start : start + size]) or _numbered(start, len(block))
                yield RowBatch(paths, paths, decode_rows(block))
            return
        first = 0
        for file, batch in self._arrow_batches([ID, PATH, UNIVERSAL], size):
            ids, paths = _names(file, batch, first)
            with _reading(file):
                yield RowBatch(ids, paths, _dense(batch.column(UNIVERSAL)))
            first += len(ids)

    def ids(self) -> Iterator[str]:
        """Yield the id of each row, in order."""
        if self.array is not None:
            yield from self.names or _numbered(0, self.size)
            return
        first = 0
        for file, batch in self._arrow_batches([ID, PATH], 65_536):
            ids, _ = _names(file, batch, first)
            yield from ids
            first += len(ids)

    def require_distinct_ids(self) -> None:
        """Check that no id occurs twice, in memory that does not grow with the number of rows.

        Raises:
            InvalidInputError: If one does. The message names some with their rows.
        """
        passes = -(-self.size // _HASHES_PER_PASS)
        for part in range(passes):
            hashes = np.fromiter((h for h in map(hash, self.ids()) if h % passes == part), np.int64)
            hashes.sort()
            twice = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist()) if len(hashes) else set()
            if twice:
                self._refuse(twice)

    def _refuse(self, hashes: set[int]) -> None:
        where: dict[str, list[int]] = {}
        for row, each in enumerate(self.ids()):
            if hash(each) in hashes:
                where.setdefault(each, []).append(row)
        repeated = {each: rows for each, rows in where.items() if len(rows) > 1}
        if repeated:
            shown = "; ".join(f"{name!r} in rows {rows[:3]}" for name, rows in
                              islice(repeated.items(), 3))  # fmt: skip
            raise InvalidInputError(
                f"{self.path}: {len(repeated)} ids occur more than once ({shown}), and a store "
                "keeps one row of each: give each row an id of its own in a column 'id', or leave "
                "the others out; nothing was written"
            )

    def _arrow_batches(self, wanted: list[str], size: int) -> Iterator[tuple[Path, Any]]:
        _, parquet = import_pyarrow(_PURPOSE)
        for file in self.files:
            with _reading(file), parquet.ParquetFile(file) as opened:
                names = opened.schema_arrow.names
                columns = [name for name in wanted if name in names] or [UNIVERSAL]
                for batch in opened.iter_batches(size, columns=columns):
                    yield file, batch


def _numbered(start: int, count: int) -> list[str]:
    return [f"row {row}" for row in range(start, start + count)]


def _names(file: Path, batch: Any, first: int) -> tuple[list[str], list[str]]:
    """Return the ids and the paths of a batch that begins at the row `first` of all files."""
    there = batch.schema.names
    paths = batch.column(PATH).to_pylist() if PATH in there else None
    ids = batch.column(ID).to_pylist() if ID in there else paths
    ids = _numbered(first, len(batch)) if ids is None else ids
    for row, each in enumerate(ids):
        if each is None or each == "":
            raise InvalidInputError(
                f"{file}: row {first + row} has no id: write the file again with an id in each row"
            )
    ids = [str(each) for each in ids]
    return ids, ids if paths is None else [str(each) for each in paths]


def _dense(column: Any) -> NDArray[np.float32]:
    """Return a column of fixed-size lists as float32, with NaN for nulls."""
    if not column.null_count:
        return decode_rows(to_numpy(column))
    rows = np.full((len(column), column.type.list_size), np.nan, np.float32)
    there = np.asarray(column.is_valid())
    rows[there] = decode_rows(to_numpy(column.filter(column.is_valid())))
    return rows


class _reading:
    """Context manager that names the file in errors of pyarrow."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        import pyarrow

        if isinstance(error, pyarrow.ArrowException | OSError):
            raise InvalidInputError(
                f"{self._file}: cannot be read ({' '.join(str(error).split())[:200]}); write this "
                "file again"
            ) from error
        if isinstance(error, InvalidInputError) and str(self._file) not in str(error):
            raise InvalidInputError(f"{self._file}: {error}") from error
