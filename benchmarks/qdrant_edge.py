"""A collection of Qdrant's engine in this process (`qdrant-edge-py`), with its HNSW graphs.

Qdrant's server has the same engine. The client's local mode has none: it compares all rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crl_sdk.vector_stores import Collection, Rows, StoreAddress, VectorStore
from crl_sdk.vector_stores._contract import nan_rows
from crl_sdk.vector_stores._qdrant import point_id

_INDEXED_FROM_KB = 100  # vectors of a segment; the server's default is 10,000


class QdrantEdge(VectorStore):
    """A shard of Qdrant, written and searched as `crl_sdk.vector_stores` does with a collection.

    The Python package cannot add a named vector to a shard, which the server can.
    """

    def __init__(self, address: StoreAddress) -> None:
        """Store the directory."""
        super().__init__(address)
        self._shard: Any = None
        self._record = ""
        self.closed_to_fields = "qdrant-edge-py adds none"

    @classmethod
    def open(cls, address: StoreAddress) -> QdrantEdge:
        """Return a shard that is made by `create`."""
        return cls(address)

    def describe(self) -> Collection | None:
        """Return the shard as it was made in this process."""
        return None if self._shard is None else Collection(self._record, self._dims)

    def create(self, record: str, dims: Mapping[str, int]) -> None:
        """Make the shard."""
        import qdrant_edge as edge

        Path(self.address.location).mkdir(parents=True)
        vectors = {
            name: edge.EdgeVectorParams(size=dim, distance=edge.Distance.Cosine)
            for name, dim in dims.items()
        }
        config = edge.EdgeConfig(
            vectors=vectors,
            hnsw_config=edge.HnswIndexConfig(m=16, ef_construct=100, full_scan_threshold=10),
            optimizers=edge.EdgeOptimizersConfig(indexing_threshold=_INDEXED_FROM_KB),
        )
        self._shard = edge.EdgeShard.create(self.address.location, config)
        self._record, self._dims = record, dict(dims)

    def write_record(self, record: str) -> None:
        """Replace the record, which is kept in this process."""
        self._record = record

    def add_field(self, name: str, dim: int) -> None:
        """Refuse."""
        raise NotImplementedError(self.closed_to_fields)

    def filled(self, ids: Sequence[str], fields: Sequence[str]) -> dict[str, set[str]]:
        """Look ids up."""
        rows = self.fetch(ids, fields)
        return {
            each: {name for name in fields if np.isfinite(rows.vectors[name][i]).all()}
            for i, each in enumerate(rows.ids)
        }

    def insert(self, rows: Rows) -> None:
        """Write points."""
        import qdrant_edge as edge

        points = [
            edge.Point(
                point_id(each),
                {name: vectors[i].tolist() for name, vectors in rows.vectors.items()},
                {"id": each, "path": rows.paths[i]},
            )
            for i, each in enumerate(rows.ids)
        ]
        self._shard.update(edge.UpdateOperation.upsert_points(points))

    def fill(self, rows: Rows) -> None:
        """Write named vectors of points."""
        import qdrant_edge as edge

        points = [
            edge.PointVectors(
                point_id(each),
                {name: vectors[i].tolist() for name, vectors in rows.vectors.items()},
            )
            for i, each in enumerate(rows.ids)
        ]
        self._shard.update(edge.UpdateOperation.update_vectors(points))

    def finish(self, fields: Sequence[str]) -> None:
        """Build the graphs."""
        self._shard.flush()
        self._shard.optimize()

    def search(self, field: str, row: NDArray[np.float32], count: int) -> list[str]:
        """Search a named vector."""
        import qdrant_edge as edge

        request = edge.QueryRequest(
            limit=count,
            query=edge.Query.Nearest(row.tolist(), using=field),
            with_payload=["id"],
            params=edge.SearchParams(hnsw_ef=max(count, 128), indexed_only=True),
        )
        return [str(point.payload["id"]) for point in self._shard.query(request)]

    def fetch(self, ids: Sequence[str], fields: Sequence[str]) -> Rows:
        """Read points by id."""
        points = self._shard.retrieve(list(map(point_id, ids)), True, list(fields))
        vectors = {
            name: nan_rows([point.vector.get(name) for point in points], self._dims[name])
            for name in fields
        }
        payloads = [point.payload for point in points]
        return Rows([each["id"] for each in payloads], [each["path"] for each in payloads], vectors)

    def count(self) -> int:
        """Return the number of points."""
        return int(self._shard.info().points_count)

    def indexed(self) -> int:
        """Return the number of vectors that are in a graph."""
        return int(self._shard.info().indexed_vectors_count)

    def close(self) -> None:
        """Close the shard."""
        if self._shard is not None:
            self._shard.close()
