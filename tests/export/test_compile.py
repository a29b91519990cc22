"""Compilation with TensorRT-RTX: all architectures, ViT-B/32 in fp16, baked bases, errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from crl_export import tensorrt as compiler
from crl_export.exporter import export_model
from crl_export.tensorrt import compile_plan
from crl_sdk import ModelBundle
from crl_sdk.engines import _tensorrt_runtime as tensorrt_runtime
from crl_sdk.engines._tensorrt_plans import choose_plan, load_plan, plans_directory, read_plans
from crl_sdk.engines._tensorrt_runtime import TensorRTRuntime, load_tensorrt
from crl_sdk.errors import (
    BasisMismatchError,
    BundleError,
    EngineError,
    ExportError,
    InvalidInputError,
    MissingDependencyError,
    PlanError,
)

ARCHITECTURES = ("sm80", "sm86", "sm89", "sm120", "sm121")


@pytest.fixture
def bundle(bundle_copy: Path) -> ModelBundle:
    return ModelBundle.open(bundle_copy)


def names(tensors) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(each.name, each.dtype, each.shape) for each in tensors]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_demo_model_compiles_for_each_architecture(bundle, architecture, tmp_path):
    compiled = compile_plan(
        bundle, precision="fp32", architectures=[architecture], directory=tmp_path
    )
    plan = compiled.plan
    assert compiled.path.stat().st_size == plan.bytes > 5_000_000
    assert names(plan.inputs) == [
        ("image", "uint8", (-1, 96, 96, 3)), ("weight", "float32", (128, -1)),
        ("bias", "float32", (-1,)),
    ]  # fmt: skip
    assert names(plan.outputs) == [
        ("embedding", "float32", (-1, 128)), ("projected", "float32", (-1, -1)),
    ]  # fmt: skip
    assert [kind.split(" ")[-1] for kind in plan.projection] == [
        "(MATRIX_MULTIPLY)", "(ELEMENTWISE)",
    ]  # fmt: skip
    assert not plan.verified and plan.peak_memory > 0


def test_a_plan_for_all_architectures_is_reused_until_something_changes(bundle, monkeypatch):
    stages: list[tuple[str, int, int]] = []
    first = compile_plan(bundle, precision="fp32", progress=lambda *told: stages.append(told))
    assert first.plan.spec.architectures == ARCHITECTURES
    assert len(stages) > 20 and all(1 <= done <= total for _, done, total in stages)
    assert b"site-packages" not in first.path.read_bytes()

    def build(*_):
        raise AssertionError("compiled again")

    with monkeypatch.context() as patched:
        patched.setattr(compiler, "_build", build)
        again = compile_plan(bundle, precision="fp32", architectures=ARCHITECTURES[::-1])
        assert again.cached and again.plan == first.plan
        for change in ({"batch": (1, 1, 2)}, {"max_columns": 8}, {"architectures": ["sm89"]}):
            with pytest.raises(AssertionError, match="compiled again"):
                compile_plan(bundle, precision="fp32", **change)
    damaged = first.path.read_bytes()[:-1]
    first.path.write_bytes(damaged)  # an incomplete plan is compiled again
    assert not compile_plan(bundle, precision="fp32").cached
    assert len(read_plans(plans_directory(bundle))) == 1


def test_vit_b_32_compiles_in_fp16(tmp_path):
    bundle = export_model(
        "ViT-B-32", pretrained="none", out=tmp_path / "b32", precisions=("fp32", "fp16"),
        text=False,
    )  # fmt: skip
    compiled = compile_plan(bundle, precision="fp16", architectures=["sm86", "sm120"])
    assert 150e6 < compiled.plan.bytes < 300e6
    assert names(compiled.plan.outputs) == [
        ("embedding", "float32", (-1, 512)), ("projected", "float32", (-1, -1)),
    ]  # fmt: skip
    kinds = [name for name in compiled.plan.projection if "MATRIX_MULTIPLY" in name]
    assert len(kinds) == 1


def test_a_basis_can_be_baked_in(bundle, embedder):
    basis = embedder.create_basis("tone", ["red", "green", "blue"])
    embedder._bases.pop("tone")
    compiled = compile_plan(bundle, precision="fp32", architectures=["sm89"], baked=basis)
    assert names(compiled.plan.inputs) == [("image", "uint8", (-1, 96, 96, 3))]
    assert compiled.plan.outputs[1].shape == (-1, 2)
    assert compiled.plan.spec.baked.sha256 == basis.sha256()
    assert compiled.plan.projection[0].endswith("(MATRIX_MULTIPLY)")
    arguments = {
        "runtime": "tensorrt-rtx",
        "runtime_version": load_tensorrt("tensorrt-rtx").version,
    }
    with pytest.raises(PlanError, match="only for the criterion 'tone'"):
        choose_plan(bundle, plans_directory(bundle), architecture="sm89", **arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architectures": ["sm90"]}, "sm80, sm86.*got sm90.*--runtime tensorrt"),
        ({"architectures": ["sm75"]}, "got sm75"),
        ({"batch": (8, 4, 32)}, "min <= opt <= max"),
        ({"batch": (0, 1, 1)}, "got 0:1:1"),
        ({"batch": (1, 1, 5000)}, "1024"),
        ({"max_columns": 0}, "1 to 65536 columns"),
        ({"precision": "int8"}, "fp16 or fp32"),
    ],
)
def test_invalid_requests(bundle, options, message):
    with pytest.raises(InvalidInputError, match=message):
        compile_plan(bundle, **{"precision": "fp32", **options})
    assert not plans_directory(bundle).exists()


def test_missing_graphs_and_packages(bundle, embedder, monkeypatch):
    with pytest.raises(BundleError, match="export again with --precision fp32,fp16"):
        compile_plan(bundle, precision="fp16")
    with pytest.raises(MissingDependencyError, match=r"crl-embeddings\[tensorrt\]"):
        compile_plan(bundle, precision="fp32", runtime="tensorrt")
    monkeypatch.setattr(tensorrt_runtime, "_import_rtx", lambda: None)
    load_tensorrt.cache_clear()
    with pytest.raises(MissingDependencyError, match=r"crl-embeddings\[tensorrt-rtx\]"):
        compile_plan(bundle, precision="fp32")
    load_tensorrt.cache_clear()


def test_a_basis_of_another_model_cannot_be_baked(bundle, embedder):
    basis = embedder.create_basis("tone", ["red", "green"])
    embedder._bases.pop("tone")
    other = ModelBundle(bundle.path, bundle.manifest)
    monkey = type("Other", (ModelBundle,), {"fingerprint": "0" * 64})(other.path, other.manifest)
    with pytest.raises(BasisMismatchError):
        compile_plan(monkey, precision="fp32", baked=basis)


def test_a_file_that_is_not_a_graph(bundle):
    bundle.image_graph("fp32").write_bytes(b"junk")  # after it was verified
    with pytest.raises(ExportError, match="cannot read it"):
        compile_plan(bundle, precision="fp32")


def test_enterprise_tensorrt_needs_the_gpu_it_compiles_for(bundle, monkeypatch):
    """The flags and architectures of versions that cannot be installed here."""

    class Flag:
        STRONGLY_TYPED = 1

    module = type("trt", (), {"NetworkDefinitionCreationFlag": Flag, "__version__": "10.3.0"})
    ten, eleven = (
        TensorRTRuntime("tensorrt", "10.3.0", module),
        TensorRTRuntime("tensorrt", "11.4.1", module),
    )
    assert (ten.network_flags, eleven.network_flags) == (2, 0)
    assert ten.architectures == ()
    monkeypatch.setattr(compiler, "load_tensorrt", lambda _: ten)
    monkeypatch.setattr(compiler.cuda, "architecture", lambda: "sm87")
    with pytest.raises(InvalidInputError, match="expected no --arch, or sm87"):
        compile_plan(bundle, precision="fp32", runtime="tensorrt", architectures=["sm89"])
    monkeypatch.undo()
    monkeypatch.setattr(compiler, "load_tensorrt", lambda _: ten)
    try:
        compiler.cuda.architecture()
    except EngineError:
        with pytest.raises(EngineError, match="expected an NVIDIA driver"):
            compile_plan(bundle, precision="fp32", runtime="tensorrt")


def test_wrong_and_damaged_plans_are_not_loaded(bundle, tmp_path):
    compiled = compile_plan(bundle, precision="fp32", architectures=["sm89"], max_columns=64)
    folder, plan = plans_directory(bundle), compiled.plan
    here = {"runtime": "tensorrt-rtx", "runtime_version": plan.spec.runtime_version}
    chosen = choose_plan(bundle, folder, architecture="sm89", **here)
    assert load_plan(bundle, folder, chosen)[4:8] == bytes(4)
    again = "crl compile .* --runtime tensorrt-rtx --precision"
    with pytest.raises(PlanError, match=f"for sm89.*{again} fp32 --arch sm86"):
        choose_plan(bundle, folder, architecture="sm86", **here)
    with pytest.raises(PlanError, match=f"for version {plan.spec.runtime_version}.*{again}"):
        choose_plan(
            bundle, folder, architecture="sm89", runtime="tensorrt-rtx", runtime_version="1.6"
        )
    with pytest.raises(PlanError, match="no plan in fp16"):
        choose_plan(bundle, folder, architecture="sm89", precision="fp16", **here)

    whole = compiled.path.read_bytes()
    for damage, message in ((whole[:1000], "cut off"), (whole[:-1] + b"!", "SHA-256")):
        compiled.path.write_bytes(damage)
        with pytest.raises(PlanError, match=message):
            load_plan(bundle, folder, plan)
    compiled.path.unlink()
    with pytest.raises(PlanError, match="missing"):
        load_plan(bundle, folder, plan)
    compiled.path.write_bytes(whole)

    record = compiled.path.with_suffix(".json")
    text = record.read_text()
    edits = {
        "schema 7": text.replace('"schema": 2', '"schema": 7'),
        "renamed or edited": text.replace('"sm89"', '"sm86"'),
        "not a readable record": text[:100],
    }
    for message, edited in edits.items():
        assert edited != text
        record.write_text(edited)
        with pytest.raises(PlanError, match=message):
            read_plans(folder)
    record.write_text(text)

    manifest = json.loads((bundle.path / "manifest.json").read_text())
    manifest["files"]["image.fp32.onnx"]["sha256"] = "0" * 64  # as if the graph was exported again
    (bundle.path / "manifest.json").write_text(json.dumps(manifest))
    from crl_sdk.model._manifest import parse_manifest

    changed = ModelBundle(bundle.path, parse_manifest((bundle.path / "manifest.json").read_bytes()))
    with pytest.raises(PlanError, match=f"made from graph.*{again} fp32"):
        load_plan(changed, folder, plan)
    with pytest.raises(PlanError, match="made from graph"):
        choose_plan(changed, folder, architecture="sm89", **here)


def test_a_full_disk_leaves_no_incomplete_plan(bundle, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("crl_sdk.storage._atomic_files.os.fsync", full)
    with pytest.raises(PlanError, match="No space left"):
        compile_plan(bundle, precision="fp32", architectures=["sm89"])
    assert list(plans_directory(bundle).iterdir()) == []


def test_ctrl_c_stops_a_compilation(bundle):
    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_plan(bundle, precision="fp32", progress=interrupt)
    assert not plans_directory(bundle).exists()
