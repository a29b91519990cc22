"""LanceDB: one table, one column of fixed-size lists for each vector, opened in this process."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from crl_sdk.errors import MissingDependencyError, VectorStoreError
from crl_sdk.stored._directory import ID, PATH, to_numpy
from crl_sdk.vector_stores._address import StoreAddress
from crl_sdk.vector_stores._contract import Collection, Rows, VectorStore, driver_errors

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_RECORD = "crl"
_INDEX_FROM = 10_000  # rows; below, a search that compares all of them takes a few milliseconds
_GRAPH = {"m": 16, "ef_construction": 100}  # of int8 values; exact scores come from the rows
_LEAST_EF = 200  # rows that a search of the graph keeps in view
_NEVER = "check the directory; a copy of the source makes a new table"


class LanceDB(VectorStore):
    """A table of LanceDB. The record is metadata of its column `id`.

    New rows are appended, which is atomic: after a kill they are all there or none. So that two
    jobs do not append the same rows, a job that writes to a directory locks it.
    """

    batch_rows = 20_000  # each batch is a version of the table and a file

    def __init__(self, address: StoreAddress, database: Any) -> None:
        """Store the connection."""
        super().__init__(address)
        self._database = database
        self._open: Any = None
        self._lock: IO[str] | None = None

    @classmethod
    def open(cls, address: StoreAddress) -> LanceDB:
        """Open a directory or URI of LanceDB."""
        try:
            import lancedb
        except ImportError as error:
            raise MissingDependencyError("lancedb", "lancedb", "LanceDB") from error
        location = address.location
        if "://" not in location and Path(location).exists() and not Path(location).is_dir():
            raise VectorStoreError(f"{address}: expected a directory, this is a file")
        with driver_errors(address, "be opened", _NEVER):
            return cls(address, lancedb.connect(location))

    def describe(self) -> Collection | None:
        """Return the table as it is, or None."""
        with self.doing("be read", _NEVER):
            location = self.address.location
            if "://" not in location and not Path(location, f"{self._name}.lance").is_dir():
                return None
            try:
                schema = self._table.schema
            except ValueError as error:
                if "not found" in str(error).lower():
                    return None
                raise
        dims = {
            field.name: field.type.list_size for field in schema if hasattr(field.type, "list_size")
        }
        metadata: dict[bytes, bytes] = {}
        if ID in schema.names:
            metadata = schema.field(ID).metadata or {}
        return Collection(metadata.get(_RECORD.encode(), b"").decode(), dims)

    def create(self, record: str, dims: Mapping[str, int]) -> None:
        """Make the table."""
        import pyarrow as pa

        schema = pa.schema(
            [
                pa.field(ID, pa.string(), nullable=False, metadata={_RECORD: record}),
                pa.field(PATH, pa.string()),
                *(pa.field(name, pa.list_(pa.float32(), dim)) for name, dim in dims.items()),
            ]
        )
        self._own()
        with self.doing("be created", "check that the directory can be written to"):
            self._open = self._database.create_table(self._name, schema=schema)

    def write_record(self, record: str) -> None:
        """Replace the record."""
        self._own()
        with self.doing("be written to", _NEVER):
            self._table.update_field_metadata({"path": ID, "metadata": {_RECORD: record}})

    def add_field(self, name: str, dim: int) -> None:
        """Add a column of nulls."""
        import pyarrow as pa

        self._own()
        with self.doing("be written to", _NEVER):
            self._table.add_columns(pa.field(name, pa.list_(pa.float32(), dim)))

    def filled(self, ids: Sequence[str], fields: Sequence[str]) -> dict[str, set[str]]:
        """Look ids up."""
        self._own()
        chosen = {ID: f"`{ID}`", **{name: f"`{name}` IS NOT NULL" for name in fields}}
        with self.doing("be read", _NEVER):
            self._index_ids()
            found = (
                self._table.search().where(_among(ids)).select(chosen).limit(len(ids)).to_arrow()
            )
        has = {name: found[name].to_pylist() for name in fields}
        return {
            each: {name for name in fields if has[name][position]}
            for position, each in enumerate(found[ID].to_pylist())
        }

    def insert(self, rows: Rows) -> None:
        """Append rows."""
        self._own()
        with self.doing("be written to", "check free space and the directory"):
            self._table.add(_arrow(rows, self._table.schema))

    def fill(self, rows: Rows) -> None:
        """Merge columns into rows by id."""
        self._own()
        with self.doing("be written to", "check free space and the directory"):
            merge = self._table.merge_insert(ID).when_matched_update_all()
            merge.execute(_arrow(rows, self._table.schema, path=False))

    def finish(self, fields: Sequence[str]) -> None:
        """Join small files, and index columns of many rows."""
        from lancedb.index import HnswSq

        self._own()
        with self.doing("build its index", "run the same command again"):
            self._table.optimize()
            indexed = {index.columns[0] for index in self._table.list_indices()}
            if self.count() >= _INDEX_FROM:
                self._index_ids()
                for name in fields:
                    if name not in indexed:
                        self._table.create_index(name, config=HnswSq("cosine", **_GRAPH))

    def search(self, field: str, row: NDArray[np.float32], count: int) -> list[str]:
        """Search a column."""
        with self.doing("be searched", _NEVER):
            query = self._table.search(row, vector_column_name=field).distance_type("cosine")
            query = query.ef(max(2 * count, _LEAST_EF)).limit(count).select([ID, "_distance"])
            return [str(each) for each in query.to_arrow()[ID].to_pylist()]

    def fetch(self, ids: Sequence[str], fields: Sequence[str]) -> Rows:
        """Read rows by id."""
        with self.doing("be read", _NEVER):
            query = self._table.search().where(_among(ids)).select([ID, PATH, *fields])
            found = query.limit(len(ids)).to_arrow()
        vectors = {name: _dense(found[name].combine_chunks()) for name in fields}
        return Rows(found[ID].to_pylist(), found[PATH].to_pylist(), vectors)

    def count(self) -> int:
        """Return the number of rows."""
        with self.doing("be read", _NEVER):
            return int(self._table.count_rows())

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @property
    def _name(self) -> str:
        return self.address.collection

    @property
    def _table(self) -> Any:
        if self._open is None:
            self._open = self._database.open_table(self._name)
        return self._open

    def _index_ids(self) -> None:
        """Index the ids of a filled table, once, so that looking one up does not read all."""
        from lancedb.index import BTree

        if not any(index.columns == [ID] for index in self._table.list_indices()):
            self._table.create_index(ID, config=BTree())

    def _own(self) -> None:
        """Lock the directory for writing."""
        location = Path(self.address.location)
        if self._lock is not None or fcntl is None or "://" in self.address.location:
            return
        with self.doing("be written to", "choose a directory that can be written to"):
            location.mkdir(parents=True, exist_ok=True)
            lock = (location / f".{self._name}.lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise VectorStoreError(
                f"{self.address}: another process is writing to this table; wait until it ends, "
                "then run the same command again"
            ) from None
        except OSError:  # some network file systems have no locks
            with suppress(OSError):
                lock.close()
            warnings.warn(
                f"{self.address}: this file system has no locks; start one job at a time",
                stacklevel=2,
            )
            return
        self._lock = lock


def _among(ids: Sequence[str]) -> str:
    quoted = ", ".join("'" + each.replace("'", "''") + "'" for each in ids)
    return f"`{ID}` IN ({quoted})"


def _arrow(rows: Rows, schema: Any, *, path: bool = True) -> Any:
    import pyarrow as pa

    columns: dict[str, Any] = {ID: pa.array(rows.ids, pa.string())}
    if path:
        columns[PATH] = pa.array(rows.paths, pa.string())
    for name, vectors in rows.vectors.items():
        values = pa.array(np.ascontiguousarray(vectors, np.float32).ravel())
        columns[name] = pa.FixedSizeListArray.from_arrays(values, vectors.shape[1])
    return pa.table(columns, schema=pa.schema([schema.field(name) for name in columns]))


def _dense(column: Any) -> NDArray[np.float32]:
    """Return a column of fixed-size lists as an array, with NaN for nulls."""
    rows = np.full((len(column), column.type.list_size), np.nan, np.float32)
    rows[np.asarray(column.is_valid())] = to_numpy(column.filter(column.is_valid()))
    return rows
