"""Qdrant: one named vector for each criterion; on a server, or in the client's local mode."""

from __future__ import annotations

import logging
import uuid
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
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

_RECORD = "crl"
_NAMESPACE = uuid.UUID("6f0d6a3b-6f5e-5d3c-9d43-0a3f1c5e8b11")
_LEAST_EF = 128  # rows that a search of the graph keeps in view
_TIMEOUT = 60  # seconds of one call
_LOOPBACK = ("localhost", "127.0.0.1", "::1")

_log = logging.getLogger(__name__)


def point_id(row_id: str) -> str:
    """Return the id of a point, a UUID that follows from the id of a row (version 5)."""
    return str(uuid.uuid5(_NAMESPACE, row_id))


class Qdrant(VectorStore):
    """A collection of Qdrant. The record is the metadata of the collection.

    Qdrant scales vectors that are compared by cosine to unit length when it gets them.
    """

    batch_rows = 500

    def __init__(self, address: StoreAddress, client: Any) -> None:
        """Store the connection."""
        super().__init__(address)
        self._client = client

    @classmethod
    def open(cls, address: StoreAddress) -> Qdrant:
        """Connect to a server, or open a directory in the client's local mode."""
        try:
            import qdrant_client
        except ImportError as error:
            raise MissingDependencyError("qdrant-client", "qdrant", "Qdrant") from error
        if address.location and Path(address.location).is_file():
            raise VectorStoreError(f"{address}: expected a directory, this is a file")
        with driver_errors(address, "be opened"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Api key is used with an insecure connection")
            if address.location:
                return cls(address, qdrant_client.QdrantClient(path=address.location))
            if address.password and not address.tls and address.host not in _LOOPBACK:
                _log.warning("%s: the API key is sent unencrypted; use qdrant+https://", address)
            client = qdrant_client.QdrantClient(
                host=address.host,
                port=address.port,
                https=address.tls,
                api_key=address.password or None,
                timeout=_TIMEOUT,
                check_compatibility=False,  # a call of its own, whose failure is only a warning
            )
            client.get_collections()
            return cls(address, client)

    def describe(self) -> Collection | None:
        """Return the collection as it is, or None."""
        with self.doing("be read"):
            if not self._client.collection_exists(self._name):
                return None
            config = self._client.get_collection(self._name).config
        vectors = config.params.vectors
        if not isinstance(vectors, dict):  # the one vector without a name
            vectors = {} if vectors is None else {"": vectors}
        other = {
            name: each.distance.value
            for name, each in vectors.items()
            if each.distance.value != "Cosine" or each.multivector_config is not None
        }
        return Collection(
            (config.metadata or {}).get(_RECORD, ""),
            {name: each.size for name, each in vectors.items()},
            ", ".join(f"{name or 'vector'}: {distance}" for name, distance in other.items()),
        )

    def create(self, record: str, dims: Mapping[str, int]) -> None:
        """Make the collection."""
        from qdrant_client import models

        vectors = {
            name: models.VectorParams(size=dim, distance=models.Distance.COSINE)
            for name, dim in dims.items()
        }
        with self.doing("be created"):
            self._client.create_collection(
                self._name, vectors_config=vectors, metadata={_RECORD: record}
            )

    def write_record(self, record: str) -> None:
        """Replace the record."""
        with self.doing("be written to"):
            self._client.update_collection(self._name, metadata={_RECORD: record})

    def add_field(self, name: str, dim: int) -> None:
        """Add a named vector."""
        from qdrant_client import models

        dense = models.DenseVectorConfig(size=dim, distance=models.Distance.COSINE)
        with self.doing("get another vector", "Qdrant adds named vectors since version 1.18"):
            self._client.create_vector_name(
                self._name, name, models.DenseVectorNameConfig(dense=dense)
            )

    def filled(self, ids: Sequence[str], fields: Sequence[str]) -> dict[str, set[str]]:
        """Look ids up: once for the points, and once for each named vector."""
        from qdrant_client import models

        names = {point_id(each): each for each in ids}
        here = models.HasIdCondition(has_id=list(names))
        found: dict[str, set[str]] = {each: set() for each in self._points(names, [here])}
        for field in fields if found else ():
            has = models.HasVectorCondition(has_vector=field)
            for each in self._points(names, [here, has]):
                found[each].add(field)
        return found

    def insert(self, rows: Rows) -> None:
        """Write points."""
        from qdrant_client import models

        payloads = [{ID: i, PATH: path} for i, path in zip(rows.ids, rows.paths, strict=True)]
        batch = models.Batch(
            ids=list(map(point_id, rows.ids)),
            vectors={name: each.tolist() for name, each in rows.vectors.items()},
            payloads=payloads,
        )
        with self.doing("be written to"):
            self._client.upsert(self._name, points=batch, wait=True)

    def fill(self, rows: Rows) -> None:
        """Write named vectors of points."""
        from qdrant_client import models

        points = [
            models.PointVectors(
                id=point_id(each),
                vector={name: vectors[i].tolist() for name, vectors in rows.vectors.items()},
            )
            for i, each in enumerate(rows.ids)
        ]
        with self.doing("be written to"):
            self._client.update_vectors(self._name, points=points, wait=True)

    def finish(self, fields: Sequence[str]) -> None:
        """Do nothing: a server builds its graphs while points come."""

    def search(self, field: str, row: NDArray[np.float32], count: int) -> list[str]:
        """Search a named vector."""
        from qdrant_client import models

        ef = models.SearchParams(hnsw_ef=max(count, _LEAST_EF))
        with self.doing("be searched"):
            found = self._client.query_points(
                self._name,
                query=row.tolist(),
                using=field,
                limit=count,
                with_payload=[ID],
                search_params=None if self.address.location else ef,  # local mode has no graph
            )
        return [point.payload[ID] for point in found.points]

    def fetch(self, ids: Sequence[str], fields: Sequence[str]) -> Rows:
        """Read points by id."""
        with self.doing("be read"):
            points = self._client.retrieve(
                self._name,
                ids=list(map(point_id, ids)),
                with_payload=[ID, PATH],
                with_vectors=list(fields),
            )
        vectors = {
            name: nan_rows([(point.vector or {}).get(name) for point in points], self.dim_of(name))
            for name in fields
        }
        payloads = [point.payload for point in points]
        return Rows([each[ID] for each in payloads], [each[PATH] for each in payloads], vectors)

    def count(self) -> int:
        """Return the number of points."""
        with self.doing("be read"):
            return int(self._client.count(self._name, exact=True).count)

    def close(self) -> None:
        """Close the connection, and the files of the local mode."""
        self._client.close()

    @property
    def _name(self) -> str:
        return self.address.collection

    def _points(self, names: Mapping[str, str], conditions: list[Any]) -> list[str]:
        """Return the ids of the rows whose points fulfil conditions."""
        from qdrant_client import models

        with self.doing("be read"):
            points, _ = self._client.scroll(
                self._name,
                scroll_filter=models.Filter(must=conditions),
                limit=len(names),
                with_payload=False,
                with_vectors=False,
            )
        return [names[str(point.id)] for point in points]
