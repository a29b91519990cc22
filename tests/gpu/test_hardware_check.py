"""The hardware check itself: its steps on simulated hardware, and what it makes of failures."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from simulated_gpu import Driver

from crl_benchmarks.gpu import check, decode_checks, driver_checks, kernel_checks
from crl_benchmarks.gpu.engine_checks import NotHere
from crl_sdk.engines import _cuda as cuda
from crl_sdk.errors import EngineError, MissingDependencyError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def driver(monkeypatch):
    simulated = Driver(memory=1 << 31)
    monkeypatch.setattr(cuda, "driver", lambda: simulated)
    yield simulated
    gc.collect()
    assert simulated.nothing_left()


def test_the_steps_of_the_driver_on_a_simulated_one(driver, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (driver.free, 1 << 31))
    assert driver_checks.check_copies(megabytes=1)["bytes"] == 1 << 20
    assert driver_checks.check_graphs(runs=5) == {"launches": 5}
    assert driver_checks.check_threads(count=3) == {"threads": 3}
    assert len(driver_checks.check_errors()) == 3
    assert len(driver_checks.check_memory_is_returned(rounds=2, megabytes=1)["free_bytes"]) == 2


def test_a_driver_that_loses_data_or_memory_is_found(driver, monkeypatch):
    import torch

    free = iter([100, 50])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (next(free), 0))
    with pytest.raises(AssertionError, match="50"):
        driver_checks.check_memory_is_returned(rounds=2, megabytes=1)
    monkeypatch.setattr(cuda.CudaDevice, "wait", lambda self: None)
    for step in (driver_checks.check_copies, driver_checks.check_graphs):
        with pytest.raises(AssertionError):
            step(1)


def test_the_decoder_is_compared_with_pillow(monkeypatch):
    monkeypatch.setattr(decode_checks, "require_gpu_decoder", lambda: None)
    monkeypatch.setattr(decode_checks, "decode_jpeg", lambda opened, data: opened.copy())
    found = decode_checks.check_decoder(((64, 48),), threads=2, rounds=2)
    assert found["64x48"]["max_levels"] == 0 and len(found["64x48"]["gpu_images_per_second"]) == 2
    monkeypatch.setattr(
        decode_checks, "decode_jpeg", lambda opened, data: opened.transpose(0).convert("RGB")
    )
    with pytest.raises(AssertionError, match="differs from Pillow"):
        decode_checks.check_decoder(((64, 48),), threads=2, rounds=1)
    monkeypatch.setattr(decode_checks, "decode_jpeg", lambda opened, data: None)
    with pytest.raises(AssertionError, match="did not decode"):
        decode_checks.check_decoder(((64, 48),), threads=2, rounds=1)

    def missing():
        raise MissingDependencyError("nvidia-nvimgcodec-cu12", "gpu-decode", "--decode gpu")

    monkeypatch.setattr(decode_checks, "require_gpu_decoder", missing)
    with pytest.raises(NotHere):
        decode_checks.check_decoder()


def test_the_kernel_agrees_in_the_interpreter():
    code = (
        "from crl_benchmarks.gpu.kernel_checks import check_jitted\n"
        "found = check_jitted('cpu', shapes=[(5, 40)])\n"
        "assert found['cases'] == 36 and 0 < found['max_abs'] < found['tolerance'], found\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]


def test_a_kernel_that_is_wrong_is_found():
    case = kernel_checks.Case(rows=3, dim=8, sizes=(4, 5), dtype="fp32", unit=True)
    x, projections = kernel_checks.draw(case, seed=0)
    exact = kernel_checks.define(x, projections, unit=True)
    assert kernel_checks._difference(exact, x, projections, case) == 0
    for wrong in (1e-3, np.nan):
        got = exact.copy()
        got[2, 8] += wrong
        with pytest.raises(AssertionError, match="differs by"):
            kernel_checks._difference(got, x, projections, case)


def test_the_definition_is_that_of_the_projections():
    case = kernel_checks.Case(rows=3, dim=8, sizes=(4, 5, 6), dtype="fp32", unit=False)
    x, projections = kernel_checks.draw(case, seed=1)
    assert {each.post for each in projections} == {"l2", "standardise", "none"}
    applied = np.concatenate([each.apply(x.numpy()) for each in projections], axis=1)
    np.testing.assert_allclose(kernel_checks.define(x, projections, unit=False), applied, atol=1e-5)


def test_every_step_runs_whatever_became_of_the_others(capsys):
    def fails():
        raise EngineError("the run failed")

    def absent():
        raise NotHere("no TensorRT")

    def no_package():
        raise MissingDependencyError("cuda-bindings", "tensorrt-rtx", "using a GPU")

    def broken():
        import crl_benchmarks.gpu.no_such_module  # noqa: F401

    steps = check.run_checks(
        [
            check.Check("a", fails), check.Check("b", absent), check.Check("c", no_package),
            check.Check("d", broken), check.Check("e", lambda: {"x": 1}),
        ]
    )  # fmt: skip
    assert [step.outcome for step in steps] == ["failed", "skipped", "skipped", "failed", "passed"]
    assert "EngineError: the run failed" in steps[0].reason and steps[4].figures == {"x": 1}
    assert "cuda-bindings" in steps[2].reason
    assert "no TensorRT" in capsys.readouterr().out
    late = check.run_checks([check.Check("a", dict), check.Check("b", dict)], seconds=-1)
    assert [step.outcome for step in late] == ["skipped", "skipped"] and "used up" in late[0].reason


@pytest.mark.parametrize(
    ("outcomes", "passed"),
    [
        (["passed", "skipped"], True),
        (["passed", "failed"], False),
        (["skipped"], False),
        ([], False),
    ],
)
def test_a_record_passes_only_if_something_ran(outcomes, passed):
    steps = tuple(check.Step(name="x", outcome=each, seconds=0) for each in outcomes)
    record = check.Record(
        schema=1, time="2026-01-01T00:00:00+00:00", commit="x", seconds=1, device=[], driver="13.0",
        processor="x", system="x", versions={}, steps=steps,
    )  # fmt: skip
    assert record.passed is passed
    assert msgspec.json.decode(msgspec.json.encode(record), type=check.Record) == record


def test_without_a_gpu_it_says_so(tmp_path):
    ran = subprocess.run(
        ["sh", str(ROOT / "benchmarks" / "gpu" / "check.sh"), str(tmp_path / "record.json")],
        env={**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    if ran.returncode != 2:
        pytest.skip("this machine has a GPU")
    assert "no GPU to check" in ran.stderr and not (tmp_path / "record.json").exists()


def test_committed_records_can_be_read():
    for path in sorted(check.RESULTS.glob("*.json")):
        record = msgspec.json.decode(path.read_bytes(), type=check.Record)
        assert record.device and record.steps, path
