"""A directory of parts, read as it stands by what people already use."""

from __future__ import annotations

import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

from crl_benchmarks.thumbnails import thumbnails
from crl_sdk import Embedder, demo_bundle
from crl_sdk.bulk import BulkJob
from crl_sdk.stored import StoredEmbeddings

pytest.importorskip("pyarrow")

ROWS = 48
BROKEN = 17


@pytest.fixture(scope="module")
def embedded(tmp_path_factory) -> Path:
    """Two shards with a picture that cannot be read, embedded for one criterion."""
    work = tmp_path_factory.mktemp("readers")
    shards = [work / "a.tar", work / "b.tar"]
    for half, shard in enumerate(shards):
        with tarfile.open(shard, "w") as archive:
            for i, data in thumbnails(half * ROWS // 2, ROWS // 2):
                content = b"no picture" if i == BROKEN else data
                member = tarfile.TarInfo(f"{i:03}.jpg")
                member.size = len(content)
                archive.addfile(member, BytesIO(content))
    out = work / "embedded"
    with Embedder.open(demo_bundle()) as embedder:
        basis = embedder.create_basis("color", ["red", "green", "blue"])
    with BulkJob.create(out, shards, demo_bundle(), [basis]) as job:
        job.run()
    return out


@pytest.fixture(scope="module")
def expected(embedded) -> tuple[np.ndarray, np.ndarray]:
    """The embeddings of the pictures that can be read, universal and by colour."""
    from pyarrow import dataset

    table = dataset.dataset(embedded, format="parquet").to_table()
    good = table.filter(table["universal"].is_valid())
    assert good.num_rows == ROWS - 1
    return tuple(np.array(good[name].to_pylist(), np.float32) for name in ("universal", "color"))


def check(ids, universal, colour, errors, expected):
    """Compare what a library read: ids, embeddings by row or None, and reasons or None."""
    assert [name[-7:] for name in ids] == [f"{i:03}.jpg" for i in range(ROWS)]
    assert [i for i, error in enumerate(errors) if error is not None] == [BROKEN]
    for rows, right in zip((universal, colour), expected, strict=True):
        assert rows[BROKEN] is None
        given = np.stack([np.asarray(row, np.float32) for row in rows if row is not None])
        assert (given == right).all()


def test_pandas(embedded, expected):
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_parquet(embedded)
    rows = [frame[name].to_list() for name in ("universal", "color", "error")]
    rows = [
        [value if isinstance(value, str | np.ndarray) else None for value in column]
        for column in rows
    ]
    check(frame["id"], *rows, expected)


def test_polars(embedded, expected):
    polars = pytest.importorskip("polars")
    frame = polars.read_parquet(embedded / "*.parquet")  # it would take `_crl` for parts as well
    assert frame.schema["universal"] == polars.Array(polars.Float32, 128)
    check(*(frame[name].to_list() for name in ("id", "universal", "color", "error")), expected)
    lazy = polars.scan_parquet(embedded / "*.parquet").filter(polars.col("error").is_null())
    assert lazy.select(polars.len()).collect().item() == ROWS - 1


def test_duckdb(embedded, expected):
    duckdb = pytest.importorskip("duckdb")
    with duckdb.connect() as connection:
        parts = str(embedded / "*.parquet")
        rows = connection.execute(
            "SELECT id, universal, color, error FROM read_parquet(?) ORDER BY id", [parts]
        ).fetchall()
        check(*zip(*rows, strict=True), expected)
        nearest = connection.execute(
            "SELECT id FROM read_parquet(?) WHERE error IS NULL ORDER BY"
            " array_cosine_similarity(universal::FLOAT[128], ?::FLOAT[128]) DESC LIMIT 1",
            [parts, expected[0][30].tolist()],
        ).fetchone()
    assert nearest[0].endswith("031.jpg")  # row 30 of the good ones, behind the broken one


def test_lancedb(embedded, expected, tmp_path):
    lancedb = pytest.importorskip("lancedb")
    from pyarrow import dataset

    parts = dataset.dataset(embedded, format="parquet")
    database = lancedb.connect(tmp_path / "lance")
    table = database.create_table(
        "pictures", parts.to_batches(), schema=parts.schema, on_bad_vectors="null"
    )
    rows = table.to_arrow()
    check(*(rows[name].to_pylist() for name in ("id", "universal", "color", "error")), expected)
    found = table.search(expected[1][20], vector_column_name="color").limit(1).to_list()
    assert found[0]["_distance"] == pytest.approx(0, abs=1e-6)


def test_datasets(embedded, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    rows = datasets.load_dataset(
        str(embedded), split="train", cache_dir=str(tmp_path), verification_mode="no_checks"
    )
    assert rows.features["universal"].length == 128
    check(*(list(rows[name]) for name in ("id", "universal", "color", "error")), expected)


def test_stored_embeddings(embedded, expected):
    opened = StoredEmbeddings.open(embedded)
    assert (np.asarray(opened.embeddings) == expected[0]).all()
    assert opened.fingerprint is not None
