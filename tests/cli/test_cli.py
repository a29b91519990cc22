"""Command line: files that it writes, its JSON output, and its errors."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from crl_sdk import Basis, demo_bundle
from crl_sdk.projection import decode_rows
from support import basis_file


@pytest.fixture
def crl(tmp_path, monkeypatch):
    """Return a function that runs `crl` as a process in an empty directory."""
    monkeypatch.chdir(tmp_path)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("CRL_")}

    def run(*arguments: object, status: int = 0, **variables: str) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [sys.executable, "-m", "crl_sdk", *map(str, arguments)],
            capture_output=True, text=True, check=False,
            env={**environment, "COLUMNS": "200", **variables},
        )  # fmt: skip
        assert done.returncode == status, done.stdout + done.stderr
        return done

    return run


def document(done: subprocess.CompletedProcess) -> dict:
    return json.loads(done.stdout)


def test_version_and_help(crl):
    assert crl("--version").stdout.startswith("crl 0.")
    text = crl("--help").stdout
    for command in ("export", "basis", "embed", "info", "demo-data"):
        assert command in text


def test_info(crl):
    facts = document(crl("info", demo_bundle(), "--json"))
    assert facts["embedding_dim"] > 0 and facts["path"] == str(demo_bundle())
    table = crl("info", demo_bundle()).stdout
    assert facts["fingerprint"] in table and "image.fp32.onnx" in table
    assert "no readable manifest.json" in crl("info", "nowhere", status=1).stderr
    error = document(crl("info", "nowhere", "--json", status=1))["error"]
    assert error["type"] == "BundleError" and "nowhere" in error["message"]


def test_nothing_is_cut_at_80_columns(crl):
    """Neither the descriptions of commands, nor names of options, nor a fingerprint."""
    for command in ((), ("basis",), ("classify",), ("eval",), ("serve",), ("bench",), ("cluster",)):
        shown = crl(*command, "--help", COLUMNS="80").stdout
        lines = [line for line in shown.splitlines() if not line.startswith("Usage:")]
        assert not [line for line in lines if line.endswith("...") or len(line) > 80 or "…" in line]
    shown = crl("info", demo_bundle(), COLUMNS="80").stdout
    assert "…" not in shown and max(map(len, shown.splitlines())) <= 80
    fingerprint = json.loads((demo_bundle() / "manifest.json").read_text())["fingerprint"]
    assert fingerprint[:50] in shown


def test_basis_then_embed(crl, image_files, tmp_path):
    texts = tmp_path / "colours.txt"
    texts.write_text("red\ngreen\n\nblue\nRED\n", encoding="utf-8")
    made = document(crl("basis", "create", "Main Color", "--texts", texts, "-t", "pink", "--json"))
    assert made["texts"] == ["pink", "red", "green", "blue"] and made["counts"] == [1, 2, 1, 1]
    path = basis_file("bases", "main color")
    assert made["path"] == str(path) and path.parent.name == made["fingerprint"][:16]
    for name in ("main color", path):
        assert document(crl("basis", "show", name, "--json")) == made
    assert "pink" in crl("basis", "show", path).stdout
    listed = document(crl("basis", "list", "--json"))
    assert [each["criterion"] for each in listed["bases"]] == ["main color"]
    assert "main color" in crl("basis", "list").stdout
    assert "pass --overwrite" in crl("basis", "create", "main color", "-t", "x", status=1).stderr
    crl("basis", "create", "main color", "-t", "red", "-t", "blue", "--overwrite")
    assert Basis.load(path).texts == ("red", "blue")

    for name in ("x.npz", "x.parquet"):
        summary = document(
            crl("embed", image_files[0].parent, "--criteria", "main color", "--out", name, "--json")
        )
        assert summary["images"] == 9 and summary["failed"] == []
        assert summary["conditional"] == {"main color": 2}
    arrays = np.load("x.npz")
    again = ["embed", image_files[0], "--out", "x.npz"]
    assert "x.npz: exists already; pass --overwrite" in crl(*again, status=1).stderr
    assert arrays["universal"].shape == (9, summary["universal"])
    assert arrays["main color"].shape == (9, 2)
    assert arrays["path"].tolist() == sorted(map(str, image_files))
    assert str(arrays["fingerprint"]) == summary["fingerprint"]

    from pyarrow import parquet

    table = parquet.read_table("x.parquet")
    assert table.schema.metadata[b"crl_fingerprint"].decode() == summary["fingerprint"]
    stored = np.stack(table["main color"].to_numpy(zero_copy_only=False))
    np.testing.assert_array_equal(stored, arrays["main color"])


@pytest.mark.parametrize("form", ["npz", "parquet"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-3), ("int8", 0.02)])
def test_embed_in_smaller_dtypes(crl, image_files, form, dtype, tolerance):
    crl("basis", "create", "color", "-t", "red", "-t", "green", "-t", "blue")
    ask = ["embed", image_files[0].parent, "--criteria", "color", "--out"]
    crl(*ask, "full.npz")
    assert document(crl(*ask, f"x.{form}", "--dtype", dtype, "--json"))["dtype"] == dtype
    full = np.load("full.npz")
    if form == "npz":
        found = {name: np.load("x.npz")[name] for name in ("universal", "color")}
    else:
        from pyarrow import parquet

        table = parquet.read_table("x.parquet")
        found = {
            name: np.stack(table[name].to_numpy(zero_copy_only=False))
            for name in ("universal", "color")
        }
    for name, rows in found.items():
        assert rows.dtype == dtype
        np.testing.assert_allclose(decode_rows(rows), full[name], atol=tolerance)
    crl("project", f"x.{form}", "--criteria", "color", "--out", "out", "--dtype", "int8")
    projected = np.load("out/color.npy")
    assert projected.dtype == np.int8
    np.testing.assert_allclose(decode_rows(projected), full["color"], atol=5 * tolerance)


def test_int8_of_a_basis_without_row_normalisation_is_refused_before_the_work(crl, image_files):
    crl("basis", "create", "color", "-t", "red", "-t", "green", "-t", "blue", "--post", "none")
    ask = ["--criteria", "color", "--dtype", "int8"]
    for command in (["embed", image_files[0], "--out", "x.npz"], ["project", "y.npz", "-o", "o"]):
        if command[0] == "project":
            crl("embed", image_files[0], "--out", "y.npz")
        assert "use float16" in crl(*command, *ask, status=1).stderr
    assert not Path("x.npz").exists() and not Path("o").exists()


def test_the_command_that_an_error_suggests_works_as_printed(crl, image_files, bundle_copy):
    """It carries the --bundle and --bases of the command that failed."""
    ask = ["embed", image_files[0], "--criteria", "main color", "--bundle", bundle_copy]
    ask += ["--bases", "my bases", "--out", "x.npz"]
    told = crl(*ask, status=1).stderr
    suggested = shlex.split(told.partition("To make it: ")[2])
    assert suggested[:4] == ["crl", "basis", "create", "main color"]
    crl(*suggested[1:], "-t", "red", "-t", "blue", "-t", "green")
    assert crl(*ask, "--json").returncode == 0
    edit = crl("basis", "list", "--bases", "none", status=0).stderr
    assert "crl basis create color --bases none" in edit


def test_the_environment_names_bundle_and_bases(crl, tmp_path):
    crl("basis", "create", "color", "-t", "red", "-t", "blue", CRL_BASES=str(tmp_path / "mine"))
    assert basis_file(tmp_path / "mine", "color").exists()
    wrong = crl("basis", "create", "color", "-t", "x", status=1, CRL_BUNDLE="nowhere")
    assert "nowhere" in wrong.stderr


def test_one_bad_image_is_named_and_the_others_written(crl, image_files, tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(image_files[0].read_bytes()[:200])
    done = crl("embed", image_files[0], bad, image_files[1], "--out", "x.npz", "--json", status=1)
    assert document(done)["failed"][0]["path"] == str(bad)
    assert np.load("x.npz")["path"].tolist() == [str(image_files[0]), str(image_files[1])]
    nothing = crl("embed", bad, "--out", "y.npz", status=1)
    assert "bad.jpg" in nothing.stderr
    assert "nothing written" in nothing.stdout and "None" not in nothing.stdout
    assert not Path("y.npz").exists()
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")]


def test_a_basis_against_others(crl):
    colors = [part for word in ("red", "green", "blue", "yellow") for part in ("-t", word)]
    crl("basis", "create", "shape", "-t", "circle", "-t", "square", "-t", "star")
    against = ["--method", "exclusive-orthogonal", "--against"]
    made = document(crl("basis", "create", "color", *colors, *against, "shape", "--json"))
    assert made["provenance"]["against"] == ["shape"] and made["method"] == "exclusive-orthogonal"
    assert "shape" in crl("basis", "show", made["path"]).stdout
    mixed = [*colors, "-t", "circles", "--against", "shape", "--overwrite", "--json"]
    made = document(crl("basis", "create", "color", *mixed))
    assert made["method"] == "contrastive" and made["weights"][-1] < min(made["weights"][:-1])
    assert f"{made['weights'][-1]:.2f}" in crl("basis", "show", made["path"]).stdout
    refused = crl(
        "basis", "create", "size", *colors, "--method", "exclusive-orthogonal", status=1
    ).stderr
    assert "the method 'exclusive-orthogonal' needs other criteria" in refused
    refused = crl("basis", "create", "size", *colors, *against, "mood", status=1).stderr
    assert "no basis 'mood' of this model in" in refused
    refused = crl("basis", "edit", "mood", "--add", "calm", status=1).stderr
    assert "no basis 'mood' of this model in" in refused
    refused = crl("basis", "create", "size", *colors, "--hint", "as a painter", status=1).stderr
    assert "--hint" in refused and "leave them out" in refused


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["basis", "create", "color", "--texts", "nowhere.txt"], "cannot be read"),
        (["basis", "create", "color", "--texts", "latin1.txt"], "expected UTF-8"),
        (["basis", "create", "color", "--texts", "empty.txt"], "one text per line"),
        (["basis", "create", "../color", "-t", "red"], "expected a criterion"),
        (["basis", "create", "color", "-t", "red"], "at least 3 distinct texts"),
        (["basis", "create", "color", "-t", "red " * 999, "-t", "blue"], "tokens, the model reads"),
        (["basis", "show", "empty.safetensors"], "not a valid basis file"),
        (["embed", "x.jpg", "--out", "x.csv"], "expected a .npz or .parquet"),
        (["embed", "x.jpg", "--out", "no/such/x.npz"], "run mkdir -p no/such"),
        (["embed", ".", "--out", "x.npz"], "no image files"),
        (["embed", "x.jpg", "--out", "x.npz", "--criteria", "mood"], "which has none"),
        (["embed", "x.jpg", "--out", "x.npz", "--engine", "onnx/cuda"], "CUDAExecutionProvider"),
        (["serve", "--generate", "--llm", "nowhere.gguf"], "no such file; expected a GGUF"),
        (["serve", "--generate", "--llm", "latin1.txt"], "not a GGUF file"),
        (["export", "ViT-B-32", "--out", "b", "--precision", "fp8"], "fp32, fp16, int8"),
    ],
)
def test_errors_say_what_to_do(crl, tmp_path, arguments, words):
    (tmp_path / "latin1.txt").write_bytes("grün\n".encode("latin-1"))
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "empty.safetensors").write_text("\n")
    done = crl(*arguments, status=1)
    assert words in done.stderr and "Traceback" not in done.stderr


def test_without_a_package_that_runs_a_language_model(crl, tmp_path):
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    for name in ("llama_cpp", "xllamacpp"):
        (hidden / f"{name}.py").write_text(f"raise ModuleNotFoundError('none', name={name!r})")
    path = os.pathsep.join([str(hidden), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    for arguments in (["basis", "create", "color"], ["serve", "--generate"]):
        message = " ".join(crl(*arguments, status=1, PYTHONPATH=path).stderr.split())
        assert "pip install 'crl-embeddings[generate]', which compiles llama.cpp. " in message
        assert "compiler: pip install 'crl-embeddings[generate-wheels]', or give" in message
        assert "--texts FILE" in message and "Traceback" not in message


def test_demo_data(crl, tmp_path):
    crl("demo-data", "scenes", "-n", 12, "--seed", 5)
    lines = (tmp_path / "scenes" / "labels.csv").read_text().splitlines()
    assert len(lines) == 13 and lines[0].startswith("file,shape,colour,texture,count")
    assert "exists already" in crl("demo-data", "scenes", "-n", 12, status=1).stderr


def test_demo(crl):
    summary = document(crl("demo", "-n", 100, "--no-generate", "--json"))
    assert [row["criterion"] for row in summary["criteria"]] == [
        "shape", "colour", "texture", "count",
    ]  # fmt: skip
    colour = summary["criteria"][1]
    assert colour["true_words"] > 0.85 and "generated" not in colour
    assert colour["universal"] < 0.6
    assert "conditional" in crl("demo", "-n", 100, "--no-generate").stdout


def test_texts_come_from_a_local_model(crl, tmp_path):
    told = crl("basis", "create", "color", "--answers", 4, "--dry-run")
    table = told.stdout
    assert "crl basis edit color --add TEXT --remove TEXT" in told.stderr
    assert "crl basis create color --texts FILE --overwrite" in told.stderr
    assert "votes" in table and "kept" in table and not (tmp_path / "bases").exists()
    create = ["basis", "create", "color", "--answers", 4, "--count", 9, "--include", "teal"]
    made = document(crl(*create, "--exclude", "blue", "--hint", "as painters say", "--json"))
    assert made["texts"][0] == "teal" and 3 <= len(made["texts"]) <= 9
    assert "blue" not in made["texts"]
    origin = made["provenance"]
    assert origin["model"]["sha256"] and origin["options"]["hint"] == "as painters say"
    assert origin["votes"].keys() >= set(made["texts"]) and origin["seeds"] == [0, 1, 2, 3]

    crl("basis", "create", "color", "--answers", 4, "--overwrite")
    path = basis_file("bases", "color")
    first = path.read_bytes()
    crl("basis", "create", "color", "--answers", 4, "--overwrite")
    assert path.read_bytes() == first  # the same command, the same bytes

    edited = document(crl("basis", "edit", "color", "--add", "zigzag", "--remove", "red", "--json"))
    assert edited["texts"][-1] == "zigzag" and "red" not in edited["texts"]
    assert edited["provenance"]["edits"] == [{"added": ["zigzag"], "removed": ["red"]}]
    assert (
        "has no text 'mauve'" in crl("basis", "edit", "color", "--remove", "mauve", status=1).stderr
    )


def test_an_interrupted_generation_writes_nothing(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "crl_sdk", "basis", "create", "mood", "--answers", "1000"],
        cwd=tmp_path, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    assert "demo model" in process.stderr.readline()  # it runs
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 130 and "Traceback" not in stderr
    assert not list(tmp_path.rglob("*.safetensors*"))


def test_warnings_of_an_export_are_printed_without_the_code_that_gave_them(capsys):
    import warnings

    from crl_sdk.cli._console import plain_warnings

    with plain_warnings():
        warnings.simplefilter("always")  # not the error that pytest makes of it
        warnings.warn("ViT-B-32 has [GELU] activations", stacklevel=1)
    captured = capsys.readouterr()
    assert captured.err == "warning: ViT-B-32 has [GELU] activations\n" and not captured.out
