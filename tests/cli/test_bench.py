"""`crl bench` against a server of this tree, by both contracts."""

from __future__ import annotations

import asyncio
import json
import math
import socket
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import trustme
import typer
from PIL import Image

from crl_benchmarks import targets
from crl_benchmarks.bench import BenchSettings, Generators, _row
from crl_benchmarks.call_records import CallRecords, PartWriter, _read_run
from crl_benchmarks.load import EndedCall, Reply, Run
from crl_benchmarks.metrics_page import MetricsPage, Scrape
from crl_benchmarks.targets import Target
from crl_sdk import demo_bundle
from crl_sdk.cli._bench import bench
from crl_sdk.errors import (
    AccessError,
    CrlError,
    InvalidInputError,
    MissingDependencyError,
    ServiceError,
    UnknownCriterionError,
)
from crl_sdk.serving._security import ServerTls, Token

DEFAULTS = {
    "api": "crl", "criteria": "", "kserve_model": "", "images": None, "size": "64x48", "count": 8,
    "batch": 1, "concurrency": "", "rate": "", "slo": None, "warm_up": 0.1, "seconds": 0.6,
    "processes": 1, "timeout": 5.0, "out_file": None, "plot": None, "as_json": True,
    "bundle": None, "engine": "auto", "threads": None, "batches": "1,8,16,32", "distinct": False,
    "authority": None, "certificate": None, "key": None, "compare": None,
    "plain_text_token": False, "overwrite": False, "requests": None,
    "metrics": None, "burst": None, "replay": None, "speed": 1.0,
    "mix": None, "cold": None,
}  # fmt: skip


def test_both_contracts_and_both_loops(server, capsys, tmp_path):
    out = tmp_path / "report.json"
    options = {"criteria": "color", "concurrency": "1,2", "rate": "20", "processes": 2, "batch": 2}
    bench(server.address, **{**DEFAULTS, **options, "out_file": out})
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads(out.read_text())
    assert [(row["mode"], row["load"]) for row in told["rows"]] == [
        ("closed", 1.0), ("closed", 2.0), ("open", 20.0),
    ]  # fmt: skip
    for row in told["rows"]:
        assert row["served_calls"] > 0 and not row["failed_calls"] and not row["messages"]
        assert row["images_per_second"] == pytest.approx(2 * row["calls_per_second"], rel=0.01)
        assert row["server_p50_ms"].keys() >= {"preprocess", "queue", "infer", "total"}
    kserve = {"api": "kserve", "kserve_model": "crl.color", "concurrency": "2", "as_json": False}
    bench(server.address, **{**DEFAULTS, **kserve})
    told = capsys.readouterr().out
    assert "kserve" in told and "2 callers" in told and "crl_onnx" in told
    assert "does not say whether its cache answered" in " ".join(told.split())


def test_what_cannot_be_measured_says_why(server):
    runs = server.pipeline.batcher  # one call finds out, before any load
    with pytest.raises(UnknownCriterionError, match=r"no basis 'nothing such'; known are"):
        bench(server.address, **{**DEFAULTS, "criteria": "nothing such", "concurrency": "1"})
    assert runs.depth == 0
    with pytest.raises(ServiceError, match="UNAVAILABLE"):
        bench("127.0.0.1:1", **{**DEFAULTS, "concurrency": "1", "seconds": 60.0})
    with pytest.raises(InvalidInputError, match="such as localhost:50051"):
        bench("localhost", **{**DEFAULTS, "concurrency": "1"})
    for wrong, words in [
        ({"api": "kserve"}, "--kserve-model"),
        ({"concurrency": "0"}, "--concurrency"),
        ({"concurrency": "1.5"}, "--concurrency"),
        ({"rate": "x"}, "--rate"),
        ({"size": "640"}, "--size"),
        ({"slo": "fast"}, "p99<50ms"),
        ({"api": "kserve", "kserve_model": "crl.color", "criteria": "color"}, "without criteria"),
        ({"batches": "1"}, "--batches needs --bundle"),
        ({"compare": ("a", "b")}, "--compare alone"),
        ({"out_file": Path("nowhere/report.json")}, "run mkdir -p nowhere"),
        ({"mix": "color"}, "color:3,shape:1"),
        ({"mix": "color:1", "criteria": "shape"}, "leave --criteria out"),
        ({"mix": "color:1", "api": "kserve", "kserve_model": "crl.color"}, "without criteria"),
        ({"rate": "5", "burst": "4:2"}, "FACTOR:SECONDS:EVERY"),
        ({"concurrency": "1", "burst": "4:2:10"}, "--burst needs an open loop: add --rate or"),
        ({"plot": Path("plot.gif")}, r"png or \.html"),
        ({"plot": Path("nowhere/plot.png")}, "run mkdir -p nowhere"),
        ({"requests": Path("nowhere/calls.jsonl")}, "run mkdir -p nowhere"),
        ({"requests": Path("calls.csv")}, r"--requests: expected .* \.jsonl or \.parquet"),
    ]:
        with pytest.raises(InvalidInputError, match=words):
            bench(server.address, **{**DEFAULTS, **wrong})


def test_an_engine_in_process(capsys, tmp_path):
    plot = tmp_path / "plot.html"
    options = {**DEFAULTS, "bundle": demo_bundle(), "seconds": 0.2, "warm_up": 0.0}
    options["batches"] = "1,3"
    bench(None, **{**options, "plot": plot})
    told = json.loads(capsys.readouterr().out)
    assert told["target"]["engine"] == "onnx/cpu/fp32" and "<svg" in plot.read_text()
    assert [(row["mode"], row["load"]) for row in told["rows"]] == [("engine", 1), ("engine", 3)]
    for row in told["rows"]:
        assert row["quotable"] and row["served_calls"] >= 3
        assert row["images_per_second"] == pytest.approx(
            row["load"] * row["calls_per_second"], rel=0.01
        )
    for address in (None, "127.0.0.1:1"):
        bundle = None if address is None else demo_bundle()
        with pytest.raises(InvalidInputError, match="expected either"):
            bench(address, **{**DEFAULTS, "bundle": bundle})
    for wrong in ({"slo": "p99<50ms"}, {"rate": "5"}, {"distinct": True}, {"criteria": "color"},
                  {"requests": tmp_path / "calls.jsonl"}):  # fmt: skip
        with pytest.raises(InvalidInputError, match="needs the address of a server"):
            bench(None, **{**options, **wrong})
    with pytest.raises(InvalidInputError, match="expected batch sizes"):
        bench(None, **{**options, "batches": ","})


@pytest.fixture
def never_late(monkeypatch):
    """Take the load generators for fast enough, whatever else this machine does."""
    monkeypatch.setattr("crl_benchmarks.bench._LATE_SECONDS", math.inf)
    monkeypatch.setattr("crl_benchmarks.bench._BUSY", math.inf)


def test_the_cache_is_told_and_distinct_images_avoid_it(server, capsys, tmp_path, never_late):
    options = {**DEFAULTS, "concurrency": "1", "seconds": 0.3, "count": 2}
    for seconds in (0.3, 1.0, 3.0, 9.0):  # a busy machine makes few calls, or none
        bench(server.address, **{**options, "as_json": False, "seconds": seconds})
        first_lines = " ".join(capsys.readouterr().out.split()[:30])
        bench(server.address, **{**options, "seconds": seconds})
        warnings = capsys.readouterr().err
        if "cache answered 100%" in first_lines and "cache answered 100%" in warnings:
            break
    else:
        pytest.fail(f"{first_lines}\n{warnings}")
    assert "of the images" in first_lines and "--distinct" in first_lines
    for name in ("a.json", "b.json"):
        bench(server.address, **{**options, "distinct": True, "out_file": tmp_path / name})
        told = json.loads(capsys.readouterr().out)
        assert told["cached_share"] == 0 and told["settings"]["distinct"] is True
        assert told["target"]["model"] == "crl-demo" and len(told["target"]["fingerprint"]) == 64
        assert told["target"]["engine"] == "onnx/cpu/fp32" and told["machine"]["processor"]
    compared = {**options, "compare": (tmp_path / "a.json", tmp_path / "b.json")}
    bench(None, **compared)
    ratios = json.loads(capsys.readouterr().out)
    assert ratios["differences"] == [] and ratios["ratios"]["1 caller"]["p50"]["value"] > 0
    bench(None, **{**compared, "as_json": False})
    assert "1 caller" in capsys.readouterr().out


def fake_runs(monkeypatch, *rows):
    """Have the load generators return these runs, whatever they are asked for."""
    left = list(rows)
    monkeypatch.setattr(Generators, "measure", lambda self, mode, load: left.pop(0))


@pytest.mark.parametrize("late", [0.001, 0.004])
def test_an_objective_on_a_cache_that_answers(server, capsys, monkeypatch, late):
    """The cache answers in half a millisecond, which is no reason to call an objective missed."""

    def measure(self, mode, load):
        rate = load if mode == "open" else 1000
        run = Run(seconds=1, offered=int(rate), lags=[late] * 10, cached=[1.0])
        run.latencies = {"ok": [0.0005 if rate <= 1000 else 0.09] * int(rate)}
        run.done = [i / rate for i in range(int(rate))]
        return _row(mode, load, run, 1)

    monkeypatch.setattr(Generators, "measure", measure)
    options = {**DEFAULTS, "slo": "p99<50ms", "as_json": False}
    with pytest.raises(typer.Exit) if late > 0.002 else nullcontext() as exit:
        bench(server.address, **options)
    told = capsys.readouterr().out
    assert "cache answered 100%" in told[:200]
    if exit is None:
        assert "p99<50ms: met at" in told and "The cache answered" in told.splitlines()[-1]
    else:
        assert exit.value.exit_code == 1
        assert "p99<50ms: could not be judged: a generator woke 4.0 ms late" in told


def test_what_was_measured_before_the_server_went_away_is_kept(
    server, capsys, monkeypatch, tmp_path
):
    gone = Run(seconds=1, offered=7, latencies={"error": [0.1] * 7}, failures={"UNAVAILABLE": 7})
    gone.messages = {"UNAVAILABLE": "connection refused"}
    good = Run(seconds=1, offered=9, latencies={"ok": [0.1] * 9}, lags=[0.0])
    rows = _row("closed", 1, good, 1), _row("closed", 2, gone, 1)
    options = {**DEFAULTS, "concurrency": "1,2,4", "out_file": tmp_path / "report.json"}
    fake_runs(monkeypatch, *rows)
    with pytest.raises(typer.Exit) as exit:
        bench(server.address, **options)
    captured = capsys.readouterr()
    told = json.loads(captured.out)  # one document
    assert exit.value.exit_code == 1 and told == json.loads((tmp_path / "report.json").read_text())
    assert [row["served_calls"] for row in told["rows"]] == [9, 0]
    assert "2 callers: no call succeeded" in told["ended_early"]
    assert "7 of 7 ended with UNAVAILABLE (connection refused)" in captured.err
    fake_runs(monkeypatch, *rows)
    with pytest.raises(typer.Exit):
        bench(server.address, **{**options, "as_json": False, "out_file": None})
    assert "1 caller" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("end", "words"), [(KeyboardInterrupt, "interrupted"), (ServiceError("ended"), "ended")]
)
def test_what_was_measured_before_an_interruption_is_kept(server, capsys, monkeypatch, end, words):
    good = Run(seconds=1, offered=9, latencies={"ok": [0.1] * 9}, lags=[0.0])
    left = iter([_row("closed", 1, good, 1)])

    def measure(self, mode, load):
        for row in left:
            return row
        raise end

    monkeypatch.setattr(Generators, "measure", measure)
    with pytest.raises(typer.Exit):
        bench(server.address, **{**DEFAULTS, "concurrency": "1,2"})
    told = json.loads(capsys.readouterr().out)
    assert len(told["rows"]) == 1 and told["ended_early"] == words


def test_a_generator_that_ends_is_told(monkeypatch):
    with Generators(Target("h:1", [b"xx"]), BenchSettings()) as generators:
        monkeypatch.setattr(generators._pool, "map", lambda *_: iter_broken())
        with pytest.raises(ServiceError, match="enough memory"):
            generators.measure("closed", 1)


def iter_broken():
    """An iterator over the results of processes that ended."""
    raise BrokenProcessPool
    yield


def test_a_server_that_never_answers():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(CrlError, match=r"within 0\.3 s: use a longer --timeout|UNAVAILABLE"):
            bench(address, **{**DEFAULTS, "timeout": 0.3})


def test_the_first_call_sends_other_images_than_the_runs(server, capsys):
    options = {"distinct": True, "warm_up": 0.0, "batch": 64, "concurrency": "1", "seconds": 0.1}
    bench(server.address, **{**DEFAULTS, **options})
    told = json.loads(capsys.readouterr().out)
    assert not told["cached_share"] and server.pipeline.cache.hits == 0


@pytest.mark.parametrize("as_json", [True, False])
def test_a_plot_that_fails_does_not_lose_the_table(server, capsys, monkeypatch, tmp_path, as_json):
    busy = Run(seconds=1, offered=9, latencies={"ok": [0.1] * 9}, lags=[0.0], cpu=1.0)
    fake_runs(monkeypatch, _row("closed", 1, busy, 1))
    options = {**DEFAULTS, "concurrency": "1", "as_json": as_json, "plot": tmp_path / "plot.png"}
    with pytest.raises(typer.Exit) as exit:
        bench(server.address, **options)
    captured = capsys.readouterr()
    assert exit.value.exit_code == 1 and "expected a quotable run to draw" in captured.err
    if as_json:
        assert json.loads(captured.out)["rows"][0]["served_calls"] == 9
    else:
        assert "1 caller" in captured.out and "100% of its core" in captured.out


@pytest.mark.parametrize("seconds", [2.345, 98765.4])
def test_numbers_are_not_cut(server, capsys, monkeypatch, seconds):
    slow = Run(seconds=1, latencies={"ok": [seconds] * 9000, "error": [1.0] * 9999}, lags=[0.0])
    slow.offered, slow.failures = 18999, {"DEADLINE_EXCEEDED": 9999}
    fake_runs(monkeypatch, _row("open", 1234.5, slow, 1))
    bench(server.address, **{**DEFAULTS, "rate": "5", "as_json": False})
    told = capsys.readouterr().out
    assert "…" not in told and "9,999 calls ended with DEADLINE_EXCEEDED" in told
    if seconds < 10:
        assert "1234 calls/s" in told and "2345–2345" in told and " 9,999 \n" in told


def test_a_secured_server(serve, embedder, tmp_path, capsys, monkeypatch):
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    issued = authority.issue_cert("localhost")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "server.pem")
    issued.private_key_pem.write_to_path(tmp_path / "server.key")
    token = Token("bench", "a-token-of-some-length", frozenset({"embed"}))
    tls = ServerTls(tmp_path / "server.pem", tmp_path / "server.key")
    server = serve(embedder, tls=tls, tokens=(token,))
    address = server.address.replace("127.0.0.1", "localhost")
    options = {**DEFAULTS, "concurrency": "1", "seconds": 2, "authority": tmp_path / "ca.pem"}
    with pytest.raises(AccessError, match="Bearer TOKEN"):
        bench(address, **options)
    monkeypatch.setenv("CRL_TOKEN", token.secret)
    bench(address, **options)
    assert json.loads(capsys.readouterr().out)["rows"][0]["served_calls"] > 0


def test_a_server_that_asks_for_a_certificate(serve, embedder, tmp_path, capsys):
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    for name in ("server", "client"):
        issued = authority.issue_cert("localhost")
        issued.cert_chain_pems[0].write_to_path(tmp_path / f"{name}.pem")
        issued.private_key_pem.write_to_path(tmp_path / f"{name}.key")
    tls = ServerTls(tmp_path / "server.pem", tmp_path / "server.key", tmp_path / "ca.pem")
    address = serve(embedder, tls=tls).address.replace("127.0.0.1", "localhost")
    options = {**DEFAULTS, "concurrency": "1", "seconds": 2}
    pair = {"certificate": tmp_path / "client.pem", "key": tmp_path / "client.key"}
    for wrong, error, words in [
        ({}, ServiceError, "--authority"),
        ({"authority": tmp_path / "ca.pem"}, ServiceError, "UNAVAILABLE"),
        ({"authority": tmp_path / "none.pem", **pair}, InvalidInputError, "cannot be read"),
        (pair, InvalidInputError, "needs TLS"),
        ({"key": tmp_path / "client.key"}, InvalidInputError, "together"),
    ]:
        with pytest.raises(error, match=words):
            bench(address, **{**options, **wrong})
    bench(address, **{**options, "authority": tmp_path / "ca.pem", **pair})
    assert json.loads(capsys.readouterr().out)["rows"][0]["served_calls"] > 0


def read_calls(path):
    """Return header and records of a file of --requests."""
    header, *calls = map(json.loads, path.read_text().splitlines())
    return header, calls


def test_each_call_is_recorded(server, capsys, tmp_path):
    path = tmp_path / "calls.jsonl"
    options = {"criteria": "color,shape", "concurrency": "2", "rate": "30", "processes": 2}
    options |= {"batch": 3, "requests": path, "seconds": 1.0, "warm_up": 0.5}
    bench(server.address, **{**DEFAULTS, **options})
    told = json.loads(capsys.readouterr().out)
    header, calls = read_calls(path)
    assert header["schema"] == 1 and header["address"] == server.address and header["started"]
    last = {call["mode"]: call["run"] for call in calls}  # a run may have been repeated
    for row in told["rows"]:
        run = [call for call in calls if call["run"] == last[row["mode"]]]
        measured = [call for call in run if call["phase"] == "measured"]
        assert len(measured) == row["offered_calls"]
        assert {call["load"] for call in run} == {row["load"]}
        assert any(call["phase"] == "warm_up" for call in run)
        served = [call["latency_ms"] for call in measured if call["outcome"] == "ok"]
        p50 = next(each for each in row["latency"] if each["percent"] == 50)
        assert np.median(served) == pytest.approx(p50["latency_ms"], abs=0.01)
    for call in calls:
        assert call["images"] == 3 and call["criteria"] == ["color", "shape"]
        assert (
            call["status"] == "OK" and call["sent_bytes"] > 3 * 64 and "infer" in call["server_ms"]
        )
        assert 0 <= call["due_seconds"] <= call["sent_seconds"] + 1e-6
        assert call["mode"] != "closed" or call["due_seconds"] == call["sent_seconds"]
    for run in {call["run"] for call in calls}:
        due = [call["due_seconds"] for call in calls if call["run"] == run]
        assert due == sorted(due)
    assert [each.name for each in tmp_path.iterdir() if "calls" in each.name] == [path.name]
    with pytest.raises(InvalidInputError, match="--overwrite"):
        bench(server.address, **{**DEFAULTS, **options})


def test_records_as_parquet(server, capsys, tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "calls.parquet"
    options = {**DEFAULTS, "concurrency": "1", "requests": path}
    bench(server.address, **options)
    served = json.loads(capsys.readouterr().out)["rows"][0]["offered_calls"]
    table = parquet.read_table(path)
    assert table["phase"].to_pylist().count("measured") >= served
    assert json.loads(table.schema.metadata[b"crl_bench"])["address"] == server.address
    assert "infer" in dict(table["server_ms"][0].as_py()) and table["images"][0].as_py() == 1
    path.unlink()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependencyError, match=r"'pyarrow'.*crl-embeddings\[parquet\]"):
        bench(server.address, **options)


@pytest.mark.parametrize("end", [KeyboardInterrupt, BrokenProcessPool])
def test_records_stay_when_a_run_is_interrupted(server, capsys, monkeypatch, tmp_path, end):
    path = tmp_path / "calls.jsonl"
    begin_run = CallRecords.begin_run

    def interrupted(self, mode, load, processes):
        parts = begin_run(self, mode, load, processes)
        if load > 1:  # what a dying process leaves: a record, and the beginning of another
            with PartWriter(parts[0]) as record:
                record(EndedCall(1.0, 1.0, 1.5, "warm_up", Reply("ok")))
            with parts[0].path.open("ab") as file:
                file.write(b'{"run":2,"mode":"clo')
            raise end
        return parts

    monkeypatch.setattr(CallRecords, "begin_run", interrupted)
    options = {**DEFAULTS, "concurrency": "1,2", "requests": path}
    with pytest.raises(typer.Exit) if end is KeyboardInterrupt else pytest.raises(end):
        bench(server.address, **options)
    _, calls = read_calls(path)
    assert {call["load"] for call in calls} == {1.0, 2.0}
    assert calls[-1]["latency_ms"] == 500 and calls[-1]["phase"] == "warm_up"


def test_a_generator_that_is_killed_leaves_its_records(tmp_path):
    """At most the calls of its last second are lost."""
    path = tmp_path / "calls.jsonl"
    part = CallRecords(path, command="crl bench", address="h:1").begin_run("closed", 1, 1)[0]
    code = (
        "import os, signal, time\n"
        "from pathlib import Path\n"
        "from crl_benchmarks.call_records import Part, PartWriter\n"
        "from crl_benchmarks.load import EndedCall, Reply\n"
        f"record = PartWriter(Part(Path({str(part.path)!r}), 1, 'closed', 1.0, 0.0))\n"
        "now = time.perf_counter()\n"
        "for done in (now, now + 2.0, now + 2.5):\n"
        "    record(EndedCall(done, done, done, 'measured', Reply('ok')))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    assert len(_read_run([part])) == 2  # the last one was younger than a second


def test_records_that_cannot_be_written_do_not_lose_the_report(
    server, capsys, monkeypatch, tmp_path
):
    path = tmp_path / "calls.jsonl"

    def full(file, header, runs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("crl_benchmarks.call_records._write_lines", full)
    with pytest.raises(typer.Exit) as exit:
        bench(server.address, **{**DEFAULTS, "concurrency": "1", "requests": path})
    captured = capsys.readouterr()
    assert exit.value.exit_code == 1 and json.loads(captured.out)["rows"][0]["served_calls"] > 0
    told = " ".join(captured.err.split())
    assert "No space left on device" in told and "The records are in" in told
    (parts,) = tmp_path.glob(".calls.jsonl.parts-*")
    assert any(parts.iterdir())


def test_a_record_that_cannot_be_kept_is_told(tmp_path):
    records = CallRecords(tmp_path / "calls.jsonl", command="", address="h:1")
    part = records.begin_run("closed", 1, 1)[0]
    with PartWriter(replace(part, path=tmp_path / "nowhere" / "1.jsonl")) as record:
        record(EndedCall(1.0, 1.0, 1.5, "measured", Reply("ok")))
    assert "No such file" in record.problem
    records.note_problem(record.problem)
    with pytest.raises(InvalidInputError, match="not all calls were recorded"):
        records.write()
    assert records.failed


def test_the_metrics_of_a_server(serve, embedder, capsys):
    server = serve(embedder, metrics_address="127.0.0.1:0")
    options = {"concurrency": "2", "distinct": True, "metrics": server.metrics_address}
    bench(server.address, **{**DEFAULTS, **options, "seconds": 1.5})
    metrics = json.loads(capsys.readouterr().out)["rows"][0]["server_metrics"]
    assert metrics["scrapes"] >= 3 and metrics["failed_scrapes"] == 0
    changed = metrics["changed"]
    assert changed['crl_images_total{outcome="embedded"}']["change"] > 0
    assert changed["crl_batch_size"]["change"] > 0 and changed["crl_batch_size"]["mean"] >= 1
    bench(server.address, **{**DEFAULTS, **options, "as_json": False})
    told = capsys.readouterr().out
    assert "metrics of the server" in told and "crl_batch_size" in told


def test_a_page_of_metrics_that_goes_away_does_not_lose_the_report(
    serve, embedder, capsys, monkeypatch
):
    server = serve(embedder, metrics_address="127.0.0.1:0")
    scrape, scrapes = MetricsPage.scrape, []

    def gone(self):
        scrapes.append(scrape(self) if len(scrapes) < 2 else Scrape(problem="connection refused"))
        return scrapes[-1]

    monkeypatch.setattr(MetricsPage, "scrape", gone)
    options = {"concurrency": "1", "as_json": False, "metrics": server.metrics_address}
    bench(server.address, **{**DEFAULTS, **options})
    told = " ".join(capsys.readouterr().out.split())
    assert "1 caller" in told and "scrapes of the metrics failed (connection refused)" in told


def test_metrics_are_checked_before_any_call(server):
    options = {"concurrency": "1", "metrics": "127.0.0.1:1"}
    with pytest.raises(ServiceError, match="expected a Prometheus page"):
        bench(server.address, **{**DEFAULTS, **options})
    assert not server.pipeline.cache.misses


def test_bursts_of_calls(server, capsys, tmp_path):
    options = {"rate": "20", "burst": "6:0.5:1", "seconds": 2.0, "requests": tmp_path / "a.jsonl"}
    bench(server.address, **{**DEFAULTS, **options, "processes": 2})
    told = json.loads(capsys.readouterr().out)
    assert told["settings"]["burst"] == "6:0.5:1" and told["rows"][0]["load"] == 20
    _, calls = read_calls(tmp_path / "a.jsonl")
    last = [c["due_seconds"] for c in calls if c["run"] == calls[-1]["run"]]
    measured = [c for c in calls if c["run"] == calls[-1]["run"] and c["phase"] == "measured"]
    inside = sum((c["due_seconds"] - last[0]) % 1 < 0.55 for c in measured)
    assert len(measured) > 80  # 140 are expected, and 40 without bursts
    assert inside > 0.6 * len(measured)


def write_trace(path, *lines):
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def test_a_trace_is_replayed(server, capsys, tmp_path):
    criteria = [["color"], ["color", "shape"], []]
    phases = ["warm_up"] * 5 + ["measured"] * 15
    calls = [
        {
            "due_seconds": 10 + i / 10,
            "images": 1 + i % 3,
            "phase": phase,
            "criteria": criteria[i % 3],
        }
        for i, phase in enumerate(phases)
    ]
    trace, path = write_trace(tmp_path / "trace.jsonl", *reversed(calls)), tmp_path / "again.jsonl"
    options = {"replay": trace, "speed": 2.0, "warm_up": 2.0, "seconds": 10.0}
    bench(server.address, **{**DEFAULTS, **options, "requests": path})
    told = json.loads(capsys.readouterr().out)
    (row,) = told["rows"]
    assert (row["mode"], row["load"], row["load_unit"]) == ("replay", 2, "times the recorded speed")
    assert row["offered_calls"] == row["served_calls"] == 15 and not row["failed_calls"]
    assert row["measured_seconds"] == pytest.approx(0.7)
    images = sum(call["images"] for call in calls[5:]) / 15
    assert row["images_per_second"] == pytest.approx(row["calls_per_second"] * images, rel=1e-3)
    assert told["settings"]["replay"] == str(trace)
    assert told["settings"]["warm_up_seconds"] == pytest.approx(0.25)
    assert told["settings"]["criteria"] == ["color", "shape"]
    _, again = read_calls(path)
    sent = [(call["images"], call["criteria"], call["phase"]) for call in again]
    assert sent == [(call["images"], call["criteria"], call["phase"]) for call in calls]
    assert all(call["sent_seconds"] >= call["due_seconds"] - 1e-6 for call in again)
    assert np.diff([call["due_seconds"] for call in again]) == pytest.approx(0.05, abs=1e-5)
    options |= {"replay": path, "processes": 3, "as_json": False}
    bench(server.address, **{**DEFAULTS, **options})
    assert "2 times the recorded speed" in capsys.readouterr().out


def test_what_a_trace_decides_is_not_given_beside_it(server, tmp_path):
    trace = write_trace(tmp_path / "trace.jsonl", {"due_seconds": 0, "criteria": ["color"]})
    given = {**DEFAULTS, "warm_up": 2.0, "seconds": 10.0, "replay": trace}
    for wrong, words in [
        ({"rate": "5"}, "the trace decides --rate"),
        ({"slo": "p99<50ms"}, "the trace decides --slo"),
        ({"criteria": "color"}, "the trace decides --criteria"),
        ({"batch": 2}, "the trace decides --batch"),
        ({"seconds": 5.0}, "the trace decides --seconds"),
        ({"replay": None, "speed": 2.0}, "--speed needs --replay"),
        ({"replay": tmp_path / "none.jsonl"}, "cannot be read .* crl bench --requests"),
        ({"api": "kserve", "kserve_model": "crl.color"}, "without criteria"),
    ]:
        with pytest.raises(InvalidInputError, match=words):
            bench(server.address, **{**given, **wrong})
    unknown = write_trace(tmp_path / "b.jsonl", {"due_seconds": 0, "criteria": ["nothing such"]})
    with pytest.raises(UnknownCriterionError, match="nothing such"):
        bench(server.address, **{**given, "replay": unknown})


def test_a_mix_of_criteria(server, capsys, tmp_path):
    path = tmp_path / "calls.jsonl"
    options = {"mix": "color:3,shape:1,color+shape:1", "rate": "60", "seconds": 2.0}
    bench(server.address, **{**DEFAULTS, **options, "requests": path})
    told = json.loads(capsys.readouterr().out)
    (row,) = told["rows"]
    assert told["settings"]["mix"] == options["mix"]
    assert row["kinds"][0]["name"] == "color, 1 image"
    offered = {tuple(kind["criteria"]): kind["offered_calls"] for kind in row["kinds"]}
    assert offered.keys() == {("color",), ("shape",), ("color", "shape")}
    assert sum(offered.values()) == row["offered_calls"]
    assert 0.4 < offered["color",] / row["offered_calls"] < 0.8
    for kind in row["kinds"]:
        assert kind["served_calls"] <= kind["offered_calls"]
        assert kind["latency"][0]["latency_ms"] > 0
    _, calls = read_calls(path)
    last = [call for call in calls if call["run"] == calls[-1]["run"]]
    sent = [tuple(call["criteria"]) for call in last if call["phase"] == "measured"]
    assert {names: sent.count(names) for names in offered} == offered
    with pytest.raises(UnknownCriterionError, match="nothing such"):  # before any load
        bench(server.address, **{**DEFAULTS, "mix": "color:1,nothing such:1"})
    bench(server.address, **{**DEFAULTS, **options, "as_json": False})
    told = capsys.readouterr().out
    assert "by what the calls ask for" in told and "color+shape, 1 image" in told


def test_the_sizes_of_images_are_told(server, capsys, tmp_path):
    for i, size in enumerate([(64, 48), (64, 48), (200, 100)]):
        Image.new("RGB", size, (i, 0, 0)).save(tmp_path / f"{i}.png")
    bench(server.address, **{**DEFAULTS, "concurrency": "1", "images": tmp_path})
    told = json.loads(capsys.readouterr().out)["settings"]
    assert told["image_sizes"] == ["64x48: 2", "200x100: 1"]
    assert told["median_image_pixels"] == told["smallest_image_pixels"] == 64 * 48
    assert told["largest_image_pixels"] == 20000
    assert told["largest_image_bytes"] > told["median_image_bytes"]


def test_calls_take_turns_on_connections(server):
    from crl_benchmarks.images import synthetic_jpegs

    target = targets.Target(server.address, synthetic_jpegs(1, (64, 48)), connections=3)

    async def call():
        async with targets.open_calls(target) as send:
            return [await send(number) for number in range(6)]

    seen = []
    watched = server.pipeline.embed

    async def embed(images, criteria=(), *, deadline=None, client=""):
        seen.append(client)
        return await watched(images, criteria, deadline=deadline, client=client)

    server.pipeline.embed = embed
    assert [reply.outcome for reply in asyncio.run(call())] == ["ok"] * 6
    assert len(seen) == 6 and seen[:3] == seen[3:] and len(set(seen)) == 3


def test_the_first_calls_of_a_new_connection(server, capsys):
    asked = []
    server.pipeline.on_result.append(lambda result: asked.append(len(result.images)))
    options = {**DEFAULTS, "criteria": "color", "cold": 5, "batch": 2, "distinct": True}
    bench(server.address, **options)
    told = json.loads(capsys.readouterr().out)
    cold = told["cold"]
    assert len(cold["calls_ms"]) == 5 and min(cold["calls_ms"]) > 0 and not cold["failed_calls"]
    assert 0 < cold["first_server_ms"]["total"] <= cold["calls_ms"][0]
    assert cold["later_p50_ms"] == pytest.approx(np.median(cold["calls_ms"][1:]), rel=1e-4)
    assert cold["later_max_ms"] == max(cold["calls_ms"][1:])
    assert told["rows"] == [] and asked == [2] * 6  # five calls, then the one that asks who answers
    assert not server.pipeline.cache.hits
    bench(server.address, **{**options, "concurrency": "1", "cold": 1, "as_json": False})
    told = capsys.readouterr().out
    assert "first call of a new connection:" in told and "ms in the server" in told
    assert "The server may have been warm" in told and "1 caller" in told
    bench(server.address, **{**options, "as_json": False})
    told = capsys.readouterr().out
    assert "; the next 4: p50 " in told and "images/s" not in told
    with pytest.raises(UnknownCriterionError):
        bench(server.address, **{**options, "criteria": "nothing such"})


def test_first_calls_that_fail_are_told(server, capsys, monkeypatch):
    """A server that is still starting refuses the first calls."""
    connect, left = targets.connect, [Reply("error", "UNAVAILABLE", "starting")] * 2

    def connected(target, channel):
        send = connect(target, channel)

        async def failing(number, call):
            return left.pop() if left else await send(number, call)

        return failing

    monkeypatch.setattr(targets, "connect", connected)
    options = {**DEFAULTS, "cold": 4}
    bench(server.address, **options)
    cold = json.loads(capsys.readouterr().out)["cold"]
    assert cold["calls_ms"][:2] == [None, None] and cold["failed_calls"] == {"UNAVAILABLE": 2}
    assert cold["first_server_ms"] == {} and cold["later_p50_ms"] > 0
    left += [Reply("error", "UNAVAILABLE", "starting")]
    bench(server.address, **{**options, "as_json": False})
    told = " ".join(capsys.readouterr().out.split())
    assert "first call of a new connection: failed" in told and "1 with UNAVAILABLE" in told
