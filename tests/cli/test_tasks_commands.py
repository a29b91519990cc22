"""`crl cluster`, `crl classify`, `crl retrieve`: what they write, print and refuse."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from crl_sdk import Basis, Embedder, demo_bundle
from crl_sdk.cli import _sources, app
from crl_sdk.errors import BasisMismatchError, CrlError, InvalidInputError
from crl_sdk.tasks import FewShotClassifier
from support import basis_file, generated_texts

pytest.importorskip("sklearn")

COLOURS = ("red", "green", "blue")


@pytest.fixture
def crl(tmp_path, monkeypatch):
    """Return a function that runs `crl` in this process. It returns JSON or raises an error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CRL_BUNDLE", str(demo_bundle()))
    monkeypatch.delenv("CRL_BASES", raising=False)

    def run(*arguments: object, status: int = 0) -> dict | str:
        done = CliRunner().invoke(app, [str(each) for each in arguments])
        if isinstance(done.exception, CrlError):
            raise done.exception
        assert done.exit_code == status, done.output
        return json.loads(done.stdout) if "--json" in arguments else done.stdout

    return run


@pytest.fixture
def folder(tmp_path, image_files) -> Path:
    """Nine images of three colours."""
    made = tmp_path / "photos"
    made.mkdir()
    for path in image_files:
        shutil.copy(path, made / path.name)
    return made


@pytest.fixture
def colours(tmp_path) -> Path:
    path = tmp_path / "colours.txt"
    path.write_text("\n".join(COLOURS), encoding="utf-8")
    return path


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_cluster_a_folder(crl, folder, colours, tmp_path):
    told = crl(
        "cluster", folder, "--criterion", "Color", "--texts", colours, "--out", "out", "--json"
    )
    assert told["k"] == 3 and told["chosen"]["agreement"] == 1.0 and not told["chosen"]["weak"]
    assert {each["name"]: each["size"] for each in told["clusters"]} == dict.fromkeys(COLOURS, 3)
    lines = table(tmp_path / "out" / "clusters.csv")
    assert [line["file"] for line in lines] == sorted(str(path) for path in folder.iterdir())
    assert all(line["name"] in line["file"] and float(line["typicality"]) > 0 for line in lines)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count('role="img"') == 18 and page.count("data:image/jpeg") == 9
    assert "http" not in page and "number of groups, 3, was chosen" in page
    assert not (tmp_path / "bases").exists()
    shown = crl("cluster", folder, "--criterion", "color", "--texts", colours, "-k", 2)
    assert "cohesion" in shown and len(table(tmp_path / "clusters" / "clusters.csv")) == 9


def test_an_unreadable_image_is_named_and_left_out(crl, folder, colours):
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff broken")
    told = crl("cluster", folder, "--criterion", "color", "--texts", colours, "--json", status=1)
    assert told["images"] == 9 and told["failed"][0]["path"].endswith("broken.jpg")
    assert Path(told["report"]).exists()


def test_a_missing_word_is_reported_on_the_page_too(crl, folder, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("red\ngreen\nyellow\n")  # there is no word for the blue ones
    ask = ["cluster", folder, "--criterion", "color", "--texts", words, "-k", 3, "--json"]
    told = crl(*ask)
    fitting = {each["name"]: each["fits"] for each in told["clusters"]}
    assert fitting == {"red": True, "green": True, "no matching text": False}
    (reason,) = told["quality"]["reasons"]
    assert reason.startswith("no text describes 1 of 3 groups")
    assert reason in Path(told["report"]).read_text(encoding="utf-8")


def test_reasons_are_printed(crl, colours):
    """Images that differ equally in all directions do not differ more in colour."""
    rows = np.random.default_rng(0).standard_normal((60, 128)).astype(np.float32)
    np.save("x.npy", rows / np.linalg.norm(rows, axis=1, keepdims=True))
    ask = ["cluster", "x.npy", "--criterion", "color", "--texts", colours, "-k", 4, "--overwrite"]
    told = crl(*ask, "--json")
    assert told["quality"]["separation"] < 0.1 and "may not see" in told["quality"]["reasons"][0]
    output = CliRunner().invoke(app, [str(each) for each in ask]).output
    assert "color: not reliable: the groups are hardly better" in " ".join(output.split())


def test_cluster_stored_embeddings(crl, folder, colours, tmp_path):
    crl("basis", "create", "color", "--texts", colours)
    crl("embed", folder, "--out", "x.npz")
    crl("embed", folder, "--out", "x.parquet")
    crl("embed", folder, "--out", "i.npz", "--dtype", "int8")
    crl("embed", folder, "--out", "i.parquet", "--dtype", "int8")
    np.save("x.npy", np.load("x.npz")["universal"].astype(np.float16))
    for name in ("x.npz", "x.parquet", "x.npy", "i.npz", "i.parquet"):
        told = crl("cluster", name, "--criterion", "color", "--out", f"{name}.out", "--json")
        assert told["report"] is None and told["k"] == 3
        lines = table(tmp_path / f"{name}.out" / "clusters.csv")
        assert {line["name"] for line in lines} == set(COLOURS)
        known = str(folder / "blue-0.jpg") if name != "x.npy" else "row 0"
        assert lines[0]["file"] == known
        assert [p.name for p in (tmp_path / f"{name}.out").iterdir()] == ["clusters.csv"]
    told = crl("cluster", "x.npz", "--basis", basis_file("bases", "color"), "--k", 1, "--json")
    assert told["criterion"] == "color" and told["chosen"] is None and told["stability"] is None


def test_the_language_models_basis_is_made_once_and_kept(crl, folder, tmp_path, monkeypatch):
    asked = []

    def generate(embedder, criterion, **_):
        asked.append(criterion)
        return generated_texts(criterion, COLOURS)

    monkeypatch.setattr(Embedder, "generate_texts", generate)
    for _ in range(2):
        told = crl("cluster", folder, "--criterion", "main color", "--json", "--overwrite")
        assert told["texts"] == list(COLOURS)
    assert asked == ["main color"]
    assert Basis.load(basis_file("bases", "main color")).texts == COLOURS


def test_a_basis_is_made_against_another(crl, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Embedder, "generate_texts", lambda _, criterion, **__: generated_texts(criterion, COLOURS)
    )
    crl("basis", "create", "shape", "--text", "square", "--text", "circle", "--text", "star")
    asked = ("cluster", folder, "--criterion", "main color", "--against", "shape", "--json")
    crl(*asked)
    basis = Basis.load(basis_file("bases", "main color"))
    assert basis.provenance["against"] == ["shape"]
    with pytest.raises(InvalidInputError, match="--against is for a basis that is made now"):
        crl(*asked, "--overwrite")


def test_file_names_are_neither_markup_nor_html(crl, folder, colours, tmp_path):
    odd = folder / "x[red]<b>'y.jpg"
    (folder / "red-0.jpg").rename(odd)
    crl("basis", "create", "color", "--texts", colours)
    crl("cluster", folder, "--criterion", "color", "--out", "out")
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "x[red]&lt;b&gt;&#39;y.jpg" in page and odd.name not in page
    assert any(line["file"] == str(odd) for line in table(tmp_path / "out" / "clusters.csv"))
    shown = crl("retrieve", folder / "red-1.jpg", folder, "--criteria", "color")
    assert "x[red]" in "".join(line.split("│")[2].strip() for line in shown.splitlines()[3:-1])


def test_copies_and_tiny_folders(crl, folder, colours, tmp_path):
    for path in list(folder.iterdir())[1:]:
        path.unlink()
    only = next(folder.iterdir())
    options = ("--criterion", "color", "--texts", colours, "--json", "--overwrite")
    told = crl("cluster", folder, *options)
    assert told["k"] == 1 and told["clusters"][0]["size"] == 1
    for i in range(3):
        shutil.copy(only, folder / f"copy-{i}.jpg")
    told = crl("cluster", folder, *options)
    assert told["k"] == 1 and len(told["clusters"][0]["typical"]) == 1
    told = crl("cluster", folder, *options, "-k", 3)
    assert told["k"] == 3 and len(told["clusters"]) == 1
    with pytest.raises(CrlError, match="from 1 to the 4 rows"):
        crl("cluster", folder, *options, "-k", 5)


def foreign(path: Path) -> Path:
    """Return the path of a copy of a basis file that names another model."""
    basis = Basis.load(path)
    changed = {name: getattr(basis, name) for name in basis.__dataclass_fields__}
    other = Basis(**{**changed, "fingerprint": "0" * 64})
    other.save(path.with_name("foreign.safetensors"))
    return path.with_name("foreign.safetensors")


def test_without_scikit_learn_nothing_is_embedded(crl, folder, colours, monkeypatch):
    monkeypatch.setattr(_sources, "find_spec", lambda name: None if name == "sklearn" else name)
    for command in (("cluster", folder), ("classify", "fit", folder, "-o", "m.safetensors")):
        with pytest.raises(CrlError, match=r"pip install 'crl-embeddings\[tasks\]'"):
            crl(*command, "--criterion", "color", "--texts", colours)


def test_models_are_not_mixed(crl, folder, colours, tmp_path):
    crl("basis", "create", "color", "--texts", colours)
    crl("embed", folder, "--out", "x.npz")
    other = foreign(basis_file("bases", "color"))
    for source in ("photos", "x.npz"):
        with pytest.raises(BasisMismatchError, match="made for model 000000"):
            crl("cluster", source, "--basis", other)
    labels = tmp_path / "labels.csv"
    labels.write_text("file,label\nred-0.jpg,r\nblue-0.jpg,b\n")
    with pytest.raises(BasisMismatchError):
        crl("classify", "fit", folder, "--labels", labels, "--basis", other, "-o", "m.safetensors")
    rows = np.eye(3, 2, dtype=np.float32)
    FewShotClassifier(Basis.load(other)).fit(rows, list("aab")).save("m.safetensors")
    for source in ("photos", "x.npz"):
        with pytest.raises(BasisMismatchError, match="model 000000"):
            crl("classify", "predict", "m.safetensors", source)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "--criterion", "color"], "does not exist"),
        (["empty", "--criterion", "color"], "no image files in this directory"),
        (["textual", "--criterion", "color"], "no image files in this directory"),
        (["broken", "--criterion", "color"], "none of 1 images can be read"),
        (["photos"], "expected --criterion"),
        (["photos", "--criterion", "../x", "--texts", "colours.txt"], "expected a criterion"),
        (["photos", "--basis", "b", "--texts", "t", "--criterion", "x"], "got both"),
        (["photos", "--basis", "nowhere"], "cannot be read"),
        (["x.npy", "--criterion", "color", "--texts", "colours.txt"], "NaN"),
        (
            ["photos", "--criterion", "c", "--texts", "colours.txt", "-o", "x.npy"],
            "cannot be created",
        ),
    ],
)
def test_what_cluster_refuses(crl, folder, colours, arguments, words):
    tmp_path = folder.parent
    for name in ("empty", "textual", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "textual" / "a.txt").write_text("x")
    (tmp_path / "broken" / "a.jpg").write_text("x")
    np.save(tmp_path / "x.npy", np.full((4, 128), np.nan, np.float32))
    with pytest.raises(CrlError, match=words):
        crl("cluster", *arguments)


def sorted_folder(folder: Path) -> Path:
    """One subdirectory of images for each colour, without the last image of each."""
    made = folder.with_name("classes")
    for path in folder.iterdir():
        name, _, number = path.stem.partition("-")
        if number != "2":
            (made / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, made / name)
    return made


def test_classify(crl, folder, colours, tmp_path):
    made = sorted_folder(folder)
    options = ("--criterion", "color", "--texts", colours)
    told = crl("classify", "fit", made, "-o", "m.safetensors", *options, "--json")
    assert told["classes"] == {"blue": 2, "green": 2, "red": 2} and told["singletons"] == []
    assert told["cross_validated_accuracy"] == 1.0
    rest = [folder / f"{name}-2.jpg" for name in COLOURS]
    told = crl("classify", "predict", "m.safetensors", *rest, "--csv", "p.csv", "--json")
    assert [each["label"] for each in told["predictions"]] == list(COLOURS)
    assert told["calibrated"] is False and told["criterion"] == "color"
    for each in told["predictions"]:
        assert sum(each["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert each["probability"] == max(each["probabilities"].values())
    lines = table(tmp_path / "p.csv")
    assert [line["label"] for line in lines] == list(COLOURS)
    assert set(lines[0]) == {"file", "label", "probability", *COLOURS}
    assert "calibrated" in crl("classify", "predict", "m.safetensors", folder)

    crl("embed", folder, "--out", "x.npz")
    stored = crl("classify", "predict", "m.safetensors", "x.npz", "--json")["predictions"]
    direct = crl("classify", "predict", "m.safetensors", folder, "--json")["predictions"]
    assert [each["file"] for each in stored] == [each["file"] for each in direct]
    for one, two in zip(stored, direct, strict=True):
        assert one["label"] == two["label"]
        assert one["probability"] == pytest.approx(two["probability"], abs=1e-4)

    labels = tmp_path / "labels.csv"
    labels.write_text("\ufefffile,label,mood\nred-0.jpg,red,x\nblue-0.jpg,blue,y\n", "utf-8")
    fit = ("classify", "fit", folder, "-o", "m.safetensors", *options, "--labels", labels)
    with pytest.raises(CrlError, match=r"m\.safetensors: exists already; pass --overwrite"):
        crl(*fit)
    with pytest.raises(CrlError, match=r"p\.csv: exists already"):
        crl("classify", "predict", "m.safetensors", folder, "--csv", "p.csv")
    fit = (*fit, "--overwrite")
    told = crl(*fit, "--json")
    assert told["classes"] == {"blue": 1, "red": 1} and told["singletons"] == ["blue", "red"]
    assert told["cross_validated_accuracy"] is None
    assert crl(*fit, "--column", "mood", "--json")["classes"] == {"x": 1, "y": 1}
    assert "not measured" in crl(*fit)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("file;label\na;b\n", r"columns 'file' and 'label'.*found \['file;label'\]"),
        ("red-0.jpg,red\nblue-0.jpg,blue\n", r"found \['red-0.jpg', 'red'\]"),
        ("", r"found \[\]"),
        ("file,label\n", "a line for each labelled image"),
        ("file,label\nred-0.jpg,\n", "line 2: expected a file and a label"),
        ("file,label\nred-0.jpg\n", "line 2: expected a file and a label"),
        ("file,label\nred-0.jpg,a,b\n", "line 2: expected a file and a label and 2 columns"),
        (
            "file,label\nred-0.jpg,a\nred-0.jpg,b\n",
            "line 3: 'red-0.jpg' has the label 'b' here and 'a'",
        ),
        ("file,label\nred-0.jpg,a\nred-1.jpg,a\n", "two classes or more, got only 'a'"),
        ("file,label\nred-0.jpg,a\nnone.jpg,b\n", "there is none of b"),
        ("file,label\nno.jpg,a\nnone.jpg,b\n", "none of 2 images can be read"),
        (b"file,label\ngr\xfcn.jpg,a\n", "expected CSV in UTF-8"),
        ('file,label\n"red-0.jpg,a\n', "expected CSV in UTF-8"),
    ],
)
def test_tables_in_the_wrong_layout(crl, folder, colours, content, words):
    labels = folder.parent / "labels.csv"
    labels.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CrlError, match=words):
        crl(
            "classify", "fit", folder, "-o", "m.safetensors", "--criterion", "color",
            "--texts", colours, "--labels", labels,
        )  # fmt: skip
    assert not labels.with_name("m.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fit", "photos", "-o", "m.safetensors"], r"one subdirectory.*found \[\]"),
        (["fit", "nowhere", "-o", "m.safetensors"], "expected a directory"),
        (["fit", "hollow", "-o", "m.safetensors"], "class 'a' has no image"),
        (["fit", "photos", "-o", "m.pkl"], "expected a .safetensors file"),
        (["predict", "colours.txt", "photos"], "not a valid classifier file"),
        (["predict", "nowhere", "photos"], "cannot be read"),
        (["predict", "rows.safetensors", "photos"], "holds no basis"),
    ],
)
def test_what_classify_refuses(crl, folder, colours, arguments, words):
    tmp_path = colours.parent
    for name in "ab":
        (tmp_path / "hollow" / name).mkdir(parents=True)
    rows = np.eye(3, 2, dtype=np.float32)
    FewShotClassifier().fit(rows, list("aab")).save(tmp_path / "rows.safetensors")
    with pytest.raises(CrlError, match=words):
        crl("classify", *arguments)


def test_retrieve(crl, folder, colours, tmp_path):
    crl("basis", "create", "color", "--texts", colours)
    crl("basis", "create", "shape", "-t", "square", "-t", "circle", "-t", "star")
    crl("embed", folder, "--out", "x.npz")
    query, options = folder / "red-1.jpg", ("--criteria", "color:2, shape", "--json", "-n", 4)
    for source in (folder, "x.npz"):
        told = crl("retrieve", query, source, *options)
        names = [Path(each["file"]).name for each in told["results"]]
        assert set(names[:2]) == {"red-0.jpg", "red-2.jpg"} and len(names) == 4
        assert told["weights"] == {"color": 2.0, "shape": 1.0}
        for each in told["results"]:
            score = 2 * each["parts"]["color"] + each["parts"]["shape"]
            assert each["score"] == pytest.approx(score, abs=1e-5)
    unlike = crl("retrieve", query, folder, "--criteria", "color:-1", "--json", "-n", 6)
    assert not any("red" in each["file"] for each in unlike["results"])
    but = ("retrieve", query, folder, "--but-with", "a green square", "--scene", "shape")
    told = crl(*but, "--json", "--scene-weight", 0.0)
    assert "green" in told["results"][0]["file"] and told["weights"]["shape"] == 0.0
    told = crl(*but, "--json")
    assert set(told["results"][0]["parts"]) == {"shape", "condition"} and told["but_with"]
    assert 0 < told["weights"]["shape"] != 10.0  # centred: both parts alike
    crl("basis", "create", "plain", "--texts", colours, "--method", "cosine")
    told = crl("retrieve", query, folder, "--but-with", "a dog", "--scene", "plain", "--json")
    assert told["weights"]["plain"] == 10.0  # the paper's
    assert "condition" in crl(*but).replace("\n", "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "expected --criteria"),
        (["--criteria", "color", "--but-with", "a dog"], "expected --criteria"),
        (["--criteria", "color:x"], "got 'color:x'"),
        (["--criteria", "color:0"], "other than 0"),
        (["--criteria", "color:nan"], "other than 0"),
        (["--criteria", "color:1, Color:2"], "occurs twice"),
        (["--criteria", "../x"], "expected a criterion"),
    ],
)
def test_what_retrieve_refuses(crl, folder, arguments, words):
    with pytest.raises(CrlError, match=words):
        crl("retrieve", folder / "red-0.jpg", folder, *arguments)
