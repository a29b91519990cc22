"""`crl basis sharpen`, `--ignore`, `crl cluster --no-sharpen`, `crl background`, and editing."""

from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

from crl_sdk import Basis, demo_bundle
from crl_sdk.cli import app
from crl_sdk.errors import CriterionError, InvalidInputError
from crl_sdk.model._bundle import ModelBundle
from crl_sdk.tasks import sharpen
from support import basis_file

pytest.importorskip("sklearn")

COLOURS = ["-t", "red", "-t", "green", "-t", "blue", "-t", "yellow"]
SHAPES = ["-t", "circle", "-t", "square", "-t", "star", "-t", "heart"]


@pytest.fixture
def crl(tmp_path, monkeypatch):
    """Return a function that runs `crl` here. It returns the result or raises an error of ours."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CRL_BUNDLE", str(demo_bundle()))
    monkeypatch.delenv("CRL_BASES", raising=False)

    def run(*arguments):
        done = CliRunner().invoke(app, [str(each) for each in arguments])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done

    return run


@pytest.fixture
def stored(tmp_path):
    """160 embeddings in a file, of four groups."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((4, 128))[np.arange(160) % 4] + rng.standard_normal((160, 128)) / 2
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    fingerprint = ModelBundle.open(demo_bundle()).fingerprint
    names = [f"photos/{i}.jpg" for i in range(160)]
    np.savez(tmp_path / "x.npz", universal=rows, path=names, fingerprint=fingerprint)
    return rows


def load(name):
    return Basis.load(basis_file("bases", name))


def test_a_basis_is_sharpened_with_images_and_records_it(crl, stored):
    crl("basis", "create", "color", *COLOURS)
    plain = load("color")
    shown = crl("basis", "sharpen", "color", "--images", "x.npz")
    found, expected = load("color"), sharpen(plain, stored, source="x.npz").basis
    assert found.sha256() == expected.sha256() != plain.sha256()
    assert "160 images of x.npz in 4 clusters" in " ".join(shown.output.split())
    with pytest.raises(InvalidInputError, match="at least 50 images"):
        np.save("few.npy", stored[:20])
        crl("basis", "sharpen", "color", "--images", "few.npy")
    assert load("color").sha256() == expected.sha256()  # nothing was lost


def test_labels_of_some_of_the_images(crl, stored):
    crl("basis", "create", "color", *COLOURS)
    plain = load("color")
    with open("labels.csv", "w", newline="") as file:
        rows = [(f"photos/{i}.jpg", "abcd"[i % 4]) for i in range(40)] + [("photos/no.jpg", "a")]
        csv.writer(file).writerows([("file", "label"), *rows])
    done = crl("basis", "sharpen", "color", "--images", "x.npz", "--labels", "labels.csv")
    given = ["abcd"[i % 4] if i < 40 else "" for i in range(160)]
    assert load("color").sha256() == sharpen(plain, stored, given, source="x.npz").basis.sha256()
    assert "1 of 41 files are not among the images" in " ".join(done.output.split())
    with pytest.raises(InvalidInputError, match="columns 'file' and 'kind'"):
        crl("basis", "sharpen", "color", "--images", "x.npz", "--labels", "labels.csv",
            "--column", "kind")  # fmt: skip


def test_cluster_sharpens_unless_told_or_done_before(crl, stored):
    crl("basis", "create", "color", *COLOURS)
    ask = ["cluster", "x.npz", "--criterion", "color", "-k", 4, "--json", "--overwrite"]
    record = json.loads(crl(*ask).stdout)["sharpened"]
    assert record["images"] == 160 and not record["labelled"]
    assert "sharpened" not in load("color").provenance  # for this command only
    assert json.loads(crl(*ask, "--no-sharpen").stdout)["sharpened"] is None
    sharpen(load("color"), stored[:60], source="before").basis.save(basis_file("bases", "color"))
    assert json.loads(crl(*ask).stdout)["sharpened"]["source"] == "before"
    np.save("few.npy", stored[:149])
    crl("basis", "create", "color", *COLOURS, "--overwrite")
    few = ["cluster", "few.npy", "--criterion", "color", "-k", 4, "--json", "--overwrite"]
    assert json.loads(crl(*few).stdout)["sharpened"] is None


def test_a_criterion_is_ignored_with_others_and_alone(crl):
    crl("basis", "create", "color", *COLOURS)
    crl("basis", "create", "shape", *SHAPES, "--ignore", "color")
    removed = load("color").projection.weight
    assert np.abs(removed.T @ load("shape").projection.weight).max() < 1e-5
    assert "ignore" in crl("basis", "show", "shape").output
    crl("basis", "create", "rest", "--method", "ignore", "--ignore", "color")
    rest = load("rest")
    assert rest.projection.output_dim == 128 and rest.texts == load("color").texts
    assert np.abs(removed.T @ rest.projection.weight).max() < 1e-5
    with pytest.raises(InvalidInputError, match="pass --ignore NAME"):
        crl("basis", "create", "nothing", "--method", "ignore")
    with pytest.raises(CriterionError, match="no basis 'mood'"):
        crl("basis", "create", "size", *SHAPES, "--ignore", "mood")


def test_editing_finds_the_other_criteria_and_tells_what_is_lost(crl, stored):
    crl("basis", "create", "color", *COLOURS)
    crl("basis", "create", "shape", *SHAPES, "--against", "color")
    crl("basis", "sharpen", "shape", "--images", "x.npz")
    done = crl("basis", "edit", "shape", "--add", "cross")
    assert "no longer is: run crl basis sharpen shape --images DIR" in " ".join(done.output.split())
    edited = load("shape")
    assert edited.provenance["against"] == ["color"] and "sharpened" not in edited.provenance
    crl("basis", "create", "shape", *SHAPES, "-t", "cross", "--against", "color", "--overwrite")
    np.testing.assert_array_equal(edited.projection.weight, load("shape").projection.weight)
    shutil.move(basis_file("bases", "color"), "color.safetensors")
    with pytest.raises(CriterionError, match="no basis 'color'"):
        crl("basis", "edit", "shape", "--add", "ring")


def test_a_background_of_your_own(crl, tmp_path):
    bundle = shutil.copytree(demo_bundle(), tmp_path / "bundle")
    texts = tmp_path / "texts.txt"
    texts.write_text("# scenes\n" + "\n".join(f"{i} red squares" for i in range(60)) + "\n")
    shown = crl("background", bundle, "--background", texts)
    assert "60 generic texts" in shown.output
    assert len(ModelBundle.open(bundle).background) == 60
    texts.write_text("red\n")
    with pytest.raises(InvalidInputError, match="at least 50 distinct background texts, got 1"):
        crl("background", bundle, "--background", texts)
    assert len(ModelBundle.open(bundle).background) == 60
    document = json.loads(crl("info", bundle, "--json").stdout)
    assert "background.safetensors" in document["files"]
