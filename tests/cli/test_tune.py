"""`crl tune`: real servers of the demo model, and the choice among candidates that are made up."""

from __future__ import annotations

import json
import math
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import typer

from crl_benchmarks.bench import _row
from crl_benchmarks.bench_objective import Objective
from crl_benchmarks.load import Run
from crl_benchmarks.tune import CALLERS, Subject, Sweep, list_settings, peak_memory
from crl_benchmarks.tune_report import (
    Candidate,
    TuneRow,
    check_pareto,
    pareto,
    tune_report,
    write_pareto,
)
from crl_sdk import demo_bundle
from crl_sdk.cli import _tune, app
from crl_sdk.cli._local_server import local_server
from crl_sdk.cli._tune import config_text, tune
from crl_sdk.engines._ranking import RankedEngine, Ranking
from crl_sdk.engines._selection import measure_engines
from crl_sdk.errors import InvalidInputError, MissingDependencyError, ServiceError

OBJECTIVE = Objective.parse("p99<50ms")


def run_of(mode: str, load: float, *, latency: float, rate: float) -> object:
    """A run of a server that takes `latency` seconds and serves `rate` calls per second."""
    served = 2000
    run = Run(seconds=1.0, offered=served, lags=[0.0])
    slow = mode == "open" and load > rate
    run.latencies = {"ok": [0.2 if slow else latency] * served}
    seconds = served / (min(load, rate) if mode == "open" else 1 / latency if load == 1 else rate)
    run.seconds = seconds
    run.done = [seconds * (i + 0.5) / served for i in range(served)]
    return _row(mode, load, run, 1)


class Machine:
    """Candidates with a latency in seconds and a rate, and what was asked of them, in order."""

    def __init__(self, speeds: dict[Candidate, tuple[float, float]]) -> None:
        self.speeds, self.asked, self.open, self.most_open = speeds, [], set(), 0

    @contextmanager
    def start(self, candidate):
        if candidate not in self.speeds:
            raise ServiceError("crl serve ended with status 1: no such engine")
        latency, rate = self.speeds[candidate]
        self.open.add(candidate)
        self.most_open = max(self.most_open, len(self.open))

        def measure(mode, load):
            self.asked.append((candidate, mode, load))
            return run_of(mode, load, latency=latency, rate=rate)

        try:
            yield Subject(measure, lambda: 100.0)
        finally:
            self.open.remove(candidate)


def candidate(engine="a/cpu/fp32", threads=1, batch=8, decode="exact"):
    return Candidate(engine, threads, batch, decode)


def by_engine(rows):
    return {row.engine: row for row in rows}


def test_the_best_meets_the_objective_at_the_highest_rate_and_the_pareto_set_is_marked():
    fast, short, slow, late = map(
        candidate, ("fast/cpu/x", "short/cpu/x", "slow/cpu/x", "late/cpu/x")
    )
    machine = Machine({fast: (0.02, 200), short: (0.005, 90), slow: (0.06, 40), late: (0.019, 180)})
    sweep = Sweep([slow, short, fast, late], OBJECTIVE, machine.start, rounds=2, finalists=3)
    sweep.run()
    rows = sweep.rows()
    assert rows[0].engine == "fast/cpu/x" and rows[0].best and not any(row.best for row in rows[1:])
    assert rows[0].rate == pytest.approx(200, rel=0.06)
    found = by_engine(rows)
    assert {name for name, row in found.items() if row.pareto} == {
        "fast/cpu/x", "short/cpu/x", "late/cpu/x"
    }  # fmt: skip
    assert found["short/cpu/x"].one_caller_p50_ms == pytest.approx(5)
    assert found["short/cpu/x"].closed_images_per_second == pytest.approx(90)
    assert found["short/cpu/x"].memory_mib == 100
    # the slow one was dropped after the first round, and never searched
    dropped = found["slow/cpu/x"]
    assert dropped.state == "dropped" and "times its images/s" in dropped.reason
    assert [each for each in machine.asked if each[0] == slow] == [
        (slow, "closed", 1), (slow, "closed", CALLERS)
    ]  # fmt: skip
    assert not machine.open and machine.most_open == 3


def test_candidates_take_turns_in_the_rounds_and_in_the_search():
    first, second = candidate("first/cpu/x"), candidate("second/cpu/x")
    machine = Machine({first: (0.01, 100), second: (0.01, 101)})
    Sweep([first, second], OBJECTIVE, machine.start, rounds=2).run()
    rounds = [each for each, mode, load in machine.asked[:8]]
    assert rounds == [first, first, second, second] * 2
    searched = [each for each, *_ in machine.asked[8:]]
    alternating = [searched[0], searched[1]] * (len(searched) // 2)
    together = 2 * min(searched.count(first), searched.count(second))
    assert together > 8 and searched[:together] == alternating[:together]


def test_a_candidate_that_fails_is_a_row_with_its_reason():
    good, missing = candidate("good/cpu/x"), candidate("missing/cpu/x")
    machine = Machine({good: (0.01, 100)})
    sweep = Sweep([missing, good], OBJECTIVE, machine.start, rounds=1)
    sweep.run()
    rows = by_engine(sweep.rows())
    assert (
        rows["missing/cpu/x"].state == "failed" and "no such engine" in rows["missing/cpu/x"].reason
    )
    assert rows["good/cpu/x"].best

    @contextmanager
    def refusing(_):
        run = Run(seconds=1, offered=3, failures={"UNAVAILABLE": 3}, lags=[0.0])
        run.latencies, run.messages = {"error": [0.1] * 3}, {"UNAVAILABLE": "refused"}
        yield Subject(lambda mode, load: _row(mode, load, run, 1), lambda: 1.0)

    sweep = Sweep([good], OBJECTIVE, refusing, rounds=1)
    sweep.run()
    (row,) = sweep.rows()
    assert row.state == "failed" and "3 of 3 calls failed (UNAVAILABLE: refused)" in row.reason
    assert not row.best and row.rate is None


def test_a_server_that_fails_in_the_search_ends_its_search_only():
    good, bad = candidate("good/cpu/x"), candidate("bad/cpu/x")
    machine = Machine({good: (0.01, 100), bad: (0.01, 100)})

    @contextmanager
    def start(each):
        with machine.start(each) as subject:

            def measure(mode, load):
                if each is bad and mode == "open":
                    raise ServiceError("a generator process ended")
                return subject.measure(mode, load)

            yield Subject(measure, subject.memory)

    sweep = Sweep([good, bad], OBJECTIVE, start, rounds=1)
    sweep.run()
    rows = by_engine(sweep.rows())
    assert rows["bad/cpu/x"].state == "failed" and "process ended" in rows["bad/cpu/x"].reason
    assert rows["good/cpu/x"].best


@pytest.mark.parametrize("asked", [3, 9])
def test_what_was_measured_before_an_interruption_is_kept(asked):
    """In the first round, and in the search, which runs in threads."""
    first, second = candidate("first/cpu/x"), candidate("second/cpu/x")
    machine = Machine({first: (0.01, 100), second: (0.01, 101)})

    @contextmanager
    def start(each):
        with machine.start(each) as subject:

            def measure(mode, load):
                if len(machine.asked) == asked:
                    raise KeyboardInterrupt
                return subject.measure(mode, load)

            yield Subject(measure, subject.memory)

    sweep = Sweep([first, second], OBJECTIVE, start, rounds=2)
    with pytest.raises(KeyboardInterrupt):
        sweep.run()
    rows = by_engine(sweep.rows("its search had not begun"))
    assert rows["first/cpu/x"].one_caller_p50_ms == pytest.approx(10)
    if asked == 3:
        assert rows["first/cpu/x"].state == rows["second/cpu/x"].state == "unfinished"
        assert rows["second/cpu/x"].one_caller_p50_ms is None
        assert rows["second/cpu/x"].reason == "its search had not begun"
    assert not machine.open


def test_only_engines_on_a_cpu_have_threads():
    found = list_settings(["onnx/cpu/fp32", "onnx/cuda/fp16"], [1, 2], [8], ["exact"])
    assert [str(each) for each in found] == [
        "onnx/cpu/fp32, 1 thread, max-batch 8",
        "onnx/cpu/fp32, 2 threads, max-batch 8",
        "onnx/cuda/fp16, max-batch 8",
    ]
    assert "threads" not in found[2].settings
    (fast,) = list_settings(["onnx/cuda/fp16"], [], [1], ["fast"])
    assert str(fast).endswith("fast decoding")


def test_workers_have_no_more_threads_than_there_are_cores():
    found = list_settings(
        ["onnx/cpu/fp32", "onnx/cuda/fp16"], [2, 4], [8], ["exact"], workers=[1, 2, 3], cores=4
    )
    assert [(each.workers, each.threads) for each in found] == [
        (1, 2), (1, 4), (2, 2), (3, 1), (1, None), (2, None), (3, None)
    ]  # fmt: skip
    assert str(found[2]) == "onnx/cpu/fp32, 2 workers, 2 threads, max-batch 8"
    assert found[2].settings["workers"] == 2 and "workers" not in found[0].settings


def test_points_that_no_other_beats():
    assert pareto([(10, 5), (20, 9), (9, 6), (20, 10), (10, 5)]) == {0, 1, 4}
    assert pareto([]) == set()


def report_of(best: Candidate, *others: TuneRow) -> object:
    machine = Machine({best: (0.01, 100)})
    sweep = Sweep([best], OBJECTIVE, machine.start, rounds=1)
    sweep.run()
    return tune_report(
        "crl tune", model="clip", fingerprint="f" * 64, objective=OBJECTIVE, settings={},
        rows=[*sweep.rows(), *others], seconds=1.0,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["plain", 'with "quotes" and \\ and ü', "line\nbreak"])
@pytest.mark.parametrize("threads", [None, 2])
def test_crl_serve_reads_the_file(tmp_path, name, threads):
    bundle = tmp_path / name
    best = Candidate("onnx/cpu/int8", threads, 16, "fast")
    text = config_text(report_of(best), bundle)
    assert "p99<50ms: met at" in text and "fast changes embeddings slightly" in text
    path = tmp_path / "serve.toml"
    path.write_text(text, encoding="utf-8")
    command = typer.main.get_command(app).commands["serve"]
    found = command.make_context("serve", ["--config", str(path)]).params
    assert found["engine"] == "onnx/cpu/int8" and found["threads"] == threads
    assert found["max_batch"] == 16 and found["decode"] == "fast"
    assert list(map(Path, found["bundle"])) == [bundle]
    assert "bundle" not in config_text(report_of(best), None).replace("# ", "")


def test_a_path_that_toml_cannot_hold_is_refused():
    with pytest.raises(InvalidInputError, match="UTF-8"):
        config_text(report_of(candidate()), Path("/tmp/\udcff"))


def test_the_picture(tmp_path):
    write_pareto(report_of(candidate()), tmp_path / "pareto.png")
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InvalidInputError, match=r"ends in \.png"):
        check_pareto(tmp_path / "pareto.gif")
    empty = tune_report(
        "crl tune", model="clip", fingerprint="f", objective=OBJECTIVE, settings={}, rows=[],
        seconds=1.0,
    )  # fmt: skip
    with pytest.raises(InvalidInputError, match="got none"):
        write_pareto(empty, tmp_path / "none.png")


@pytest.fixture
def quick_engines(monkeypatch):
    """Compare the engines of the demo model in little time, as timing decides nothing here."""
    monkeypatch.setattr(_tune, "measure_engines", partial(measure_engines, seconds=0.01))


@pytest.fixture
def never_late(monkeypatch):
    """Take the load generators for fast enough, whatever else this machine does."""
    monkeypatch.setattr("crl_benchmarks.bench._LATE_SECONDS", math.inf)
    monkeypatch.setattr("crl_benchmarks.bench._BUSY", math.inf)


QUICK = {
    "engines": "onnx/cpu/fp32", "threads": "1", "max_batch": "1,4", "warm_up": 0.0,
    "seconds": 0.3, "rounds": 1, "finalists": 1, "as_json": True,
}  # fmt: skip


def test_servers_of_the_demo_model(image_files, tmp_path, capsys, quick_engines, never_late):
    out, kept = tmp_path / "serve.toml", tmp_path / "tune.json"
    tune(
        "p50<20000ms",
        **{**QUICK, "images": image_files[0].parent, "out_file": out, "report_file": kept,
           "plot": tmp_path / "pareto.png"},
    )  # fmt: skip
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads(kept.read_text())
    assert {row["max_batch"] for row in told["rows"]} == {1, 4}
    best, other = told["rows"]
    assert best["best"] and best["pareto"] and best["objective"]["best"]["served_calls"] > 0
    assert best["objective"]["best"]["cached_share"] == 0 and best["memory_mib"] > 20
    assert other["state"] == "dropped" and other["one_caller_p50_ms"] > 0
    assert told["model"] == "crl-demo" and told["machine"]["processor"] and told["seconds"] > 0
    assert told["versions"]["onnxruntime"]
    assert (tmp_path / "pareto.png").exists()
    with local_server(demo_bundle(), tmp_path / "log", "--config", str(out)) as server:
        assert server.engine == best["engine"] == "onnx/cpu/fp32"
        assert peak_memory(server.pid) > 20
    with pytest.raises(InvalidInputError, match="exists already"):
        tune("p50<20000ms", **{**QUICK, "out_file": out})


def test_an_objective_that_nothing_meets_writes_no_file_and_keeps_the_table(
    image_files, tmp_path, capsys, quick_engines, never_late
):
    out = tmp_path / "serve.toml"
    options = {**QUICK, "images": image_files[0].parent, "max_batch": "4", "as_json": False}
    with pytest.raises(typer.Exit) as exit:
        tune("p50<0.001ms", **{**options, "out_file": out})
    captured = capsys.readouterr()
    assert exit.value.exit_code == 1 and not out.exists()
    assert "met at no rate" in captured.out and "no settings met p50<0.001ms" in captured.err


def fake_sweep(monkeypatch, machine):
    """Serve made-up candidates in place of real ones."""
    monkeypatch.setattr(_tune, "_serve", lambda *arguments: machine.start(arguments[-1]))


def ranking(*engines: RankedEngine) -> Ranking:
    return Ranking(schema=1, time="", conditions=None, engines=engines)


def test_fast_decoding_is_tried_only_if_it_is_allowed_and_engines_only_if_they_agree(
    monkeypatch, capsys, image_files
):
    engines = ranking(
        RankedEngine(engine="onnx/cpu/fp32", agrees=True, reason=""),
        RankedEngine(engine="onnx/cpu/int8", agrees=False, reason="cosine 0.9"),
        RankedEngine(engine="openvino/cpu/fp32", agrees=False, failed=True, reason="failed here"),
    )
    monkeypatch.setattr(_tune, "read_ranking", lambda *_: engines)
    options = {"threads": "1", "max_batch": "8", "images": image_files[0].parent, "as_json": False}
    exact, fast = candidate("onnx/cpu/fp32"), candidate("onnx/cpu/fp32", decode="fast")
    machine = Machine({exact: (0.01, 100), fast: (0.01, 105)})
    fake_sweep(monkeypatch, machine)
    tune("p99<50ms", **options)
    told = " ".join(capsys.readouterr().out.split())
    assert {each for each, *_ in machine.asked} == {exact} and "slightly" not in told
    assert "onnx/cpu/int8: does not agree with fp32: cosine 0.9" in told
    assert "openvino/cpu/fp32: failed here" in told
    assert 'engine = "onnx/cpu/fp32"' in told  # the file, as no --out was given
    machine.asked.clear()
    tune("p99<50ms", **{**options, "allow_fast_decode": True})
    told = " ".join(capsys.readouterr().out.split())
    assert {each for each, *_ in machine.asked} == {exact, fast}
    assert "fast decoding changes embeddings slightly" in told
    with pytest.raises(InvalidInputError, match=r"agrees with fp32, found none \(onnx/cpu/int8"):
        tune("p99<50ms", **{**options, "engines": "onnx/cpu/int8"})
    with pytest.raises(InvalidInputError, match="expected some of onnx/cpu/fp32"):
        tune("p99<50ms", **{**options, "engines": "onnx/cpu/fp"})


def test_ctrl_c_prints_what_was_measured(monkeypatch, capsys, image_files):
    engines = ranking(RankedEngine(engine="onnx/cpu/fp32", agrees=True, reason=""))
    monkeypatch.setattr(_tune, "read_ranking", lambda *_: engines)
    machine = Machine({candidate("onnx/cpu/fp32"): (0.01, 100)})

    @contextmanager
    def start(*arguments):
        with machine.start(arguments[-1]) as subject:

            def measure(mode, load):
                if len(machine.asked) == 4:
                    raise KeyboardInterrupt
                return subject.measure(mode, load)

            yield Subject(measure, subject.memory)

    monkeypatch.setattr(_tune, "_serve", start)
    options = {"threads": "1", "max_batch": "8", "images": image_files[0].parent}
    with pytest.raises(typer.Exit) as exit:
        tune("p99<50ms", **{**options, "rounds": 1, "as_json": True})
    told = json.loads(capsys.readouterr().out)
    assert exit.value.exit_code == 1 and told["ended_early"] == "interrupted"
    assert told["rows"][0]["closed_images_per_second"] == pytest.approx(100)


def test_wrong_options_are_refused_before_a_server_starts(monkeypatch, tmp_path, image_files):
    monkeypatch.setattr(_tune, "_serve", lambda *_: pytest.fail("a server started"))
    for wrong, words in [
        ({"slo": "fast"}, "p99<50ms"),
        ({"threads": "0"}, "--threads"),
        ({"threads": "1.5"}, "--threads"),
        ({"max_batch": "x"}, "--max-batch"),
        ({"max_batch": ","}, "--max-batch"),
        ({"plot": tmp_path / "plot.html"}, r"\.png"),
        ({"out_file": tmp_path / "none" / "serve.toml"}, "mkdir -p"),
        ({"images": tmp_path / "none"}, "expected a directory of images"),
    ]:
        with pytest.raises(InvalidInputError, match=words):
            tune(**{"slo": "p99<50ms", "images": image_files[0].parent, **wrong})
    (tmp_path / "a.webp").write_bytes(b"RIFFxxxxWEBP")
    with pytest.raises(InvalidInputError, match="JPEGs and PNGs"):
        tune("p99<50ms", images=tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match=r"crl-embeddings\[bench\]"):
        tune("p99<50ms", plot=tmp_path / "plot.png")
