"""`crl verify`: engines that agree, one that does not, and the record."""

from __future__ import annotations

import json

import msgspec
import numpy as np
import pytest
import typer

from crl_sdk import ModelBundle, demo_bundle
from crl_sdk.cli._verify import verify as command
from crl_sdk.engines import _verify as module
from crl_sdk.engines._engine_name import EngineName
from crl_sdk.engines._onnx import OnnxImageEngine
from crl_sdk.engines._verify import Verification, verify
from crl_sdk.errors import EngineError, InvalidInputError
from crl_sdk.model._bundle import sha256_file
from crl_sdk.model._manifest import FileEntry, write_manifest


@pytest.fixture
def bundle() -> ModelBundle:
    return ModelBundle.open(demo_bundle())


class ChangedEngine:
    """The real engine, with outputs that `change` modifies."""

    name = EngineName("onnx", "cpu", "fp32")

    def __init__(self, bundle, change):
        self._engine, self._change = OnnxImageEngine.open(bundle), change

    def close(self):
        self._engine.close()

    def run(self, *arguments):
        return self._change(*self._engine.run(*arguments))


def test_the_default_engine_agrees_and_is_timed(bundle):
    told = []
    record = verify(bundle, batches=(1, 5), seconds=0.05, progress=told.append)
    assert record.agrees and record.engine == "onnx/cpu/fp32" and not record.failures
    assert record.parity.max_abs < 1e-5 and record.parity.samples == 16
    assert [each.batch for each in record.latencies] == [1, 5]
    for each in record.latencies:
        assert each.runs >= 5 and 0 < each.p50_ms <= each.p99_ms
    assert len(told) == 4 and record.model["fingerprint"] == bundle.fingerprint
    again = msgspec.json.decode(msgspec.json.encode(record), type=Verification)
    assert again == record


def test_int8_has_its_own_tolerance(bundle_copy):
    from crl_export.precision import quantise

    bundle = ModelBundle.open(bundle_copy)
    graph = bundle_copy / "image.int8.onnx"
    quantise(bundle.image_graph("fp32"), graph, bundle.preprocess)
    entry = FileEntry(sha256=sha256_file(graph), bytes=graph.stat().st_size)
    first = bundle.manifest.images[0]
    int8 = msgspec.structs.replace(first, file=graph.name, precision="int8")
    write_manifest(
        bundle_copy,
        msgspec.structs.replace(
            bundle.manifest,
            images=(first, int8),
            files={**bundle.manifest.files, graph.name: entry},
        ),
    )
    record = verify(ModelBundle.open(bundle_copy), "onnx/cpu/int8", batches=(1,), seconds=0.01)
    assert record.agrees and record.engine == "onnx/cpu/int8"
    assert 0.99 < record.parity.cosine_mean < 1 and record.parity.max_abs > 1e-4


@pytest.mark.parametrize(
    ("change", "failure"),
    [
        (lambda rows, columns: (rows[::-1], columns), "cosine_min"),
        (lambda rows, columns: (np.roll(rows, 1, axis=1), columns), "cosine_min"),
        (lambda rows, columns: (rows, columns + 1e-3), "projected_max_abs"),
        (lambda rows, columns: (rows, columns * np.nan), "projected_max_abs"),
    ],
)
def test_an_engine_with_wrong_results_fails(bundle, monkeypatch, change, failure):
    monkeypatch.setattr(module, "open_engine", lambda *_, **__: ChangedEngine(bundle, change))
    record = verify(bundle, batches=(1,), seconds=0.01)
    assert not record.agrees and any(failure in told for told in record.failures)


def test_engines_that_cannot_run_here(bundle):
    for unknown in ("onnx/cpu/int8", "tensorrt/cpu", "x/y"):
        with pytest.raises(InvalidInputError, match=r"expected an engine of .*onnx/cpu/fp32"):
            verify(bundle, unknown)
    for missing in ("onnx/cuda/fp32", "tensorrt"):
        with pytest.raises(EngineError, match=r"cannot run here .*crl doctor"):
            verify(bundle, missing)


def test_the_record_is_written_and_the_exit_status_is_1_on_failure(
    bundle, tmp_path, monkeypatch, capsys
):
    file = tmp_path / "record.json"
    options = {
        "engine": None,
        "batches": "1",
        "seconds": 0.01,
        "out_file": file,
        "kernel": False,
        "baked": None,
    }
    command(demo_bundle(), **options, as_json=True)
    assert json.loads(file.read_text()) == json.loads(capsys.readouterr().out)
    with pytest.raises(InvalidInputError, match=r"record\.json: exists already; pass --overwrite"):
        command(demo_bundle(), **options, as_json=False)
    options["overwrite"] = True
    command(demo_bundle(), **options, as_json=False)
    assert "agrees with fp32" in capsys.readouterr().out
    monkeypatch.setattr(
        module, "open_engine", lambda *_, **__: ChangedEngine(bundle, lambda r, c: (r, c + 1))
    )
    with pytest.raises(typer.Exit):
        command(demo_bundle(), **options, as_json=False)
    assert "projected_max_abs" in capsys.readouterr().out
    for bad in ("", "0", "a", "1,-2"):
        with pytest.raises(InvalidInputError, match="batches"):
            command(demo_bundle(), **{**options, "batches": bad}, as_json=False)
