"""Bases made from vectors of texts, without a text tower, in Python and on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from crl_sdk import Embedder, demo_bundle
from crl_sdk.basis import Basis, build_basis, build_basis_from_vectors
from crl_sdk.basis._build import edit_basis
from crl_sdk.cli import app
from crl_sdk.errors import BasisError, BasisMismatchError, InvalidInputError
from crl_sdk.model._fingerprint import fingerprint_of_name

WORDS = ["red", "green", "blue", "yellow"]
ROWS = np.random.default_rng(0).standard_normal((9, 16))
MODEL = "openai/clip-vit-base-patch32"


def test_it_is_the_basis_that_a_text_tower_with_these_rows_would_make():
    known = {word: row / np.linalg.norm(row) for word, row in zip(WORDS, ROWS, strict=False)}
    expected = build_basis(
        "color", WORDS, lambda texts: np.array([known[t] for t in texts], np.float32),
        fingerprint=f"name:{MODEL}", background=ROWS,
    )  # fmt: skip
    made = build_basis_from_vectors("color", WORDS, 7 * ROWS[:4], model=MODEL, background=ROWS)
    np.testing.assert_allclose(made.projection.weight, expected.projection.weight, atol=1e-6)
    assert made.texts == expected.texts and made.fingerprint == expected.fingerprint
    assert made.provenance["texts"] == "given with their embeddings"
    twice = build_basis_from_vectors(
        "color", [*WORDS, "Red"], np.float16(np.concatenate([ROWS[:4], ROWS[:1]])), model=MODEL
    )
    assert twice.texts == tuple(WORDS) and twice.counts == (2, 1, 1, 1)


def test_models_are_never_mixed(tmp_path):
    made = build_basis_from_vectors("color", WORDS, ROWS[:4], model=MODEL)
    other = build_basis_from_vectors("shape", WORDS, ROWS[:4], model="other")
    with pytest.raises(BasisMismatchError, match=f"name:other, but .* name:{MODEL}"):
        build_basis_from_vectors("color", WORDS, ROWS[:4], model=MODEL, against=[other])
    with Embedder.open(demo_bundle()) as embedder:
        with pytest.raises(BasisMismatchError, match=f"made for model name:{MODEL}"):
            embedder.add_basis(made)
        own = build_basis_from_vectors(
            "color", WORDS, embedder.embed_text(WORDS), model=embedder.bundle.fingerprint
        )
        embedder.add_basis(own)  # vectors of a bundle's own text tower
    made.save(tmp_path / "color.safetensors")
    assert Basis.load(tmp_path / "color.safetensors").fingerprint == f"name:{MODEL}"
    with pytest.raises(BasisError, match="made from vectors"):
        edit_basis(made, lambda texts: ROWS, fingerprint=made.fingerprint, add=["pink"])


def test_names_of_models():
    assert fingerprint_of_name(" my clip ") == fingerprint_of_name("name:my clip") == "name:my clip"
    assert fingerprint_of_name("ab" * 32) == "ab" * 32
    for bad in ("", "  ", "name:", "a\nb", "x" * 201):
        with pytest.raises(InvalidInputError, match="the name of a model"):
            fingerprint_of_name(bad)


@pytest.mark.parametrize(
    ("texts", "rows", "words"),
    [
        (WORDS, ROWS[:3], "one row for each of 4 texts"),
        (WORDS, ROWS[0], "one row for each"),
        ("red", ROWS[:3], "one row for each"),
        (WORDS, np.full((4, 16), np.nan), "NaN"),
        (WORDS, np.zeros((4, 16)), "the embedding of 'red' is zero"),
        (WORDS, np.ones((4, 16), int), "float"),
        ([*WORDS[:3], " "], ROWS[:4], "no visible characters"),
        (WORDS[:1], ROWS[:1], "at least 3 distinct texts"),
        ([], np.zeros((0, 16)), "at least one text|empty"),
    ],
)
def test_bad_vectors(texts, rows, words):
    with pytest.raises(InvalidInputError, match=words):
        build_basis_from_vectors("color", texts, rows, model=MODEL)


@pytest.fixture
def bank(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kinds = ["color"] * 4 + ["shape"] * 3 + ["noun"] * 2
    words = [*WORDS, "circle", "square", "star", "dog", "cat"]
    np.savez("bank.npz", text=ROWS, word=words, kind=kinds, background=ROWS[::-1])
    np.savez("own.npz", **{"text:color": ROWS[:4], "words:color": WORDS}, fingerprint="ab" * 32)
    return Path("bank.npz")


def run(*arguments, status=0):
    done = CliRunner().invoke(app, [str(each) for each in arguments])
    assert done.exit_code == status, done.output
    return done


def create(*arguments, status=0):
    return run("basis", "create", *arguments, status=status)


def error_of(*arguments):
    return str(CliRunner().invoke(app, [str(each) for each in arguments]).exception)


def test_from_a_bank_to_groups(bank):
    made = json.loads(create("color", "--vectors", bank, "--model", MODEL, "--json").stdout)
    assert made["texts"] == WORDS and made["fingerprint"] == f"name:{MODEL}"
    assert made["provenance"]["background"] == 9 and made["provenance"]["source"] == "bank.npz"
    some = ["--vectors", bank, "--model", MODEL, "-t", "dog", "-t", "cat", "-t", "star", "--json"]
    assert json.loads(create("pets", *some).stdout)["texts"] == ["star", "dog", "cat"]
    against = ["--vectors", bank, "--model", MODEL, "--against", "color", "--json"]
    assert json.loads(create("shape", *against).stdout)["provenance"]["against"] == ["color"]
    rows = np.random.default_rng(1).standard_normal((60, 16)).astype(np.float32)
    np.save("images.npy", rows / np.linalg.norm(rows, axis=1, keepdims=True))
    found = run("cluster", "images.npy", "--criterion", "color", "-k", 4)
    assert f"the model of the basis, name:{MODEL}" in " ".join(found.output.split())
    run("project", "images.npy", "--criteria", "color", "--out", "rows.npz")


def test_the_file_may_name_its_model(bank):
    made = json.loads(create("color", "--vectors", "own.npz", "--json").stdout)
    assert made["fingerprint"] == "ab" * 32


def test_misuse_says_what_to_do(bank):
    ask = ["basis", "create", "color", "--vectors"]
    assert "name it with --model NAME" in error_of(*ask, bank)
    assert "leave out --model" in error_of(*ask, "own.npz", "--model", MODEL)
    assert "leave out --prompt" in error_of(*ask, bank, "--model", MODEL, "--prompt", "a {}")
    assert "pass both or neither" in error_of("basis", "create", "color", "-t", "a", "--model", "x")
    mood = ["basis", "create", "mood", "--vectors", bank, "--model", MODEL]
    assert "no texts of 'mood', the file has color, noun, shape" in error_of(*mood)
    assert "mood: happy not found in the bank" in error_of(*mood, "-t", "happy")
    assert "no such file" in error_of(*ask, "absent.npz", "--model", MODEL).lower()
