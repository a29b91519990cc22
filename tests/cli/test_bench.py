"""`crl bench` against a server of this tree, by both contracts."""

from __future__ import annotations

import json

import pytest
import trustme

from crl_sdk import demo_bundle
from crl_sdk.cli._bench import bench
from crl_sdk.errors import AccessError, InvalidInputError, ServiceError, UnknownCriterionError
from crl_sdk.serving._security import ServerTls, Token

DEFAULTS = {
    "api": "crl", "criteria": "", "kserve_model": "", "images": None, "size": "64x48", "count": 8,
    "batch": 1, "concurrency": "", "rate": "", "slo": None, "warm_up": 0.1, "seconds": 0.6,
    "processes": 1, "timeout": 5.0, "out_file": None, "plot": None, "as_json": True,
    "bundle": None, "engine": "auto", "threads": None, "batches": "1,3", "distinct": False,
    "authority": None, "certificate": None, "key": None, "compare": None,
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
    ]:
        with pytest.raises(InvalidInputError, match=words):
            bench(server.address, **{**DEFAULTS, **wrong})


def test_an_engine_in_process(capsys, tmp_path):
    plot = tmp_path / "plot.html"
    options = {**DEFAULTS, "bundle": demo_bundle(), "seconds": 0.2, "warm_up": 0.0}
    bench(None, **{**options, "plot": plot})
    told = json.loads(capsys.readouterr().out)
    assert told["target"]["engine"] == "onnx/cpu/fp32" and "<svg" in plot.read_text()
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


def test_the_cache_is_told_and_distinct_images_avoid_it(server, capsys, tmp_path):
    options = {**DEFAULTS, "concurrency": "1", "seconds": 0.3, "count": 2}
    bench(server.address, **{**options, "as_json": False})
    assert "cache answered 100% of the images" in capsys.readouterr().err
    for name in ("a.json", "b.json"):
        bench(server.address, **{**options, "distinct": True, "out_file": tmp_path / name})
        told = json.loads(capsys.readouterr().out)
        assert told["rows"][0]["cached"] == 0 and told["settings"]["distinct_images"] == "yes"
        assert told["target"]["model"] == "crl-demo" and len(told["target"]["fingerprint"]) == 64
    compared = {**options, "compare": (tmp_path / "a.json", tmp_path / "b.json")}
    bench(None, **compared)
    ratios = json.loads(capsys.readouterr().out)
    assert ratios["differ"] == [] and ratios["ratios"]["1 callers"]["p50"]["value"] > 0
    bench(None, **{**compared, "as_json": False})
    assert "1 callers" in capsys.readouterr().out


def test_a_plot_that_fails_does_not_lose_the_table(server, capsys, tmp_path):
    options = {**DEFAULTS, "concurrency": "1", "seconds": 0.3, "as_json": False}
    with pytest.raises(InvalidInputError, match=r"png or \.html"):
        bench(server.address, **{**options, "plot": tmp_path / "plot.gif"})
    assert "1 callers" in capsys.readouterr().out


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
    options = {**DEFAULTS, "concurrency": "1", "seconds": 0.3, "authority": tmp_path / "ca.pem"}
    with pytest.raises(AccessError, match="Bearer TOKEN"):
        bench(address, **options)
    monkeypatch.setenv("CRL_TOKEN", token.secret)
    bench(address, **options)
    assert json.loads(capsys.readouterr().out)["rows"][0]["served"] > 0
