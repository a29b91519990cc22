"""Fixtures: a compiled plan of the demo model, and a machine with a simulated GPU that runs it."""

from __future__ import annotations

import gc
import shutil
from types import SimpleNamespace

import pytest
from simulated_gpu import Driver, tensorrt

from crl_sdk import ModelBundle, demo_bundle
from crl_sdk.engines import _cuda as cuda
from crl_sdk.engines import _tensorrt as module
from crl_sdk.engines import _tensorrt_family as family
from crl_sdk.engines import _tensorrt_runtime as tensorrt_runtime
from crl_sdk.engines._onnx import OnnxImageEngine
from crl_sdk.engines._tensorrt_plans import plans_directory, read_plans

MOST, COLUMNS = 5, 100
"""Largest number of images and of columns of the plan."""


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """A copy of the demo bundle with a real plan of it."""
    from crl_export.tensorrt import compile_plan

    path = tmp_path_factory.mktemp("bundle") / "demo"
    shutil.copytree(demo_bundle(), path)
    bundle = ModelBundle.open(path)
    compile_plan(
        bundle, precision="fp32", architectures=["sm89"], batch=(1, 2, MOST), max_columns=COLUMNS
    )
    return path


@pytest.fixture
def bundle(compiled, tmp_path):
    shutil.copytree(compiled, tmp_path / "bundle")
    return ModelBundle.open(tmp_path / "bundle")


@pytest.fixture
def reference(bundle):
    return OnnxImageEngine.open(bundle, precision="fp32", threads=1)


@pytest.fixture
def gpu(bundle, reference, monkeypatch):
    """A machine with a simulated GPU and TensorRT-RTX; all GPU memory must be freed at the end."""
    real = tensorrt_runtime.load_tensorrt("tensorrt-rtx")
    folder = plans_directory(bundle)
    plan = (folder / f"{read_plans(folder)[0].spec.stem}.plan").read_bytes()
    driver = Driver()
    fake = tensorrt(driver, reference, plan, (1, MOST), (1, COLUMNS))
    logger = SimpleNamespace(errors=[])
    kit = SimpleNamespace(
        runtime="tensorrt-rtx", version=real.version, module=fake, logger=lambda: logger
    )
    monkeypatch.setattr(cuda, "driver", lambda: driver)
    for each in (module, family):
        monkeypatch.setattr(each, "load_tensorrt", lambda _: kit)
    yield SimpleNamespace(driver=driver, trt=fake, kit=kit)
    gc.collect()
    assert driver.nothing_left()
