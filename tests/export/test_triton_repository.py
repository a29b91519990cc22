"""Model repositories of Triton: graphs, steps, updates and bad input. Triton's own server runs them
in tests/scale/triton.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import onnxruntime as ort
import pytest
from PIL import Image

from crl_export.triton_server import configs
from crl_export.triton_server.graphs import write_basis, write_tower
from crl_export.triton_server.repository import (
    RECORD,
    Options,
    Written,
    export_repository,
    model_names,
    update_repository,
)
from crl_sdk import Embedder, ModelBundle, demo_bundle
from crl_sdk.engines._tensorrt_plans import (
    Baked,
    Plan,
    PlanSpec,
    PlanTensor,
    graph_digest,
    plans_directory,
    write_plan,
)
from crl_sdk.errors import (
    BasisError,
    BasisMismatchError,
    BundleError,
    CrlError,
    ExportError,
    InvalidInputError,
    ParityError,
    PlanError,
)
from crl_sdk.model import load_pixels
from crl_sdk.model._manifest import fingerprint_of, write_manifest
from crl_sdk.projection import Projection
from support import save_basis

COLOURS = ("red", "green", "blue", "yellow")


@pytest.fixture(scope="module")
def bundle() -> ModelBundle:
    return ModelBundle.open(demo_bundle())


@pytest.fixture
def bases(embedder: Embedder, tmp_path: Path) -> Path:
    """A directory with the bases `color` and `object shape`."""
    for criterion, texts in (("color", COLOURS), ("object shape", ("circle", "square", "star"))):
        save_basis(embedder.create_basis(criterion, texts, load=False), tmp_path / "bases")
    return tmp_path / "bases"


@pytest.fixture
def export(bundle, bases, tmp_path):
    """Return a function that exports a repository with some options."""

    def run(out: str = "repository", **options) -> Written:
        return export_repository(bundle, bases, tmp_path / out, Options(**options))

    return run


def snapshot(folder: Path) -> dict[str, str]:
    """Return the digest of every file of a directory."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def unit_rows(count: int, dim: int = 128) -> np.ndarray:
    rows = np.random.default_rng(1).standard_normal((count, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def run_graph(path: Path, outputs: list[str], name: str, rows: np.ndarray) -> list[np.ndarray]:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [each.name for each in session.get_inputs()] == [name]
    return session.run(outputs, {name: rows})


def test_the_tower_is_the_image_graph_without_the_projection(bundle, embedder, tmp_path):
    difference = write_tower(bundle, "fp32", tmp_path / "model.onnx")
    assert difference <= 1e-6
    pixels = np.random.default_rng(0).integers(0, 256, (5, 96, 96, 3), np.uint8)
    (rows,) = run_graph(tmp_path / "model.onnx", ["embedding"], "image", pixels)
    np.testing.assert_allclose(rows, embedder.embed(list(pixels)).universal, atol=1e-6)


@pytest.mark.parametrize("post", ["l2", "standardise", "none"])
@pytest.mark.parametrize("columns", [1, 4])
def test_a_basis_as_a_graph(embedder, tmp_path, post, columns):
    made = embedder.create_basis("color", COLOURS, load=False)
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((128, columns)).astype(np.float32)
    projection = Projection(weight, rng.standard_normal(columns).astype(np.float32), post)
    basis = replace(made, projection=projection)
    write_basis(basis, tmp_path / "model.onnx")
    rows = np.concatenate([unit_rows(9), np.zeros((1, 128), np.float32)])
    outputs = ["CONDITIONAL", "BASIS_SHA256"]
    got, names = run_graph(tmp_path / "model.onnx", outputs, "EMBEDDING", rows)
    np.testing.assert_allclose(got, projection.apply(rows), atol=2e-5)
    assert names.tolist() == [[basis.sha256()]] * 10


def test_a_zero_row_stays_zero(embedder, tmp_path):
    made = embedder.create_basis("color", COLOURS, load=False)
    weight = np.ones((128, 4), np.float32)
    for post in ("l2", "standardise"):
        basis = replace(made, projection=Projection(weight, np.zeros(4, np.float32), post))
        write_basis(basis, tmp_path / "model.onnx")
        rows = np.zeros((2, 128), np.float32)
        (got,) = run_graph(tmp_path / "model.onnx", ["CONDITIONAL"], "EMBEDDING", rows)
        assert (got == 0).all()


def test_a_graph_that_differs_is_not_written(export, monkeypatch, tmp_path):
    monkeypatch.setattr(
        Projection, "apply", lambda self, rows: np.zeros((len(rows), self.output_dim), np.float32)
    )
    with pytest.raises(ParityError, match="differs from its projection"):
        export()
    assert not (tmp_path / "repository").exists()


def test_the_files_of_a_repository(export, bundle):
    written = export()
    assert written.load == ("crl_color", "crl_object_shape")
    models = {path.name for path in written.path.iterdir() if path.is_dir()}
    assert models == {
        "crl_decode", "crl_tower", "crl_basis_color", "crl_basis_object_shape", "crl_color",
        "crl_object_shape", "crl_pixels_color", "crl_pixels_object_shape",
    }  # fmt: skip
    for model in models:
        text = (written.path / model / "config.pbtxt").read_text()
        assert f'name: "{model}"' in text and bundle.fingerprint in text
        assert list((written.path / model / "1").iterdir())  # object stores drop empty folders
    record = json.loads((written.path / RECORD).read_text())
    assert record["fingerprint"] == bundle.fingerprint
    assert record["bases"]["object shape"]["name"] == "object_shape"
    assert not list(written.path.parent.glob(".repository*"))


@pytest.mark.parametrize("crops", [False, True])
def test_the_decoding_step_is_load_pixels_and_needs_numpy_and_pillow_alone(
    cropping_bundle, tmp_path, crops
):
    """Run the step in a process without the SDK, with a module in place of Triton's."""
    with Embedder.open(cropping_bundle if crops else demo_bundle()) as embedder:
        save_basis(embedder.create_basis("color", COLOURS, load=False), tmp_path / "bases")
    written = export_repository(
        embedder.bundle, tmp_path / "bases", tmp_path / "repository", Options()
    )
    spec = embedder.bundle.preprocess
    assert (spec.resize is not None) == crops
    rng = np.random.default_rng(0)
    encoded = []
    for size, mode, form in (
        ((150, 200), "RGB", "JPEG"), ((300, 90), "RGBA", "PNG"), ((97, 96), "L", "PNG"),
        ((64, 400), "CMYK", "JPEG"), ((120, 130), "P", "GIF"),
    ):  # fmt: skip
        channels = {"L": (), "P": (), "RGB": (3,), "RGBA": (4,), "CMYK": (4,)}[mode]
        values = rng.integers(0, 256, (*size, *channels), np.uint8)
        buffer = io.BytesIO()
        Image.frombytes(mode, size[::-1], values.tobytes()).save(buffer, form)
        encoded.append(buffer.getvalue())
    np.savez(tmp_path / "images.npz", *[np.frombuffer(each, np.uint8) for each in encoded])
    script = tmp_path / "step.py"
    script.write_text(
        """
import importlib.abc, importlib.util, sys, types
import numpy as np

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] not in {"numpy", "PIL", "crl_sdk"} | sys.stdlib_module_names:
            raise ImportError(f"{name} is not installed")

class Tensor:
    def __init__(self, name, values): self.name, self.values = name, values
    def as_numpy(self): return self.values
class TritonError(Exception):
    INVALID_ARG = 3
    def __init__(self, message, code): super().__init__(message); self.code = code
class InferenceResponse:
    def __init__(self, output_tensors, error=None):
        self.output_tensors, self.error = output_tensors, error

triton = types.ModuleType("triton_python_backend_utils")
triton.Tensor, triton.TritonError, triton.InferenceResponse = Tensor, TritonError, InferenceResponse
triton.get_input_tensor_by_name = lambda request, name: request[name]
sys.modules["triton_python_backend_utils"] = triton
sys.meta_path.insert(0, Refuse())
model_file, images, out = sys.argv[1:]
spec = importlib.util.spec_from_file_location("model", model_file)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert sys.modules["crl_sdk"].__file__.startswith(model_file.removesuffix("model.py"))
model = module.TritonPythonModel()
model.initialize({})
encoded = [each.tobytes() for each in np.load(images).values()]
column = lambda items: {"IMAGE": Tensor("IMAGE", np.array(items, dtype=object).reshape(-1, 1))}
good, bad, last = model.execute([column(encoded), column([encoded[0], b"x"]), column(encoded[:1])])
assert bad.output_tensors == [] and "image 1: not a readable image" in str(bad.error)
assert bad.error.code == 3 and good.error is None and last.error is None
assert (last.output_tensors[0].values == good.output_tensors[0].values[:1]).all()
np.save(out, good.output_tensors[0].values)
model.finalize()
"""
    )
    step = written.path / "crl_decode" / "1" / "model.py"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, "-P" if sys.version_info >= (3, 11) else "-B", script, step,
         tmp_path / "images.npz", tmp_path / "pixels.npy"],
        check=True, env={**environment, "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    expected = np.stack([load_pixels(each, spec) for each in encoded])
    assert (np.load(tmp_path / "pixels.npy") == expected).all()


def test_the_configurations_of_each_backend(export):
    python = export("a", backend="python", max_batch=4, instances=2, threads=3)
    tower = (python.path / "crl_tower" / "config.pbtxt").read_text()
    assert 'backend: "python"' in tower and "count: 2\n  kind: KIND_CPU" in tower
    assert re.search(r'key: "intra_op_thread_count"\s+value {\s+string_value: "3"', tower)
    assert [int(size) for size in re.findall(r"batch_size: (\d+)", tower)] == [4, 1, 4]
    assert (python.path / "crl_basis_color" / "1" / "model.py").exists()
    onnx = export("b", device="gpu", accelerator="tensorrt")
    tower = (onnx.path / "crl_tower" / "config.pbtxt").read_text()
    assert 'backend: "onnxruntime"' in tower and "kind: KIND_GPU" in tower
    assert 'value: "image:32x96x96x3"' in tower and 'value: "FP32"' in tower
    assert not (onnx.path / "crl_tower" / "1" / "model.py").exists()
    openvino = export("c", accelerator="openvino")
    assert "cpu_execution_accelerator" in (openvino.path / "crl_tower/config.pbtxt").read_text()


def plan_record(bundle: ModelBundle, data: bytes, **changes) -> Plan:
    spec = PlanSpec(
        runtime="tensorrt", runtime_version="10.9.0", architectures=("sm90",), precision="fp32",
        batch=(1, 8, 32), max_columns=0, onnx_sha256=graph_digest(bundle, "fp32"),
        baked=Baked(criterion="color", sha256="0" * 64),
    )  # fmt: skip
    spec = msgspec.structs.replace(spec, **changes)
    tensors = [("embedding", 128), ("projected", 3)]
    return Plan(
        schema=2, spec=spec, fingerprint=bundle.fingerprint,
        sha256=hashlib.sha256(data).hexdigest(), bytes=len(data),
        inputs=(PlanTensor(name="image", dtype="uint8", shape=(-1, 96, 96, 3)),),
        outputs=tuple(PlanTensor(name=n, dtype="float32", shape=(-1, d)) for n, d in tensors),
        layers=1, projection=(), seconds=0.0, peak_memory=0,
    )  # fmt: skip


def test_a_plan_is_used_if_triton_can_batch_it(bundle_copy, bases, tmp_path):
    bundle = ModelBundle.open(bundle_copy)
    options = Options(backend="tensorrt", device="gpu")
    for fault, changes in (
        ("no batch dimension", {"baked": None, "max_columns": 64}),
        ("for tensorrt-rtx", {"runtime": "tensorrt-rtx"}),
        ("at most 16 images", {"batch": (1, 8, 16)}),
    ):
        plan = plan_record(bundle, b"plan", **changes)
        path = write_plan(plans_directory(bundle), plan, b"plan")
        with pytest.raises(PlanError, match=f"{fault}.*crl compile .* --baked BASIS_FILE"):
            export_repository(bundle, bases, tmp_path / "repository", options)
        path.unlink()
        path.with_suffix(".json").unlink()
    write_plan(plans_directory(bundle), plan_record(bundle, b"plan"), b"plan")
    written = export_repository(bundle, bases, tmp_path / "repository", options)
    tower = written.path / "crl_tower"
    assert (tower / "1" / "model.plan").read_bytes() == b"plan"
    text = (tower / "config.pbtxt").read_text()
    assert 'platform: "tensorrt_plan"' in text and 'name: "projected"' in text
    assert "10.9.0" in text and "sm90" in text
    basis = (written.path / "crl_basis_color" / "config.pbtxt").read_text()
    assert 'backend: "onnxruntime"' in basis
    other = plan_record(bundle, b"plan", architectures=("sm89",))
    write_plan(plans_directory(bundle), other, b"plan")
    with pytest.raises(PlanError, match="one kind of GPU"):
        export_repository(bundle, bases, tmp_path / "second", options)


def test_an_update_adds_versions_of_what_changed_and_nothing_else(export, bundle, bases, embedder):
    written = export(backend="python")
    before = snapshot(written.path)
    again = update_repository(bundle, bases, written.path)
    assert again.load == () and snapshot(written.path) == before

    save_basis(embedder.create_basis("color", [*COLOURS, "white"], load=False), bases)
    save_basis(embedder.create_basis("size", ["small", "large"], load=False), bases)
    again = update_repository(bundle, bases, written.path)
    assert again.load == ("crl_color", "crl_size")
    assert again.repository.bases["color"].version == 2
    assert again.repository.bases["object shape"] == written.repository.bases["object shape"]
    after = snapshot(written.path)
    assert {name for name in before if before[name] != after.get(name)} == {
        RECORD, "crl_basis_color/config.pbtxt", "crl_color/config.pbtxt",
        "crl_pixels_color/config.pbtxt",
    }  # fmt: skip
    assert {name.split("/")[0] for name in set(after) - set(before)} == {
        "crl_basis_color", "crl_basis_size", "crl_size", "crl_pixels_size",
    }  # fmt: skip
    assert (written.path / "crl_basis_color" / "2" / "model.py").exists()
    assert "dims: 4" in (written.path / "crl_color" / "config.pbtxt").read_text()


def test_a_criterion_without_a_basis_stays(export, bundle, bases):
    written = export()
    for file in bases.rglob("object+shape*"):
        file.unlink()
    again = update_repository(bundle, bases, written.path)
    assert again.kept == ("object shape",) and again.load == ()
    assert (written.path / "crl_object_shape").is_dir()


def test_a_killed_update_is_completed_by_the_next(export, bundle, bases, embedder, monkeypatch):
    written = export()
    before = snapshot(written.path)
    save_basis(embedder.create_basis("color", ["black", "white"], load=False), bases)

    def killed(folder, config):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("crl_export.triton_server.repository._write_config", killed)
        update_repository(bundle, bases, written.path)
    after = snapshot(written.path)
    assert {name: after[name] for name in before} == before  # only a version folder was added
    again = update_repository(bundle, bases, written.path)
    assert again.load == ("crl_color",) and again.repository.bases["color"].version == 3


def test_a_second_update_at_once_is_refused(export, bundle, bases):
    written = export()
    opened = os.open(written.path, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX)
        with pytest.raises(ExportError, match="another process updates it"):
            update_repository(bundle, bases, written.path)
    finally:
        os.close(opened)
    assert update_repository(bundle, bases, written.path).load == ()


def test_a_full_disk_is_an_error_of_the_sdk(export, bundle, bases, embedder, monkeypatch):
    written = export()
    save_basis(embedder.create_basis("size", ["small", "large"], load=False), bases)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("crl_export.triton_server.repository.write_basis", full)
    with pytest.raises(ExportError, match="No space left on device"):
        update_repository(bundle, bases, written.path)
    with pytest.raises(ExportError, match="No space left on device"):
        export_repository(bundle, bases, written.path.with_name("other"), Options())
    assert not written.path.with_name("other").exists()


def test_only_the_bundle_that_a_repository_was_made_from_updates_it(export, bases, bundle_copy):
    written = export()
    before = snapshot(written.path)
    other = ModelBundle.open(bundle_copy)
    manifest = msgspec.structs.replace(
        other.manifest, source=msgspec.structs.replace(other.manifest.source, quick_gelu=True)
    )
    fingerprint = fingerprint_of(
        manifest.source, manifest.preprocess, manifest.files[manifest.text.tokenizer].sha256
    )
    write_manifest(bundle_copy, msgspec.structs.replace(manifest, fingerprint=fingerprint))
    with pytest.raises(ExportError, match="name the bundle it was made from"):
        update_repository(ModelBundle.open(bundle_copy), bases, written.path)
    assert snapshot(written.path) == before


def test_bad_directories(export, bundle, bases, tmp_path):
    written = export()
    with pytest.raises(InvalidInputError, match=r"exists already.*--update"):
        export()
    (tmp_path / "file").touch()
    for out, fault in (
        (tmp_path / "file", "exists already"),
        (tmp_path / "no" / "where", "expected an existing directory"),
        (tmp_path / "file" / "inside", "expected an existing directory"),
    ):
        with pytest.raises(InvalidInputError, match=fault):
            export_repository(bundle, bases, out, Options())
    with pytest.raises(ExportError, match="cannot be written"):
        export_repository(bundle, bases, Path("/proc/repository"), Options())
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ExportError, match="expected a repository"):
            update_repository(bundle, bases, folder)
    (written.path / RECORD).write_text("{")
    with pytest.raises(ExportError, match="not a readable record"):
        update_repository(bundle, bases, written.path)


def test_bad_bases(export, bundle, bases, embedder, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(BasisError, match=r"found none.*crl basis create CRITERION"):
            export_repository(bundle, folder, tmp_path / "out", Options())
    basis = embedder.create_basis("color", COLOURS, load=False)
    foreign = replace(basis, fingerprint="ab" * 32)
    save_basis(foreign, tmp_path / "foreign")
    with pytest.raises(BasisError, match=r"of other models: color"):
        export_repository(bundle, tmp_path / "foreign", tmp_path / "out", Options())
    (bases / bundle.fingerprint[:16] / "size.safetensors").write_bytes(foreign.to_bytes())
    with pytest.raises(BasisMismatchError):
        export()
    (bases / bundle.fingerprint[:16] / "size.safetensors").write_bytes(b"damaged")
    with pytest.raises(BundleError, match="not a valid basis"):
        export()
    assert not (tmp_path / "repository").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "criteria",
    [("a b", "a_b"), ("tower",), ("decode",), ("color", "basis color"), ("x", "pixels x")],
)
def test_names_that_collide_are_refused(criteria):
    with pytest.raises(InvalidInputError, match="would both have the Triton model"):
        model_names(criteria)


def test_an_update_does_not_bring_a_name_that_collides(export, bundle, bases, embedder):
    written = export()
    before = snapshot(written.path)
    for file in bases.rglob("object+shape*"):
        file.unlink()
    save_basis(embedder.create_basis("object_shape", ["circle", "star"], load=False), bases)
    with pytest.raises(InvalidInputError, match="'object_shape' and criterion 'object shape'"):
        update_repository(bundle, bases, written.path)
    assert snapshot(written.path) == before


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"max_batch": 0}, "--max-batch"),
        ({"max_batch": -1}, "--max-batch"),
        ({"max_batch": 4096}, "--max-batch"),
        ({"instances": 0}, "--instances"),
        ({"threads": 0}, "--threads"),
        ({"backend": "tensorrt"}, "needs --device gpu"),
        ({"backend": "python", "device": "gpu"}, "runs on the CPU"),
        ({"backend": "tensorrt", "device": "gpu", "precision": "int8"}, "no int8"),
        ({"backend": "python", "accelerator": "openvino"}, "needs --backend onnxruntime"),
        ({"accelerator": "tensorrt"}, "needs --device gpu"),
        ({"accelerator": "openvino", "device": "gpu"}, "needs --device cpu"),
        ({"accelerator": "tensorrt", "device": "gpu", "precision": "int8"}, "no int8"),
        ({"precision": "int8"}, "expected an image graph in int8"),
    ],
)  # fmt: skip
def test_bad_options(export, tmp_path, options, fault):
    with pytest.raises(CrlError, match=fault):
        export(**options)
    assert not (tmp_path / "repository").exists()


def test_text_format():
    message = {"name": 'a "b"\\', "kind": configs.Name("KIND_CPU"), "dims": [1, 2], "empty": {}}
    assert configs.to_text(message) == (
        'name: "a \\"b\\"\\\\"\nkind: KIND_CPU\ndims: 1\ndims: 2\nempty {\n}\n'
    )


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "crl_sdk", "export-triton", *map(str, arguments)],
        capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip


def test_the_command(bases, tmp_path, embedder):
    out = tmp_path / "repository"
    arguments = [demo_bundle(), "--bases", bases, "--out", out]
    done = run(*arguments, "--backend", "python", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["load"] == ["crl_color", "crl_object_shape"]
    done = run(*arguments)
    assert done.returncode == 1 and "exists already" in done.stderr
    done = run(*arguments, "--update", "--max-batch", "4")
    assert done.returncode == 1 and "--max-batch" in done.stderr
    save_basis(embedder.create_basis("size", ["small", "large"], load=False), bases)
    done = run(*arguments, "--update")
    assert done.returncode == 0 and "repository/models/crl_size/load" in done.stderr
    assert "crl_size, crl_pixels_size; version 1" in done.stdout
    assert "nothing has changed" in run(*arguments, "--update").stderr


def test_torch_is_not_imported(bases, tmp_path):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from pathlib import Path\n"
        "from crl_export.triton_server.repository import Options, export_repository\n"
        "from crl_sdk import ModelBundle\n"
        "bundle, bases, out = map(Path, sys.argv[1:])\n"
        "export_repository(ModelBundle.open(bundle), bases, out, Options())\n"
    )
    arguments = [demo_bundle(), bases, tmp_path / "repository"]
    subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=True)
