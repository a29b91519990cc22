"""The benchmark against peers: names of weights, the protocol, verdicts, the README's part."""

from __future__ import annotations

import json
import re
import sys

import msgspec
import numpy as np
import pytest

from crl_benchmarks.load import Run
from crl_benchmarks.peers import machine
from crl_benchmarks.peers.__main__ import main
from crl_benchmarks.peers.engines import compare
from crl_benchmarks.peers.environments import Recipe, make_environment
from crl_benchmarks.peers.plot import write_plot
from crl_benchmarks.peers.protocol import WORKERS, Worker, WorkerError, median_ms
from crl_benchmarks.peers.records import (
    EngineRow,
    Environment,
    Report,
    ServiceRow,
    ServiceRun,
    Verdict,
    read_report,
    write_report,
)
from crl_benchmarks.peers.services import summarise
from crl_benchmarks.peers.tables import BEGIN, END, markdown, rewritten
from crl_benchmarks.peers.verdicts import judge
from crl_benchmarks.peers.weights import hugging_face_names
from crl_sdk.errors import InvalidInputError


def engine(name, run, *, precision="fp32", cosine=1.0, peak=100, ours=False, **more):
    rounds = {"decode": (4.0, 4.0), "run 1": run, "run 16": run, "embed 16": (10.0, 10.0)}
    return EngineRow(
        name=name, environment=name, ours=ours, precision=precision, cosine_mean=cosine,
        cosine_min=cosine, peak_bytes=peak, start_seconds=1.0, rounds=rounds, **more,
    )  # fmt: skip


def service(name, p50, rate, *, starts=(1.0,), peak=100, ours=False):
    def load(mode, calls, per_second, ms, share=None):
        return ServiceRun(
            mode=mode, load=calls, share=share, offered=9, failed=0, per_second=per_second,
            p50_ms=ms, p99_ms=2 * ms,
        )  # fmt: skip

    runs = (
        load("closed", 1.0, 9, p50),
        load("closed", 8.0, rate, 100.0),
        load("open", 5.0, 5, p50, share=0.5),
    )
    return ServiceRow(
        name=name, environment=name, ours=ours, runs=runs, start_seconds=starts, peak_bytes=peak
    )


ENGINES = [
    engine("crl fp32", (50.0, 60.0), ours=True),
    engine("crl auto", (20.0, 20.0), precision="int8", cosine=0.9998, peak=90, ours=True),
    engine("exact", (55.0, 66.0)),
    engine("close", (22.0, 22.0), precision="bf16", cosine=0.9999),
    engine("rough", (10.0, 10.0), precision="int8", cosine=0.995),
    engine("wrong", (1.0, 1.0), cosine=0.5, void="cosine 0.5"),
    EngineRow(name="absent", environment="absent", skipped="pip install failed (1)"),
]
SERVICES = [
    service("crl fp32", 65.0, 99.0, starts=(1.0, 9.0, 1.5), ours=True),
    service("crl auto", 25.0, 50.0, starts=(3.0,), ours=True),
    service("PyTriton", 80.0, 60.0),
]


def a_report():
    return Report(
        schema=1, time="2026-01-01T00:00:00+00:00", seconds=60.0, command="make bench-peers",
        commit="abc", machine=machine.describe(), settings={"threads": "2"},
        environments=(Environment(name="crl", python="3.11", versions={"crl-sdk": "1"}),),
        engines=tuple(ENGINES), services=tuple(SERVICES), verdicts=tuple(judge(ENGINES, SERVICES)),
    )  # fmt: skip


def test_open_clip_names_become_those_of_transformers():
    open_clip = pytest.importorskip("open_clip")
    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 16, "width": 64, "heads": 1, "layers": 1},
    }
    state = open_clip.CLIP(**config).state_dict()
    renamed = hugging_face_names(state)
    layer = "vision_model.encoder.layers.0"
    fused = state["visual.transformer.resblocks.0.attn.in_proj_weight"]
    assert (renamed[f"{layer}.self_attn.k_proj.weight"] == fused[64:128]).all()
    assert (renamed["visual_projection.weight"] == state["visual.proj"].T).all()
    assert renamed[f"{layer}.mlp.fc1.bias"].shape == (256,)
    assert renamed["vision_model.pre_layrnorm.weight"].shape == (64,)
    assert sum(each.numel() for each in renamed.values()) == sum(
        each.numel() for each in state.values()
    )
    with pytest.raises(KeyError):
        hugging_face_names({"unknown.weight": fused})


def test_targets_are_computed():
    found = {each.target: each for each in judge(ENGINES, SERVICES)}

    def told(start):
        return next(each for target, each in found.items() if target.startswith(start))

    best = told("engine fp32, batch 1: at least")
    assert best.measured == pytest.approx(1.1) and best.held and best.against == "exact, run 1"
    assert told("engine auto, batch 1: 3 times").measured == pytest.approx(3.025)
    assert told("engine auto, batch 16: no slower than any peer of comparable").held
    assert told("engine auto, batch 16: no slower than any peer with").measured == 0.5
    assert told("service, crl fp32: p50 of one caller").measured == pytest.approx(6.0)
    assert told("service, crl fp32: throughput at saturation").measured == pytest.approx(0.99)
    assert told("service, crl auto: higher throughput").told == "missed by 16.7%"
    assert told("service, crl auto: lower p99 than PyTriton at 50%").held
    assert told("service, crl fp32: start").held and not told("service, crl auto: start").held
    assert told("engine, crl auto: peak").held


def test_nothing_is_said_where_nothing_was_measured():
    assert all(each.held is None for each in judge([], []))
    assert Verdict(target="x", missing="no run").told == "not measured: no run"


def test_a_failed_call_took_forever():
    run = Run(seconds=10.0, offered=10, cpu=0.1, latencies={"ok": [0.1] * 9, "error": [0.2]})
    row = summarise("open", 1.0, None, [run])
    assert (row.failed, row.p50_ms, row.p99_ms, row.per_second) == (1, 100.0, None, 0.9)


def test_rows_that_do_not_agree_are_void():
    reference = np.eye(4, 8, dtype=np.float32)
    assert compare(7 * reference, reference, "fp32")[1] == ""
    assert "0.999" in compare(reference + 0.1, reference, "fp32")[1]
    assert "shape" in compare(reference[:1], reference, "fp32")[1]
    assert compare(np.full_like(reference, np.nan), reference, "int8")[1]


def test_a_worker_answers_and_says_why_it_failed(tmp_path, monkeypatch):
    (tmp_path / "half.py").write_text(
        f"import sys; sys.path.insert(0, {str(WORKERS)!r})\n"
        "import loop, numpy as np\n"
        "class Half(loop.Engine):\n"
        "    settings = 'none'\n"
        "    def decode(self, data): return np.frombuffer(data, np.uint8)[:2]\n"
        "    def run(self, batch): print('noise'); return batch / 2\n"
        "loop.run(Half)\n"
    )
    monkeypatch.setattr("crl_benchmarks.peers.protocol.WORKERS", tmp_path)
    files = []
    for number in range(3):
        files.append(str(tmp_path / f"{number}.jpg"))
        (tmp_path / f"{number}.jpg").write_bytes(bytes([number, 4, 9]))
    log = tmp_path / "half.log"
    with Worker(sys.executable, "half.py", {"threads": 1}, log=log) as worker:
        out = str(tmp_path / "rows.npy")
        assert worker.ask("embed", files=files, batch=2, out=out) == {"rows": 3}
        assert np.load(out).tolist() == [[0, 2], [0.5, 2], [1, 2]]
        timed = worker.ask("time", what="run", files=files, batch=3, seconds=0, least=2, warm=True)
        assert len(timed["seconds"]) == 2
        assert worker.ask("status")["peak_bytes"] > 0
        with pytest.raises(WorkerError, match="KeyError"):
            worker.ask("sing")
    with (
        Worker(sys.executable, "absent.py", {"threads": 1}, log=log) as worker,
        pytest.raises(WorkerError, match="No such file"),
    ):
        worker.ask("open")
    assert median_ms([0.003, 0.001, 0.002, 0.004]) == 2.5


def test_an_environment_that_does_not_install_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    recipe = Recipe("none", ("crl-no-such-package",), ())
    made = make_environment(recipe, tmp_path / "venvs", tmp_path / "logs")
    assert made.skipped.startswith("pip install failed (1); ERROR: ")


def test_a_report_is_read_back_drawn_and_told(tmp_path):
    report, path = a_report(), tmp_path / "peers.json"
    write_report(report, path)
    assert read_report(path) == report
    text = markdown(report)
    assert "absent: skipped: pip install failed (1)" in text and "**void**" in text
    assert not re.search(r"\bnan\b|None", text)
    write_plot(report, tmp_path / "peers.png")
    assert (tmp_path / "peers.png").read_bytes().startswith(b"\x89PNG")
    path.write_text(json.dumps({**msgspec.to_builtins(report), "extra": 1, "schema": "x"}))
    with pytest.raises(InvalidInputError, match="report"):
        read_report(path)


def test_the_readme_is_made_from_the_report(tmp_path, capsys):
    readme, out = tmp_path / "README.md", tmp_path / "peers.json"
    write_report(a_report(), out)
    readme.write_text(f"before\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    told = ["--readme-file", str(readme), "--out", str(out)]
    assert main(["--check", *told]) == 1 and "--readme" in capsys.readouterr().err
    assert main(["--readme", *told]) == 0 and main(["--check", *told]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| **crl auto** |" in text and "wrong" not in text
    with pytest.raises(InvalidInputError, match="once"):
        rewritten("no markers", a_report())
