"""What every vector store must do, with the real stores."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from store_rows import DIM, MODEL, basis, stored_file, unit_rows

from crl_sdk.errors import StoreMismatchError, VectorStoreError
from crl_sdk.tasks import Index
from crl_sdk.vector_stores import (
    StoredRows,
    open_record,
    open_store,
    require_searchable,
    search_store,
    store_embeddings,
)

ROWS = 700  # Qdrant's local mode takes 8 ms to write one
COLOR, SHAPE = basis("color"), basis("time-of-day", dim=7)
CHILD = Path(__file__).parent / "child.py"


@pytest.fixture
def source(tmp_path) -> Path:
    names = [f'it\'s "{i}".jpg' for i in range(ROWS)]
    return stored_file(tmp_path / "a.npz", unit_rows(ROWS), names=names)


def everything(address: str, fields: list[str]) -> dict[str, dict[str, np.ndarray]]:
    """Return all vectors of a collection, by id."""
    with open_store(address) as store:
        ids = [f'it\'s "{i}".jpg' for i in range(ROWS)]
        found: dict[str, dict[str, np.ndarray]] = {}
        for start in range(0, ROWS, 500):
            rows = store.fetch(ids[start : start + 500], fields)
            assert list(rows.paths) == list(rows.ids)
            for i, each in enumerate(rows.ids):
                assert each not in found
                found[each] = {name: rows.vectors[name][i] for name in fields}
        assert store.count() == len(found)
    return found


def unit(rows: np.ndarray) -> np.ndarray:
    return np.asarray(rows / np.linalg.norm(rows, axis=-1, keepdims=True))


def test_rows_come_back(address, source):
    with open_store(address) as store:
        assert store.describe() is None
        report = store_embeddings(StoredRows.open(source), store, [COLOR, SHAPE])
        assert report.new == ROWS
        there = store.describe()
        assert there is not None and not there.other
        assert dict(there.dims) == {"universal": DIM, "color": 5, "timeHofHday": 7}
        assert open_record(store).fields["color"].basis_sha256 == COLOR.sha256()
    found = everything(address, ["universal", "color", "timeHofHday"])
    universal = unit_rows(ROWS)
    got = np.stack([found[f'it\'s "{i}".jpg']["universal"] for i in range(ROWS)])
    assert np.allclose(unit(got), universal, atol=1e-5)
    got = np.stack([found[f'it\'s "{i}".jpg']["timeHofHday"] for i in range(ROWS)])
    assert np.allclose(unit(got), unit(SHAPE.projection.apply(universal)), atol=1e-5)
    with open_store(address) as store:
        again = store_embeddings(StoredRows.open(source), store, [COLOR, SHAPE], batch_rows=400)
        assert (again.new, again.there, store.count()) == (0, ROWS, ROWS)


@pytest.mark.parametrize(
    "weights", [{"color": 2.0, "time-of-day": 1.0}, {"color": 1.0, "time-of-day": -1.0}]
)
def test_searches_equal_the_index(address, source, weights):
    universal = unit_rows(ROWS)
    index = Index.project(universal, [COLOR, SHAPE])
    with open_store(address) as store:
        store_embeddings(StoredRows.open(source), store, [COLOR, SHAPE])
        require_searchable(store, open_record(store), [COLOR, SHAPE], MODEL, universal=True)
        hits = 0
        for seed in range(10):
            query = unit_rows(1, seed=50 + seed)
            rows = {b.criterion: b.projection.apply(query) for b in (COLOR, SHAPE)}
            found, exact = search_store(store, rows, weights), index.nearest(rows, weights)
            hits += len(set(found.paths) & {f'it\'s "{i}".jpg' for i in exact.positions})
        assert hits >= 98  # of 100; stores with a graph may miss one
        first = search_store(store, {"universal": universal[7]}, n=2)
        assert first.ids[0] == 'it\'s "7".jpg' and first.scores[0] > 0.9999


def run_and_kill(source: Path, address: str, *bases: Path, after: int) -> None:
    """Kill a job that writes, without a warning, while it is at work."""
    line = [sys.executable, str(CHILD), str(source), address, *map(str, bases)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as child:
        try:
            for _ in range(after):
                assert child.stdout is not None and child.stdout.readline()
        finally:
            child.kill()


def test_killed_and_resumed(address, source, tmp_path):
    COLOR.save(tmp_path / "color.safetensors")
    SHAPE.save(tmp_path / "shape.safetensors")
    for after in (2, 3):
        run_and_kill(source, address, tmp_path / "color.safetensors", after=after)
    with open_store(address) as store:
        assert 0 < store.count() < ROWS
        report = store_embeddings(StoredRows.open(source), store, [COLOR], batch_rows=200)
        assert report.new + report.there == ROWS and report.there >= 200
        if store.closed_to_fields:
            return
    run_and_kill(
        source, address, tmp_path / "color.safetensors", tmp_path / "shape.safetensors", after=4
    )
    with open_store(address) as store:
        report = store_embeddings(StoredRows.open(source), store, [COLOR, SHAPE])
        assert report.completed + report.there == ROWS and report.new == 0
    found = everything(address, ["universal", "color", "timeHofHday"])
    assert len(found) == ROWS
    for each in found.values():
        assert all(np.isfinite(vector).all() for vector in each.values())


def test_a_criterion_is_added(address, source):
    with open_store(address) as store:
        store_embeddings(StoredRows.open(source), store, [COLOR])
    before = everything(address, ["universal", "color"])
    with open_store(address) as store:
        if store.closed_to_fields:
            with pytest.raises(VectorStoreError, match="new collection"):
                store_embeddings(StoredRows.open(source), store, [SHAPE])
            return
        report = store_embeddings(StoredRows.open(source), store, [SHAPE])
        assert (report.completed, report.new) == (ROWS, 0)
        rows = {"time-of-day": SHAPE.projection.apply(unit_rows(1, seed=9))}
        assert len(search_store(store, rows).ids) == 10
    after = everything(address, ["universal", "color", "timeHofHday"])
    for each, vectors in before.items():
        assert np.array_equal(after[each]["color"], vectors["color"])
        assert np.array_equal(after[each]["universal"], vectors["universal"])
        assert np.isfinite(after[each]["timeHofHday"]).all()


def test_models_and_versions_are_not_mixed(address, source, tmp_path):
    other = stored_file(tmp_path / "b.npz", unit_rows(3), model="b" * 64)
    with open_store(address) as store:
        store_embeddings(StoredRows.open(source), store, [COLOR])
    with open_store(address) as store:
        with pytest.raises(StoreMismatchError, match="another name"):
            store_embeddings(StoredRows.open(other), store)
        with pytest.raises(StoreMismatchError, match="--bases"):
            store_embeddings(StoredRows.open(source), store, [basis("color", seed=1)])
        assert store.count() == ROWS


def test_no_collection(address):
    with open_store(address) as store, pytest.raises(VectorStoreError, match="no such collection"):
        open_record(store)
