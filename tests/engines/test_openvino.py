"""OpenVINO compared with ONNX Runtime on the demo model: precisions, threads, bad input."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from msgspec.structs import replace

from crl_sdk import Embedder, ModelBundle, demo_bundle
from crl_sdk.cli._verify import verify as verify_command
from crl_sdk.engines import _openvino as module
from crl_sdk.engines._hardware import Hardware
from crl_sdk.engines._onnx import OnnxImageEngine
from crl_sdk.engines._openvino import OpenVinoImageEngine, missing_instructions
from crl_sdk.engines._processor import find_features
from crl_sdk.engines._verify import verify
from crl_sdk.errors import BundleError, EngineError, InvalidInputError, MissingDependencyError
from crl_sdk.model import _parity as parity

FP32 = {"rtol": 0, "atol": 5e-6}
"""Tolerance between the two runtimes in fp32; the measured difference was 4e-7."""

MISSING = missing_instructions("bf16", find_features())
needs_bf16 = pytest.mark.skipif(MISSING is not None, reason=f"{MISSING}")
precisions = pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=needs_bf16)])


@pytest.fixture(scope="module")
def bundle() -> ModelBundle:
    return ModelBundle.open(demo_bundle())


@pytest.fixture(scope="module")
def engine(bundle) -> Iterator[OpenVinoImageEngine]:
    opened = OpenVinoImageEngine.open(bundle, precision="fp32")
    yield opened
    opened.close()
    opened.close()


@pytest.fixture(scope="module")
def pixels(bundle):
    return parity.images(bundle.preprocess, 17)


def packed(bundle: ModelBundle, columns: int):
    rng = np.random.default_rng(columns)
    weight = rng.standard_normal((bundle.embedding_dim, columns)).astype(np.float32)
    bias = rng.standard_normal(columns).astype(np.float32)
    return weight / np.linalg.norm(weight, axis=0), bias


@pytest.mark.parametrize("columns", [0, 1, 7])
@pytest.mark.parametrize("batch", [1, 3, 17])
def test_fp32_agrees_with_onnx_runtime(bundle, engine, pixels, batch, columns):
    bases = packed(bundle, columns)
    expected = OnnxImageEngine.open(bundle).run(pixels[:batch], *bases)
    found = engine.run(pixels[:batch], *bases)
    for array, other in zip(found, expected, strict=True):
        assert array.shape == other.shape and array.dtype == np.float32
        np.testing.assert_allclose(array, other, **FP32)
    assert str(engine.name) == "openvino/cpu/fp32"


def test_no_images_give_no_rows(bundle, engine, pixels):
    rows, columns = engine.run(pixels[:0], *packed(bundle, 7))
    assert rows.shape == (0, bundle.embedding_dim) and columns.shape == (0, 7)
    assert rows.dtype == columns.dtype == np.float32


@needs_bf16
@pytest.mark.parametrize("batch", [1, 3, 17])
def test_bf16_is_close_to_fp32_and_projects_in_fp32(bundle, engine, pixels, batch):
    bases = packed(bundle, 7)
    half = OpenVinoImageEngine.open(bundle, precision="bf16")
    rows, columns = half.run(pixels[:batch], *bases)
    exact, _ = engine.run(pixels[:batch], *bases)
    cosines = (rows * exact).sum(axis=1)
    assert cosines.min() > 0.999 and np.abs(rows - exact).max() > 1e-4  # it is bf16
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(columns, rows @ bases[0] + bases[1], atol=1e-6)
    assert str(half.name) == "openvino/cpu/bf16"


@precisions
def test_threads_and_array_views_get_their_own_results(bundle, pixels, precision):
    opened = OpenVinoImageEngine.open(bundle, precision=precision, threads=1)
    parts = [pixels[i % 5 : i % 5 + 1 + i % 4] for i in range(24)] + [pixels[::-3], pixels[:, ::-1]]
    bases = packed(bundle, 3)
    alone = [opened.run(part, *bases) for part in parts]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda part: opened.run(part, *bases), parts))
    for one, other, part in zip(alone, together, parts, strict=True):
        for mine, theirs in zip(one, other, strict=True):
            np.testing.assert_array_equal(mine, theirs)
        np.testing.assert_array_equal(opened.run(np.ascontiguousarray(part), *bases)[0], one[0])


def test_a_result_outlives_the_next_run(bundle, engine, pixels):
    bases = packed(bundle, 2)
    first = engine.run(pixels[:2], *bases)
    kept = [array.copy() for array in first]
    second = engine.run(pixels[2:4], *bases)
    for array, before, other in zip(first, kept, second, strict=True):
        np.testing.assert_array_equal(array, before)
        assert not np.shares_memory(array, other) and np.abs(array - other).max() > 0.01


def test_bad_input_is_a_typed_error_and_the_next_run_works(bundle, engine, pixels):
    weight, bias = packed(bundle, 2)
    for wrong in (pixels[:1, :3, :3], pixels[0], pixels[:1].astype(np.float32)):
        with pytest.raises(EngineError, match=r"the run failed on image .* \(b, 96, 96, 3\) uint8"):
            engine.run(wrong, weight, bias)
    for bases in ((weight[1:], bias), (weight, np.zeros(3, np.float32))):
        with pytest.raises(EngineError, match=r"the run failed on image \(1, 96, 96, 3\), weight"):
            engine.run(pixels[:1], *bases)
    assert engine.run(pixels[:1], weight, bias)[1].shape == (1, 2)


def test_errors_of_open(bundle, bundle_copy, monkeypatch):
    with pytest.raises(InvalidInputError, match="expected a precision"):
        OpenVinoImageEngine.open(bundle, precision="int8")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="threads"):
        OpenVinoImageEngine.open(bundle, precision="fp32", threads=0)
    half = tuple(replace(each, precision="fp16") for each in bundle.manifest.images)
    without = ModelBundle(bundle.path, replace(bundle.manifest, images=half))
    with pytest.raises(BundleError, match="image graph in fp32"):
        OpenVinoImageEngine.open(without, precision="fp32")
    copy = ModelBundle.open(bundle_copy)
    copy.image_graph("fp32").write_bytes(copy.text_graph().read_bytes())  # a graph without pixels
    with pytest.raises(EngineError, match="cannot compile it in fp32"):
        OpenVinoImageEngine.open(copy, precision="fp32")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingDependencyError, match=r"crl-embeddings\[openvino\]"):
        OpenVinoImageEngine.open(bundle, precision="fp32")


def test_bf16_is_never_silently_replaced(bundle, monkeypatch):
    monkeypatch.setattr(module, "find_features", lambda: ("avx2", "avx512f", "avx512_vnni"))
    with pytest.raises(EngineError, match="neither avx512_bf16 nor amx_bf16; choose openvino/cpu"):
        OpenVinoImageEngine.open(bundle, precision="bf16")
    hardware = Hardware(features=("avx2",), gpus=(), cuda="none")
    monkeypatch.setattr("crl_sdk.engines._selection.inspect_hardware", lambda: hardware)
    with pytest.raises(EngineError, match=r"cannot run here .*avx512_bf16"):
        Embedder.open(bundle, engine="openvino/cpu/bf16")


def test_the_precision_that_openvino_would_use_is_checked(bundle, monkeypatch):
    runtime = module._load()

    class Core(runtime.Core):
        def compile_model(self, model, device, options):
            return super().compile_model(
                model, device, {**options, "INFERENCE_PRECISION_HINT": "f32"}
            )

    other = SimpleNamespace(Core=Core, Model=runtime.Model, Type=runtime.Type)
    monkeypatch.setattr(module, "find_features", lambda: ("amx_bf16",))
    monkeypatch.setattr(module, "_load", lambda: other)
    with pytest.raises(EngineError, match=r"compute in bf16, but it would use .*f"):
        OpenVinoImageEngine.open(bundle, precision="bf16")


def test_the_import_sends_no_telemetry():
    """The package sends an event when it is imported. The module that sends it is not loaded."""
    code = (
        "import sys; from crl_sdk import Embedder, demo_bundle; "
        "Embedder.open(demo_bundle(), engine='openvino/cpu/fp32').close(); "
        "assert 'openvino' in sys.modules; "
        "print([name for name in sys.modules if name.startswith('openvino_telemetry')])"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert told.stdout == "[]\n"


def test_an_embedder_agrees_with_the_default_engine(embedder, image_files):
    with Embedder.open(demo_bundle(), engine="openvino/cpu/fp32") as other:
        assert other.engine == "openvino/cpu/fp32"
        basis = other.create_basis("color", ["red", "green", "blue"])
        found = other.embed(image_files, [basis], batch_size=4)
    expected = embedder.embed(image_files, [basis])
    np.testing.assert_allclose(found.universal, expected.universal, **FP32)
    np.testing.assert_allclose(found["color"], expected["color"], rtol=0, atol=5e-5)


@precisions
def test_verify_agrees(bundle, precision):
    record = verify(bundle, f"openvino/cpu/{precision}", batches=(1, 2), seconds=0.01)
    assert record.agrees and record.engine == f"openvino/cpu/{precision}", record.failures
    assert (record.parity.max_abs > 1e-4) == (precision == "bf16")


def test_the_command_verifies_it(capsys):
    verify_command(
        demo_bundle(), engine="openvino/cpu/fp32", batches="1", seconds=0.01, baked=None,
        out_file=None, kernel=False, as_json=False,
    )  # fmt: skip
    assert "agrees with fp32" in capsys.readouterr().out


SIGNAL = """
import faulthandler, gc, os, signal
faulthandler.enable()
signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
from crl_sdk import ModelBundle, demo_bundle
from crl_sdk.engines import open_engine
bundle = ModelBundle.open(demo_bundle())
engines = [open_engine(bundle, "openvino/cpu/fp32") for _ in range(2)]
while engines:
    engines.pop(0).close()
    gc.collect()
os.kill(os.getpid(), signal.SIGUSR1)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs signals of POSIX")
def test_a_signal_is_handled_after_engines_were_closed():
    """With a core for each engine, the stack of signals was freed memory by then."""
    run = [sys.executable, "-c", SIGNAL]
    done = subprocess.run(run, check=False, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr
