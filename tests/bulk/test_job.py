"""Bulk embedding: every source, what a job refuses, and criteria that are added later."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from bulk_sources import picture, write_directory, write_shard, write_tar
from pyarrow import parquet

from crl_sdk import Embedder, demo_bundle
from crl_sdk.bulk import BulkJob, ParquetColumns, add_criteria
from crl_sdk.bulk._job import Progress
from crl_sdk.errors import InvalidInputError
from crl_sdk.stored import StoredEmbeddings
from crl_sdk.stored._directory import EmbeddingDirectory

ENGINE = "onnx/cpu/fp32"


@pytest.fixture(scope="module")
def bases(embedder):
    return [
        embedder.create_basis(name, texts, load=False)
        for name, texts in (("color", ["red", "blue"]), ("shape", ["disc", "star", "ring"]))
    ]


@pytest.fixture
def pictures(tmp_path):
    return write_directory(tmp_path / "pictures", 25)


def embed(out: Path, *sources: Path, **options) -> BulkJob:
    options = {"engine": ENGINE, "batch_size": 4, "part_rows": 10, **options}
    with BulkJob.create(out, sources, demo_bundle(), options.pop("bases", ()), **options) as job:
        job.run()
    return job


def rows_of(out: Path) -> list[dict]:
    return parquet.read_table(out).to_pylist()


def test_a_directory_becomes_parts_whose_rows_are_those_of_the_embedder(tmp_path, pictures, bases):
    seen: list[Progress] = []
    out = tmp_path / "out"
    with BulkJob.create(
        out, [pictures], demo_bundle(), bases, engine=ENGINE, batch_size=4, part_rows=10
    ) as job:
        counts = job.run(seen.append)
    assert (counts.rows, counts.errors) == (25, 0)
    assert [path.name for path in job.parts()] == [f"part-0000{i}.parquet" for i in range(3)]
    assert seen[0] == Progress(0, 0, 25, 0, 3) and seen[-1] == Progress(25, 0, 25, 2, 3)
    assert [now.rows for now in seen] == [0, 4, 8, 10, 14, 18, 20, 24, 25]
    table = parquet.read_table(out)
    files = sorted(pictures.rglob("*.png"))
    assert table["id"].to_pylist() == table["path"].to_pylist() == list(map(str, files))
    assert table["error"].null_count == 25
    with Embedder.open(demo_bundle(), engine=ENGINE) as embedder:
        for part in range(3):  # batches begin anew in each part
            expected = embedder.embed(files[10 * part : 10 * part + 10], bases, batch_size=4)
            mine = parquet.read_table(job.parts()[part])
            for name in ("universal", "color", "shape"):
                want = expected.universal if name == "universal" else expected[name]
                assert mine[name].type == pa.list_(pa.float32(), want.shape[1])
                np.testing.assert_array_equal(np.array(mine[name].to_pylist(), np.float32), want)
    manifest = EmbeddingDirectory.open(out).manifest
    assert (manifest.rows, manifest.errors, manifest.parts) == (25, 0, 3)
    assert manifest.criteria == {basis.criterion: basis.sha256() for basis in bases}


def test_every_kind_of_source(tmp_path, pictures, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_shard(Path("shard-0.tar"), 5, first=100)
    table = pa.table({"key": ["a", "b"], "jpg": [picture(200), picture(201)]})
    parquet.write_table(table, "bytes.parquet")
    hugging = pa.table({"image": [{"bytes": picture(210), "path": None}], "key": ["h"]})
    parquet.write_table(hugging, "hugging.parquet")
    Path("more").mkdir()
    for i in range(3):
        Path("more", f"{i}.png").write_bytes(picture(300 + i))
    Path("list.txt").write_text("more/0.png\r\n\nmore/1.png\n")
    parquet.write_table(
        pa.table({"path": ["more/2.png", None], "key": ["p", "q"]}), "paths.parquet"
    )
    sources = [
        Path(name)
        for name in ("pictures", "shard-0.tar", "bytes.parquet", "hugging.parquet", "list.txt",
                     "paths.parquet")
    ]  # fmt: skip
    embed(tmp_path / "out", *sources, columns=ParquetColumns())
    rows = rows_of(tmp_path / "out")
    ids = [row["id"] for row in rows]
    assert ids[0] == "pictures/000/00000.png" and ids[25:27] == ["more/0.png", "more/1.png"]
    assert ids[27] == "shard-0.tar/000100.png" and rows[27]["path"] == "shard-0.tar"
    assert ids[32:] == [
        "bytes.parquet#0", "bytes.parquet#1", "hugging.parquet#0", "paths.parquet#0",
        "paths.parquet#1",
    ]  # fmt: skip
    assert [row["id"] for row in rows if row["error"]] == ["paths.parquet#1"]
    assert rows[-1]["universal"] is None and "expected a path" in rows[-1]["error"]
    with Embedder.open(demo_bundle(), engine=ENGINE) as embedder:
        want = embedder.embed([picture(100), picture(200), picture(210), picture(302)]).universal
    got = [rows[i]["universal"] for i in (27, 32, 34, 35)]
    np.testing.assert_allclose(np.array(got, np.float32), want, atol=1e-6)


def test_named_columns_and_row_ranges(tmp_path):
    table = pa.table({"key": [f"k{i}" for i in range(23)], "x": [picture(i) for i in range(23)]})
    parquet.write_table(table, tmp_path / "t.parquet", row_group_size=7)
    embed(tmp_path / "out", tmp_path / "t.parquet", columns=ParquetColumns(image="x", id="key"))
    assert [row["id"] for row in rows_of(tmp_path / "out")] == [f"k{i}" for i in range(23)]
    embed(
        tmp_path / "all",
        tmp_path / "t.parquet",
        columns=ParquetColumns("x", id="key"),
        part_rows=99,
    )
    np.testing.assert_allclose(
        StoredEmbeddings.open(tmp_path / "all").embeddings,
        StoredEmbeddings.open(tmp_path / "out").embeddings, atol=1e-6,
    )  # fmt: skip


def test_bad_pictures_are_rows_with_their_reason(tmp_path):
    folder = write_directory(tmp_path / "in", 4)
    (folder / "000" / "00001.png").write_bytes(picture(1)[:60])
    (folder / "000" / "00002.png").write_bytes(b"")
    (folder / "zz.jpg").write_text("no picture")
    job = embed(tmp_path / "out", folder)
    rows = rows_of(tmp_path / "out")
    assert (job.manifest.rows, job.manifest.errors) == (5, 3)
    bad = {Path(row["id"]).name: row["error"] for row in rows if row["error"]}
    assert list(bad) == ["00001.png", "00002.png", "zz.jpg"] and "0 bytes" in bad["00002.png"]
    assert [row["universal"] is None for row in rows] == [False, True, True, False, True]
    stored = StoredEmbeddings.open(tmp_path / "out")
    assert stored.embeddings.shape == (2, 128) and stored.fingerprint == job.manifest.fingerprint


def test_members_that_are_no_pictures(tmp_path):
    link = tmp_path / "t.tar"
    write_tar(
        link, [("a/b.png", picture(1)), ("../../etc/passwd", b"x"), ("../up.png", picture(2))]
    )
    embed(tmp_path / "out", link)
    assert [row["id"] for row in rows_of(tmp_path / "out")] == [
        f"{link}/a/b.png",
        f"{link}/../up.png",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "t.tar"]


def test_memory_of_an_archive_stays_flat(tmp_path):
    import tracemalloc

    write_tar(
        tmp_path / "t.tar", [(f"{i:05d}.txt", b"x") for i in range(3000)] + [("a.png", picture(0))]
    )
    from crl_sdk.bulk._sources import read_tar

    tracemalloc.start()
    try:
        (found,) = read_tar(tmp_path / "t.tar", "t.tar", ("PNG",))
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert found.id == "t.tar/a.png"


def test_what_a_new_job_refuses(tmp_path, pictures):
    def create(*sources, out=tmp_path / "new", **options):
        with BulkJob.create(out, sources, demo_bundle(), engine=ENGINE, **options):
            pass

    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(InvalidInputError, match="expected an empty directory"):
        create(pictures, out=tmp_path / "used")
    with pytest.raises(InvalidInputError, match="found a file"):
        create(pictures, out=tmp_path / "used" / "file")
    cases = [
        ([tmp_path / "gone"], "does not exist"),
        ([pictures, pictures], "given twice"),
        ([pictures, pictures / "001"], "a source too; leave one out"),
        ([tmp_path / "used"], "expected pictures, found none"),
    ]
    for number, (sources, message) in enumerate(cases):
        with pytest.raises(InvalidInputError, match=message):
            create(*sources, out=tmp_path / f"case-{number}")
    with pytest.raises(InvalidInputError, match="batch_size"):
        create(pictures, batch_size=0)


def test_what_parquet_sources_refuse(tmp_path):
    path = tmp_path / "t.parquet"

    def create(table, *, columns=ParquetColumns(), name="out"):  # noqa: B008
        parquet.write_table(table, path)
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        embed(tmp_path / name, path, columns=columns)

    with pytest.raises(InvalidInputError, match=r"a column of images or of paths, found \['x'\]"):
        create(pa.table({"x": [1]}))
    with pytest.raises(InvalidInputError, match=r"--id-column: expected one of .*got 'key'"):
        create(pa.table({"jpg": [picture(0)]}), columns=ParquetColumns(id="key"))
    twice = pa.table({"jpg": [picture(0)] * 3, "key": ["a", "b", "a"]})
    with pytest.raises(InvalidInputError, match="'a' is the name of two rows"):
        create(twice, columns=ParquetColumns(id="key"))
    create(pa.table({"jpg": pa.array([None, picture(1)], pa.binary())}))
    assert [row["error"] is None for row in rows_of(tmp_path / "out")] == [False, True]
    path.write_bytes(b"PAR1 no")
    with pytest.raises(InvalidInputError, match=r"not a readable .parquet file"):
        embed(tmp_path / "bad", path)


def test_a_name_twice_in_two_sources_is_refused_with_both(tmp_path, pictures):
    one = next(pictures.rglob("*.png"))
    (tmp_path / "list.txt").write_text(f"{one}\n")
    with pytest.raises(
        InvalidInputError, match=rf"list.txt: '{one}' .* the other one in {pictures}"
    ):
        embed(tmp_path / "out", pictures, tmp_path / "list.txt")


def test_adding_a_criterion_reads_no_picture(tmp_path, pictures, bases):
    (pictures / "zz.png").write_bytes(b"bad")
    both = embed(tmp_path / "both", pictures, bases=bases)
    later = embed(tmp_path / "later", pictures, bases=bases[:1])
    shutil.rmtree(pictures)
    done: list[int] = []
    add_criteria(later.path, bases[1:], done.append)
    assert done == [10, 20, 26]
    assert EmbeddingDirectory.open(later.path).manifest.criteria == both.manifest.criteria
    for mine, other in zip(rows_of(later.path), rows_of(both.path), strict=True):
        assert list(mine) == ["id", "path", "universal", "color", "shape", "error"] == list(other)
        if mine["error"] is None:
            np.testing.assert_allclose(mine.pop("shape"), other.pop("shape"), atol=1e-6)
        assert mine == other
    before = [path.stat().st_mtime_ns for path in later.parts()]
    add_criteria(later.path, bases[1:])  # as after a kill: what is done stays
    assert [path.stat().st_mtime_ns for path in later.parts()] == before


def test_a_criterion_that_is_made_again_replaces_its_column(tmp_path, pictures, bases, embedder):
    job = embed(tmp_path / "out", pictures, bases=bases)
    other = embedder.create_basis("shape", ["round", "angular"], load=False)
    add_criteria(job.path, [other])
    rows = rows_of(job.path)
    want = other.projection.apply(StoredEmbeddings.open(job.path).embeddings)
    np.testing.assert_allclose(
        np.array([row["shape"] for row in rows], np.float32), want, atol=1e-6
    )
    assert EmbeddingDirectory.open(job.path).manifest.criteria["shape"] == other.sha256()


def test_what_adding_refuses(tmp_path, pictures, bases, embedder):
    job = embed(tmp_path / "out", pictures)
    with pytest.raises(InvalidInputError, match="the name of another column"):
        add_criteria(job.path, [embedder.create_basis("path", ["red", "star"], load=False)])
    job.parts()[0].unlink()
    with pytest.raises(InvalidInputError, match="this part is missing"):
        add_criteria(job.path, bases)


def test_half_precision(tmp_path, pictures, bases):
    job = embed(tmp_path / "out", pictures, bases=bases, dtype="float16")
    table = parquet.read_table(job.path)
    assert table["color"].type.value_type == pa.float16()
    whole = embed(tmp_path / "whole", pictures, bases=bases)
    np.testing.assert_allclose(
        StoredEmbeddings.open(job.path).embeddings.astype(np.float32),
        StoredEmbeddings.open(whole.path).embeddings, atol=1e-3,
    )  # fmt: skip
    add_criteria(job.path, bases)
