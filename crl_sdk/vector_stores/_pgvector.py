"""PostgreSQL with pgvector: one table, one column for each criterion, each with an HNSW index."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crl_sdk.errors import MissingDependencyError, VectorStoreError
from crl_sdk.stored._directory import ID, PATH
from crl_sdk.vector_stores._address import StoreAddress
from crl_sdk.vector_stores._contract import (
    Collection,
    Rows,
    VectorStore,
    driver_errors,
    nan_rows,
)

_MOST_INDEXED = 2_000  # values of a `vector` that an HNSW index takes
_MOST_HALF_INDEXED = 4_000  # values of a `halfvec` that it takes
_LEAST_EF, _MOST_EF = 100, 1_000  # rows that a search keeps in view; pgvector allows no more
_RECORD = "crl "  # begins the comment of a table that `crl store` made
_TIMEOUT = 20  # seconds to connect
_STAGE = "crl_rows"


class PostgreSQL(VectorStore):
    """A table of PostgreSQL. The record is the comment of the table.

    Vectors of more than 2,000 values are stored as `halfvec` (float16), because an HNSW index takes
    no more of a `vector`. Vectors of more than 4,000 values get no index.
    """

    batch_rows = 2_000

    def __init__(self, address: StoreAddress, connection: Any) -> None:
        """Store the connection."""
        super().__init__(address)
        self._connection = connection

    @classmethod
    def open(cls, address: StoreAddress) -> PostgreSQL:
        """Connect to a database, and make the extension `vector` if it lacks it."""
        try:
            import psycopg
            from pgvector.psycopg import register_vector
        except ImportError as error:
            raise MissingDependencyError(
                error.name or "psycopg", "pgvector", "PostgreSQL"
            ) from error
        with driver_errors(address, "be opened"):
            connection = psycopg.connect(
                host=address.host,
                port=address.port,
                dbname=address.database,
                user=address.user or None,
                password=address.password or None,
                connect_timeout=_TIMEOUT,
                autocommit=True,
            )
        try:
            with driver_errors(
                address,
                "use pgvector",
                "install pgvector on the server, and run CREATE EXTENSION vector in this database "
                "as its administrator",
            ):
                connection.execute("SET client_min_messages TO warning")
                connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
                register_vector(connection)
        except VectorStoreError:
            connection.close()
            raise
        return cls(address, connection)

    def describe(self) -> Collection | None:
        """Return the table as it is, or None."""
        with self.doing("be read"):
            found = self._connection.execute(
                "SELECT oid, obj_description(oid, 'pg_class') FROM pg_class "
                "WHERE oid = to_regclass(%s)",
                [self._quoted(self._name)],
            ).fetchone()
            if found is None:
                return None
            columns = self._connection.execute(
                "SELECT attname, atttypmod FROM pg_attribute JOIN pg_type ON pg_type.oid = "
                "atttypid WHERE attrelid = %s AND attnum > 0 AND NOT attisdropped "
                "AND typname IN ('vector', 'halfvec') ORDER BY attnum",
                [found[0]],
            ).fetchall()
        comment = found[1] or ""
        record = comment.removeprefix(_RECORD) if comment.startswith(_RECORD) else ""
        return Collection(record, dict(columns))

    def create(self, record: str, dims: Mapping[str, int]) -> None:
        """Make the table and its comment in one transaction."""
        columns = "".join(
            f", {self._quoted(name)} {_type(dim)}({dim})" for name, dim in dims.items()
        )
        with self.doing("be created"), self._connection.transaction():
            self._connection.execute(
                f"CREATE TABLE {self._table} ({ID} text PRIMARY KEY, {PATH} text NOT NULL{columns})"
            )
            self._comment(record)

    def write_record(self, record: str) -> None:
        """Replace the comment."""
        with self.doing("be written to"):
            self._comment(record)

    def add_field(self, name: str, dim: int) -> None:
        """Add a column of nulls."""
        with self.doing("be written to"):
            self._connection.execute(
                f"ALTER TABLE {self._table} ADD COLUMN {self._quoted(name)} {_type(dim)}({dim})"
            )

    def filled(self, ids: Sequence[str], fields: Sequence[str]) -> dict[str, set[str]]:
        """Look ids up."""
        tests = "".join(f", {self._quoted(name)} IS NOT NULL" for name in fields)
        with self.doing("be read"):
            found = self._connection.execute(
                f"SELECT {ID}{tests} FROM {self._table} WHERE {ID} = ANY(%s)", [list(ids)]
            ).fetchall()
        return {
            row[0]: {name for name, has in zip(fields, row[1:], strict=True) if has}
            for row in found
        }

    def insert(self, rows: Rows) -> None:
        """Copy rows in; those whose id is there stay as they are."""
        self._copy(rows, "INSERT INTO {table} ({columns}) SELECT {columns} FROM {stage} "
                         "ON CONFLICT DO NOTHING")  # fmt: skip

    def fill(self, rows: Rows) -> None:
        """Copy columns in by id."""
        sets = ", ".join(f"{each} = {_STAGE}.{each}" for each in map(self._quoted, rows.vectors))
        self._copy(
            rows, f"UPDATE {{table}} AS t SET {sets} FROM {{stage}} WHERE t.{ID} = {_STAGE}.{ID}"
        )

    def finish(self, fields: Sequence[str]) -> None:
        """Build the HNSW index of each column that has none."""
        dims = {name: self.dim_of(name) for name in fields}
        with self.doing("build its index", "run the same command again"):
            for name in fields:
                if dims[name] <= _MOST_HALF_INDEXED:
                    column = f"{self._quoted(name)} {_type(dims[name])}_cosine_ops"
                    self._connection.execute(
                        f"CREATE INDEX IF NOT EXISTS {self._quoted(self._index(name))} ON "
                        f"{self._table} USING hnsw ({column})"
                    )
            self._connection.execute(f"ANALYZE {self._table}")

    def search(self, field: str, row: NDArray[np.float32], count: int) -> list[str]:
        """Search a column."""
        ef = min(max(count, _LEAST_EF), _MOST_EF)
        kind = _type(len(row))
        with self.doing("be searched"), self._connection.transaction():
            self._connection.execute(f"SET LOCAL hnsw.ef_search = {ef}")
            self._connection.execute("SET LOCAL hnsw.iterative_scan = strict_order")
            found = self._connection.execute(
                f"SELECT {ID} FROM {self._table} ORDER BY {self._quoted(field)} <=> %s::{kind} "
                f"LIMIT {int(count)}",
                [_value(row)],
            ).fetchall()
        return [each for (each,) in found]

    def fetch(self, ids: Sequence[str], fields: Sequence[str]) -> Rows:
        """Read rows by id."""
        columns = "".join(f", {self._quoted(name)}" for name in fields)
        with self.doing("be read"):
            found = self._connection.execute(
                f"SELECT {ID}, {PATH}{columns} FROM {self._table} WHERE {ID} = ANY(%s)",
                [list(ids)],
                binary=True,  # five times as fast as parsing text
            ).fetchall()
        vectors = {
            name: nan_rows([_array(row[2 + i]) for row in found], self.dim_of(name))
            for i, name in enumerate(fields)
        }
        return Rows([row[0] for row in found], [row[1] for row in found], vectors)

    def count(self) -> int:
        """Return the number of rows."""
        with self.doing("be read"):
            (found,) = self._connection.execute(f"SELECT count(*) FROM {self._table}").fetchone()
        return int(found)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    @property
    def _name(self) -> str:
        return self.address.collection

    @property
    def _table(self) -> str:
        return self._quoted(self._name)

    @staticmethod
    def _quoted(name: str) -> str:
        return '"' + name.replace('"', '""') + '"'

    def _index(self, field: str) -> str:
        """Return the name of the index of a column: at most 63 bytes, and distinct."""
        digest = hashlib.sha256(f"{self._name}.{field}".encode()).hexdigest()[:12]
        return f"crl_{self._name[:30]}_{digest}"

    def _comment(self, record: str) -> None:
        from psycopg import sql

        self._connection.execute(
            sql.SQL("COMMENT ON TABLE {} IS {}").format(
                sql.Identifier(self._name), sql.Literal(_RECORD + record)
            )
        )

    def _copy(self, rows: Rows, statement: str) -> None:
        """Copy rows to a table of the transaction, and run a statement that reads it."""
        names = [ID, PATH, *rows.vectors]
        columns = ", ".join(map(self._quoted, names))
        types = [
            "text", "text", *(_type(each.shape[1]) for each in rows.vectors.values())
        ]  # fmt: skip
        values = list(rows.vectors.values())
        with self.doing("be written to"), self._connection.transaction():
            made = ", ".join(f"{self._quoted(n)} {t}" for n, t in zip(names, types, strict=True))
            self._connection.execute(f"CREATE TEMPORARY TABLE {_STAGE} ({made}) ON COMMIT DROP")
            with (
                self._connection.cursor() as cursor,
                cursor.copy(f"COPY {_STAGE} ({columns}) FROM STDIN WITH (FORMAT BINARY)") as copy,
            ):
                copy.set_types(types)
                for i, each in enumerate(rows.ids):
                    copy.write_row([each, rows.paths[i], *(_value(v[i]) for v in values)])
            self._connection.execute(
                statement.format(table=self._table, columns=columns, stage=_STAGE)
            )


def _type(dim: int) -> str:
    return "vector" if dim <= _MOST_INDEXED else "halfvec"


def _value(row: NDArray[np.float32]) -> Any:
    from pgvector import HalfVector, Vector

    return Vector(row) if len(row) <= _MOST_INDEXED else HalfVector(row)


def _array(value: Any) -> Any:
    """Return a value of pgvector as an array; None stays None."""
    return value.to_numpy() if hasattr(value, "to_numpy") else value
