"""Engines and the projection kernel on a real GPU; skipped without one."""

from __future__ import annotations

import numpy as np
import pytest

from crl_sdk import Embedder, ModelBundle
from crl_sdk.engines import _cuda as cuda
from crl_sdk.engines._kernels import kernels_directory
from crl_sdk.engines._selection import list_candidates
from crl_sdk.engines._tensorrt_runtime import load_tensorrt
from crl_sdk.engines._verify import verify, verify_kernel
from crl_sdk.errors import CrlError
from crl_sdk.model import _parity as parity

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def architecture() -> str:
    try:
        return cuda.architecture()
    except CrlError as error:
        pytest.skip(str(error))


@pytest.fixture
def bundle(bundle_copy):
    return ModelBundle.open(bundle_copy)


@pytest.mark.parametrize("runtime", ["tensorrt-rtx", "tensorrt"])
def test_a_plan_agrees_with_the_fp32_graph(architecture, bundle, runtime):
    from crl_export.tensorrt import compile_plan

    try:
        tensorrt = load_tensorrt(runtime)
    except CrlError as error:
        pytest.skip(str(error))
    if tensorrt.architectures and architecture not in tensorrt.architectures:
        pytest.skip(f"{runtime} does not compile for {architecture}")
    architectures = [architecture] if tensorrt.architectures else []
    compile_plan(bundle, runtime=runtime, precision="fp32", architectures=architectures)
    record = verify(bundle, runtime, batches=(1, 32), seconds=0.5)
    assert record.agrees, record.failures
    with Embedder.open(bundle) as automatic, Embedder.open(bundle, engine="onnx/cpu") as reference:
        assert automatic.engine == f"{runtime}/cuda/fp32"  # since it is now verified
        images = list(parity.images(bundle.preprocess, 40))
        got, expected = automatic.embed(images), reference.embed(images)
        np.testing.assert_allclose(got.universal, expected.universal, atol=2e-3)


@pytest.mark.parametrize("device", ["cuda", "tensorrt", "tensorrt-rtx"])
def test_onnx_runtime_agrees_with_the_cpu(architecture, bundle, device):
    name = f"onnx/{device}/fp32"
    found = next(each for each in list_candidates(bundle) if str(each.name) == name)
    if not found.usable:
        pytest.skip(found.reason)
    record = verify(bundle, name, batches=(1, 32), seconds=0.5)
    assert record.agrees, record.failures


def test_the_projection_kernel_agrees_with_numpy(architecture, bundle):
    from crl_export.kernels.ahead import compile_kernels

    compile_kernels(kernels_directory(bundle), [architecture])
    record = verify_kernel(bundle)
    assert record.agrees, record.checks
