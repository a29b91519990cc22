"""`crl eval vectors` on small files, and misused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from crl_sdk.cli import app
from crl_sdk.errors import CrlError, InvalidInputError

pytest.importorskip("sklearn")

SHORT = [
    "--seeds",
    "2",
    "--splits",
    "2",
    "--shots",
    "1,2",
    "--method",
    "contrastive,exclusive-orthogonal",
]


def invoke(*arguments: object):
    done = CliRunner().invoke(app, ["eval", "vectors", *map(str, arguments)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    tone, kind = np.arange(24) % 2, np.arange(24) // 2 % 3
    images = np.eye(8)[tone] + np.eye(8)[2 + kind] + 0.05 * rng.standard_normal((24, 8))
    path = tmp_path / "data.npz"
    np.savez(
        path, image=images, tone=np.array(["dark", "light"])[tone], form=kind,
        **{"text:tone": np.eye(8)[:2] + np.eye(8)[7], "text:form": np.eye(8)[2:5] + np.eye(8)[7]},
    )  # fmt: skip
    return path


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    path = tmp_path / "bank.npz"
    np.savez(path, vec=np.eye(8)[:5] + np.eye(8)[7], word=["dark", "light", "a", "b", "c"])
    return path


def test_table_json_and_markdown(data, tmp_path):
    out = tmp_path / "found.json"
    done = invoke("--data", data, *SHORT, "--json", "--out", out)
    found = json.loads(done.stdout)
    assert json.loads(out.read_text())["rows"] == found["rows"]
    assert found["labels"]["tone"] == {
        "criterion": "tone", "images": 24, "classes": {"dark": 12, "light": 12},
    }  # fmt: skip
    assert found["settings"]["methods"] == ["contrastive", "exclusive-orthogonal"]
    assert any("do not have unit length" in note for note in found["notes"])
    rows = {(r["labels"], r["protocol"], r["representation"]): r["scores"] for r in found["rows"]}
    assert rows["tone", "clustering", "exclusive-orthogonal"]["ACC"]["mean"] == 1
    assert ("tone", "clustering", "contrastive") not in rows
    assert any("needs 3 texts and there are 2" in note for note in found["notes"])
    assert rows["tone", "clustering", "cosine"]["ACC"]["difference"] is None
    assert rows["form", "retrieval", "universal"]["mAP"]["low"] is not None
    markdown = tmp_path / "found.md"
    shown = invoke("--data", data, *SHORT, "--out", markdown).output
    assert "random directions" in shown and "1-NN" in shown
    text = markdown.read_text()
    assert "| clustering | embeddings | ACC | ACC − cosine | NMI |" in text
    assert "- labels tone, criterion tone: 24 images of 2 classes" in text and "paired 95 %" in text


def test_noise_is_mixed_into_the_texts_of_the_methods_alone(data, tmp_path):
    more = tmp_path / "more.npz"
    generic = np.eye(8)[np.arange(30) % 8] + np.eye(8)[7]
    np.savez(more, **dict(np.load(data)), background=generic)
    ask = ["--data", more, *SHORT, "--protocol", "clustering,retrieval", "--json"]
    found = json.loads(invoke(*ask, "--noise", "clean,off-topic,other-criteria").stdout)
    rows = [r for r in found["rows"] if (r["labels"], r["protocol"]) == ("form", "retrieval")]
    noises = {
        name: [row["texts"] for row in rows if row["representation"] == name]
        for name in ("universal", "cosine", "contrastive")
    }
    every = ["clean", "off-topic", "other-criteria"]
    assert noises == {"universal": ["clean"], "cosine": every, "contrastive": every}
    assert found["settings"]["texts"] == every
    clean = json.loads(invoke(*ask).stdout)["rows"]
    assert [row for row in found["rows"] if row["texts"] == "clean"] == clean
    shown = invoke(*ask[:-1], "--noise", "off-topic").output
    assert "form, off-topic" in shown and "other-criteria" not in shown
    with pytest.raises(InvalidInputError, match=r"--noise off-topic: expected at least 3 generic"):
        invoke("--data", data, *SHORT, "--noise", "off-topic")
    with pytest.raises(InvalidInputError, match=r"--noise other-criteria: .* there are 0"):
        invoke("--data", data, *SHORT, "--criteria", "form", "--noise", "other-criteria")


def test_files_with_other_names(data, bank, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("dark\nlight\n")
    arrays = dict(np.load(data))
    for name in ("text:tone", "text:form"):
        arrays.pop(name)
    arrays["clip"] = arrays.pop("image")
    arrays["product"] = np.arange(24) // 2
    other = tmp_path / "other.npz"
    np.savez(other, **arrays)
    done = invoke(
        "--data", other, "--texts", bank, "--words", f"brightness={words}",
        "--labels", "tone=brightness", "--group", "product", "--array", "image=clip",
        "--array", "text=vec", "--protocol", "retrieval", "--json",
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert found["settings"]["grouped"] == "yes"
    assert found["texts"]["brightness"]["texts"] == ["dark", "light"]
    assert {row["criterion"] for row in found["rows"]} == {"brightness"}


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--labels", "tone=mood"], "there are no texts of mood; expected COLUMN=CRITERION"),
        (["--labels", "mood=tone"], "expected an array 'mood' with labels"),
        (["--labels", "tone", "--labels", "tone=form"], "tone is given twice"),
        (["--criteria", "mood"], "--criteria: expected some of tone, form"),
        (["--array", "picture=clip"], "--array: expected one of image, text"),
        (["--array", "image"], "expected NAME=STORED"),
        (["--words", "tone"], "--words: expected CRITERION=FILE"),
        (["--method", "best"], "--method: expected some of contrastive"),
        (["--protocol", "luck"], "--protocol: expected some of clustering"),
        (["--min-class-size", "3"], "10 shots need classes of at least 11"),
        (["--shots", "20"], "expected two classes or more with at least 21 images"),
        (["--out", "found.txt"], r"expected a \.md or \.json"),
        (["--group", "twin"], "expected an array 'twin' with groups"),
        (["--texts", "nowhere.npz"], "nowhere.npz: cannot be read"),
    ],
)
def test_misuse_says_what_to_do(data, arguments, what):
    with pytest.raises(CrlError, match=what):
        invoke("--data", data, *arguments)


def test_missing_texts_say_what_is_expected(tmp_path, data):
    arrays = dict(np.load(data))
    np.savez(tmp_path / "bare.npz", image=arrays["image"], tone=arrays["tone"])
    with pytest.raises(InvalidInputError, match="no text vectors: expected arrays text:CRITERION"):
        invoke("--data", tmp_path / "bare.npz")
    texts = {name: rows for name, rows in arrays.items() if name.startswith("text:")}
    np.savez(tmp_path / "other.npz", image=arrays["image"], label=arrays["tone"], **texts)
    with pytest.raises(InvalidInputError, match=r"no column has the name of a criterion"):
        invoke("--data", tmp_path / "other.npz")


def test_benchmarks_are_commands_beside_vectors():
    shown = CliRunner().invoke(app, ["eval", "--help"]).output
    assert "vectors" in shown and "clevr4" in shown and "deepfashion" in shown
