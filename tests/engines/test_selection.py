"""The choice of an engine, its reasons, choice by name, and the registry of runtimes."""

from __future__ import annotations

import logging

import pytest
from msgspec.structs import replace

from crl_sdk import Embedder, ModelBundle, demo_bundle
from crl_sdk.engines import _onnx as onnx
from crl_sdk.engines import _openvino as openvino
from crl_sdk.engines import _registry as registry
from crl_sdk.engines import _selection as selection
from crl_sdk.engines._engine_name import EngineName
from crl_sdk.engines._family import EngineCandidate, EngineFamily
from crl_sdk.engines._hardware import Gpu, Hardware
from crl_sdk.engines._onnx import OnnxImageEngine
from crl_sdk.engines._selection import choose_engine, list_candidates, open_engine
from crl_sdk.errors import EngineError, InvalidInputError
from crl_sdk.model._parity import Tolerance

GPU = (Gpu(name="one", architecture="sm89", memory=2**33),)
NONE = ((), "expected an NVIDIA driver (libcuda.so.1), found none")


@pytest.fixture
def bundle():
    return ModelBundle.open(demo_bundle())


def machine(
    monkeypatch, *, gpus=NONE, providers=("CPUExecutionProvider",), features=(), packages=()
):
    hardware = Hardware(features=features, gpus=gpus[0], cuda=gpus[1])
    monkeypatch.setattr(selection, "inspect_hardware", lambda: hardware)
    monkeypatch.setattr(openvino, "find_spec", lambda name: name if name in packages else None)
    monkeypatch.setattr(onnx, "find_providers", lambda: providers)


def test_without_a_gpu_the_cpu_is_chosen_and_the_others_say_why(bundle, monkeypatch, caplog):
    machine(monkeypatch)
    engines = {str(each.name): each for each in list_candidates(bundle)}
    automatic = [name for name, each in engines.items() if each.usable and each.automatic]
    assert automatic == ["onnx/cpu/fp32"]
    assert "crl-embeddings[gpu]" in engines["onnx/cuda/fp32"].reason
    assert "onnxruntime-ep" in engines["onnx/tensorrt-rtx/fp32"].reason
    assert "crl compile" in engines["tensorrt-rtx/cuda/fp32"].reason
    with caplog.at_level(logging.INFO):
        embedder = Embedder.open(bundle)
    assert embedder.engine == "onnx/cpu/fp32"
    assert "engine auto: onnx/cpu/fp32 (runs everywhere)" in caplog.text


def test_providers_are_unusable_without_a_driver(bundle, monkeypatch):
    machine(monkeypatch, providers=("CUDAExecutionProvider", "CPUExecutionProvider"))
    engines = {str(each.name): each for each in list_candidates(bundle)}
    assert not engines["onnx/cuda/fp32"].usable and "libcuda" in engines["onnx/cuda/fp32"].reason
    with pytest.raises(EngineError, match=r"cannot run here .*libcuda"):
        open_engine(bundle, "onnx/cuda")


def test_with_a_gpu_cuda_is_chosen_but_not_what_compiles_at_start(bundle, monkeypatch):
    providers = ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider")
    machine(monkeypatch, gpus=(GPU, "13.0"), providers=providers)
    engines = list_candidates(bundle)
    assert str(choose_engine(engines, "auto").name) == "onnx/cuda/fp32"
    asked = choose_engine(engines, "onnx/tensorrt")
    assert str(asked.name) == "onnx/tensorrt/fp32" and "must be chosen by name" in asked.reason
    assert str(choose_engine(engines, "onnx/cpu").name) == "onnx/cpu/fp32"


def test_names_are_matched_by_whole_parts():
    engines = [
        EngineCandidate(name=EngineName.parse(name), usable=True, automatic=True, reason="")
        for name in ("tensorrt-rtx/cuda/fp16", "tensorrt/cuda/fp16", "onnx/cpu/fp32")
    ]
    assert str(choose_engine(engines, "tensorrt").name) == "tensorrt/cuda/fp16"
    assert str(choose_engine(engines, "onnx/cpu/fp32").name) == "onnx/cpu/fp32"
    for wrong in ("tensor", "onnx/cpu/fp32/x", "", "/"):
        with pytest.raises(InvalidInputError, match="got "):
            choose_engine(engines, wrong)


def test_damaged_plan_records_are_reported_and_the_other_engines_work(bundle_copy, monkeypatch):
    machine(monkeypatch)
    folder = bundle_copy / "engines"
    folder.mkdir()
    (folder / "tensorrt-x.json").write_text("{")
    engines = list_candidates(ModelBundle.open(bundle_copy))
    assert "compile again" in engines[0].reason
    assert str(choose_engine(engines, "auto").name) == "onnx/cpu/fp32"


def test_a_baked_basis_needs_a_plan(bundle):
    embedder = Embedder.open(bundle)
    basis = embedder.create_basis("color", ["red", "blue"])
    words = "to go with a baked basis, such as tensorrt-rtx/cuda/fp16; got"
    for wrong in ("auto", "", "onnx/cpu", "tensorrt-rtx/cpu", "tensorrt-rtx/cuda/int8"):
        with pytest.raises(InvalidInputError, match=words):
            Embedder.open(bundle, engine=wrong, baked=basis)
    with pytest.raises(EngineError, match="NVIDIA driver"):
        Embedder.open(bundle, engine="tensorrt-rtx", baked=basis)


def with_int8(bundle, **parity):
    """Return the bundle as if it had an int8 graph with this recorded parity."""
    fp32 = bundle.manifest.images[0]
    recorded = {"cosine_mean": 0.9998, "cosine_min": 0.999, "centred_cosine_min": 0.999, **parity}
    int8 = replace(fp32, precision="int8", parity=replace(fp32.parity, **recorded))
    return ModelBundle(bundle.path, replace(bundle.manifest, images=(fp32, int8)))


@pytest.mark.parametrize("feature", ["avx512_vnni", "avx_vnni", "amx_int8"])
def test_int8_is_chosen_where_bytes_multiply_fast(bundle, monkeypatch, feature):
    machine(monkeypatch, features=("avx2", feature))
    engines = list_candidates(with_int8(bundle))
    for wanted in ("auto", "onnx", "onnx/cpu"):
        assert str(choose_engine(engines, wanted).name) == "onnx/cpu/int8"
    reason = choose_engine(engines, "auto").reason
    assert feature in reason and "0.99980" in reason
    assert str(choose_engine(engines, "onnx/cpu/fp32").name) == "onnx/cpu/fp32"


@pytest.mark.parametrize(
    ("features", "parity", "why"),
    [
        (("avx2", "avx512f"), {}, "no avx512_vnni"),
        (("avx512_vnni",), {"cosine_mean": 0.9975}, "cosine_mean 0.9975 "),
        (("avx512_vnni",), {"centred_cosine_min": 0.98}, "centred_cosine_min 0.98 "),
        (("avx512_vnni",), {"cosine_mean": float("nan")}, "cosine_mean nan"),
    ],
)
def test_int8_is_not_chosen_where_it_is_slow_or_inexact(bundle, monkeypatch, features, parity, why):
    machine(monkeypatch, features=features)
    engines = list_candidates(with_int8(bundle, **parity))
    for wanted in ("auto", "onnx/cpu"):
        assert str(choose_engine(engines, wanted).name) == "onnx/cpu/fp32"
    asked = choose_engine(engines, "onnx/cpu/int8")
    assert why in asked.reason and "must be chosen by name" in asked.reason


@pytest.mark.parametrize("feature", ["avx512_bf16", "amx_bf16"])
def test_openvino_must_be_chosen_by_name(bundle, monkeypatch, feature):
    machine(monkeypatch, features=("avx2", feature), packages=("openvino",))
    engines = list_candidates(bundle)
    for wanted in ("auto", "onnx"):
        assert str(choose_engine(engines, wanted).name) == "onnx/cpu/fp32"
    for wanted, taken in (("openvino", "bf16"), ("openvino/cpu/fp32", "fp32")):
        asked = choose_engine(engines, wanted)
        assert str(asked.name) == f"openvino/cpu/{taken}" and not asked.automatic
        command = f"crl verify {bundle.path} --engine openvino/cpu/{taken}"
        assert "must be chosen by name" in asked.reason and command in asked.reason


def test_openvino_without_its_package_or_the_instructions(bundle, monkeypatch):
    machine(monkeypatch, features=("avx512f",), packages=("openvino",))
    assert str(choose_engine(list_candidates(bundle), "openvino").name) == "openvino/cpu/fp32"
    with pytest.raises(EngineError, match="neither avx512_bf16 nor amx_bf16"):
        choose_engine(list_candidates(bundle), "openvino/cpu/bf16")
    machine(monkeypatch, features=("amx_bf16",))
    with pytest.raises(EngineError, match=r"pip install 'crl-embeddings\[openvino\]'"):
        choose_engine(list_candidates(bundle), "openvino")


def test_openvino_needs_the_fp32_graph(bundle):
    half = tuple(replace(each, precision="fp16") for each in bundle.manifest.images)
    without = ModelBundle(bundle.path, replace(bundle.manifest, images=half))
    assert not any(each.name.runtime == "openvino" for each in list_candidates(without))


class FakeEngine:
    name = EngineName("fake", "npu", "int4")

    def __init__(self, bundle, threads):
        self.threads, self._engine = threads, OnnxImageEngine.open(bundle)

    def run(self, *arguments):
        return self._engine.run(*arguments)

    def close(self):
        self._engine.close()


FAKE = EngineFamily(
    runtime="fake",
    packages=("numpy",),
    list_candidates=lambda bundle, hardware: [
        EngineCandidate(
            name=FakeEngine.name,
            usable=True,
            automatic="npu" in hardware.features,
            reason=f"runs {bundle.manifest.name}",
        )
    ],
    open=lambda bundle, name, threads: FakeEngine(bundle, threads),
    tolerances={"int4": Tolerance(cosine_mean=0.9)},
)


@pytest.mark.parametrize(
    ("features", "wanted"), [((), "fake"), ((), "fake/npu/int4"), (("npu",), "auto")]
)
def test_a_new_runtime_is_one_family_in_the_registry(bundle, monkeypatch, features, wanted):
    machine(monkeypatch, features=features)
    monkeypatch.setattr(registry, "FAMILIES", (FAKE, *registry.FAMILIES))
    candidates = list_candidates(bundle)
    assert candidates[0].name == FakeEngine.name
    assert candidates[0].reason == f"runs {bundle.manifest.name}"
    assert choose_engine(candidates, "onnx").name.runtime == "onnx"
    opened = open_engine(bundle, wanted, threads=3)
    assert isinstance(opened, FakeEngine) and opened.threads == 3
    basis = Embedder.open(bundle, engine="onnx/cpu").create_basis("color", ["red", "blue"])
    with pytest.raises(InvalidInputError, match="expected an engine of tensorrt-rtx, tensorrt to"):
        open_engine(bundle, "fake", baked=basis)


def test_every_family_has_its_own_runtime_and_lists_only_its_own_engines(bundle):
    runtimes = [family.runtime for family in registry.FAMILIES]
    assert len(set(runtimes)) == len(runtimes)
    hardware = Hardware(features=(), gpus=(), cuda="no driver")
    for family in registry.FAMILIES:
        for candidate in family.list_candidates(bundle, hardware):
            assert candidate.name.runtime == family.runtime
            assert candidate.name.precision in family.tolerances
            assert registry.family_of(candidate.name) is family
