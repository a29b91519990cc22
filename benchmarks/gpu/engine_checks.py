"""Checks of the engines that a GPU runs, as far as their libraries are installed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec

from crl_sdk.engines import _cuda as cuda
from crl_sdk.engines._selection import list_candidates
from crl_sdk.engines._tensorrt_plans import PlanRuntime
from crl_sdk.engines._tensorrt_runtime import load_tensorrt
from crl_sdk.engines._verify import verify
from crl_sdk.errors import CrlError
from crl_sdk.model import ModelBundle
from crl_sdk.model._bundle import demo_bundle


class NotHere(Exception):
    """What a check needs is not installed; the text says what."""


def check_onnx_runtime(provider: str) -> dict[str, Any]:
    """Compare an execution provider of ONNX Runtime with the CPU on the demo model, and time it.

    Args:
        provider: `cuda`, `tensorrt` or `tensorrt-rtx`.

    Raises:
        NotHere: If this ONNX Runtime does not have it.
        AssertionError: If its embeddings differ by more than the stated parity.
    """
    bundle = ModelBundle.open(demo_bundle())
    name = f"onnx/{provider}/fp32"
    try:
        found = next(each for each in list_candidates(bundle) if str(each.name) == name)
    except CrlError as error:
        raise NotHere(str(error)) from error
    if not found.usable:
        raise NotHere(found.reason)
    record = verify(bundle, name, batches=(1, 8, 32), seconds=1.0)
    assert record.agrees, record.failures
    figures: dict[str, Any] = msgspec.to_builtins(record)
    figures.pop("machine", None)
    return figures


def check_tensorrt(runtime: PlanRuntime, folder: Path) -> dict[str, Any]:
    """Compile the demo model with TensorRT, compare the plan with the CPU, and time it.

    Args:
        runtime: `tensorrt` or `tensorrt-rtx`.
        folder: Empty directory to work in.

    Raises:
        NotHere: If this TensorRT is not installed or does not know the GPU.
        AssertionError: If its embeddings differ by more than the stated parity.
    """
    from crl_export.tensorrt import compile_plan

    try:
        tensorrt = load_tensorrt(runtime)
    except CrlError as error:
        raise NotHere(str(error)) from error
    architecture = cuda.architecture()
    if tensorrt.architectures and architecture not in tensorrt.architectures:
        raise NotHere(f"{runtime} {tensorrt.version} does not compile for {architecture}")
    shutil.copytree(demo_bundle(), folder / "bundle")
    bundle = ModelBundle.open(folder / "bundle")
    compile_plan(
        bundle, runtime=runtime, precision="fp32",
        architectures=[architecture] if tensorrt.architectures else [],
    )  # fmt: skip
    record = verify(bundle, runtime, batches=(1, 8, 32), seconds=1.0)
    assert record.agrees, record.failures
    figures: dict[str, Any] = msgspec.to_builtins(record)
    figures.pop("machine", None)
    return figures
