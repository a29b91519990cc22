"""Sources that are damaged, ambiguous or missing: nothing is lost, and everything is said."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from crl_sdk import demo_bundle
from crl_sdk.bulk import BulkJob, ParquetColumns
from crl_sdk.errors import InvalidInputError
from crl_sdk.stored._directory import EmbeddingDirectory


def jpeg(shade=0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (shade, 90, 200)).save(file, "JPEG")
    return file.getvalue()


def write_tar(path: Path, names, mode="w") -> Path:
    with tarfile.open(path, mode) as archive:
        for i, name in enumerate(names):
            data = jpeg(i % 256)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def embed(out, sources, **options):
    """Run a job, and return its rows as dictionaries without embeddings."""
    with BulkJob.create(out, sources, demo_bundle(), **options) as job:
        job.run()
    return rows_of(out)


def rows_of(out):
    directory = EmbeddingDirectory.open(out)
    directory.require_complete()
    batches = directory.batches(["id", "path", "error", "universal"])
    rows = [row for batch in batches for row in batch.to_pylist()]
    assert all((row["universal"] is None) == (row["error"] is not None) for row in rows)
    return rows


NAMES = [f"{i}.jpg" for i in range(5)]


def cut_in_a_picture(data, offsets):
    return data[: offsets[3] + 700]


def cut_in_a_header(data, offsets):
    return data[: offsets[3] + 100]


def cut_between_pictures(data, offsets):
    return data[: offsets[3]]


def without_its_end(data, offsets):
    return data[: offsets[4] + 512 + -(-len(jpeg(4)) // 512) * 512]


def with_a_damaged_header(data, offsets):
    return data[: offsets[3]] + b"x" * 512 + data[offsets[3] + 512 :]


@pytest.mark.parametrize(
    ("damage", "whole"),
    [
        (cut_in_a_picture, 3),
        (cut_in_a_header, 3),
        (cut_between_pictures, 3),
        (with_a_damaged_header, 3),
        (without_its_end, 5),
    ],
)
def test_a_shard_that_ends_early(tmp_path, damage, whole):
    good = write_tar(tmp_path / "good.tar", NAMES)
    bad = write_tar(tmp_path / "bad.tar", NAMES)
    with tarfile.open(bad) as archive:
        offsets = [member.offset for member in archive]
    bad.write_bytes(damage(bad.read_bytes(), offsets))
    rows = embed(tmp_path / "out", [bad, good])
    assert [row["id"] for row in rows] == [
        *(f"{bad}/{name}" for name in NAMES[:whole]),
        f"{bad}#end",
        *(f"{good}/{name}" for name in NAMES),
    ]
    (error,) = (row["error"] for row in rows if row["error"])
    assert f"cannot be read further after {whole} pictures" in error


@pytest.mark.parametrize("mode", ["w:gz", "w:xz"])
def test_a_compressed_shard(tmp_path, mode):
    shard = write_tar(tmp_path / "shard.tar.gz", NAMES, mode)
    assert len(embed(tmp_path / "out", [shard])) == 5
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    rows = embed(tmp_path / "again", [shard])
    assert rows[-1]["id"] == f"{shard}#end"


@pytest.mark.parametrize("content", [b"", b"no archive" * 300])
def test_a_shard_that_is_none(tmp_path, content):
    shard = tmp_path / "shard.tar"
    shard.write_bytes(content)
    (row,) = embed(tmp_path / "out", [shard])
    assert row["id"] == f"{shard}#end"


def test_a_shard_of_nothing_else(tmp_path):
    shard = write_tar(tmp_path / "shard.tar", ["a.txt", "b.json", "c.jpg"])
    assert [row["id"] for row in embed(tmp_path / "out", [shard])] == [f"{shard}/c.jpg"]


def test_a_shard_that_is_away_stops_the_job_and_is_read_later(tmp_path):
    first, second = (write_tar(tmp_path / f"{name}.tar", NAMES) for name in "ab")
    out = tmp_path / "out"
    with BulkJob.create(out, [first, second], demo_bundle()) as job:
        second.rename(tmp_path / "away")
        with pytest.raises(InvalidInputError, match="run the same crl embed with --resume"):
            job.run()
    (tmp_path / "away").rename(second)
    assert [path.name for path in out.glob("*.parquet")] == ["part-00000.parquet"]
    with BulkJob.resume(out) as job:
        assert job.run().rows == 10
    assert not any(row["error"] for row in rows_of(out))


def test_one_name_twice_in_a_shard(tmp_path):
    shard = write_tar(tmp_path / "shard.tar", ["a.jpg", "b.jpg", "a.jpg"])
    rows = embed(tmp_path / "out", [shard])
    assert [row["id"] for row in rows] == [f"{shard}/a.jpg", f"{shard}/b.jpg", f"{shard}/a.jpg#3"]
    assert "pictures 1 and 3 of the archive both have the name a.jpg" in rows[2]["error"]


def test_one_id_twice_in_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for name, ids in (("a", ["x", "y"]), ("b", ["z", "y"])):
        table = pa.table({"id": ids, "image": [jpeg(), jpeg()]})
        parquet.write_table(table, tmp_path / f"{name}.parquet")
    sources = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    with pytest.raises(InvalidInputError) as caught:
        embed(tmp_path / "out", sources, columns=ParquetColumns(id="id"))
    for part in ("'y'", "a.parquet", "b.parquet"):
        assert part in str(caught.value)
    assert len(embed(tmp_path / "by-number", sources)) == 4


def test_one_path_twice_in_a_list(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg())
    listed = tmp_path / "list.txt"
    listed.write_text(f"{tmp_path}/a.jpg\n\n{tmp_path}/a.jpg\n")
    with pytest.raises(InvalidInputError, match="is the name of two rows"):
        embed(tmp_path / "out", [listed])


def test_a_list_names_what_is_missing(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg())
    listed = tmp_path / "list.txt"
    listed.write_text(f"{tmp_path}/a.jpg\r\n{tmp_path}/missing.jpg\r\n")
    rows = embed(tmp_path / "out", [listed])
    assert [bool(row["error"]) for row in rows] == [False, True]


def test_parquet_without_the_column(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"label": ["a"], "picture": [jpeg()]}), file)
    with pytest.raises(InvalidInputError, match=r"found \['label', 'picture'\].*--image-column"):
        embed(tmp_path / "out", [file])
    with pytest.raises(InvalidInputError, match=r"--image-column: expected one of .*'photo'"):
        embed(tmp_path / "out", [file], columns=ParquetColumns(image="photo"))
    (row,) = embed(tmp_path / "out", [file], columns=ParquetColumns(image="picture"))
    assert row["error"] is None and row["id"] == f"{file}#0"


def test_parquet_that_is_cut_off(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"image": [jpeg()] * 50}), file)
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(InvalidInputError, match=r"not a readable \.parquet file"):
        embed(tmp_path / "out", [file])


def test_parquet_rows_without_an_image(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = tmp_path / "rows.parquet"
    images = [{"bytes": jpeg(), "path": None}, None, {"bytes": b"", "path": None}]
    parquet.write_table(pa.table({"image": images}), file)
    rows = embed(tmp_path / "out", [file])
    assert [bool(row["error"]) for row in rows] == [False, True, True]


def test_parquet_in_parts_across_row_groups(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = tmp_path / "rows.parquet"
    table = pa.table({"key": [f"k{i}" for i in range(23)], "image": [jpeg(i) for i in range(23)]})
    parquet.write_table(table, file, row_group_size=5)
    rows = embed(tmp_path / "out", [file], columns=ParquetColumns(id="key"), part_rows=7)
    assert [row["id"] for row in rows] == [f"k{i}" for i in range(23)]
    assert len(list((tmp_path / "out").glob("*.parquet"))) == 4
    whole = embed(tmp_path / "whole", [file], columns=ParquetColumns(id="key"))
    assert [row["id"] for row in whole] == [row["id"] for row in rows]


def test_sources_inside_each_other(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(jpeg())
    for sources in (["photos", "photos"], ["photos", "photos/a.jpg"]):
        with pytest.raises(InvalidInputError, match=r"given twice|lies in"):
            embed(tmp_path / "out", [tmp_path / source for source in sources])


def test_names_that_are_not_text(tmp_path):
    pictures = tmp_path / "photos"
    pictures.mkdir()
    for name in (b"\xff.jpg", b"two\nlines.jpg", "ü.jpg".encode()):
        Path(str(pictures), name.decode("utf-8", "surrogateescape")).write_bytes(jpeg())
    rows = embed(tmp_path / "out", [pictures])
    assert len(rows) == 3 and not any(row["error"] for row in rows)


def test_an_empty_directory(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(InvalidInputError, match="expected pictures, found none"):
        embed(tmp_path / "out", [tmp_path / "photos"])
    (tmp_path / "photos" / "a.jpg").write_bytes(jpeg())
    assert (
        len(embed(tmp_path / "out", [tmp_path / "photos"])) == 1
    )  # what was begun is no hindrance
