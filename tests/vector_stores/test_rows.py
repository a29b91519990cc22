"""Rows of stored embeddings, batch by batch: files, directories of parts, and bad ones."""

from __future__ import annotations

import numpy as np
import pytest
from store_rows import DIM, MODEL, stored_file, unit_rows

from crl_sdk.errors import CrlError, InvalidInputError
from crl_sdk.vector_stores import StoredRows
from crl_sdk.vector_stores import _rows as rows_module

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def lists(rows, nulls=()):
    values = [None if i in nulls else row.tolist() for i, row in enumerate(rows)]
    return pa.array(values, pa.list_(pa.float32(), rows.shape[1]))


def part(path, rows, *, ids=None, model=MODEL, nulls=()):
    names = [f"{path.stem}-{i}" for i in range(len(rows))] if ids is None else ids
    table = pa.table(
        {"id": names, "path": [f"p/{i}" for i in names], "universal": lists(rows, nulls)}
    )
    parquet.write_table(table.replace_schema_metadata({"crl_fingerprint": model}), path)


def test_npz(tmp_path):
    universal = unit_rows(25)
    rows = StoredRows.open(stored_file(tmp_path / "a.npz", universal))
    batches = list(rows.batches(10))
    assert [len(batch.ids) for batch in batches] == [10, 10, 5]
    assert np.array_equal(np.concatenate([batch.universal for batch in batches]), universal)
    assert batches[1].ids[0] == batches[1].paths[0] == "photos/10.jpg"
    assert (rows.size, rows.dim, rows.fingerprint) == (25, DIM, MODEL)


def test_npy_has_row_numbers(tmp_path):
    np.save(tmp_path / "a.npy", unit_rows(3))
    rows = StoredRows.open(tmp_path / "a.npy")
    assert list(rows.ids()) == ["row 0", "row 1", "row 2"] and rows.fingerprint is None
    assert [batch.ids for batch in rows.batches(2)] == [["row 0", "row 1"], ["row 2"]]


def test_int8_zeros_are_failed_images(tmp_path):
    values = np.array([[3, -4], [0, 0]], np.int8)
    np.save(tmp_path / "a.npy", values)
    (batch,) = StoredRows.open(tmp_path / "a.npy").batches(9)
    assert batch.universal[0].tolist() == pytest.approx([0.6, -0.8])
    assert np.isnan(batch.universal[1]).all()


def test_a_directory_of_parts(tmp_path):
    universal = unit_rows(12)
    part(tmp_path / "part-00000.parquet", universal[:5], nulls=(2,))
    part(tmp_path / "part-00001.parquet", universal[5:])
    rows = StoredRows.open(tmp_path)
    got = np.concatenate([batch.universal for batch in rows.batches(4)])
    assert np.flatnonzero(np.isnan(got).any(axis=1)).tolist() == [2]
    assert np.array_equal(np.delete(got, 2, 0), np.delete(universal, 2, 0))
    ids = list(rows.ids())
    assert ids[:2] == ["part-00000-0", "part-00000-1"] and len(set(ids)) == 12
    assert [i for batch in rows.batches(4) for i in batch.ids] == ids


def test_bad_parts(tmp_path):
    with pytest.raises(InvalidInputError, match="found none"):
        StoredRows.open(tmp_path)
    part(tmp_path / "part-00000.parquet", unit_rows(2))
    part(tmp_path / "part-00001.parquet", unit_rows(2), model="b" * 64)
    with pytest.raises(InvalidInputError, match="2 models"):
        StoredRows.open(tmp_path)
    (tmp_path / "part-00001.parquet").write_bytes(b"PAR1 cut off")
    with pytest.raises(CrlError, match="part-00001"):
        StoredRows.open(tmp_path)
    parquet.write_table(pa.table({"x": [1]}), tmp_path / "part-00001.parquet")
    with pytest.raises(InvalidInputError, match=r"part-00001.*'universal'"):
        StoredRows.open(tmp_path)


def test_a_row_without_an_id(tmp_path):
    part(tmp_path / "part-00000.parquet", unit_rows(2), ids=["a", None])
    with pytest.raises(InvalidInputError, match="row 1 has no id"):
        list(StoredRows.open(tmp_path).ids())


@pytest.mark.parametrize("per_pass", [1 << 24, 3])
def test_ids_twice(tmp_path, monkeypatch, per_pass):
    monkeypatch.setattr(rows_module, "_HASHES_PER_PASS", per_pass)
    names = ["a", "b", "c", "a", "d", "e", "f", "g"]
    rows = StoredRows.open(stored_file(tmp_path / "a.npz", unit_rows(8), names=names))
    with pytest.raises(InvalidInputError, match=r"1 ids .*'a' in rows \[0, 3\]"):
        rows.require_distinct_ids()
    names[3] = "z"
    StoredRows.open(
        stored_file(tmp_path / "a.npz", unit_rows(8), names=names)
    ).require_distinct_ids()
