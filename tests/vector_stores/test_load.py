"""Writing to a store: what is written, going on after a stop, and what is refused."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from store_rows import DIM, MODEL, MemoryStore, basis, stored_file, unit_rows

from crl_sdk.errors import (
    BasisMismatchError,
    InvalidInputError,
    StoreMismatchError,
    VectorStoreError,
)
from crl_sdk.vector_stores import StoredRows, store_embeddings


@pytest.fixture
def rows(tmp_path):
    return StoredRows.open(stored_file(tmp_path / "a.npz", unit_rows(35)))


def test_every_row_gets_its_vectors(rows):
    store, bases = MemoryStore(), [basis("color"), basis("animal habitat", dim=3)]
    report = store_embeddings(rows, store, bases)
    assert (report.new, report.there, report.failed, report.total) == (35, 0, 0, 35)
    assert store.dims == {"universal": DIM, "color": 5, "animal_habitat": 3}
    assert report.fields["animal habitat"] == "animal_habitat"
    for i, row in enumerate(unit_rows(35)):
        path, vectors = store.rows[f"photos/{i}.jpg"]
        assert path == f"photos/{i}.jpg" and np.array_equal(vectors["universal"], row)
        assert np.allclose(vectors["color"], bases[0].projection.apply(row[None])[0], atol=1e-6)
    record = msgspec.json.decode(store.record)
    assert record["fingerprint"] == MODEL
    assert record["fields"]["color"]["basis_sha256"] == bases[0].sha256()


def test_again_writes_nothing(rows):
    store = MemoryStore()
    store_embeddings(rows, store, [basis("color")])
    store.writes.clear()
    report = store_embeddings(rows, store, [basis("color")])
    assert (report.new, report.there) == (0, 35) and store.writes == ["finish"]


def test_a_store_that_goes_away(rows):
    store = MemoryStore(fails_after=2)
    with pytest.raises(VectorStoreError, match=r"20 of 35 rows .* run the same command") as caught:
        store_embeddings(rows, store, [basis("color")])
    assert "hunter2" not in str(caught.value) and "***" in str(caught.value)
    assert caught.value.__cause__ is None
    store.fails_after = None
    report = store_embeddings(rows, store, [basis("color")])
    assert (report.new, report.there, store.count()) == (15, 20, 35)


def test_a_criterion_is_added(rows):
    store = MemoryStore()
    store_embeddings(rows, store, [basis("color")])
    before = {each: vectors["color"].copy() for each, (_, vectors) in store.rows.items()}
    store.writes.clear()
    report = store_embeddings(rows, store, [basis("shape")])
    assert report.completed == 35 and store.count() == 35
    assert store.writes == ["add shape", *["fill 10 ['shape']"] * 3, "fill 5 ['shape']", "finish"]
    assert all(np.array_equal(store.rows[i][1]["color"], v) for i, v in before.items())
    assert set(msgspec.json.decode(store.record)["fields"]) == {"universal", "color", "shape"}


def test_a_store_that_takes_no_further_criteria(rows):
    store = MemoryStore()
    store_embeddings(rows, store, [basis("color")])
    store.closed_to_fields, before = "this one adds none", store.record
    with pytest.raises(VectorStoreError, match=r"lacks shape.*adds none.*new collection"):
        store_embeddings(rows, store, [basis("color"), basis("shape")])
    assert store.record == before
    assert store_embeddings(rows, store, [basis("color")]).there == 35


@pytest.mark.parametrize("fails_after", [0, 1, 3])
def test_adding_a_criterion_can_be_stopped(rows, fails_after):
    store = MemoryStore()
    store_embeddings(rows, store)
    store.fails_after = len(store.writes) + fails_after
    with pytest.raises(VectorStoreError, match="cannot be written to"):
        store_embeddings(rows, store, [basis("color")])
    store.fails_after = None
    assert store_embeddings(rows, store).there == 35  # without what could not be added
    store_embeddings(rows, store, [basis("color")])
    assert all(set(vectors) == {"universal", "color"} for _, vectors in store.rows.values())


def test_failed_images_are_left_out_and_counted(tmp_path):
    universal = unit_rows(25)
    universal[[3, 14]] = np.nan
    universal[10:20] = np.nan
    rows = StoredRows.open(stored_file(tmp_path / "a.npz", universal))
    store = MemoryStore()
    report = store_embeddings(rows, store, [basis("color")])
    assert (report.new, report.failed, report.done) == (14, 11, 25)
    assert "photos/3.jpg" not in store.rows


def test_models_are_not_mixed(rows, tmp_path):
    store = MemoryStore()
    store_embeddings(rows, store, [basis("color")])
    other = StoredRows.open(stored_file(tmp_path / "b.npz", unit_rows(3), model="b" * 64))
    with pytest.raises(StoreMismatchError, match=r"aaaaaaaaaaaa….*bbbbbbbbbbbb….*another name"):
        store_embeddings(other, store)
    with pytest.raises(BasisMismatchError):
        store_embeddings(rows, store, [basis("shape", model="b" * 64)])
    with pytest.raises(StoreMismatchError, match="--bundle is bbbb"):
        store_embeddings(rows, store, fingerprint="b" * 64)
    assert store.count() == 35


def test_versions_of_a_basis_are_not_mixed(rows):
    store = MemoryStore()
    store_embeddings(rows, store, [basis("color")])
    with pytest.raises(StoreMismatchError, match=r"version .* of 'color'.*--bases"):
        store_embeddings(rows, store, [basis("color", seed=1)])
    with pytest.raises(StoreMismatchError, match=r"5 values.*4 values"):
        store_embeddings(rows, store, [basis("color", dim=4)])


def test_collections_of_others(rows):
    store = MemoryStore()
    store.create("", {"vector": 7})
    store.other = "vector: Euclid"
    with pytest.raises(StoreMismatchError, match=r"not made by crl store.*vector 7.*Euclid"):
        store_embeddings(rows, store)
    store.record = "{"
    with pytest.raises(StoreMismatchError, match="cannot be read"):
        store_embeddings(rows, store)


def test_a_collection_that_was_changed(rows):
    store = MemoryStore()
    store_embeddings(rows, store, [basis("color")])
    store.dims["shape"] = 5
    with pytest.raises(StoreMismatchError, match="shape that crl store did not write"):
        store_embeddings(rows, store, [basis("shape")])
    store.dims["color"] = 6
    with pytest.raises(StoreMismatchError, match=r"'color' of 5 values.*found 6"):
        store_embeddings(rows, store, [basis("color")])
    store.dims["color"], store.other = 5, "color: Euclid"
    with pytest.raises(StoreMismatchError, match=r"cosine, found color: Euclid"):
        store_embeddings(rows, store, [basis("color")])


def test_what_is_refused_before_anything_is_written(tmp_path, rows):
    twice = StoredRows.open(stored_file(tmp_path / "b.npz", unit_rows(2), names=["a", "a"]))
    store = MemoryStore()
    with pytest.raises(InvalidInputError, match="'a' in rows"):
        store_embeddings(twice, store)
    with pytest.raises(InvalidInputError, match="at least one"):
        store_embeddings(rows, store, universal=False)
    with pytest.raises(InvalidInputError, match="each criterion once"):
        store_embeddings(rows, store, [basis("color"), basis("color", seed=1)])
    unknown = StoredRows.open(stored_file(tmp_path / "c.npz", unit_rows(2), model=None))
    with pytest.raises(InvalidInputError, match="--bundle"):
        store_embeddings(unknown, store)
    assert store.record is None


def test_ctrl_c_loses_nothing(rows):
    store = MemoryStore()

    def interrupt(report):
        if report.done >= 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store_embeddings(rows, store, [basis("color")], progress=interrupt)
    assert store.count() == 20
    assert store_embeddings(rows, store, [basis("color")]).new == 15
