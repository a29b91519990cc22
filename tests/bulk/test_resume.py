"""Jobs that end early, by kill, Ctrl-C, a full disk or a crash, and go on without a lost row."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet

from crl_benchmarks.bulk_million import demonstrate, read_universal
from crl_benchmarks.thumbnails import write_shards
from crl_sdk import Embedder, demo_bundle
from crl_sdk.basis import BasisDirectory
from crl_sdk.bulk import BulkJob, add_criteria, make_part, open_job_embedder
from crl_sdk.errors import InvalidInputError
from crl_sdk.stored._directory import EmbeddingDirectory

CRL = [sys.executable, "-m", "crl_sdk"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Six shards of 40 pictures."""
    return write_shards(tmp_path_factory.mktemp("shards"), 240, shard=40)


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory):
    """The shards, embedded in one go."""
    out = tmp_path_factory.mktemp("whole") / "embedded"
    with BulkJob.create(out, shards, demo_bundle()) as job:
        assert job.run().rows == 240
    return out


@pytest.fixture(scope="module")
def colour():
    with Embedder.open(demo_bundle()) as embedder:
        return embedder.create_basis("color", ["red", "green", "blue"])


def require_same(out, whole):
    """Check that two directories have the same rows, bit for bit."""
    parts, others = EmbeddingDirectory.open(out).parts(), EmbeddingDirectory.open(whole).parts()
    assert [part.name for part in parts] == [part.name for part in others]
    for part, other in zip(parts, others, strict=True):
        names, values = read_universal(part)
        other_names, other_values = read_universal(other)
        assert names == other_names
        assert (values == other_values).all()
    assert not list(out.glob(".*.tmp"))


def test_killed_again_and_again(tmp_path):  # `make scale-million` does it with a million
    runs, text = demonstrate(tmp_path, 1200, shard=100, kills=3, grace=0.05)
    *killed, last = runs  # a fast job may end before the third kill
    assert killed and all(run.killed for run in killed) and not last.killed
    assert "1,200 pictures, 1,200 rows" in text


def test_ctrl_c_says_how_to_go_on(tmp_path, shards, whole):
    out = tmp_path / "out"
    with subprocess.Popen(
        [*CRL, "embed", *map(str, shards), "--out", str(out)], stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            ends = time.monotonic() + 120
            while not (out / "part-00000.parquet").exists():
                assert process.poll() is None and time.monotonic() < ends
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            _, told = process.communicate(timeout=120)
        finally:
            process.kill()
    if process.returncode == 0:  # it was faster than the signal
        pytest.skip("the job had ended")
    assert process.returncode == 130
    assert f"{out}; run the same command with --resume" in " ".join(told.split())
    assert "Traceback" not in told and "Exception ignored" not in told
    left = [path.name for path in out.iterdir()]
    assert "part-00000.parquet" in left and not any(name.endswith(".tmp") for name in left)
    done = subprocess.run([*CRL, "embed", "--out", str(out), "--resume"], check=False)
    assert done.returncode == 0
    require_same(out, whole)


LIMITED = """
import resource, sys
from pathlib import Path
from crl_sdk.basis import BasisDirectory
from crl_sdk.bulk import BulkJob
from crl_sdk.errors import CrlError
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    with BulkJob.resume(Path(sys.argv[1])) as job:
        job.run()
except CrlError as error:
    print(error)
    sys.exit(3)
"""


def test_a_disk_that_is_full_at_part_7(tmp_path):
    small = write_shards(tmp_path / "small", 60, shard=10)
    large = write_shards(tmp_path / "large", 400, shard=400)
    out = tmp_path / "out"
    BulkJob.create(out, [*small, *large], demo_bundle()).close()
    limit = str(100_000)  # bytes of a file: enough for 10 embeddings of 512 bytes, not for 400
    full = subprocess.run(
        [sys.executable, "-c", LIMITED, str(out), limit],
        capture_output=True,
        text=True,
        check=False,
    )
    assert full.returncode == 3, full.stderr
    assert "part-00006.parquet: cannot be written" in full.stdout
    assert "Exception ignored" not in full.stderr
    assert [path.name for path in sorted(out.iterdir())] == [
        "_crl", *(f"part-0000{i}.parquet" for i in range(6))
    ]  # fmt: skip
    with BulkJob.resume(out) as job:
        assert job.run().rows == 460


def test_a_second_job_is_refused(tmp_path, shards):
    out = tmp_path / "out"
    with BulkJob.create(out, shards, demo_bundle()):
        for again in (
            [*CRL, "embed", str(shards[0]), "--out", str(out)],
            [*CRL, "embed", "--out", str(out), "--resume"],
        ):
            refused = subprocess.run(again, capture_output=True, text=True, check=False)
            assert refused.returncode == 1
        assert "another process works on this job" in " ".join(refused.stderr.split())
        with pytest.raises(InvalidInputError, match="another process works on this job"):
            BulkJob.resume(out)
    BulkJob.resume(out).close()


def test_a_directory_of_something_else_is_refused(tmp_path, shards):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InvalidInputError, match="expected an empty directory"):
        BulkJob.create(tmp_path, shards, demo_bundle())
    with pytest.raises(InvalidInputError, match=r"crl embed --out"):
        BulkJob.resume(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_basis_that_changes_during_the_job(tmp_path, shards, colour):
    out, bases = tmp_path / "out", tmp_path / "bases"
    bases.mkdir()
    colour.save(bases / "color.safetensors")
    with BulkJob.create(out, shards, demo_bundle(), [colour]) as job:
        task = next(job.pending())
        with open_job_embedder(out) as embedder:
            make_part(task, embedder, job.manifest)
    with Embedder.open(demo_bundle()) as embedder:
        embedder.create_basis("color", ["cyan", "grey"]).save(bases / "color.safetensors")
    with BulkJob.resume(out) as job:
        job.run()
    (kept,) = (out / "_crl" / "bases").iterdir()
    assert kept.name == f"{colour.sha256()}.safetensors"
    for part in EmbeddingDirectory.open(out).parts():
        schema = parquet.read_schema(part)
        assert schema.field("color").type.list_size == colour.projection.output_dim
        assert schema.metadata[b"crl_basis:color"].decode() == colour.sha256()


def test_parts_in_any_order_and_process(tmp_path, shards, whole):
    out = tmp_path / "out"
    with BulkJob.create(out, shards, demo_bundle()) as job:
        tasks = pickle.loads(pickle.dumps(list(job.pending())))
        with open_job_embedder(out) as embedder:
            for task in reversed(tasks):
                make_part(task, embedder, job.manifest)
        assert job.finish().rows == 240
    require_same(out, whole)


def test_a_part_that_is_deleted_is_made_again(tmp_path, whole):
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    (out / "part-00003.parquet").unlink()
    with pytest.raises(InvalidInputError, match=r"expected 6 parts, found 5.*--resume"):
        EmbeddingDirectory.open(out).require_complete()
    with BulkJob.resume(out) as job:
        assert job.run().rows == 240
    require_same(out, whole)


def test_parts_that_are_damaged_or_foreign(tmp_path, shards, whole):
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    part = out / "part-00002.parquet"
    data = part.read_bytes()
    part.write_bytes(data[:1000])
    with pytest.raises(InvalidInputError, match=r"part-00002.*delete it and run.*--resume"):
        BulkJob.resume(out)
    other = tmp_path / "other"
    with BulkJob.create(other, shards[2:3], demo_bundle()) as job:
        job.run()
    shutil.copy(other / "part-00000.parquet", part)
    with pytest.raises(InvalidInputError, match="belongs to another job"):
        BulkJob.resume(out)


def test_an_edited_manifest(tmp_path, whole):
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    manifest = out / "_crl" / "manifest.json"
    for text in ("", "{", "[]", '{"schema": 99}', "null"):
        manifest.write_text(text)
        with pytest.raises(InvalidInputError, match=r"manifest\.json"):
            BulkJob.resume(out)


def test_a_criterion_added_later_reads_no_picture(tmp_path, shards, whole, colour):
    copies = [Path(shutil.copy(shard, tmp_path)) for shard in shards[:3]]
    out = tmp_path / "out"
    with BulkJob.create(out, copies, demo_bundle()) as job:
        job.run()
    for copy in copies:
        copy.unlink()
    before = [read_universal(part)[1].tobytes() for part in EmbeddingDirectory.open(out).parts()]
    calls = []

    def stop_after_the_first(rows):
        calls.append(rows)
        if len(calls) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        add_criteria(out, [colour], stop_after_the_first)
    assert EmbeddingDirectory.open(out).criteria == ()
    first = (out / "part-00000.parquet").stat().st_mtime_ns
    add_criteria(out, [colour])
    assert (out / "part-00000.parquet").stat().st_mtime_ns == first, "it was there already"
    directory = EmbeddingDirectory.open(out)
    assert directory.criteria == ("color",)
    assert [read_universal(part)[1].tobytes() for part in directory.parts()] == before
    for part in directory.parts():
        table = parquet.read_table(part)
        universal = np.array(table["universal"].drop_null().to_pylist(), np.float32)
        expected = colour.projection.apply(universal)
        assert np.abs(np.array(table["color"].drop_null().to_pylist()) - expected).max() < 1e-6


def test_resuming_as_something_else_is_refused(tmp_path, shards):
    out = tmp_path / "out"
    BulkJob.create(out, shards, demo_bundle()).close()
    for options, named in (
        (["--batch-size", "8"], "--batch-size"),
        (["--dtype", "float16"], "--dtype"),
        ([str(shards[0])], "sources"),
    ):
        refused = subprocess.run(
            [*CRL, "embed", *options, "--out", str(out), "--resume"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert refused.returncode == 1
        assert named in " ".join(refused.stderr.split())


def test_open_files_do_not_grow(tmp_path, shards):
    with BulkJob.create(tmp_path / "a", shards, demo_bundle()) as job:
        job.run()
    opened = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    with BulkJob.create(tmp_path / "b", shards, demo_bundle()) as job:
        job.run()
    if opened is not None:
        assert len(os.listdir("/proc/self/fd")) <= opened + 2


def test_crl_project_adds_a_criterion(tmp_path, whole, colour):
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    basis = BasisDirectory(tmp_path / "bases").path_of("color", colour.fingerprint)
    basis.parent.mkdir(parents=True)
    colour.save(basis)
    command = [*CRL, "project", str(out), "--criteria", "color", "--bases", str(tmp_path / "bases")]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["rows"] == 240 and facts["criteria"] == ["color"]
    assert "color" in parquet.read_schema(out / "part-00005.parquet").names
    refused = subprocess.run(
        [*command, "--dtype", "int8"], capture_output=True, text=True, check=False
    )
    assert refused.returncode == 1
    assert "have the dtype float32" in " ".join(refused.stderr.split())
