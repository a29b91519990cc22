"""`crl bench --mlperf`: LoadGen drives a server of this tree, and its verdict is read."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer

from crl_benchmarks import mlperf
from crl_benchmarks.bench import _row
from crl_benchmarks.images import synthetic_jpegs
from crl_benchmarks.load import Run
from crl_benchmarks.mlperf import (
    MlperfSettings,
    Probe,
    choose_settings,
    parse_scenarios,
    run_scenario,
)
from crl_benchmarks.mlperf_report import ScenarioResult, parse_summary, read_summary
from crl_benchmarks.targets import Target
from crl_sdk.cli._bench import bench
from crl_sdk.errors import InvalidInputError, MissingDependencyError, ServiceError

needs_loadgen = pytest.mark.skipif(
    find_spec("mlperf_loadgen") is None,
    reason="LoadGen is not installed: pip install mlcommons-loadgen",
)

OPTIONS = {
    "size": "64x48", "count": 8, "warm_up": 0.1, "seconds": 0.1, "timeout": 30.0,
    "mlperf": "all", "as_json": True,
}  # fmt: skip

SETTINGS = MlperfSettings(
    seconds=0.1, rate=40.0, percent=90.0, bound_ms=60_000.0, batch=4, callers=2,
    one_caller_ms=5.0, images_per_second=200.0, offline_images_per_second=200.0,
)  # fmt: skip

SUMMARY = """\
================================================
MLPerf Results Summary
================================================
SUT name : PySUT
Scenario : Server
Mode     : PerformanceOnly
Completed samples per second    : 41.25
Result is : INVALID
  Performance constraints satisfied : NO
  Min duration satisfied : Yes
  Min queries satisfied : Yes
  Early stopping satisfied: NO
Recommendations:
 * Reduce target QPS to improve latency.
Early Stopping Result:
 * Run unsuccessful.
 * Processed 100 queries.
 * Would need to run at least 562 more queries,
 with the run being successful if every additional
 query were under latency.

================================================
Additional Stats
================================================
Completed samples per second    : 41.25

Min latency (ns)                : 2000000
50.00 percentile latency (ns)   : 3500000
99.90 percentile latency (ns)   : 9.5e+06

================================================
Test Parameters Used
================================================
samples_per_query : 1
target_qps : 40

2 warnings encountered. See detailed log.

No errors encountered during test.
"""


def result(scenario: str, **changes: object) -> ScenarioResult:
    fields = {
        "scenario": scenario, "verdict": "VALID", "reasons": (), "ended": True, "remarks": (),
        "answered_images": 9, "figures": {"Samples per second": 12.5}, "logs": "logs",
        "client_cpu_share": 0.1, **changes,
    }  # fmt: skip
    return ScenarioResult(**fields)


@needs_loadgen
def test_all_scenarios_run_to_their_end(server, capsys, tmp_path):
    out = tmp_path / "report.json"
    options = {
        **OPTIONS, "criteria": "color", "rate": "40", "slo": "p90<60000ms", "batch": 4,
        "distinct": True, "mlperf_logs": tmp_path / "logs", "out_file": out,
    }  # fmt: skip
    bench(server.address, **options)
    captured = capsys.readouterr()
    told = json.loads(captured.out)
    assert told == json.loads(out.read_text())
    assert "no MLPerf result" in told["claim"] and "ask for 600 s" in captured.err
    assert told["versions"]["mlcommons-loadgen"] and told["target"]["model"] == "crl-demo"
    assert told["settings"]["server_queries_per_second"] == 40
    assert (
        told["settings"]["server_target_from"]
        == "the rate that was given, the bound that was given"
    )
    found = {each["scenario"]: each for each in told["scenarios"]}
    assert list(found) == ["SingleStream", "MultiStream", "Server", "Offline"]
    for name, each in found.items():
        assert each["ended"] and each["figures"] and each["client_cpu_share"] is not None
        assert each["answered_images"] >= (800 if name == "MultiStream" else 100)
        assert each["figures"]["50.00 percentile latency (ns)"] > 0
        log = tmp_path / "logs" / name / "mlperf_log_summary.txt"
        assert f"Result is : {each['verdict']}" in log.read_text()
    assert found["Server"]["verdict"] == "VALID" and not found["Server"]["reasons"]
    # 100 queries are too few for MultiStream's 99th percentile
    assert found["MultiStream"]["verdict"] == "INVALID"
    assert any("queries" in each for each in found["MultiStream"]["reasons"])
    assert server.pipeline.cache.hits == 0
    with pytest.raises(InvalidInputError, match=r"Server.*exists already; pass --overwrite"):
        bench(server.address, **{**options, "out_file": None})


@needs_loadgen
def test_what_was_not_given_is_derived_from_a_probe_and_the_table_claims_nothing(
    server, capsys, tmp_path
):
    options = {**OPTIONS, "mlperf": "server", "as_json": False, "mlperf_logs": tmp_path / "logs"}
    bench(server.address, **options)
    told = " ".join(capsys.readouterr().out.split())
    assert "70 % of" in told
    assert "no MLPerf result" in told and "Server" in told


@needs_loadgen
def test_a_bound_that_is_missed_is_invalid_with_loadgens_reasons(server, tmp_path):
    images = synthetic_jpegs(8, (64, 48))
    strict = replace(SETTINGS, bound_ms=1e-3)
    found = run_scenario(Target(server.address, images), "Server", strict, tmp_path)
    assert found.ended and found.verdict == "INVALID"
    assert "Reduce target QPS to improve latency." in found.reasons
    assert not read_summary(tmp_path).valid


@needs_loadgen
@pytest.mark.parametrize("scenario", ["SingleStream", "MultiStream", "Server", "Offline"])
def test_a_failed_call_ends_the_run_and_counts_as_no_answer(
    serve, faked, engine, tmp_path, scenario
):
    address = serve(faked).address
    engine.fails = True
    target = Target(address, synthetic_jpegs(3, (64, 48)), timeout=30.0, distinct=True)
    found = run_scenario(target, scenario, SETTINGS, tmp_path)
    assert found.verdict == "INVALID" and not found.ended and not found.figures
    assert found.reasons[0].startswith("a call failed with ") and found.answered_images == 0
    assert not multiprocessing.active_children()
    with pytest.raises(InvalidInputError, match=r"mlperf_log_summary\.txt"):
        read_summary(tmp_path)  # LoadGen gave no verdict


@needs_loadgen
def test_a_call_that_fails_after_others_ends_the_run(serve, faked, engine, monkeypatch, tmp_path):
    address = serve(faked).address
    run = engine.run

    def run_six_times(*arguments):
        engine.fails = len(engine.batches) >= 6
        return run(*arguments)

    engine.batches.clear()
    monkeypatch.setattr(engine, "run", run_six_times)
    target = Target(address, synthetic_jpegs(3, (64, 48)), timeout=30.0, distinct=True)
    found = run_scenario(target, "SingleStream", SETTINGS, tmp_path)
    assert found.verdict == "INVALID" and not found.ended and not found.figures
    assert found.answered_images == 6 and "a call failed with" in found.reasons[0]


@needs_loadgen
def test_a_process_of_loadgen_that_ends_is_an_error(server, tmp_path):
    target = Target(server.address, synthetic_jpegs(3, (64, 48)))
    with pytest.raises(ServiceError, match="process of LoadGen ended with status 1"):
        run_scenario(target, "NoScenario", SETTINGS, tmp_path)
    assert not multiprocessing.active_children()


def test_a_failed_call_shows_in_the_table_and_the_exit_status(
    server, capsys, monkeypatch, tmp_path
):
    failed = result(
        "Server", verdict="INVALID", ended=False, figures={}, client_cpu_share=None,
        reasons=("a call failed with UNAVAILABLE (gone)",),
    )  # fmt: skip
    left = [result("SingleStream"), failed]
    with_fakes(monkeypatch, lambda *_: left.pop(0))
    options = {**OPTIONS, "mlperf": "single-stream,server", "mlperf_logs": tmp_path / "logs"}
    with pytest.raises(typer.Exit) as exit:
        bench(server.address, **{**options, "as_json": False})
    told = " ".join(capsys.readouterr().out.split())
    assert exit.value.exit_code == 1
    assert "Server is INVALID: a call failed with UNAVAILABLE (gone)" in told
    assert "Samples per second 12.5" in told


@pytest.mark.parametrize(
    "ending", [(KeyboardInterrupt, "interrupted"), (ServiceError("it ended"), "it ended")]
)
def test_what_was_measured_before_an_interruption_is_kept(
    server, capsys, monkeypatch, tmp_path, ending
):
    left = iter([result("SingleStream")])

    def run(*_):
        for each in left:
            return each
        raise ending[0]

    with_fakes(monkeypatch, run)
    with pytest.raises(typer.Exit):
        bench(server.address, **{**OPTIONS, "mlperf_logs": tmp_path / "logs"})
    told = json.loads(capsys.readouterr().out)
    assert [each["scenario"] for each in told["scenarios"]] == ["SingleStream"]
    assert told["ended_early"] == ending[1]


def with_fakes(monkeypatch, run):
    """Run no LoadGen, which need not be installed then."""
    monkeypatch.setattr("crl_sdk.cli._bench_mlperf.find_spec", lambda _: True)
    monkeypatch.setattr(mlperf, "run_scenario", run)


def test_a_missing_package_is_named_with_its_command(server, monkeypatch, tmp_path):
    monkeypatch.setattr("crl_sdk.cli._bench_mlperf.find_spec", lambda _: None)
    logs = tmp_path / "logs"
    with pytest.raises(MissingDependencyError, match=r"pip install 'crl-embeddings\[mlperf\]'"):
        bench(server.address, **{**OPTIONS, "mlperf_logs": logs})
    assert not logs.exists()


def test_wrong_options_are_refused_before_anything_runs(server, monkeypatch, tmp_path):
    with_fakes(monkeypatch, lambda *_: pytest.fail("it ran"))
    (tmp_path / "file").touch()
    for wrong, words in [
        ({"mlperf": "offline,fast"}, "expected `all`, or some of single-stream"),
        ({"mlperf": ","}, "expected `all`"),
        ({"rate": "5,6"}, "--rate: expected one number"),
        ({"concurrency": "1,2"}, "--concurrency: expected one number"),
        ({"processes": 2}, "--processes"),
        ({"plot": tmp_path / "plot.png"}, "--plot"),
        ({"slo": "fast"}, "p99<50ms"),
        ({"mlperf_logs": tmp_path / "file"}, "cannot be created"),
    ]:
        with pytest.raises(InvalidInputError, match=words):
            bench(server.address, **{**OPTIONS, "mlperf_logs": tmp_path / "logs", **wrong})
    with pytest.raises(InvalidInputError, match="--mlperf needs the address of a server"):
        bench(None, bundle=Path("bundle"), mlperf="all")
    with pytest.raises(ServiceError, match="UNAVAILABLE"):
        bench("127.0.0.1:1", **{**OPTIONS, "mlperf_logs": tmp_path / "logs"})


def test_a_summary_is_read():
    found = parse_summary(SUMMARY, "here")
    assert not found.valid
    assert found.reasons == (
        "Performance constraints satisfied: no",
        "Early stopping satisfied: no",
        "Reduce target QPS to improve latency.",
        "Run unsuccessful.",
        "Processed 100 queries.",
        "Would need to run at least 562 more queries, with the run being successful if every "
        "additional query were under latency.",
    )
    assert found.figures == {
        "Completed samples per second": 41.25, "Min latency (ns)": 2e6,
        "50.00 percentile latency (ns)": 3.5e6, "99.90 percentile latency (ns)": 9.5e6,
    }  # fmt: skip
    assert found.remarks == ("2 warnings encountered. See detailed log.",)
    valid = parse_summary(SUMMARY.replace(": INVALID", ": VALID"), "here")
    assert valid.valid and valid.reasons == ()
    with pytest.raises(InvalidInputError, match="here: expected LoadGen's line 'Result is'"):
        parse_summary("", "here")


def test_scenarios_have_names():
    assert parse_scenarios("all") == ["SingleStream", "MultiStream", "Server", "Offline"]
    assert parse_scenarios("offline, server,offline") == ["Offline", "Server"]


def test_settings_follow_from_the_probe_unless_they_are_given():
    found = Probe(median_ms=4.0, images_per_second=100.0, offline_images_per_second=150.0)
    chosen = choose_settings(found, seconds=1, rate=None, bound=None, batch=1, callers=2)
    assert (chosen.rate, chosen.percent, chosen.bound_ms) == (pytest.approx(70), 99.0, 40.0)
    given = choose_settings(found, seconds=1, rate=5.0, bound=(90.0, 7.0), batch=1, callers=2)
    assert (given.rate, given.percent, given.bound_ms) == (5.0, 90.0, 7.0)


def test_a_probe_takes_longer_on_a_slow_server_and_fails_with_its_message():
    asked = []

    def slow(seconds, callers, batch):
        asked.append((seconds, callers, batch))
        calls = int(seconds * 4)
        run = Run(seconds=seconds, offered=calls, latencies={"ok": [0.25] * calls}, lags=[0.0])
        run.done = [0.25 * i for i in range(calls)]
        return _row("closed", callers, run, batch)

    shape = {"batch": 4, "callers": 2}
    found = mlperf.probe(slow, **shape)
    assert asked == [
        (seconds, callers, batch)
        for callers, batch in ((1, 1), (8, 1), (2, 4))
        for seconds in (1.0, 4.0, 16.0)
    ]
    assert found.offline_images_per_second == pytest.approx(16)
    assert found.median_ms == pytest.approx(250) and found.images_per_second == pytest.approx(4)
    gone = Run(seconds=1, offered=7, latencies={"error": [0.1] * 7}, failures={"UNAVAILABLE": 7})
    gone.messages = {"UNAVAILABLE": "connection refused"}
    with pytest.raises(ServiceError, match=r"7 of 7 calls of 1 caller .*connection refused"):
        mlperf.probe(lambda _, callers, batch: _row("closed", callers, gone, batch), **shape)
