"""`crl store` and `crl retrieve --from`, with a store in memory."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from store_rows import MemoryStore, stored_file, unit_rows
from typer.testing import CliRunner

from crl_sdk import demo_bundle
from crl_sdk.cli import _retrieve, _store, app
from crl_sdk.errors import BasisMismatchError, CrlError, InvalidInputError
from support import save_basis


@pytest.fixture
def memory(monkeypatch):
    store = MemoryStore()
    for module in (_store, _retrieve):
        monkeypatch.setattr(module, "open_store", lambda address, **_: store)
    return store


@pytest.fixture
def crl(tmp_path, monkeypatch):
    """Return a function that runs `crl` in this process. It returns JSON or raises an error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CRL_BUNDLE", str(demo_bundle()))

    def run(*arguments: object, status: int = 0) -> dict | str:
        done = CliRunner().invoke(app, [str(each) for each in arguments])
        if isinstance(done.exception, CrlError):
            raise done.exception
        assert done.exit_code == status, done.output
        return json.loads(done.stdout) if "--json" in arguments else done.output

    return run


@pytest.fixture
def photos(tmp_path, image_files, embedder, crl):
    """Nine embedded images, and bases of color and place."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in image_files:
        shutil.copy(path, folder / path.name)
    for name, texts in (("color", "red green blue"), ("shape", "square circle star")):
        save_basis(embedder.create_basis(name, texts.split(), load=False), tmp_path / "bases")
    crl("embed", "photos", "--out", "photos.npz", "--json")
    return folder


def test_store_and_retrieve(crl, photos, memory):
    told = crl("store", "photos.npz", "--to", "qdrant://db", "--criteria", "Color, shape", "--json")
    assert (told["rows"], told["new"], told["failed_left_out"]) == (9, 9, 0)
    assert told["vectors"] == {"universal": "universal", "color": "color", "shape": "shape"}
    query = "photos/red-0.jpg"
    for criteria in ("color:2, shape", "color", "color, shape:-0.5"):
        asked = ("--criteria", criteria, "-n", 4, "--json")
        found = crl("retrieve", query, "--from", "qdrant://db", *asked)
        exact = crl("retrieve", query, "photos.npz", *asked)
        assert [each["file"] for each in found["results"]] == [
            each["file"] for each in exact["results"]
        ]
        scores = [[each["score"] for each in told["results"]] for told in (found, exact)]
        assert np.allclose(*scores, atol=1e-5)
        assert found["weights"] == exact["weights"] and found["images"] == 9
    plain = crl("retrieve", query, "--from", "qdrant://db", "--json")
    assert plain["weights"] == {"universal": 1.0} and len(plain["results"]) == 8
    assert query not in {each["file"] for each in plain["results"]}
    assert "color × 2" in crl("retrieve", query, "--from", "qdrant://db", "--criteria", "color:2")


def test_a_directory_of_crl_embed(crl, photos, memory, tmp_path):
    pytest.importorskip("pyarrow")
    (photos / "broken.jpg").write_bytes(b"no picture")
    crl("embed", "photos", "--out", "embedded", "--part-rows", 4, "--json", status=1)
    told = crl("store", "embedded", "--to", "qdrant://db", "--criteria", "color", "--json")
    assert (told["rows"], told["new"], told["failed_left_out"]) == (9, 9, 1)
    found = crl("retrieve", "photos/red-0.jpg", "--from", "qdrant://db", "--criteria", "color",
                "-n", 2, "--json")  # fmt: skip
    assert all("red" in each["file"] for each in found["results"])
    next((tmp_path / "embedded").glob("part-*1.parquet")).unlink()
    with pytest.raises(InvalidInputError, match="--resume"):
        crl("store", "embedded", "--to", "qdrant://db")


def test_what_retrieve_refuses(crl, photos, memory):
    crl("store", "photos.npz", "--to", "qdrant://db", "--criteria", "color")
    query = "photos/red-0.jpg"
    with pytest.raises(InvalidInputError, match="got both"):
        crl("retrieve", query, "photos.npz", "--from", "qdrant://db")
    with pytest.raises(InvalidInputError, match="got neither"):
        crl("retrieve", query)
    with pytest.raises(InvalidInputError, match="--but-with"):
        crl("retrieve", query, "--from", "qdrant://db", "--but-with", "a dog")
    with pytest.raises(CrlError, match=r"no vectors of 'shape'.*crl store"):
        crl("retrieve", query, "--from", "qdrant://db", "--criteria", "shape")
    memory.record = memory.record.replace('"fingerprint":"', '"fingerprint":"f')
    with pytest.raises(BasisMismatchError, match="--bundle"):
        crl("retrieve", query, "--from", "qdrant://db", "--criteria", "color")


def test_what_store_refuses(crl, photos, memory, tmp_path):
    for to in ("mysql://me:hunter2@h/db", "qdrant://:hunter2@h:port/x"):
        with pytest.raises(InvalidInputError) as caught:
            crl("store", "photos.npz", "--to", to)
        assert "hunter2" not in str(caught.value)
    with pytest.raises(CrlError, match="crl basis create mood"):
        crl("store", "photos.npz", "--to", "qdrant://db", "--criteria", "mood")
    with pytest.raises(InvalidInputError, match="check the path"):
        crl("store", "none.npz", "--to", "qdrant://db")
    stored_file(tmp_path / "other.npz", unit_rows(3))
    with pytest.raises(CrlError, match="--bundle"):
        crl("store", "other.npz", "--to", "qdrant://db")
    assert memory.record is None


def test_ctrl_c_says_how_to_go_on(crl, photos, memory, monkeypatch):
    memory.batch_rows = 4
    insert = memory.insert

    def interrupted(rows):
        if memory.count() == 8:
            raise KeyboardInterrupt
        insert(rows)

    monkeypatch.setattr(memory, "insert", interrupted)
    printed = crl("store", "photos.npz", "--to", "qdrant://db", status=130)
    assert "8 of 9 rows are in the store" in printed and "run the same command again" in printed
    monkeypatch.setattr(memory, "insert", insert)
    told = crl("store", "photos.npz", "--to", "qdrant://db", "--json")
    assert (told["new"], told["there_before"]) == (1, 8)


def test_the_password_comes_from_the_environment(crl, photos, memory, monkeypatch):
    seen = []
    monkeypatch.setattr(_store, "open_store", lambda address, **_: seen.append(address) or memory)
    monkeypatch.setenv("CRL_STORE_PASSWORD", "hunter2")
    printed = crl("store", "photos.npz", "--to", "qdrant://db/photos")
    assert seen[0].password == "hunter2" and "hunter2" not in printed
