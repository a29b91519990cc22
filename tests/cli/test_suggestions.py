"""Commands that messages suggest run as they are printed, in a directory with a space in its name.

Capital letters (TEXT, FILE, DIR) are filled in as a reader would.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from crl_sdk import demo_bundle
from crl_sdk.cli import app
from crl_sdk.cli._generation import print_next_steps
from crl_sdk.model._background import BACKGROUND_FILE
from crl_sdk.model._bundle import ModelBundle
from crl_sdk.model._manifest import parse_manifest, write_manifest

COLOURS = ["--text", "red", "--text", "green", "--text", "blue", "--text", "yellow"]


@pytest.fixture
def crl(tmp_path, monkeypatch):
    """Return a function that runs `crl` in an empty directory and returns what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "500")

    def run(*arguments: object, status: int = 0) -> str:
        done = CliRunner().invoke(app, [str(each) for each in arguments])
        said = done.output if done.exception is None else f"{done.output}{done.exception}"
        assert (status == 0) == (done.exit_code == 0), said
        return said

    return run


@pytest.fixture
def bundle(tmp_path) -> Path:
    return Path(shutil.copytree(demo_bundle(), tmp_path / "my model"))


def suggested(message: str, words: str) -> list[str]:
    """Return the words of the suggested command that begins with `words`."""
    match = re.search(rf"{words}[^\n;│]*", message)
    assert match, message
    return shlex.split(match[0])


def without_background(bundle: Path) -> None:
    manifest = parse_manifest((bundle / "manifest.json").read_bytes())
    del manifest.files[BACKGROUND_FILE]
    write_manifest(bundle, manifest)
    (bundle / BACKGROUND_FILE).unlink()


def test_a_bundle_without_background(crl, bundle):
    without_background(bundle)
    create = ["basis", "create", "color", *COLOURS, "--bundle", bundle]
    told = crl(*create)
    assert suggested(told, "crl background") == suggested(crl("info", bundle), "crl background")
    crl(*suggested(told, "crl background")[1:])
    assert len(ModelBundle.open(bundle).background) >= 50
    assert "crl background" not in crl(*create, "--overwrite")


def test_a_basis_that_exists(crl):
    crl("basis", "create", "color", *COLOURS)
    told = crl("basis", "create", "color", *COLOURS, status=1)
    crl("basis", "create", "color", *COLOURS, *suggested(told, "--overwrite")[:1])


def test_no_bases(crl):
    make = suggested(crl("basis", "list", "--bases", "my bases"), "crl basis create")
    crl(*make[1:], *COLOURS)
    assert "color" in crl("basis", "list", "--bases", "my bases")


def test_the_next_steps_after_a_basis(crl, bundle, capsys):
    place = ["--bundle", bundle, "--bases", "my bases"]
    crl("basis", "create", "main color", *COLOURS, *place)
    print_next_steps("main color", bundle, Path("my bases"))
    told = capsys.readouterr().err
    edit = " ".join(map(shlex.quote, suggested(told, "crl basis edit")))
    edit = edit.replace("--add TEXT", "--add pink").replace("--remove TEXT", "--remove red")
    assert "pink" in crl(*shlex.split(edit)[1:])
    Path("mine.txt").write_text("cyan\nmagenta\nblack\n")
    own = [word.replace("FILE", "mine.txt") for word in suggested(told, "crl basis create")]
    assert "magenta" in crl(*own[1:])


def test_an_edit_that_undoes_a_sharpening(crl, bundle):
    place = ["--bundle", bundle, "--bases", "my bases"]
    rows = np.random.default_rng(0).standard_normal((200, 128)).astype(np.float32)
    np.save("rows.npy", rows / np.linalg.norm(rows, axis=1, keepdims=True))
    crl("basis", "create", "color", *COLOURS, *place)
    crl("basis", "sharpen", "color", "--images", "rows.npy", *place)
    told = crl("basis", "edit", "color", "--add", "pink", *place)
    again = [word.replace("DIR", "rows.npy") for word in suggested(told, "crl basis sharpen")]
    crl(*again[1:])
    assert "sharpened" in crl("basis", "show", "color", *place[2:])


def test_a_basis_that_cannot_be_sharpened(crl, bundle):
    place = ["--bundle", bundle, "--bases", "my bases"]
    rows = np.random.default_rng(0).standard_normal((200, 128)).astype(np.float32)
    np.save("rows.npy", rows / np.linalg.norm(rows, axis=1, keepdims=True))
    crl("basis", "create", "color", *COLOURS, "--method", "cosine", *place)
    sharpen = ["basis", "sharpen", "color", "--images", "rows.npy", *place]
    crl(*suggested(crl(*sharpen, status=1), "crl basis create")[1:])
    crl(*sharpen)


def test_an_evaluation_without_texts(crl, bundle):
    place = ["--bundle", bundle, "--bases", "my bases"]
    ask = ["eval", "demo", "--criteria", "colour", *place]
    told = crl(*ask, status=1)
    make = suggested(told.replace(", and --bases", ";"), "crl basis create")
    crl(*make[1:], *COLOURS)


def test_a_directory_that_does_not_exist(crl, image_files):
    embed = ["embed", image_files[0], "--out", "my results/rows.npz"]
    subprocess.run(suggested(crl(*embed, status=1), "mkdir"), check=True)
    crl(*embed)
