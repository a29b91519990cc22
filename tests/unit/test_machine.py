"""`crl doctor`: what is found, what is missing, and which engine is taken for which reason."""

from __future__ import annotations

import json

import msgspec
import pytest

from crl_sdk import ModelBundle, demo_bundle, machine
from crl_sdk.cli.doctor import doctor
from crl_sdk.engines import cuda
from crl_sdk.engines.onnx import OnnxImageEngine
from crl_sdk.errors import EngineError
from crl_sdk.machine import Gpu, candidates, examine


@pytest.fixture
def no_gpu(monkeypatch):
    def nothing():
        raise EngineError("expected an NVIDIA driver (libcuda.so.1), found none")

    monkeypatch.setattr(cuda, "driver", nothing)


def test_this_machine(no_gpu):
    found = examine()
    assert found.cores >= 1 and found.memory > 2**28 and found.processor
    assert found.gpus == () and "libcuda" in found.cuda
    assert found.runtimes["tensorrt-rtx"].startswith("1.")
    assert "CPUExecutionProvider" in found.providers and "numpy" in found.packages


def test_the_engine_it_names_is_the_one_that_is_taken(no_gpu):
    bundle = ModelBundle.open(demo_bundle())
    engines = candidates(examine(), bundle)
    chosen = next(each for each in engines if each.usable)
    assert chosen.engine == OnnxImageEngine.open(bundle).description
    (out,) = [each for each in engines if not each.usable]
    assert out.engine == "onnx/cuda/fp32" and "crl-sdk[gpu]" in out.reason


def test_with_a_gpu_and_its_provider_cuda_is_usable(no_gpu):
    bundle = ModelBundle.open(demo_bundle())
    found = msgspec.structs.replace(
        examine(), providers=("CUDAExecutionProvider", "CPUExecutionProvider")
    )
    reasons = {each.engine: each for each in candidates(found, bundle)}
    assert not reasons["onnx/cuda/fp32"].usable and "libcuda" in reasons["onnx/cuda/fp32"].reason
    gpu = Gpu(name="one", architecture="sm89", memory=2**33)
    found = msgspec.structs.replace(found, gpus=(gpu,))
    reasons = {each.engine: each for each in candidates(found, bundle)}
    assert reasons["onnx/cuda/fp32"].usable


def test_damaged_records_of_plans_are_told(no_gpu, bundle_copy):
    folder = bundle_copy / "engines"
    folder.mkdir()
    (folder / "x.json").write_text("{")
    engines = candidates(examine(), ModelBundle.open(bundle_copy))
    assert engines[-1].engine == "tensorrt" and "compile again" in engines[-1].reason


def test_it_is_printed_and_is_json(no_gpu, capsys, monkeypatch):
    doctor(bundle=demo_bundle(), as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["chosen"] == "onnx/cpu/fp32" and told["machine"]["gpus"] == []
    monkeypatch.setattr(machine, "_read", lambda _: "")  # a system that tells nothing
    doctor(bundle=demo_bundle(), as_json=False)
    said = capsys.readouterr().out
    assert "libcuda" in said and "taken" in said


def test_without_a_driver_the_error_says_what_was_looked_for():
    try:
        cuda.driver()
    except EngineError as error:
        assert "driver" in str(error)
    else:
        assert cuda.architecture().startswith("sm")
