"""The comparison with peers: its computations, its report, and the protocol of its workers."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from crl_benchmarks.images import synthetic_jpegs
from crl_benchmarks.load import Run
from crl_benchmarks.peers import environments
from crl_benchmarks.peers.__main__ import main
from crl_benchmarks.peers.catalogue import CRL_AUTO, CRL_FP32, ENGINES
from crl_benchmarks.peers.engines import compare
from crl_benchmarks.peers.environments import ENVIRONMENTS, OWN, EnvironmentSpec, make_environment
from crl_benchmarks.peers.plot import write_plot
from crl_benchmarks.peers.protocol import Worker, WorkerError
from crl_benchmarks.peers.records import (
    SCHEMA,
    EngineRow,
    Environment,
    Report,
    ServiceRow,
    ServiceRun,
    TargetResult,
    write_report,
)
from crl_benchmarks.peers.services import PYTRITON, SERVICES, peak_of_tree, summarise
from crl_benchmarks.peers.tables import BEGIN, END, markdown, rewritten
from crl_benchmarks.peers.target_results import check_targets
from crl_sdk import Embedder, demo_bundle
from crl_sdk.errors import InvalidInputError


def engine(name: str, one: float, sixteen: float, *, peak: int = 500, **more) -> EngineRow:
    rounds = {
        "decode": (4.0, 5.0, 4.5),
        "run 1": (one, one * 1.1, one * 0.9),
        "run 16": (sixteen, sixteen * 1.1, sixteen * 0.9),
        "embed 16": (sixteen / 16 + 1,) * 3,
    }
    values = {"cosine_mean": 1.0, "cosine_min": 1.0, "rounds": rounds, **more}
    return EngineRow(
        name=name, environment="x", ours=name.startswith("crl"), peak_bytes=peak, start_seconds=1.0,
        **values,
    )  # fmt: skip


def load(mode: str, amount: float, rate: float, *, p50: float, p99: float, **more) -> ServiceRun:
    return ServiceRun(
        mode=mode, load=amount, offered=100, failed=0, per_second=rate, p50_ms=p50, p99_ms=p99,
        **more,
    )  # fmt: skip


def service(name: str, rate: float, p99: float, *, peak: int = 500) -> ServiceRow:
    runs = (
        load("closed", 1.0, rate / 2, p50=20.0, p99=30.0),
        load("closed", 8.0, rate, p50=80.0, p99=90.0),
        load("open", 10.0, 10.0, p50=30.0, p99=p99, share=0.5),
    )
    return ServiceRow(
        name=name, environment="x", ours=name.startswith("crl"), start_seconds=(1.5, 2.5, 1.9),
        peak_bytes=peak, runs=runs, cosine_min=1.0,
    )  # fmt: skip


@pytest.fixture
def report():
    engines = (
        engine(CRL_FP32, 50.0, 700.0, peak=400),
        engine(CRL_AUTO, 16.0, 240.0, precision="auto", peak=300, cosine_mean=0.9999),
        engine("fast", 48.0, 660.0),
        engine("slow", 150.0, 3000.0),
        engine("wrong", 1.0, 1.0, void="cosine 0.5"),
        EngineRow(name="absent", environment="x", skipped="pip install failed (1)"),
    )
    services = (
        service(CRL_FP32, 18.0, 100.0, peak=900),
        service(CRL_AUTO, 50.0, 60.0),
        service(PYTRITON, 16.0, 120.0, peak=800),
    )
    return Report(
        schema=SCHEMA, time="now", seconds=60.0, command="c", commit="abc",
        machine={"cores": "2", "processor": "P"}, settings={"threads": "2"},
        environments=(Environment(name="x", skipped=""),), engines=engines, services=services,
        targets=tuple(check_targets(engines, services)),
    )  # fmt: skip


def find(report: Report, *words: str) -> TargetResult:
    (found,) = [each for each in report.targets if all(word in each.target for word in words)]
    return found


def test_targets_are_judged_against_the_best_peer_that_agrees(report):
    one = find(report, "engine crl fp32, batch 1:")
    assert one.measured == pytest.approx(48 / 50) and one.against.startswith("fast")
    assert one.held is False and one.outcome == "missed by 4.0%"
    auto = find(report, "engine auto, batch 1: 3 times")
    assert auto.measured == pytest.approx(3.0) and auto.held
    sixteen = find(report, "engine auto, batch 16: 3 times")
    assert sixteen.measured == pytest.approx(2.75) and sixteen.outcome == "missed by 8.3%"
    assert find(report, "crl fp32", "saturation of the engine's own").measured == pytest.approx(
        18 / (1e3 / 44.75)
    )
    assert find(report, "p50 of one caller", "crl auto").measured == pytest.approx(20 - 4.5 - 16)
    assert find(report, "crl fp32: higher throughput").measured == pytest.approx(18 / 16)
    assert find(report, "crl auto: lower p99", "50%").measured == pytest.approx(0.5)
    assert find(report, "crl fp32: start").measured == 1.9
    assert find(report, "service, crl fp32: peak memory").outcome == "missed by 12.5%"
    assert find(report, "engine, crl fp32: peak memory").held


def test_without_peers_nothing_is_held(report):
    ours = [row for row in report.engines if row.ours]
    targets = check_targets(ours, [])
    assert {each.held for each in targets} == {None}
    assert all(each.outcome.startswith("not measured") for each in targets)
    assert TargetResult(target="x", measured=math.nan).held is None


def test_the_tables_tell_what_is_void_missing_and_missed(report):
    text = markdown(report)
    assert "wrong (**void**: cosine 0.5)" in text and "absent: skipped: pip install" in text
    assert "**missed by 4.0%**" in text and "| **crl fp32** |" in text
    lengths = {
        line.count("|")
        for block in text.split("\n\n")
        for line in block.splitlines()
        if block.startswith("| service | load")
    }
    assert len(lengths) == 1


def test_the_readme_is_made_from_the_report(report, tmp_path, capsys):
    out, readme = tmp_path / "peers", tmp_path / "README.md"
    write_report(report, out.with_suffix(".json"))
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    arguments = ["--out", str(out), "--readme-file", str(readme)]
    assert main(["--check", *arguments]) == 1 and "tables differ" in capsys.readouterr().err
    assert "old" in readme.read_text()
    assert main(["--readme", *arguments]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| **crl auto** | 16.0 | 66.7 | 0.99990 |" in text and "wrong" not in text
    assert main(["--check", *arguments]) == 0
    readme.write_text("no markers")
    assert main(["--readme", *arguments]) == 1 and "expected the README" in capsys.readouterr().err
    with pytest.raises(InvalidInputError):
        rewritten(f"{END}{BEGIN}", report)
    out.with_suffix(".json").write_text('{"schema": 1}')
    assert main(["--readme", *arguments]) == 1 and "bench-peers" in capsys.readouterr().err


def test_the_committed_readme_is_as_the_committed_report_has_it():
    root = Path(__file__).parents[2]
    if BEGIN not in (root / "README.md").read_text(encoding="utf-8"):
        pytest.skip("no report has been committed")
    out = root / "benchmarks/results/peers"
    assert main(["--check", "--out", str(out), "--readme-file", str(root / "README.md")]) == 0


def test_the_plot_is_a_picture(report, tmp_path):
    write_plot(report, tmp_path / "peers.png")
    assert (tmp_path / "peers.png").read_bytes().startswith(b"\x89PNG")


def test_names_that_nobody_has_are_refused(capsys):
    assert main(["--only", "nobody"]) == 1
    assert "expected names among" in capsys.readouterr().err


def test_peers_have_environments():
    assert {each.environment for each in (*ENGINES, *SERVICES)} == {OWN, *ENVIRONMENTS}
    scripts = Path(environments.__file__).parent / "workers"
    assert all((scripts / each.script).is_file() for each in ENGINES)


def test_an_environment_that_cannot_be_made_says_why(tmp_path):
    spec = EnvironmentSpec("none", (str(tmp_path / "nowhere-1.0-py3-none-any.whl"),), ())
    made = make_environment(spec, tmp_path / "venvs", tmp_path / "logs")
    assert "pip install failed" in made.skipped and "nowhere" in made.skipped
    assert not (tmp_path / "venvs" / "none" / "environment.json").exists()


def test_embeddings_that_do_not_agree_are_void():
    rows = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    assert compare(7 * rows, rows, "fp32")[1] == ""
    assert "at least 0.999" in compare(rows[::-1], rows, "fp32")[1]
    assert "at least 0.98" in compare(np.full_like(rows, np.nan), rows, "int8")[1]
    assert "shape" in compare(rows[:2], rows, "fp32")[1]


def test_a_failed_call_counts_as_one_that_took_forever():
    run = Run(seconds=10.0, offered=4, cpu=0.1)
    run.latencies = {"ok": [0.1, 0.2], "rejected": [0.001, 0.001]}
    run.done = [1.0, 12.0]
    summary = summarise("open", 1.0, None, [run])
    assert summary.failed == 2 and summary.p99_ms is None and summary.p50_ms is None
    assert summary.per_second == pytest.approx(2 / 12, abs=1e-3)
    assert summarise("closed", 1.0, None, [Run(seconds=1.0)]).p50_ms is None


def test_the_memory_of_a_service_is_that_of_all_its_processes():
    alone = peak_of_tree(os.getpid())
    assert alone is not None and alone > 2**20
    assert peak_of_tree(2**22 + 1) is None


@pytest.fixture
def worker(tmp_path):
    options = {"bundle": str(demo_bundle()), "engine": "auto", "threads": 1}
    python = Path(sys.executable)
    with Worker(python, "crl_worker.py", options, log=tmp_path / "said.log") as started:
        yield started


def test_a_worker_does_what_it_is_asked(worker, tmp_path):
    files = []
    for number, data in enumerate(synthetic_jpegs(3, (120, 90))):
        files.append(tmp_path / f"{number}.jpg")
        files[-1].write_bytes(data)
    names = [str(file) for file in files]
    opened = worker.ask("open")
    assert opened["whole"] is False and "onnx/cpu/fp32" in opened["settings"]
    assert worker.ask("embed", files=names, batch=2, out=str(tmp_path / "rows.npy")) == {"rows": 3}
    with Embedder.open(demo_bundle()) as embedder:
        expected = embedder.embed(files).universal
    np.testing.assert_allclose(np.load(tmp_path / "rows.npy"), expected, atol=1e-6)
    for what in ("decode", "image", "run", "embed"):
        reply = worker.ask(
            "time", what=what, files=names, batch=2, seconds=0.0, least=2, warm=False
        )
        assert len(reply["seconds"]) == 2 and min(reply["seconds"]) > 0
    assert worker.ask("status")["peak_bytes"] > 2**20


def test_a_worker_that_fails_says_why(worker, tmp_path):
    with pytest.raises(WorkerError, match="FileNotFoundError"):
        worker.ask("embed", files=[str(tmp_path / "none.jpg")], batch=1, out="")
    worker._process.kill()
    worker._process.wait()
    with pytest.raises(WorkerError, match="ended"):
        worker.ask("open")


def test_a_worker_that_cannot_start_says_why(tmp_path):
    options = {"bundle": str(tmp_path), "engine": "auto", "threads": 1}
    python = Path(sys.executable)
    with (
        Worker(python, "crl_worker.py", options, log=tmp_path / "said.log") as started,
        pytest.raises(WorkerError, match="BundleError"),
    ):
        started.ask("open")
    with (
        Worker(python, "nothing.py", {}, log=tmp_path / "said.log") as started,
        pytest.raises(WorkerError, match=r"ended.*nothing\.py"),
    ):
        started.ask("open")


def test_weights_have_the_names_that_transformers_uses():
    open_clip = pytest.importorskip("open_clip")
    from crl_benchmarks.peers.weights import ARCHITECTURE, hugging_face_files, hugging_face_names
    from crl_sdk.model._bundle import ModelBundle

    state = open_clip.create_model(ARCHITECTURE).state_dict()
    renamed = hugging_face_names(state)
    assert sum(each.numel() for each in renamed.values()) == sum(
        each.numel() for each in state.values()
    )
    layer = "vision_model.encoder.layers.3.self_attn.k_proj.weight"
    whole = state["visual.transformer.resblocks.3.attn.in_proj_weight"]
    assert (renamed[layer] == whole[768:1536]).all()
    assert (renamed["visual_projection.weight"] == state["visual.proj"].t()).all()
    with pytest.raises(KeyError):
        hugging_face_names({"odd": whole})
    files = hugging_face_files(ModelBundle.open(demo_bundle()).preprocess)
    assert json.loads(json.dumps(files))["config.json"]["vision_config"]["patch_size"] == 32


def test_a_report_is_read_as_it_was_written(report, tmp_path):
    write_report(report, tmp_path / "r.json")
    assert msgspec.json.decode((tmp_path / "r.json").read_bytes(), type=Report) == report
