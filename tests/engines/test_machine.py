"""`crl doctor`: what this machine has, what is missing, and which engine is chosen."""

from __future__ import annotations

import json

import pytest

from crl_sdk import demo_bundle
from crl_sdk.cli._doctor import doctor
from crl_sdk.engines import _cuda as cuda
from crl_sdk.engines import _processor as processor
from crl_sdk.engines._machine import inspect_machine
from crl_sdk.errors import EngineError


@pytest.fixture
def no_gpu(monkeypatch):
    def nothing():
        raise EngineError("expected an NVIDIA driver (libcuda.so.1), found none")

    monkeypatch.setattr(cuda, "driver", nothing)


def test_this_machine(no_gpu):
    found = inspect_machine()
    assert found.cores >= 1 and found.memory > 2**28 and found.processor
    assert found.gpus == () and "libcuda" in found.cuda
    assert found.runtimes["tensorrt-rtx"].startswith("1.")
    assert "CPUExecutionProvider" in found.providers and "numpy" in found.packages


def test_the_command_prints_a_table_or_json(no_gpu, capsys, monkeypatch):
    doctor(bundle=demo_bundle(), as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["chosen"] == "onnx/cpu/fp32" and told["machine"]["gpus"] == []
    monkeypatch.setattr(processor, "_read", lambda: "")  # a system without /proc
    doctor(bundle=demo_bundle(), as_json=False)
    said = capsys.readouterr().out
    assert "libcuda" in said and "chosen" in said


def test_without_a_driver_the_error_says_what_was_expected():
    try:
        cuda.driver()
    except EngineError as error:
        assert "driver" in str(error)
    else:
        assert cuda.architecture().startswith("sm")
