"""`crl eval` on the demo world, on small data sets in the official layouts, and misused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from crl_sdk import demo_bundle
from crl_sdk.cli import app
from crl_sdk.errors import BasisMismatchError, CrlError
from crl_sdk.evaluation import _results as report
from crl_sdk.evaluation._benchmarks import BENCHMARK_NAMES, BENCHMARKS
from support import basis_file

pytest.importorskip("sklearn")

RGB = {"red": (200, 30, 30), "green": (30, 160, 40), "blue": (40, 60, 200)}


def crl_eval(*arguments: object) -> dict:
    done = CliRunner().invoke(app, ["eval", *map(str, arguments), "--json"])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def figures(found: dict) -> dict:
    return {
        (row["criterion"], row["protocol"], row["representation"]): {
            name: figure["mean"] for name, figure in row["scores"].items()
        }
        for row in found["rows"]
    }


@pytest.fixture
def words(tmp_path: Path) -> Path:
    path = tmp_path / "colours.txt"
    path.write_text("red\ngreen\n\nblue\nRed\n", encoding="utf-8")
    return path


@pytest.fixture
def clevr4(tmp_path: Path) -> Path:
    """Write 24 plain images with three of Clevr4's colours and three values of the others."""
    root = tmp_path / "clevr_4_10k_v1"
    (root / "images").mkdir(parents=True)
    annotations = {}
    for i in range(24):
        colour = tuple(RGB)[i % 3]
        pixels = Image.new("RGB", (64, 64), (128, 128, 128))
        pixels.paste(RGB[colour], (8 + i % 8, 8, 48 + i % 8, 52))
        pixels.save(root / "images" / f"CLEVR_{i:03d}.png")
        annotations[f"CLEVR_{i:03d}"] = {
            "color": colour,
            "shape": ("cube", "cone", "gear")[i % 3],
            "texture": ("metal", "wave", "star")[i // 8],
            "count": i // 8 + 1,
        }
    (root / "clevr_4_annots.json").write_text(json.dumps(annotations))
    return root


def test_demo_world_from_a_shell(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("CRL_")}
    done = subprocess.run(
        [sys.executable, "-m", "crl_sdk", "eval", "demo", "--own-words", "--limit", "90",
         "--criteria", "colour", "--seeds", "2", "--splits", "2", "--shots", "1,2", "--json",
         "--out", "demo.md"],
        cwd=tmp_path, capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["images"] == 90 and found["paper_encoder"] is None
    assert found["texts"]["colour"]["texts"][:2] == ["red", "orange"]
    assert found["settings"]["method"] == "cosine"
    by = figures(found)
    universal = by["colour", "clustering", "universal"]["ACC"]
    conditional = by["colour", "clustering", "conditional"]["ACC"]
    assert conditional > 0.8 and universal < 0.5
    few = by["colour", "few-shot", "conditional"]["2 shots"]
    assert few > 0.8 > by["colour", "few-shot", "universal, same scale"]["2 shots"]
    text = (tmp_path / "demo.md").read_text()
    assert "| clustering | embeddings | ACC | NMI | ARI |" in text
    assert found["model"]["fingerprint"][:12] in text and "published" not in text.lower()


def test_clevr4(clevr4, words, tmp_path):
    out = tmp_path / "clevr4.json"
    found = crl_eval(
        "clevr4", "--data", clevr4, "--texts", f"color={words}", "--criteria", "color",
        "--seeds", 2, "--splits", 2, "--shots", "1,5", "--bundle", demo_bundle(), "--out", out,
    )  # fmt: skip
    assert found["paper_encoder"] == "OpenAI's CLIP ViT-B/32"
    assert found["texts"]["color"]["prompts"] == ["objects with the color of {}"]
    assert (found["texts"]["color"]["count"], found["texts"]["color"]["repeated"]) == (4, 1)
    assert any("never seen such images" in remark for remark in found["remarks"])
    assert figures(found)["color", "clustering", "conditional"]["ACC"] == 1
    assert json.loads(out.read_text())["rows"] == found["rows"]


def test_published_figures_stand_beside(clevr4, words, tmp_path):
    others = tmp_path / "others.csv"
    others.write_text(
        "criterion,embeddings,measure,percent,source\n"
        'color, conditional, ACC, 51.5, "Table 1, ViT-B/32"\n'
        'color,conditional,1 shot,12.25,"Table 2, ViT-B/32"\n'
        'shape,universal,NMI,3,"Table 1, ViT-B/32"\n'
    )
    out = tmp_path / "clevr4.md"
    given = ["clevr4", "--data", clevr4, "--texts", f"color={words}", "--criteria", "color"]
    short = ["--seeds", 1, "--splits", 1, "--shots", 1, "--bundle", demo_bundle()]
    found = crl_eval(*given, *short, "--published", others, "--out", out)
    rows = {(row["protocol"], row["representation"]): row["scores"] for row in found["rows"]}
    assert rows["clustering", "conditional"]["ACC"]["published"] == 0.515
    assert found["published"] == ["Table 1, ViT-B/32", "Table 2, ViT-B/32"]
    assert rows["clustering", "universal"]["ACC"]["published"] is None
    text = out.read_text()
    assert "| 100.00 ± 0.00 (published 51.50) |" in text and "(published 12.25)" in text
    assert "are from Table 1, ViT-B/32; Table 2, ViT-B/32." in text
    assert "published but not measured here: shape, universal, NMI" in text
    shown = CliRunner().invoke(
        app, ["eval", *map(str, (*given, *short)), "--published", str(others)]
    )
    assert "published scores, in brackets, are from Table 1" in " ".join(shown.output.split())
    head = "criterion,embeddings,measure,percent,source\n"
    for content, what in (
        ("a,b\n1,2\n", "expected the header criterion,embeddings"),
        (head, "and 0 lines"),
        (f"{head}color,conditional,ACC,much,Table 1\n", "line 2: expected criterion"),
        (f"{head}color,conditional,ACC,nan,Table 1\n", "line 2: expected criterion"),
        (f"{head}color,conditional,ACC,51.5,\n", "line 2: expected criterion"),
        (f"{head}color,conditional,ACC,5,T,more\n", "line 2: expected criterion"),
        (f"{head}color,conditional,ACC,1,T\ncolor,conditional,ACC,2,T\n", "line 3: .* twice"),
        ("\udcff", "in UTF-8"),
    ):
        others.write_bytes(content.encode("utf-8", "surrogateescape"))
        with pytest.raises(CrlError, match=what):
            crl_eval(*given, "--published", others)
    with pytest.raises(CrlError, match="cannot be read"):
        crl_eval(*given, "--published", tmp_path / "nowhere.csv")


def test_the_papers_scores_are_shown_unless_left_out(clevr4, words, tmp_path):
    given = ["clevr4", "--data", clevr4, "--texts", f"color={words}", "--criteria", "color"]
    short = ["--seeds", 1, "--splits", 1, "--shots", "1,2", "--bundle", demo_bundle()]
    out = tmp_path / "clevr4.md"
    found = crl_eval(*given, *short, "--out", out)
    rows = {(row["source"], row["label"]): row for row in found["paper_rows"]}
    assert len(rows) == len(found["paper_rows"]) == 11 + 8
    assert {row["criterion"] for row in found["paper_rows"]} == {"color"}
    own = rows["arXiv 2510.04564, Table 2", "published, CRL, CLIP ViT-B/32"]
    assert own["scores"] == pytest.approx({"NMI": 0.8867, "ACC": 0.8805, "ARI": 0.8230})
    assert rows["arXiv 2510.04564, Table 2", "published, SCAN"]["encoder"] is None
    shots = rows["arXiv 2510.04564, Table 1", "published, universal, BLIP2"]
    assert shots["scores"] == pytest.approx({"1 shot": 0.2896})
    assert all(
        score["published"] is None for row in found["rows"] for score in row["scores"].values()
    )
    lines = out.read_text().splitlines()
    assert "| color | published, CRL, CLIP ViT-B/32 | 88.05 | 88.67 | 82.30 |" in lines
    assert "| color | published, CRL, MetaCLIP | 62.41 |  |" in lines
    source = "arXiv 2510.04564, Table 1; arXiv 2510.04564, Table 2"
    assert any(line.startswith(f"- rows marked published are from {source},") for line in lines)
    shown = CliRunner().invoke(app, ["eval", *map(str, (*given, *short))])
    assert shown.exit_code == 0
    assert "published, CRL, MetaCLIP" in " ".join(shown.output.split())
    crl_eval(*given, *short, "--out", out, "--no-published", "--overwrite")
    assert "published" not in out.read_text()


def test_bases_and_methods(clevr4, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["--criteria", "color", "--protocol", "clustering", "--seeds", "1"]
    with pytest.raises(CrlError, match=r"crl basis create color --prompt 'objects"):
        crl_eval("clevr4", "--data", clevr4, *arguments)
    made = CliRunner().invoke(app, ["basis", "create", "color", "--texts", str(words)])
    assert made.exit_code == 0, made.output
    color = basis_file("bases", "color")
    by_directory = crl_eval("clevr4", "--data", clevr4, "--bases", "bases", *arguments)
    by_file = crl_eval("clevr4", "--data", clevr4, "--basis", color, *arguments)
    assert by_directory["rows"] == by_file["rows"]
    assert by_directory["texts"]["color"]["count"] == 3  # a basis has no repeated texts
    assert by_directory["texts"]["color"]["prompts"] == ["{}"]
    other = crl_eval(
        "clevr4", "--data", clevr4, "--bases", "bases", *arguments, "--method", "contrastive"
    )
    assert other["settings"]["method"] == "contrastive"
    as_shape = ["--basis", f"shape={color}", "--criteria", "shape"]
    assert crl_eval("clevr4", "--data", clevr4, *as_shape, "--shots", 1, "--splits", 1)["rows"]
    with pytest.raises(CrlError, match="which has its own prompts"):
        crl_eval("clevr4", "--data", clevr4, "--bases", "bases", *arguments, "--prompt", "color={}")


def test_a_basis_of_another_model_is_refused(clevr4, tmp_path, embedder):
    from dataclasses import replace

    from crl_sdk.basis._build import build_basis

    basis = build_basis("color", ["red", "blue"], embedder.embed_text, fingerprint="0" * 64)
    path = tmp_path / "color.safetensors"
    replace(basis).save(path)
    with pytest.raises(BasisMismatchError):
        crl_eval("clevr4", "--data", clevr4, "--basis", path, "--criteria", "color", "--shots", 1)


def test_genecis(tmp_path, image_files):
    (tmp_path / "val2017").mkdir()
    for i, image in enumerate(image_files):
        (tmp_path / "val2017" / f"{i:012d}.jpg").write_bytes(image.read_bytes())
    entries = [
        {
            "reference": {"val_image_id": i},
            "target": {"val_image_id": (i + 1) % 9},
            "gallery": [{"val_image_id": (i + 4) % 9}, {"val_image_id": (i + 6) % 9}],
            "condition": "square",
        }
        for i in range(9)
    ]
    (tmp_path / "focus_object.json").write_text(json.dumps(entries))
    scenes = tmp_path / "scenes.txt"
    scenes.write_text("beach\nforest\nkitchen\n")
    found = crl_eval("genecis-focus", "--data", tmp_path, "--texts", scenes)
    assert found["texts"]["scene"]["prompts"] == ["a photo with a scene of {}"]
    by = figures(found)["scene", "retrieval", "conditional, scene and condition"]
    assert set(by) == {"R@1", "R@2", "R@3"} and by["R@3"] == 1
    labels = [row["label"] for row in found["paper_rows"]]
    assert len(labels) == 10 and labels[0] == "published, universal, image only, CLIP ViT-B/16"
    assert found["paper_rows"][-1]["encoder"] == "CLIP ViT-B/16 fine-tuned by GeneCIS"
    part = crl_eval("genecis-focus", "--data", tmp_path, "--texts", scenes, "--limit", 4)
    assert any("4 of 9 queries" in note for note in part["notes"])


def test_deepfashion(tmp_path, image_files):
    (tmp_path / "img").mkdir()
    for i, image in enumerate(image_files):
        (tmp_path / "img" / f"{i}.jpg").write_bytes(image.read_bytes())
    (tmp_path / "filenames_test.txt").write_text("".join(f"img/{i}.jpg\n" for i in range(9)))
    for kind, which in (("query", range(0, 9, 3)), ("candidate", (1, 2, 4, 5, 7, 8))):
        lines = [f"{i} {a} {i // 3}" for i in which for a in range(5)]
        (tmp_path / f"{kind}_test.txt").write_text("\n".join(lines) + "\n")
    given = []
    for name in BENCHMARKS["deepfashion"].prompts:
        path = tmp_path / f"{name}.txt"
        path.write_text("red\ngreen\nblue\n" + "yellow\n" * (name == "style"))
        given += ["--texts", f"{name}={path}"]
    found = crl_eval("deepfashion", "--data", tmp_path, *given)
    assert found["settings"]["components"] == 3
    assert figures(found)["all queries", "retrieval", "conditional"]["mAP"] > 0.9
    assert len(found["rows"]) == 14
    mean = [row for row in found["paper_rows"] if row["criterion"] == "all queries"]
    assert len(found["paper_rows"]) == 9 * 6 and mean[-1]["scores"]["mAP"] == 0.1133
    assert mean[-1]["label"] == "published, CRL, trained, CLIP ViT-B/16"
    with pytest.raises(CrlError, match="method cosine"):
        crl_eval("deepfashion", "--data", tmp_path, *given, "--method", "contrastive")


def test_cards_photos_say_that_the_model_never_saw_a_card(tmp_path, words):
    lines = ["file,rank,suit"]
    for i in range(8):
        Image.new("RGB", (32, 32), (20 * i, 90, 90)).save(tmp_path / f"{i}.jpg")
        lines.append(f"{i}.jpg,{('ace', 'two')[i % 2]},{('clubs', 'hearts')[i // 4]}")
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    found = crl_eval(
        "cards-photos", "--data", tmp_path, "--texts", f"suits={words}", "--criteria", "suits",
        "--seeds", 1, "--splits", 1, "--shots", 1,
    )  # fmt: skip
    assert any("for trying the command" in remark for remark in found["remarks"])
    assert any("never seen such images" in remark for remark in found["remarks"])


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["clevr4"], "--data: expected a directory with Clevr4"),
        (["genecis-change", "--generate"], r"genecis/change_object\.json"),
        (["deepfashion", "--generate"], r"filenames_test\.txt"),
        (["clevr4", "--data", "nowhere", "--generate"], "found nothing there"),
        (["clevr4", "--data", ".", "--own-words"], "only the benchmark demo"),
        (["demo"], "or --own-words"),
        (["demo", "--criteria", "mood"], "expected some of shape, colour"),
        (["demo", "--protocol", "guess"], "expected some of clustering, few-shot"),
        (["demo", "--shots", "0"], "--shots: expected whole numbers"),
        (["demo", "--shots", "one"], "--shots: expected whole numbers"),
        (["demo", "--texts", "colours.txt"], "expected CRITERION=VALUE"),
        (["demo", "--texts", "mood=a.txt"], "a criterion of shape"),
        (["demo", "--texts", "shape=a", "--texts", "shape=b"], "given twice"),
        (["demo", "--prompt", "shape=no place", "--own-words"], "exactly one {}"),
        (["demo", "--split", "train"], "test or valid"),
        (["demo", "--out", "a.txt"], r"expected a \.md or \.json"),
        (["demo", "--out", "nowhere/a.md"], "run mkdir -p nowhere"),
        (["demo", "--basis", "nothing.safetensors"], "cannot be read"),
        (["demo", "--criteria", "shape", "--texts", "shape=nothing.txt", "--limit", "30",
          "--protocol", "clustering"], "there is no file nothing"),
    ],
)  # fmt: skip
def test_misuse_says_what_to_do(tmp_path, monkeypatch, arguments, what):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CrlError, match=what):
        crl_eval(*arguments)


def test_too_many_shots_are_refused_before_anything_is_embedded(clevr4, words):
    given = ["clevr4", "--data", clevr4, "--texts", f"color={words}", "--criteria", "color"]
    with pytest.raises(CrlError, match="color: 10 shots need 11 images of each class, 'red' has"):
        crl_eval(*given)
    with pytest.raises(CrlError, match="expected images of two classes"):
        crl_eval(*given, "--limit", 1)


def test_too_few_texts_are_refused_before_images_are_embedded(clevr4, tmp_path, monkeypatch):
    one = tmp_path / "one.txt"
    one.write_text("red\n")
    given = ["clevr4", "--data", clevr4, "--texts", f"color={one}", "--criteria", "color"]
    monkeypatch.delattr("crl_sdk.evaluation._protocols.embed_files")
    with pytest.raises(
        CrlError, match="color: few-shot classification needs rows with two columns"
    ):
        crl_eval(*given, "--shots", 1)
    with pytest.raises(CrlError, match="'contrastive' needs at least 3 distinct texts"):
        crl_eval(*given, "--method", "contrastive", "--protocol", "clustering")
    one.write_text("red\nblue\n")
    with pytest.raises(CrlError, match="'exclusive-orthogonal' needs other criteria"):
        crl_eval(*given, "--method", "exclusive-orthogonal", "--protocol", "clustering")


def test_every_benchmark_is_described():
    assert tuple(BENCHMARKS) == BENCHMARK_NAMES
    for name, benchmark in BENCHMARKS.items():
        assert benchmark.prompts and benchmark.layout and benchmark.source
        assert all(prompt.count("{}") == 1 for prompt in benchmark.prompts.values())
        papers = name not in ("demo", "cards-photos")
        assert bool(benchmark.encoder) == papers
    assert BENCHMARKS["cards"].prompts["suits"] == "a poker card with the card suits of {}"
    assert BENCHMARKS["deepfashion"].prompts["style"] == "a fashion with a style of {}"


def test_results_are_tables_as_well(clevr4, words):
    done = CliRunner().invoke(
        app,
        ["eval", "clevr4", "--data", str(clevr4), "--texts", f"color={words}",
         "--criteria", "color", "--protocol", "clustering", "--seeds", "2"],
    )  # fmt: skip
    assert done.exit_code == 0 and "conditional" in done.output and "100.00 ± 0.00" in done.output
    assert (
        report.format_percent(report.MeanStd(0.12345)) == "12.35"
    )  # a single run has no deviation
