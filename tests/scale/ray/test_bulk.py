"""A bulk job on a cluster: the rows of one process, also when workers and the job are killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import psutil
import pytest

from crl_sdk import demo_bundle
from crl_sdk.bulk import BulkJob
from crl_sdk.errors import BundleError, InvalidInputError, ServiceError
from crl_sdk.integrations.ray import RayWorkers, _bulk, run_on_ray
from support import save_basis, wait_until

ray = pytest.importorskip("ray")
parquet = pytest.importorskip("pyarrow.parquet")

ROWS = 300


@pytest.fixture(scope="module")
def pictures(image_files, tmp_path_factory) -> Path:
    """Pictures of which every fiftieth is none."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(ROWS):
        path = folder / f"{i:04}.jpg"
        if i % 50 == 49:
            path.write_bytes(b"no picture")
        else:
            shutil.copy(image_files[i % 9], path)
    return folder


@pytest.fixture(scope="module")
def color(embedder):
    return embedder.create_basis("color", ["red", "green", "blue"], load=False)


def create(path: Path, pictures: Path, color, **options) -> BulkJob:
    chosen = {"engine": "onnx/cpu/fp32", "part_rows": 20, "batch_size": 8, **options}
    return BulkJob.create(path, [pictures], demo_bundle(), [color], **chosen)


@pytest.fixture(scope="module")
def expected(pictures, color, tmp_path_factory) -> Path:
    """The directory that one process writes."""
    path = tmp_path_factory.mktemp("expected") / "out"
    with create(path, pictures, color) as job:
        job.run()
    return path


def require_same(path: Path, expected: Path) -> None:
    """Check that two directories have the same parts with the same rows, bit for bit."""
    names = sorted(each.name for each in path.glob("part-*"))
    assert names == sorted(each.name for each in expected.glob("part-*"))
    assert not list(path.glob(".part-*"))
    for name in names:
        found, wanted = parquet.read_table(path / name), parquet.read_table(expected / name)
        assert found.equals(wanted), name


def workers() -> list[int]:
    """Return the processes of workers that make parts."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline() and "_Worker" in process.cmdline()[0]:
                found.append(process.pid)
        except psutil.Error:
            pass
    return found


def test_a_cluster_writes_the_parts_of_one_process(cluster, pictures, color, expected, tmp_path):
    seen = []
    with create(tmp_path / "out", pictures, color) as job:
        counts = run_on_ray(job, seen.append, address=cluster.address)
        assert (counts.rows, counts.errors) == (ROWS, ROWS // 50)
        again = run_on_ray(job, address="127.0.0.1:1")  # nothing is left, so nobody is asked
        assert again == counts
    assert [each.parts for each in seen] == list(range(16))
    assert (seen[-1].rows, seen[-1].errors, seen[-1].total) == (ROWS, ROWS // 50, ROWS)
    require_same(tmp_path / "out", expected)


def test_parts_of_killed_workers_are_made_again(cluster, pictures, color, expected, tmp_path):
    killed = []

    def kill(now) -> None:
        if now.parts in (2, 6):
            victim = workers()[-1]
            os.kill(victim, signal.SIGKILL)
            killed.append(victim)

    with create(tmp_path / "out", pictures, color) as job:
        run_on_ray(job, kill, address=cluster.address, workers=RayWorkers(number=2))
    assert len(set(killed)) == 2
    require_same(tmp_path / "out", expected)
    wait_until(lambda: not workers())


def test_a_killed_job_goes_on(cluster, pictures, color, expected, tmp_path):
    """The command is killed with SIGKILL, and resumed on the cluster."""
    save_basis(color, tmp_path / "bases")
    out = tmp_path / "out"
    command = [
        sys.executable, "-m", "crl_sdk", "embed", "--out", str(out), "--ray", cluster.address,
        "--json",
    ]  # fmt: skip
    begin = [
        str(pictures), "--criteria", "color", "--bases", str(tmp_path / "bases"),
        "--engine", "onnx/cpu/fp32", "--part-rows", "20", "--batch-size", "8",
        "--ray-workers", "1",
    ]  # fmt: skip
    first = subprocess.Popen([*command, *begin], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        wait_until(lambda: len(list(out.glob("part-*"))) >= 3, 60)
    finally:
        first.kill()
        first.communicate()
    made = len(list(out.glob("part-*")))
    assert 3 <= made < 15
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr  # since some pictures are none
    facts = json.loads(done.stdout)
    assert (facts["rows"], facts["failed"], facts["parts"]) == (ROWS, ROWS // 50, 15)
    require_same(out, expected)


def test_a_part_that_kills_its_workers_ends_the_job(
    cluster, pictures, color, tmp_path, monkeypatch
):
    class Poisoned(_bulk._Worker):
        def make(self, task):
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(_bulk, "RETRIES", 1)
    monkeypatch.setattr(_bulk, "_Worker", Poisoned)
    with (
        create(tmp_path / "out", pictures, color) as job,
        pytest.raises(ServiceError, match=r"part-0000.\.parquet: 2 workers.*--resume"),
    ):
        run_on_ray(job, address=cluster.address, workers=RayWorkers(number=1))


def test_a_node_without_the_package_is_said(cluster, pictures, color, tmp_path, monkeypatch):
    module = ModuleType("not_on_the_nodes")
    module.Worker = type("Worker", (_bulk._Worker,), {"__module__": module.__name__})
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(_bulk, "_Worker", module.Worker)
    with (
        create(tmp_path / "out", pictures, color) as job,
        pytest.raises(ServiceError, match=r"No module named 'not_on_the_nodes'.*install crl-emb"),
    ):
        run_on_ray(job, address=cluster.address, workers=RayWorkers(number=1))


def test_errors_of_workers_are_errors_here(cluster, pictures, color, tmp_path, bundle_copy):
    job = BulkJob.create(
        tmp_path / "out", [pictures], bundle_copy, [], engine="onnx/cpu/fp32", part_rows=100
    )
    (bundle_copy / "manifest.json").unlink()
    with job, pytest.raises(BundleError):
        run_on_ray(job, address=cluster.address)


def test_wrong_numbers_and_a_file_with_ray_are_said(tmp_path):
    with pytest.raises(InvalidInputError, match="workers >= 1"):
        RayWorkers(number=0)
    ran = subprocess.run(
        [sys.executable, "-m", "crl_sdk", "embed", ".", "--out", str(tmp_path / "a.npz"),
         "--ray", "auto"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 1 and "--ray: only for a directory" in ran.stderr
    ran = subprocess.run(
        [sys.executable, "-m", "crl_sdk", "embed", ".", "--out", str(tmp_path / "out"),
         "--ray", "127.0.0.1:1"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 1 and "ray start --head" in ran.stderr
    assert not (tmp_path / "out").exists()
