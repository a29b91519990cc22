"""Searching a store: the same results as the exact index, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from store_rows import MODEL, MemoryStore, basis, stored_file, unit_rows

from crl_sdk.errors import (
    BasisMismatchError,
    CriterionError,
    InvalidInputError,
    StoreMismatchError,
    VectorStoreError,
)
from crl_sdk.tasks import Index
from crl_sdk.vector_stores import (
    Rows,
    StoredRows,
    open_record,
    require_searchable,
    search_store,
    store_embeddings,
)
from crl_sdk.vector_stores import _search as search_module

COLOR, SHAPE = basis("color"), basis("time-of-day", dim=7)


@pytest.fixture
def filled(tmp_path):
    store = MemoryStore()
    rows = StoredRows.open(stored_file(tmp_path / "a.npz", unit_rows(900)))
    store_embeddings(rows, store, [COLOR, SHAPE], batch_rows=300)
    return store


@pytest.mark.parametrize(
    "weights",
    [{"color": 1.0}, {"color": 2.0, "time-of-day": 1.0}, {"color": 1.0, "time-of-day": -0.5}],
)
def test_equal_to_the_index(filled, weights):
    universal = unit_rows(900)
    index = Index.project(universal, [COLOR, SHAPE])
    for seed in range(5):
        query = unit_rows(1, seed=100 + seed)
        rows = {b.criterion: b.projection.apply(query) for b in (COLOR, SHAPE)}
        rows = {name: rows[name] for name in weights}
        found, exact = search_store(filled, rows, weights), index.nearest(rows, weights)
        assert found.complete
        assert found.paths == [f"photos/{i}.jpg" for i in exact.positions]
        assert np.allclose(found.scores, exact.scores, atol=1e-6)
        for name in weights:
            assert np.allclose(found.parts[name], exact.parts[name], atol=1e-6)


def test_lists_grow_until_the_result_is_certain(filled, monkeypatch):
    query = unit_rows(1, seed=7)
    rows = {b.criterion: b.projection.apply(query) for b in (COLOR, SHAPE)}
    opposed = {"color": 1.0, "time-of-day": -1.0}
    few = search_store(filled, rows, opposed, candidates=10)
    assert not few.complete and few.candidates == 10
    filled.asked.clear()
    monkeypatch.setattr(search_module, "FIRST_CANDIDATES", 10)
    found = search_store(filled, rows, opposed, n=1)
    assert found.complete and filled.asked[:4] == [10, 10, 40, 40]
    monkeypatch.setattr(search_module, "MOST_CANDIDATES", 20)
    assert not search_store(filled, rows, opposed, n=1).complete


def test_universal_embeddings(filled):
    universal = unit_rows(900)
    found = search_store(filled, {"universal": universal[5]}, n=3)
    assert found.paths == [f"photos/{i}.jpg" for i in np.argsort(-(universal @ universal[5]))[:3]]


def test_fewer_rows_than_asked_for(tmp_path):
    store = MemoryStore()
    rows = StoredRows.open(stored_file(tmp_path / "a.npz", unit_rows(4)))
    store_embeddings(rows, store, [COLOR])
    found = search_store(store, {"color": np.ones(5, np.float32)}, n=10)
    assert len(found.ids) == 4 and found.complete


def test_rows_without_a_vector_are_left_out(filled):
    filled.rows["half"] = ("half", {"color": np.ones(5, np.float32)})
    rows = {"color": np.ones(5, np.float32), "time-of-day": np.ones(7, np.float32)}
    assert "half" not in search_store(filled, rows, n=900).ids
    assert search_store(filled, {"color": rows["color"]}, n=1).ids == ["half"]


def test_equal_scores_are_in_the_order_of_ids():
    store = MemoryStore()
    store.create("", {"color": 5})
    store.insert(Rows(list("dbca"), list("dbca"), {"color": np.ones((4, 5), np.float32)}))
    assert search_store(store, {"color": np.ones(5)}, n=3).ids == ["a", "b", "c"]


def test_bad_queries(filled):
    row = np.ones(5, np.float32)
    for weights in ({}, {"color": 0.0}, {"color": np.nan}):
        with pytest.raises(InvalidInputError, match="other than 0"):
            search_store(filled, {"color": row}, weights)
    with pytest.raises(CriterionError, match="no criterion 'shape'"):
        search_store(filled, {"color": row}, {"shape": 1.0})
    with pytest.raises(InvalidInputError, match="NaN"):
        search_store(filled, {"color": row * np.nan})
    with pytest.raises(InvalidInputError, match="one query row"):
        search_store(filled, {"color": np.ones((2, 5))})
    with pytest.raises(InvalidInputError, match="n >= 1"):
        search_store(filled, {"color": row}, n=0)


def test_what_a_collection_must_have(filled):
    record = open_record(filled)
    require_searchable(filled, record, [COLOR, SHAPE], MODEL, universal=True)
    with pytest.raises(BasisMismatchError, match="--bundle"):
        require_searchable(filled, record, [], "b" * 64)
    with pytest.raises(CriterionError, match=r"no vectors of 'shape'.*crl store"):
        require_searchable(filled, record, [basis("shape")], MODEL)
    with pytest.raises(StoreMismatchError, match=r"version .*--bases"):
        require_searchable(filled, record, [basis("color", seed=3)], MODEL)
    with pytest.raises(VectorStoreError, match=r"no such collection.*crl store STORED"):
        open_record(MemoryStore())
    assert all(name not in str(filled.address) for name in ("hunter2",))
