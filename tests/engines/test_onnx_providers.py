"""The options of ONNX Runtime's providers, compared with those that the real providers know."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest

from crl_sdk import ModelBundle, demo_bundle
from crl_sdk.engines import _onnx_providers as providers
from crl_sdk.engines import _onnx_sessions as sessions
from crl_sdk.engines._engine_name import EngineName
from crl_sdk.engines._onnx import OnnxImageEngine
from crl_sdk.engines._onnx_providers import PROVIDERS, provider_options
from crl_sdk.engines._onnx_sessions import open_session
from crl_sdk.errors import EngineError

KNOWN = json.loads((Path(__file__).parent / "provider_options.json").read_text())
"""Options found in the providers' libraries by `tests/conformance/provider_options.py`."""


@pytest.fixture
def bundle():
    return ModelBundle.open(demo_bundle())


@pytest.mark.parametrize("device", ["cuda", "tensorrt", "tensorrt-rtx"])
def test_the_providers_know_every_option_and_onnx_runtime_accepts_them(bundle, device):
    from onnxruntime.capi.onnxruntime_inference_collection import (
        check_and_normalize_provider_args,
    )

    options = provider_options(bundle, device, "fp32")
    assert options and set(options) <= set(KNOWN[device]["options"])
    name = PROVIDERS[device].name
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        names, told = check_and_normalize_provider_args([(name, options)], None, [name])
    assert names == [name] and told == [options]
    assert all(isinstance(value, str) for value in options.values())


def test_fp32_is_not_tf32(bundle):
    assert providers.cuda_options("fp32")["use_tf32"] == "0"
    assert providers.cuda_options("fp16")["use_tf32"] == "1"


@pytest.mark.parametrize(("device", "prefix"), [("tensorrt", "trt"), ("tensorrt-rtx", "nv")])
def test_profiles_match_the_graph_and_cache_names_contain_its_digest(bundle, device, prefix):
    options = provider_options(bundle, device, "fp32")
    inputs = {
        each.name: each.shape for each in open_session(bundle.image_graph("fp32")).get_inputs()
    }
    shapes = {}
    for which in ("min", "opt", "max"):
        told = dict(
            part.split(":") for part in options[f"{prefix}_profile_{which}_shapes"].split(",")
        )
        shapes[which] = {name: tuple(map(int, each.split("x"))) for name, each in told.items()}
        assert shapes[which].keys() == inputs.keys()
        for name, shape in shapes[which].items():
            assert len(shape) == len(inputs[name])
            for size, dimension in zip(shape, inputs[name], strict=True):
                assert isinstance(dimension, str) or size == dimension
    for name in inputs:
        for low, usual, high in zip(*(shapes[which][name] for which in shapes), strict=True):
            assert low <= usual <= high
    folder = providers.cache_folder(options)
    assert folder.parent == bundle.path / "engines"
    digest = bundle.manifest.files[bundle.image_graph("fp32").name].sha256
    assert digest[:12] in folder.name


def test_a_missing_provider_is_an_error_that_says_how_to_get_it(bundle):
    for device, words in [
        ("cuda", r"CUDAExecutionProvider.*crl-embeddings\[gpu\]"),
        ("tensorrt-rtx", "onnxruntime_ep_nv_tensorrt_rtx.*pip install onnxruntime-ep"),
    ]:
        with pytest.raises(EngineError, match=words):
            open_session(bundle.image_graph("fp32"), device=device)


def test_a_silently_replaced_provider_is_an_error(bundle, monkeypatch):
    """ONNX Runtime only warns if CUDA's libraries do not load."""
    everything = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(ort, "get_available_providers", lambda: everything)
    real = ort.InferenceSession
    monkeypatch.setattr(
        ort, "InferenceSession", lambda graph, options, providers: real(graph, options)
    )
    with pytest.raises(EngineError, match="fell back from CUDAExecutionProvider"):
        open_session(bundle.image_graph("fp32"), device="cuda")


def test_a_cache_directory_that_cannot_be_created_is_an_error(bundle_copy, monkeypatch):
    bundle = ModelBundle.open(bundle_copy)
    (bundle_copy / "engines").write_text("a file")
    with pytest.raises(EngineError, match="keeps its engines there"):
        OnnxImageEngine.open(bundle, device="tensorrt", precision="fp32")


def test_a_provider_from_a_library_is_registered(bundle, monkeypatch):
    """ONNX Runtime's own calls, with the CPU device in place of the GPU."""
    library = SimpleNamespace(get_library_path=lambda: "/nowhere/libprovider.so")
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", library)
    monkeypatch.setattr(providers, "plugin_installed", lambda: True)
    graph = bundle.image_graph("fp32")
    with pytest.raises(EngineError, match=r"libprovider.so: ONNX Runtime cannot load it"):
        open_session(graph, device="tensorrt-rtx")
    monkeypatch.setattr(ort, "register_execution_provider_library", lambda name, path: None)
    with pytest.raises(EngineError, match="finds no GPU"):
        open_session(graph, device="tensorrt-rtx")
    rename = {**PROVIDERS, "tensorrt-rtx": providers.Provider("CPUExecutionProvider", "")}
    monkeypatch.setattr(sessions, "PROVIDERS", rename)
    assert open_session(graph, device="tensorrt-rtx").get_providers() == ["CPUExecutionProvider"]


def test_bound_runs_agree_with_plain_ones(bundle):
    """The code path of the GPU providers, in host memory."""
    session = open_session(bundle.image_graph("fp32"))
    plain = OnnxImageEngine(session, EngineName("onnx", "cpu", "fp32"))
    bound = OnnxImageEngine(session, EngineName("onnx", "cuda", "fp32"), memory="cpu")
    profiled = OnnxImageEngine(
        session, EngineName("onnx", "tensorrt", "fp32"), memory="cpu", profiled=True
    )
    rng = np.random.default_rng(0)
    spec = bundle.preprocess
    for images, columns in [(1, 0), (3, 5), (2, 5), (70, 5), (1, 9), (0, 9), (1, 9)]:
        pixels = rng.integers(0, 256, (images, spec.height, spec.width, 3), np.uint8)
        weight = rng.standard_normal((bundle.embedding_dim, columns)).astype(np.float32)
        bias = rng.standard_normal(columns).astype(np.float32)
        for _ in range(2):  # the same weights, then changed in place
            expected = plain.run(pixels, weight, bias)
            for engine in (bound, profiled):
                for got, right in zip(engine.run(pixels, weight, bias), expected, strict=True):
                    assert got.shape == right.shape
                    np.testing.assert_allclose(got, right, atol=2e-5)
            weight *= -1
    with pytest.raises(EngineError, match="at most 4096 columns"):
        profiled.run(pixels, np.zeros((bundle.embedding_dim, 4097), np.float32), np.zeros(4097))
    with pytest.raises(EngineError, match="the run failed on image"):
        bound.run(pixels[:, 1:], weight, bias)
