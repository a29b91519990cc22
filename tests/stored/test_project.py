"""`crl project`: files it reads, writes and refuses. No incomplete result is left."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from crl_sdk import Basis
from crl_sdk.cli import app
from crl_sdk.errors import BasisMismatchError, CriterionError, CrlError, InvalidInputError
from crl_sdk.projection._projection import Projection
from crl_sdk.stored import _project as projected
from support import save_basis

DIM, MODEL = 96, "ab" * 32


def make_basis(criterion: str, m: int, post: str = "l2", fingerprint: str = MODEL) -> Basis:
    rng = np.random.default_rng(m)
    texts = rng.standard_normal((m, DIM), dtype=np.float32)
    return Basis(
        criterion, tuple(f"text {i}" for i in range(m)), (1,) * m, ("{}",),
        texts / np.linalg.norm(texts, axis=1, keepdims=True),
        Projection(texts.T.copy(), rng.standard_normal(m, dtype=np.float32), post),
        "centred", fingerprint,
    )  # fmt: skip


@pytest.fixture
def bases(tmp_path, monkeypatch) -> dict[str, Basis]:
    """Two bases in `bases/` of an empty working directory."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("CRL_")]:
        monkeypatch.delenv(name)
    made = [make_basis("main color", 7), make_basis("shape", 4, "standardise")]
    for basis in made:
        save_basis(basis, "bases")
    return {basis.criterion: basis for basis in made}


@pytest.fixture
def rows() -> np.ndarray:
    rows = np.random.default_rng(0).standard_normal((500, DIM), dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def project(*arguments: object) -> dict:
    words = ["project", *map(str, arguments), "--json"]
    done = CliRunner().invoke(app, words)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def check(bases: dict[str, Basis], rows: np.ndarray, directory: str = "out") -> None:
    for name, basis in bases.items():
        written = np.load(Path(directory) / f"{name.replace(' ', '+')}.npy")
        tolerance = 1e-5 if written.dtype == np.float32 else 2e-3
        np.testing.assert_allclose(
            written, basis.projection.apply(rows), atol=tolerance, rtol=tolerance
        )
    assert not [path for path in Path(directory).iterdir() if path.name.endswith(".tmp")]


BOTH = ("--criteria", "Main Color, shape", "--out", "out")


def test_a_bare_array(bases, rows):
    np.save("x.npy", rows)
    done = CliRunner().invoke(app, ["project", "x.npy", *BOTH])
    assert (
        done.exit_code == 0
        and "assuming the model of the bases" in done.stderr
        and "(500, 7)" in done.stdout
    )
    check(bases, rows)
    record = json.loads(Path("out/projections.json").read_text())
    assert record["source"] == "x.npy" and record["source_bytes"] == Path("x.npy").stat().st_size
    assert record["fingerprint"] == MODEL and record["fingerprint_told_by"] == "bases"
    first = record["outputs"][0]
    assert first == {
        "criterion": "main color", "file": "main+color.npy", "post": "l2", "dtype": "float32",
        "basis_sha256": bases["main color"].sha256(), "shape": [500, 7],
        "bytes": Path("out/main+color.npy").stat().st_size,
    }  # fmt: skip
    assert Path("out/shape.npy").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("kind", ["npz", "compressed", "parquet"])
def test_what_crl_embed_writes(bases, rows, kind):
    facts = {"path": np.array(["a"] * 500), "fingerprint": np.array(MODEL)}
    if kind == "parquet":
        import pyarrow as pa
        from pyarrow import parquet

        column = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), DIM)
        table = pa.table({"path": facts["path"], "universal": column})
        parquet.write_table(table.replace_schema_metadata({"crl_fingerprint": MODEL}), "x.parquet")
    else:
        (np.savez if kind == "npz" else np.savez_compressed)("x.npz", **facts, universal=rows)
    name = "x.parquet" if kind == "parquet" else "x.npz"
    done = CliRunner().invoke(app, ["project", name, *BOTH, "--json"])
    assert ("loaded into memory" in done.stderr) == (kind != "npz")
    assert "trust" not in done.stderr
    assert json.loads(done.stdout)["fingerprint_told_by"] == "source"
    check(bases, rows)


def test_half_precision_in_and_out(bases, rows):
    np.save("x.npy", rows.astype(np.float16))
    written = project("x.npy", *BOTH, "--dtype", "float16", "--threads", 1)
    assert {each["dtype"] for each in written["outputs"]} == {"float16"}
    assert written["source_dtype"] == "float16" and np.load("out/shape.npy").dtype == np.float16
    check(bases, rows)


def test_no_rows(bases, rows):
    np.save("x.npy", rows[:0])
    assert project("x.npy", *BOTH)["rows"] == 0
    assert np.load("out/shape.npy").shape == (0, 4)


def test_what_is_there_is_kept_unless_told(bases, rows):
    np.save("x.npy", rows)
    project("x.npy", *BOTH)
    before = Path("out/shape.npy").read_bytes()
    np.save("y.npy", rows[::-1])
    with pytest.raises(InvalidInputError, match=r"holds .*shape.npy.* already; pass --overwrite"):
        project("y.npy", "--criteria", "shape", "--out", "out")
    assert Path("out/shape.npy").read_bytes() == before
    project("y.npy", *BOTH, "--overwrite")
    check(bases, rows[::-1])


def damaged(kind: str, rows: np.ndarray) -> None:
    """Write `x.npy` or `x.npz` with one fault."""
    if kind == "wrong d":
        rows = rows[:, :50]
    if kind == "a NaN row":
        rows = rows.copy()
        rows[77, 3] = np.nan
    if kind == "integers":
        rows = rows.astype(np.int32)
    if kind == "one axis":
        rows = rows[0]
    if kind == "pickled":
        rows = np.array([{"a": 1}], dtype=object)
    np.save("x.npy", rows)
    data = Path("x.npy").read_bytes()
    cut = {
        "cut off": data[:-1000],
        "cut in its header": data[:40],
        "empty": b"",
        "longer": data + b"0",
        "no array": b"hello " * 50,
        "vast": data.replace(b"(500, 96), }" + b" " * 14, b"(99999999999999999, 96), }"),
    }
    assert len(cut["vast"]) == len(data)
    if kind in cut:
        Path("x.npy").write_bytes(cut[kind])


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("cut off", "cut off or changed"),
        ("cut in its header", "not a valid .npy"),
        ("empty", "not a valid .npy"),
        ("longer", "cut off or changed"),
        ("no array", "not a valid .npy"),
        ("vast", "cut off or changed|not a valid .npy"),
        ("wrong d", r"\(n, 96\), got \(500, 50\)"),
        ("a NaN row", "the first at row 77"),
        ("integers", "float dtype"),
        ("one axis", "expected embeddings"),
        ("pickled", "pickled Python objects"),
    ],
)
def test_damaged_arrays(bases, rows, kind, words):
    damaged(kind, rows)
    with pytest.raises(InvalidInputError, match=words):
        project("x.npy", *BOTH)
    assert not Path("out").exists() or not list(Path("out").iterdir())


def test_damaged_archives(bases, rows):
    np.savez("x.npz", universal=rows, fingerprint=np.array(MODEL))
    data = Path("x.npz").read_bytes()
    np.savez("other.npz", embeddings=rows)
    np.savez("objects.npz", universal=np.array([{}], dtype=object))
    np.savez_compressed("packed.npz", universal=np.array([{}], dtype=object))
    Path("cut.npz").write_bytes(data[:-2000])
    Path("text.npz").write_bytes(b"hello")
    Path("x.parquet").write_bytes(data)
    Path("x.csv").write_text("1,2\n")
    for name, words in [
        ("other.npz", r"an array 'universal'.*\['embeddings.npy'\]"),
        ("objects.npz", "pickled Python objects"),
        ("packed.npz", "Object arrays cannot be loaded"),
        ("cut.npz", "not a valid .npz"),
        ("text.npz", "not a valid .npz"),
        ("x.parquet", "not a valid .parquet"),
        ("x.csv", "expected a .npy, .npz or .parquet"),
        ("nowhere.npy", "No such file"),
        ("bases", "expected a .npy"),
    ]:
        with pytest.raises(InvalidInputError, match=words):
            project(name, *BOTH)
    assert not Path("out").exists()


def test_models_must_agree(bases, rows, bundle_copy):
    np.save("x.npy", rows)
    np.savez("x.npz", universal=rows, fingerprint=np.array("cd" * 32))
    save_basis(make_basis("mood", 3, fingerprint="cd" * 32), "bases")
    for arguments in [
        ("x.npz", *BOTH),  # the file's own
        ("x.npy", *BOTH, "--bundle", bundle_copy),  # the bundle's
    ]:
        with pytest.raises(
            CriterionError, match=r"'main color' of this model .* another model has"
        ):
            project(*arguments)
    for arguments in [
        ("x.npy", "--criteria", "shape,mood", "--out", "out"),  # of two models
        ("x.npz", "--criteria", "mood", "--out", "out", "--bundle", bundle_copy),
    ]:
        with pytest.raises(BasisMismatchError):
            project(*arguments)
    save_basis(make_basis("shape", 3, fingerprint="cd" * 32), "bases")
    with pytest.raises(CriterionError, match="2 models have a basis 'shape'") as refused:
        project("x.npy", "--criteria", "shape", "--out", "out")
    assert "To make it" not in str(refused.value)
    assert not Path("out").exists()
    project("x.npz", "--criteria", "mood", "--out", "out")


def test_wrong_arguments(bases, rows):
    np.save("x.npy", rows)
    Path("file").write_text("")
    for arguments, words in [
        (("x.npy", "--criteria", "mood", "--out", "out"), "which has main color, shape"),
        (("x.npy", "--criteria", "shape,shape", "--out", "out"), "each criterion once"),
        (("x.npy", "--criteria", " , ", "--out", "out"), "at least one"),
        (("x.npy", "--criteria", "shape", "--out", "file/out"), "cannot be created"),
        (("x.npy", "--criteria", "shape", "--out", "file"), "cannot be created"),
    ]:
        with pytest.raises(CrlError, match=words):
            project(*arguments)


def test_a_full_disk_is_an_error_and_leaves_nothing(bases, rows, monkeypatch):
    np.save("x.npy", rows)
    project("x.npy", "--criteria", "shape", "--out", "out")
    before = Path("out/shape.npy").read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("posix_fallocate", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(projected.os, name, full)
            with pytest.raises(InvalidInputError, match="No space left"):
                project("x.npy", *BOTH, "--overwrite")
        assert sorted(path.name for path in Path("out").iterdir()) == [
            "projections.json", "shape.npy",
        ]  # fmt: skip
        assert Path("out/shape.npy").read_bytes() == before


def test_a_disk_that_is_really_full(bases, rows):
    """Without space on disk, writing to a memory map would kill the process.

    A limit on the file size has the same effect as a full disk.
    """
    np.save("x.npy", rows)
    done = subprocess.run(
        [sys.executable, "-c",
         "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
         "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000));"
         "sys.argv[0] = 'crl'; runpy.run_module('crl_sdk', run_name='__main__')",
         "project", "x.npy", *BOTH],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and "cannot be written" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not list(Path("out").iterdir())


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_no_result(bases, how):
    big = np.lib.format.open_memmap("big.npy", "w+", np.float32, (3_000_000, DIM))  # sparse
    del big
    process = subprocess.Popen(
        [sys.executable, "-m", "crl_sdk", "project", "big.npy", *BOTH],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    ends = time.monotonic() + 60
    while not (Path("out").exists() and list(Path("out").iterdir())):
        assert process.poll() is None and time.monotonic() < ends
        time.sleep(0.002)
    process.send_signal(how)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode in (130, -how) and "Traceback" not in stderr
    left = [path.name for path in Path("out").iterdir()]
    assert left == [] if how == signal.SIGINT else all(name.endswith(".tmp") for name in left)
