"""`crl basis create`, `edit` and `curated`: where the texts come from."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from crl_sdk import Embedder, demo_bundle
from crl_sdk.basis import Basis
from crl_sdk.basis._curated import curated_lists
from crl_sdk.cli import app
from support import basis_file, generated_texts


@pytest.fixture
def crl(tmp_path, monkeypatch):
    """Return a function that runs `crl` in a new directory, and returns its output and errors."""
    monkeypatch.chdir(tmp_path)

    def run(*words, ok=True):
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert (result.exit_code == 0) is ok, result.output
        return result

    return run


@pytest.fixture
def asked(monkeypatch):
    """Replace the language model; returns what it was asked with."""
    calls = []

    def generate(embedder, criterion, **options):
        calls.append((criterion, options))
        return generated_texts(criterion, ["red", "green", "blue"])

    monkeypatch.setattr(Embedder, "generate_texts", generate)
    return calls


def test_a_curated_list_needs_no_language_model(crl, asked):
    crl("basis", "create", "colours", "--curated", "--json")
    basis = Basis.load(basis_file("bases", "colours"))
    assert set(basis.texts) <= set(curated_lists()["color"].texts) and len(basis.texts) > 9
    assert basis.provenance["texts"] == "curated" and basis.provenance["list"] == "color"
    assert not asked


def test_there_is_no_curated_list(crl):
    said = crl("basis", "create", "dog breed", "--curated", ok=False)
    assert "expected a curated list of animal" in str(said.exception)
    for more in (["--text", "a"], ["--hint", "as a painter"], ["--preset", "clevr4-color"]):
        said = crl("basis", "create", "color", "--curated", *more, ok=False)
        assert "--curated" in str(said.exception)


def test_curated_lists_are_shown(crl):
    shown = crl("basis", "curated").stdout
    assert "color" in shown and "times of day" in shown
    assert crl("basis", "curated", "colours").stdout.splitlines()[:2] == ["red", "orange"]
    told = json.loads(crl("basis", "curated", "season", "--json").stdout)
    assert told["season"]["texts"][0] == "spring"
    crl("basis", "curated", "dog breed", ok=False)


def test_a_preset_asks_as_the_paper_does(crl, asked):
    crl("basis", "create", "color", "--preset", "clevr4-color", "--json")
    ((_, options),) = asked
    assert options["options"].subject == "the color of objects"
    assert options["prompts"] == ["objects with the color of {}"]
    assert Basis.load(basis_file("bases", "color")).prompts == ("objects with the color of {}",)
    crl("basis", "create", "color", "--preset", "clevr4-color", "--prompt", "a {}", "--overwrite")
    assert asked[1][1]["prompts"] == ["a {}"]
    said = crl("basis", "create", "shape", "--preset", "imagenet", ok=False)
    assert "expected a preset of clevr4-texture" in str(said.exception)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, image_files):
    """A file of embeddings of 27 images of red, green and blue squares."""
    path = tmp_path_factory.mktemp("pictures") / "pictures.npz"
    with Embedder.open(demo_bundle()) as embedder:
        found = embedder.embed(image_files * 3)
        np.savez(path, universal=found.universal, fingerprint=embedder.bundle.fingerprint)
    return path


def test_pictures_vote_on_texts(crl, asked, pictures):
    words = ["red", "green", "blue", "yellow", "purple", "cyan", "striped", "three"]
    texts = [part for word in words for part in ("--text", word)]
    said = crl("basis", "create", "color", *texts, "--images", pictures)
    assert "27 pictures: " in said.stderr and "fit hardly any of them best" in said.stderr
    basis = Basis.load(basis_file("bases", "color"))
    assert {"red", "green", "blue"} <= set(basis.texts) < set(words)
    assert basis.provenance["pictures"]["count"] == 27
    crl("basis", "create", "shade", "--images", pictures)
    assert asked[0][1]["pictures"].shape == (27, 128)


def test_pictures_that_cannot_vote(crl, image_files, tmp_path, pictures):
    said = crl("basis", "create", "color", "--curated", "--images", image_files[0].parent, ok=False)
    assert "expected at least 20 pictures to vote, got 9" in str(said.exception)
    other = tmp_path / "other.npz"
    np.savez(other, universal=np.load(pictures)["universal"], fingerprint="f" * 64)
    said = crl("basis", "create", "color", "--curated", "--images", other, ok=False)
    assert "crl embed" in str(said.exception) and not (tmp_path / "bases").exists()


def editor(monkeypatch, tmp_path, script):
    path = tmp_path / "editor.sh"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("EDITOR", os.fspath(path))
    monkeypatch.delenv("VISUAL", raising=False)


def test_texts_are_edited_in_an_editor(crl, monkeypatch, tmp_path):
    crl("basis", "create", "color", *["--text", "red", "--text", "green", "--text", "blue"])
    editor(monkeypatch, tmp_path, 'sed -i -e /green/d -e s/blue/purple/ "$1"; echo yellow >> "$1"')
    crl("basis", "edit", "color", "--edit")
    assert set(Basis.load(basis_file("bases", "color")).texts) == {"red", "purple", "yellow"}
    editor(monkeypatch, tmp_path, "true")
    said = crl("basis", "edit", "color", "--edit")
    assert "nothing was changed" in said.stderr
    editor(monkeypatch, tmp_path, "exit 3")
    said = crl("basis", "edit", "color", "--edit", ok=False)
    assert "the editor cannot be run" in str(said.exception) and "$EDITOR" in str(said.exception)
    assert set(Basis.load(basis_file("bases", "color")).texts) == {"red", "purple", "yellow"}
    editor(monkeypatch, tmp_path, ': > "$1"')
    crl("basis", "edit", "color", "--edit", ok=False)  # a basis needs texts
    assert set(Basis.load(basis_file("bases", "color")).texts) == {"red", "purple", "yellow"}


@pytest.mark.parametrize("stage", ["connecting", "answering", "language model"])
def test_ctrl_c_leaves_nothing(tmp_path, stage):
    """Interrupt the command while it waits for an endpoint, or while the model writes."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        connections: list[socket.socket] = []
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        command = [sys.executable, "-m", "crl_sdk", "basis", "create", "color"]
        if stage != "language model":  # a model that is named is not asked for
            command += ["--llm", url if stage == "connecting" else f"{url}#model"]
        process = subprocess.Popen(
            command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "COLUMNS": "200"},
        )  # fmt: skip
        try:
            if stage == "language model":
                while "language model: answer" not in process.stderr.readline():
                    assert process.poll() is None
            else:
                connections.append(silent.accept()[0])
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
            for each in connections:
                each.close()
    assert process.returncode == 130 and "Traceback" not in said
    assert not list(tmp_path.rglob("*.safetensors"))
