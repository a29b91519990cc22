"""Qdrant's own engine, in process: named vectors, each with its HNSW graph."""

from __future__ import annotations

import pytest
from store_rows import basis, stored_file, unit_rows

from crl_sdk.tasks import Index
from crl_sdk.vector_stores import StoreAddress, StoredRows, search_store, store_embeddings

pytest.importorskip("qdrant_edge")
pytest.importorskip("qdrant_client")

ROWS = 3000


def test_the_graphs_find_what_the_index_finds(tmp_path):
    from crl_benchmarks.qdrant_edge import QdrantEdge

    color, shape = basis("color"), basis("time-of-day", dim=7)
    universal = unit_rows(ROWS)
    rows = StoredRows.open(stored_file(tmp_path / "a.npz", universal))
    with QdrantEdge.open(StoreAddress("qdrant", "edge", str(tmp_path / "edge"))) as store:
        assert store_embeddings(rows, store, [color, shape]).new == ROWS
        assert store_embeddings(rows, store, [color, shape]).there == ROWS
        assert store.count() == ROWS and store.indexed() == 3 * ROWS
        index, weights, hits = Index.project(universal, [color, shape]), {}, 0
        weights = {"color": 2.0, "time-of-day": 1.0}
        for seed in range(20):
            query = unit_rows(1, seed=50 + seed)
            given = {b.criterion: b.projection.apply(query) for b in (color, shape)}
            exact = index.nearest(given, weights)
            paths = {f"photos/{i}.jpg" for i in exact.positions}
            hits += len(paths & set(search_store(store, given, weights).paths))
    assert hits >= 196  # of 200
