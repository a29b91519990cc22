"""Milvus: one collection, one vector field for each criterion; a server, or milvus-lite's files."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crl_sdk.errors import InvalidInputError, MissingDependencyError, VectorStoreError
from crl_sdk.stored._directory import ID, PATH
from crl_sdk.vector_stores._address import StoreAddress
from crl_sdk.vector_stores._contract import (
    Collection,
    Rows,
    VectorStore,
    driver_errors,
    nan_rows,
)

_RECORD = "crl"
_LEAST_EF = 128  # rows that a search of the graph keeps in view
_LONGEST = 4_096  # bytes of an id or path
_TIMEOUT = 60  # seconds of one call
_GRAPH = {"M": 16, "efConstruction": 200}


class Milvus(VectorStore):
    """A collection of Milvus. The record is a property of the collection."""

    batch_rows = 1_000

    def __init__(self, address: StoreAddress, client: Any) -> None:
        """Store the connection."""
        super().__init__(address)
        self._client = client
        self._loaded = False
        if address.location:
            self.closed_to_fields = "milvus-lite adds none to a collection that is there"

    @classmethod
    def open(cls, address: StoreAddress) -> Milvus:
        """Connect to a server, or open a file of milvus-lite."""
        try:
            import pymilvus
        except ImportError as error:
            raise MissingDependencyError("pymilvus", "milvus", "Milvus") from error
        for name in ("pymilvus", "milvus_lite"):  # they log what they raise, with its trace
            logging.getLogger(name).setLevel(logging.CRITICAL)
        if "-" in address.collection:
            raise InvalidInputError(
                f"{address}: Milvus allows no '-' in the name of a collection: use '_'"
            )
        scheme = "https" if address.tls else "http"
        uri = address.location or f"{scheme}://{address.host}:{address.port}"
        if address.location:
            _check_file(address)
            logging.getLogger("grpc._server").addFilter(_is_news)
        secret = {"token": f"{address.user or 'root'}:{address.password}"}
        with driver_errors(address, "be opened"):
            client = pymilvus.MilvusClient(
                uri, timeout=_TIMEOUT, **(secret if address.password else {})
            )
            client.list_collections()
            return cls(address, client)

    def describe(self) -> Collection | None:
        """Return the collection as it is, or None."""
        with self.doing("be read"):
            if not self._client.has_collection(self._name):
                return None
            found = self._client.describe_collection(self._name)
            dims = {
                field["name"]: field["params"]["dim"]
                for field in found["fields"]
                if "dim" in field["params"]
            }
            other = {}
            for name in self._client.list_indexes(self._name):
                index = self._client.describe_index(self._name, name)
                if index["metric_type"] != "COSINE" and index["field_name"] in dims:
                    other[index["field_name"]] = index["metric_type"]
        return Collection(
            found["properties"].get(_RECORD, ""),
            dims,
            ", ".join(f"{name}: {metric}" for name, metric in other.items()),
        )

    def create(self, record: str, dims: Mapping[str, int]) -> None:
        """Make the collection, with the index of each field."""
        from pymilvus import DataType

        schema = self._client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field(ID, DataType.VARCHAR, is_primary=True, max_length=_LONGEST)
        schema.add_field(PATH, DataType.VARCHAR, max_length=_LONGEST)
        for name, dim in dims.items():
            schema.add_field(name, DataType.FLOAT_VECTOR, dim=dim)
        with self.doing("be created"):
            self._client.create_collection(
                self._name,
                schema=schema,
                index_params=self._indexes(list(dims)),
                properties={_RECORD: record},
                consistency_level="Strong",  # a look-up sees what was written before it
            )

    def write_record(self, record: str) -> None:
        """Replace the record."""
        with self.doing("be written to"):
            self._client.alter_collection_properties(self._name, {_RECORD: record})

    def add_field(self, name: str, dim: int) -> None:
        """Add a field. Milvus-lite cannot, and an older server neither."""
        from pymilvus import DataType

        with self.doing("get another vector", "write all criteria to a new collection"):
            self._client.add_collection_field(
                self._name, name, DataType.FLOAT_VECTOR, dim=dim, nullable=True
            )
            self._client.create_index(self._name, self._indexes([name]))

    def filled(self, ids: Sequence[str], fields: Sequence[str]) -> dict[str, set[str]]:
        """Look ids up."""
        rows = self.fetch(ids, fields)
        return {
            each: {name for name in fields if np.isfinite(rows.vectors[name][i]).all()}
            for i, each in enumerate(rows.ids)
        }

    def insert(self, rows: Rows) -> None:
        """Write rows; those whose id is there are replaced."""
        with self.doing("be written to"):
            self._client.upsert(self._name, _entities(rows))

    def fill(self, rows: Rows) -> None:
        """Write fields of rows."""
        with self.doing("be written to"):
            self._client.upsert(self._name, _entities(rows, path=False), partial_update=True)

    def finish(self, fields: Sequence[str]) -> None:
        """Write what is in memory to the files, of which the graphs are built."""
        with self.doing("build its index", "run the same command again"):
            self._client.flush(self._name)

    def search(self, field: str, row: NDArray[np.float32], count: int) -> list[str]:
        """Search a field."""
        self._load()
        with self.doing("be searched"):
            (found,) = self._client.search(
                self._name,
                [row.tolist()],
                anns_field=field,
                limit=count,
                search_params={
                    "metric_type": "COSINE",
                    "params": {"ef": max(count, _LEAST_EF)},
                },
            )
        return [each[ID] for each in found]

    def fetch(self, ids: Sequence[str], fields: Sequence[str]) -> Rows:
        """Read rows by id."""
        self._load()
        with self.doing("be read"):
            found = self._client.query(
                self._name, filter=_among(ids), output_fields=[ID, PATH, *fields]
            )
        vectors = {
            name: nan_rows([row.get(name) for row in found], self.dim_of(name)) for name in fields
        }
        return Rows([row[ID] for row in found], [row[PATH] for row in found], vectors)

    def count(self) -> int:
        """Return the number of rows."""
        self._load()
        with self.doing("be read"):
            (found,) = self._client.query(self._name, filter="", output_fields=["count(*)"])
        return int(found["count(*)"])

    def close(self) -> None:
        """Close the connection, and stop milvus-lite."""
        self._client.close()
        if self.address.location:
            from milvus_lite import server_manager_instance

            server_manager_instance.release_server(self.address.location)

    @property
    def _name(self) -> str:
        return self.address.collection

    def _load(self) -> None:
        if not self._loaded:
            with self.doing("be loaded"):
                self._client.load_collection(self._name)
            self._loaded = True

    def _indexes(self, fields: Sequence[str]) -> Any:
        found = self._client.prepare_index_params()
        for name in fields:
            found.add_index(name, index_type="HNSW", metric_type="COSINE", params=_GRAPH)
        return found


def _check_file(address: StoreAddress) -> None:
    """Check that a file of milvus-lite has the suffix by which pymilvus knows it."""
    if not address.location.endswith(".db"):
        raise InvalidInputError(f"{address}: expected a name that ends in .db, such as milvus:a.db")
    if find_spec("milvus_lite") is None:
        raise MissingDependencyError("milvus-lite", "milvus", "milvus:FILE.db")
    parent = Path(address.location).absolute().parent
    if not parent.is_dir():
        raise VectorStoreError(f"{address}: {parent} does not exist; run mkdir -p {parent}")


def _among(ids: Sequence[str]) -> str:
    """Return a filter for ids; pymilvus's own breaks at a quotation mark in an id."""
    return f"{ID} in {json.dumps(list(ids), ensure_ascii=False)}"


def _is_news(record: logging.LogRecord) -> bool:
    """Return whether a line of gRPC's log is other than that milvus-lite lacks a call."""
    return not (record.exc_info and record.exc_info[0] is NotImplementedError)


def _entities(rows: Rows, *, path: bool = True) -> list[dict[str, Any]]:
    lists = {name: vectors.tolist() for name, vectors in rows.vectors.items()}
    return [
        {
            ID: each,
            **({PATH: rows.paths[i]} if path else {}),
            **{name: vectors[i] for name, vectors in lists.items()},
        }
        for i, each in enumerate(rows.ids)
    ]
