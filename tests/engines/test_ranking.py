"""The record of engines: what is measured, when it holds, and what `auto` makes of it."""

from __future__ import annotations

import json
import logging
from dataclasses import replace as changed
from functools import partial

import numpy as np
import pytest
import typer
from msgspec import structs

from crl_sdk import Embedder, ModelBundle, demo_bundle
from crl_sdk.cli._doctor import doctor
from crl_sdk.cli._verify import verify as command
from crl_sdk.engines import _ranking as ranking
from crl_sdk.engines import _registry as registry
from crl_sdk.engines import _selection as selection
from crl_sdk.engines._engine_name import EngineName
from crl_sdk.engines._family import EngineCandidate, EngineFamily
from crl_sdk.engines._hardware import inspect_hardware
from crl_sdk.engines._onnx import OnnxImageEngine
from crl_sdk.engines._selection import choose_engine, list_candidates, measure_engines, open_engine
from crl_sdk.errors import EngineError, InvalidInputError
from crl_sdk.model._parity import Tolerance


@pytest.fixture
def bundle(bundle_copy):
    return ModelBundle.open(bundle_copy)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A cache directory of the test's own."""
    monkeypatch.setenv(ranking.CACHE_VARIABLE, str(tmp_path / "cache"))


class Accelerator:
    """An engine on a device that this machine does not have: the CPU's, with a change."""

    def __init__(self, bundle, name, threads, *, change):
        self.name, self._change = name, change
        self._engine = OnnxImageEngine.open(bundle)

    def run(self, *arguments):
        return self._change(*self._engine.run(*arguments))

    def close(self):
        self._engine.close()


def unchanged(rows, columns):
    return rows, columns


def wrong(rows, columns):
    return rows[:, ::-1], columns


def nan(rows, columns):
    return rows * np.nan, columns


def broken(rows, columns):
    raise EngineError("cudaErrorNoKernelImageForDevice")


def add_accelerator(monkeypatch, change, **options):
    """Add a runtime of one engine, which `auto` prefers."""
    candidate = EngineCandidate(
        name=EngineName("fake", "npu", "fp16"), usable=True, automatic=True, reason="is there"
    )
    family = EngineFamily(
        runtime="fake", packages=(),
        list_candidates=lambda bundle, hardware: [changed(candidate, **options)],
        open=partial(Accelerator, change=change), tolerances={"fp16": Tolerance(cosine_mean=0.99)},
    )  # fmt: skip
    monkeypatch.setattr(registry, "FAMILIES", (family, *registry.FAMILIES))


def test_the_fastest_engine_that_agrees_comes_first(bundle, monkeypatch):
    add_accelerator(monkeypatch, unchanged)
    found = measure_engines(bundle, seconds=0.01)
    assert {each.engine for each in found.engines} >= {"onnx/cpu/fp32", "fake/npu/fp16"}
    assert found.agrees and all(each.agrees for each in found.engines)
    speeds = [each.milliseconds_per_image for each in found.engines]
    assert speeds == sorted(speeds) and min(speeds) > 0
    for each in found.engines:
        assert [one.batch for one in each.times] == list(ranking.BATCHES)
        assert each.parity.cosine_mean > 0.99
    candidates = list_candidates(bundle)
    assert [str(each.name) for each in candidates][: len(speeds)] == [
        each.engine for each in found.engines
    ]
    assert candidates[0].measured and "measured here" in candidates[0].reason
    assert str(choose_engine(candidates, "auto").name) == found.engines[0].engine
    assert (bundle.path / "engines" / f"{found.conditions.key}.json").is_file()
    ModelBundle.open(bundle.path)  # the record is no part of the bundle


def test_the_order_decides_and_not_the_family(bundle, monkeypatch):
    found = measure_engines(bundle, seconds=0.01)
    slow, fast = (
        next(each for each in found.engines if each.engine == name)
        for name in ("onnx/cpu/fp32", "openvino/cpu/fp32")
    )
    for first, second in ((slow, fast), (fast, slow)):
        ranking.write_ranking(bundle, structs.replace(found, engines=(first, second)))
        with Embedder.open(bundle) as embedder:
            assert embedder.engine == first.engine


@pytest.mark.parametrize(
    ("change", "reason", "failed"),
    [(wrong, "cosine_mean", False), (nan, "NaN or infinity", True),
     (broken, "cudaErrorNoKernelImage", True)],
)  # fmt: skip
def test_an_engine_that_is_wrong_is_skipped_with_its_reason(  # noqa: PLR0917
    bundle, monkeypatch, caplog, capsys, change, reason, failed
):
    add_accelerator(monkeypatch, change)
    with caplog.at_level(logging.WARNING):
        found = measure_engines(bundle, seconds=0.01)
    assert "fake/npu/fp16 is skipped" in caplog.text and reason in caplog.text
    last = found.engines[-1]
    assert last.engine == "fake/npu/fp16" and not last.agrees and reason in last.reason
    assert last.failed == failed and (last.times == ()) == failed
    candidate = next(each for each in list_candidates(bundle) if each.name.runtime == "fake")
    assert candidate.usable != failed and not candidate.automatic and reason in candidate.reason
    with Embedder.open(bundle) as embedder:
        assert embedder.engine.endswith(("/cpu/fp32", "/cpu/bf16"))
    doctor(bundle=bundle.path)
    assert reason.split()[0] in capsys.readouterr().out


@pytest.mark.parametrize("change", [wrong, nan, broken])
def test_without_a_record_auto_tries_a_device_before_it_trusts_it(
    bundle, monkeypatch, caplog, change
):
    add_accelerator(monkeypatch, change)
    with caplog.at_level(logging.WARNING):
        opened = open_engine(bundle)
    assert opened.name.device == "cpu"
    assert "engine fake/npu/fp16 is skipped" in caplog.text
    asked = open_engine(bundle, "fake")  # who asks for it by name gets it
    assert asked.name.runtime == "fake"


def test_a_device_that_agrees_is_taken(bundle, monkeypatch):
    add_accelerator(monkeypatch, unchanged)
    assert open_engine(bundle).name.runtime == "fake"


def test_an_engine_that_starts_slowly_is_not_tried(bundle, monkeypatch):
    add_accelerator(monkeypatch, broken, starts_slowly=True, automatic=False)
    found = measure_engines(bundle, seconds=0.01)
    assert not [each for each in found.engines if each.engine.startswith("fake")]


def test_fastest_measures_once(bundle, monkeypatch):
    measured = []
    real = selection.rank_engines

    def rank(*arguments, **options):
        measured.append(options)
        return real(*arguments, **{**options, "seconds": 0.01})

    monkeypatch.setattr(selection, "rank_engines", rank)
    first = open_engine(bundle, "fastest", threads=1)
    second = open_engine(bundle, "fastest")
    assert first.name == second.name and len(measured) == 1
    assert measured[0]["threads"] == 1


@pytest.mark.parametrize(
    "change",
    [{"processor": "another"}, {"cores": 99}, {"packages": {"onnxruntime": "0.1"}},
     {"graphs": {"image.fp32.onnx": "0" * 64}}, {"cuda": "13.0"}],
)  # fmt: skip
def test_a_record_of_other_conditions_is_ignored(bundle, capsys, change):
    hardware = inspect_hardware()
    found = measure_engines(bundle, seconds=0.01)
    here = bundle.path / "engines" / f"{found.conditions.key}.json"
    other = structs.replace(found, conditions=structs.replace(found.conditions, **change))
    assert other.conditions.key != found.conditions.key
    here.unlink()
    ranking.write_ranking(bundle, other)
    assert ranking.read_ranking(bundle, hardware) is None
    # a file that was renamed by hand
    (bundle.path / "engines" / f"{other.conditions.key}.json").rename(here)
    assert ranking.read_ranking(bundle, hardware) is None
    assert not any(each.measured for each in list_candidates(bundle))
    doctor(bundle=bundle.path)
    said = " ".join(capsys.readouterr().err.split())
    assert "not measured here; records of other machines or versions are ignored" in said
    assert "--all" in said


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"schema": 99}', b"\xff"])
def test_a_damaged_record_is_ignored(bundle, caplog, content):
    found = measure_engines(bundle, seconds=0.01)
    path = bundle.path / "engines" / f"{found.conditions.key}.json"
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert not any(each.measured for each in list_candidates(bundle))
    assert "the record of the engines is ignored" in caplog.text and "--all" in caplog.text
    measure_engines(bundle, seconds=0.01)  # replaces it
    assert any(each.measured for each in list_candidates(bundle))


def test_the_record_of_a_bundle_that_cannot_be_written_to(bundle, tmp_path):
    (bundle.path / "engines").write_text("in the way")
    measure_engines(bundle, seconds=0.01)
    assert list((tmp_path / "cache").rglob("*.json"))
    assert any(each.measured for each in list_candidates(bundle))


def test_where_no_record_can_be_kept(bundle, tmp_path, monkeypatch):
    (bundle.path / "engines").write_text("in the way")
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(EngineError, match=r"cannot be kept .*set CRL_CACHE"):
        measure_engines(bundle, seconds=0.01)


def test_a_user_without_a_home(bundle, monkeypatch):
    """In a container, the user may be a number that `/etc/passwd` lacks."""

    def nowhere(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("CRL_CACHE")
    monkeypatch.setattr(ranking.Path, "expanduser", nowhere)
    assert not any(each.measured for each in list_candidates(bundle))
    assert open_engine(bundle, "auto").name.device == "cpu"
    (bundle.path / "engines").write_text("in the way")
    with pytest.raises(EngineError, match=r"cannot be kept .*set CRL_CACHE"):
        measure_engines(bundle, seconds=0.01)
    with pytest.raises(EngineError, match=r"\(this user has no home\): set CRL_CACHE"):
        measure_engines(ModelBundle.open(demo_bundle()), seconds=0.01)


def test_fastest_needs_no_record(bundle, tmp_path, monkeypatch, caplog):
    (bundle.path / "engines").write_text("in the way")
    (tmp_path / "cache").write_text("in the way")
    real = selection.rank_engines
    monkeypatch.setattr(
        selection, "rank_engines", lambda *a, **o: real(*a, **{**o, "seconds": 0.01})
    )
    with caplog.at_level(logging.WARNING):
        opened = open_engine(bundle, "fastest")
    assert opened.name.device == "cpu" and "set CRL_CACHE" in caplog.text


def test_auto_skips_what_does_not_load_if_there_is_another(bundle, monkeypatch, caplog):
    found = measure_engines(bundle, seconds=0.01)
    first = next(each for each in found.engines if each.engine == "openvino/cpu/fp32")
    ranking.write_ranking(bundle, structs.replace(found, engines=(first,)))
    monkeypatch.setattr(
        registry, "FAMILIES",
        tuple(
            changed(each, open=refuse) if each.runtime == "openvino" else each
            for each in registry.FAMILIES
        ),
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        assert open_engine(bundle).name.runtime == "onnx"
    assert "engine openvino/cpu/fp32 is skipped: it is gone" in caplog.text
    with pytest.raises(EngineError, match="it is gone"):
        open_engine(bundle, "openvino/cpu/fp32")


def refuse(bundle, name, threads):
    raise EngineError("it is gone")


def test_the_bundle_of_the_package_is_not_changed(tmp_path):
    measure_engines(ModelBundle.open(demo_bundle()), seconds=0.01)
    assert not (demo_bundle() / "engines").exists()
    assert len(list((tmp_path / "cache").rglob("*.json"))) == 1


def test_the_command(bundle, monkeypatch, capsys, tmp_path):
    add_accelerator(monkeypatch, wrong)
    options = {
        "engine": None, "batches": "1", "seconds": 0.01, "baked": None, "kernel": False,
        "overwrite": False, "every": True,
    }  # fmt: skip
    command(bundle.path, out_file=tmp_path / "record.json", as_json=False, **options)
    said = capsys.readouterr()
    assert "fake/npu/fp16" in said.out and "agrees" in said.out
    assert "auto takes" in said.err
    written = json.loads((tmp_path / "record.json").read_text())
    assert written["conditions"]["processor"] and not written["engines"][-1]["agrees"]
    command(bundle.path, out_file=None, as_json=True, **options)
    assert json.loads(capsys.readouterr().out)["engines"]
    for wrong_option in ({"engine": "onnx"}, {"kernel": True}):
        with pytest.raises(InvalidInputError, match="--all tries every engine"):
            command(bundle.path, out_file=None, as_json=True, **{**options, **wrong_option})


def test_the_command_fails_if_no_engine_agrees(bundle, monkeypatch):
    none = ranking.RankedEngine(engine="onnx/cpu/fp32", agrees=False, reason="broken")
    real = selection.rank_engines
    monkeypatch.setattr(
        selection, "rank_engines",
        lambda *a, **o: structs.replace(real(*a, **{**o, "seconds": 0.01}), engines=(none,)),
    )  # fmt: skip
    with pytest.raises(typer.Exit):
        command(
            bundle.path, engine=None, batches="1", seconds=0.01, baked=None, kernel=False,
            overwrite=False, every=True, out_file=None, as_json=True,
        )  # fmt: skip
