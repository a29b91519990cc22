"""`crl bench` against a server of this tree, by both contracts."""

from __future__ import annotations

import json

import pytest

from crl_sdk import demo_bundle
from crl_sdk.cli._bench import bench
from crl_sdk.errors import InvalidInputError, ServiceError

DEFAULTS = {
    "api": "crl", "criteria": "", "kserve_model": "", "images": None, "size": "64x48", "count": 8,
    "batch": 1, "concurrency": "", "rate": "", "slo": None, "warm_up": 0.1, "seconds": 0.6,
    "processes": 1, "timeout": 5.0, "out_file": None, "plot": None, "as_json": True,
    "bundle": None, "engine": "auto", "threads": None, "batches": "1,3",
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
        assert row["served"] > 0 and not row["errors"]
        assert row["images_per_second"] == pytest.approx(2 * row["calls_per_second"], rel=0.01)
        assert row["stages_ms"].keys() >= {"preprocess", "queue", "infer", "total"}
    kserve = {"api": "kserve", "kserve_model": "crl.color", "concurrency": "2", "as_json": False}
    bench(server.address, **{**DEFAULTS, **kserve})
    told = capsys.readouterr().out
    assert "kserve" in told and "2 callers" in told


def test_what_cannot_be_measured_says_why(server):
    with pytest.raises(ServiceError, match=r"NOT_FOUND.*these criteria"):
        bench(server.address, **{**DEFAULTS, "criteria": "nothing such", "concurrency": "1"})
    with pytest.raises(ServiceError, match="UNAVAILABLE"):
        bench("127.0.0.1:1", **{**DEFAULTS, "concurrency": "1", "seconds": 0.3})
    for wrong, words in [
        ({"api": "kserve"}, "--kserve-model"),
        ({"concurrency": "0"}, "--concurrency"),
        ({"concurrency": "1.5"}, "--concurrency"),
        ({"rate": "x"}, "--rate"),
        ({"size": "640"}, "--size"),
        ({"slo": "fast"}, "p99<50ms"),
    ]:
        with pytest.raises(InvalidInputError, match=words):
            bench(server.address, **{**DEFAULTS, **wrong})


def test_an_engine_in_process(capsys, tmp_path):
    plot = tmp_path / "plot.html"
    options = {**DEFAULTS, "bundle": demo_bundle(), "seconds": 0.2, "warm_up": 0.0}
    bench(None, **{**options, "plot": plot})
    told = json.loads(capsys.readouterr().out)
    assert told["settings"]["engine"] == "onnx/cpu/fp32" and "<svg" in plot.read_text()
    assert [(row["mode"], row["load"]) for row in told["rows"]] == [("engine", 1), ("engine", 3)]
    for row in told["rows"]:
        assert row["quotable"] and row["served"] >= 3
        assert row["images_per_second"] == pytest.approx(
            row["load"] * row["calls_per_second"], rel=0.01
        )
    for address in (None, "127.0.0.1:1"):
        bundle = None if address is None else demo_bundle()
        with pytest.raises(InvalidInputError, match="expected either"):
            bench(address, **{**DEFAULTS, "bundle": bundle})
