"""The repository of `crl export-triton --backend python` in Triton's own server.

The server is PyTriton's binary, which has the python backend alone. Configurations of the other
backends are parsed with Triton's protobuf; they are not run.
"""

from __future__ import annotations

import io
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

grpc = pytest.importorskip("tritonclient.grpc", reason="make test-triton installs Triton")
pytest.importorskip("pytriton", reason="make test-triton installs Triton")

from google.protobuf import text_format  # noqa: E402
from PIL import Image  # noqa: E402
from tritonclient import http  # noqa: E402
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup  # noqa: E402
from tritonclient.utils import InferenceServerException  # noqa: E402

from crl_benchmarks import triton_ensemble  # noqa: E402
from crl_benchmarks.pytriton_server import RunningTriton, run_triton  # noqa: E402
from crl_export.triton_server.repository import (  # noqa: E402
    Options,
    export_repository,
    update_repository,
)
from crl_sdk import Basis, Embedder, ModelBundle, demo_bundle  # noqa: E402
from crl_sdk.basis import BasisDirectory  # noqa: E402

TOLERANCE = 1e-5
"""Largest difference of an element from `Embedder`, in fp32. The batches may differ."""

OUTPUTS = ("UNIVERSAL", "CONDITIONAL", "BASIS_SHA256")

Infer = Callable[..., dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def embedder() -> Iterator[Embedder]:
    with Embedder.open(demo_bundle(), engine="onnx/cpu/fp32") as opened:
        yield opened


def save(embedder: Embedder, bases: Path, criterion: str, texts: list[str]) -> Basis:
    basis = embedder.create_basis(criterion, texts, load=False)
    path = BasisDirectory(bases).path_of(basis.criterion, basis.fingerprint)
    path.parent.mkdir(parents=True, exist_ok=True)
    basis.save(path)
    return basis


@pytest.fixture(scope="module")
def bases(embedder: Embedder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for criterion, texts in (
        ("color", ["red", "green", "blue", "yellow"]),
        ("object shape", ["circle", "square", "triangle"]),
    ):
        embedder.add_basis(save(embedder, folder, criterion, texts))
    return folder


@pytest.fixture(scope="module")
def triton(
    bases: Path, embedder: Embedder, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningTriton]:
    folder = tmp_path_factory.mktemp("triton")
    options = Options(backend="python", max_batch=8, threads=1)
    export_repository(embedder.bundle, bases, folder / "repository", options)
    with run_triton(folder / "repository", folder) as server:
        yield server


def encoded_images() -> list[bytes]:
    """Return images of several sizes and formats, as the bytes of their files."""
    rng = np.random.default_rng(0)
    files = []
    for size, form in (
        ((200, 150), "JPEG"), ((96, 96), "PNG"), ((90, 300), "WEBP"), ((640, 480), "JPEG"),
        ((120, 97), "PNG"),
    ):  # fmt: skip
        corners = rng.integers(0, 256, (3, 4, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(corners).resize(size).save(buffer, form)
        files.append(buffer.getvalue())
    return files


def infer(client, model: str, name: str, values: np.ndarray, *, outputs=OUTPUTS) -> dict:
    """Call a model with one input by an unmodified tritonclient, and return its outputs."""
    module = grpc if isinstance(client, grpc.InferenceServerClient) else http
    kinds = {"O": "BYTES", "u": "UINT8", "f": "FP32"}
    given = module.InferInput(name, list(values.shape), kinds[values.dtype.kind])
    given.set_data_from_numpy(values)
    wanted = [module.InferRequestedOutput(each) for each in outputs]
    result = client.infer(model, [given], outputs=wanted)
    return {each: result.as_numpy(each) for each in outputs}


def column(files: list[bytes]) -> np.ndarray:
    return np.array(files, dtype=object).reshape(-1, 1)


@pytest.fixture(params=[grpc, http], ids=["grpc", "http"])
def call(request, triton) -> Iterator[Infer]:
    module = request.param
    address = triton.grpc if module is grpc else triton.http
    with module.InferenceServerClient(address) as client:
        yield lambda *arguments, **named: infer(client, *arguments, **named)


@pytest.mark.parametrize(
    ("criterion", "model"), [("color", "crl_color"), ("object shape", "crl_object_shape")]
)
def test_an_ensemble_gives_what_the_embedder_gives(call, embedder, criterion, model):
    files = encoded_images()
    expected = embedder.embed(files, [criterion])
    for sent, rows in ((files, slice(None)), (files[2:3], slice(2, 3))):
        got = call(model, "IMAGE", column(sent))
        np.testing.assert_allclose(got["UNIVERSAL"], expected.universal[rows], atol=TOLERANCE)
        np.testing.assert_allclose(got["CONDITIONAL"], expected[criterion][rows], atol=TOLERANCE)
        sha256 = embedder.bases[criterion].sha256().encode()
        assert got["BASIS_SHA256"].tolist() == [[sha256]] * len(sent)


def test_decoding_equals_load_pixels_bit_for_bit(call, embedder):
    from crl_sdk.model import load_pixels

    files = encoded_images()
    pixels = call("crl_decode", "IMAGE", column(files), outputs=["PIXELS"])["PIXELS"]
    spec = embedder.bundle.preprocess
    assert (pixels == np.stack([load_pixels(each, spec) for each in files])).all()


def test_pixels_and_stored_embeddings(call, embedder):
    pixels = np.random.default_rng(1).integers(0, 256, (3, 96, 96, 3), np.uint8)
    expected = embedder.embed(list(pixels), ["color"])
    got = call("crl_pixels_color", "PIXELS", pixels)
    np.testing.assert_allclose(got["CONDITIONAL"], expected["color"], atol=TOLERANCE)
    stored = call("crl_basis_color", "EMBEDDING", expected.universal, outputs=OUTPUTS[1:])
    np.testing.assert_allclose(stored["CONDITIONAL"], expected["color"], atol=TOLERANCE)


def test_a_damaged_image_fails_its_request_alone(triton, call, embedder):
    """Requests of one batch: those with a damaged image fail, and say which."""
    files = encoded_images()
    expected = embedder.embed(files, ["color"])["color"]
    damaged = files[3][:300]

    def one(i: int) -> None:
        if i % 4 == 3:
            with pytest.raises(InferenceServerException, match=r"image 1: .*damaged"):
                infer(client, "crl_color", "IMAGE", column([files[0], damaged]))
        else:
            got = infer(client, "crl_color", "IMAGE", column(files[i % 4 : i % 4 + 1]))
            np.testing.assert_allclose(got["CONDITIONAL"][0], expected[i % 4], atol=TOLERANCE)

    with grpc.InferenceServerClient(triton.grpc) as client, ThreadPoolExecutor(16) as pool:
        list(pool.map(one, range(64)))
    for bad, fault in ((b"", "empty"), (b"text", "not a readable image")):
        with pytest.raises(InferenceServerException, match=f"image 0: .*{fault}"):
            call("crl_color", "IMAGE", column([bad]))


def test_wrong_shapes_are_refused(call):
    with pytest.raises(InferenceServerException, match="batch-size must be <= 8"):
        call("crl_pixels_color", "PIXELS", np.zeros((9, 96, 96, 3), np.uint8))
    with pytest.raises(InferenceServerException, match="unexpected shape"):
        call("crl_pixels_color", "PIXELS", np.zeros((1, 97, 96, 3), np.uint8))
    with pytest.raises(InferenceServerException, match="unknown model"):
        call("crl_nothing", "PIXELS", np.zeros((1, 96, 96, 3), np.uint8))


def tower_statistics(client) -> tuple[int, int, set[int]]:
    """Return inferences and executions of the tower, and the sizes of its batches."""
    (found,) = client.get_inference_statistics("crl_tower").model_stats
    sizes = {each.batch_size for each in found.batch_stats}
    return found.inference_count, found.execution_count, sizes


def test_requests_are_batched(triton):
    pixels = np.zeros((1, 96, 96, 3), np.uint8)
    with grpc.InferenceServerClient(triton.grpc) as client, ThreadPoolExecutor(32) as pool:
        images, runs, _ = tower_statistics(client)

        def one(_: int) -> None:
            infer(client, "crl_pixels_color", "PIXELS", pixels)

        for _ in range(20):  # until 32 clients at once meet in a batch
            list(pool.map(one, range(64)))
            now_images, now_runs, sizes = tower_statistics(client)
            if max(sizes) > 1 and now_runs - runs < now_images - images:
                break
        assert (now_images - images) % 64 == 0
        assert now_runs - runs < now_images - images and 1 < max(sizes) <= 8


def test_what_the_server_says_about_its_models(triton, embedder):
    with grpc.InferenceServerClient(triton.grpc) as client:
        config = client.get_model_config("crl_object_shape").config
        described = {key: value.string_value for key, value in config.parameters.items()}
        assert described["crl_fingerprint"] == embedder.bundle.fingerprint
        assert described["crl_criterion"] == "object shape"
        assert described["crl_basis_sha256"] == embedder.bases["object shape"].sha256()
        ready = {each.name for each in client.get_model_repository_index().models}
        assert len(ready) == 8


@dataclass
class Callers:
    """Threads that call both ensembles of a criterion until they are stopped.

    Attributes:
        server: The server.
        pixels: The image of all calls.
        versions: SHA-256 of the bases in the order of their loads.
        loaded: Number of bases that are loaded. A call that begins now must not get an older one.
        replies: Number of replies by model and basis.
        first: First conditional embedding of each basis.
        faults: What went wrong.
    """

    server: RunningTriton
    pixels: np.ndarray
    versions: list[str] = field(default_factory=list)
    loaded: int = 0
    replies: Counter = field(default_factory=Counter)
    first: dict[str, np.ndarray] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def __enter__(self) -> Callers:
        self._stop, self._lock = threading.Event(), threading.Lock()
        buffer = io.BytesIO()
        Image.fromarray(self.pixels).save(buffer, "PNG")
        calls = [
            ("crl_pixels_color", "PIXELS", self.pixels[None]),
            ("crl_color", "IMAGE", column([buffer.getvalue()])),
        ]
        self._threads = [threading.Thread(target=self._run, args=(each,)) for each in calls * 2]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, arguments) -> None:
        with grpc.InferenceServerClient(self.server.grpc) as client:
            while not self._stop.is_set():
                oldest = self.loaded - 1
                try:
                    got = infer(client, *arguments)
                except InferenceServerException as error:
                    self.faults.append(str(error))
                    continue
                sha256, rows = got["BASIS_SHA256"][0, 0].decode(), got["CONDITIONAL"]
                with self._lock:
                    known = self.first.setdefault(sha256, rows)
                    self.replies[arguments[0], sha256] += 1
                same = known.shape == rows.shape and np.abs(known - rows).max() <= TOLERANCE
                if not same:
                    self.faults.append(f"rows of {sha256} changed")
                if self.versions.index(sha256) < oldest:
                    self.faults.append(f"{sha256} after a newer one was loaded")

    def wait(self, replies: int, sha256: str) -> None:
        """Wait until each ensemble has given so many more replies with a basis."""
        wanted = {
            model: self.replies[model, sha256] + replies
            for model in ("crl_color", "crl_pixels_color")
        }
        ends = time.monotonic() + 60
        while any(self.replies[model, sha256] < count for model, count in wanted.items()):
            assert time.monotonic() < ends and not self.faults, self.faults[:3]
            time.sleep(0.01)


def test_a_basis_is_replaced_under_load_without_a_gap(embedder, tmp_path):
    """Three times, also by one with another number of columns: each reply is old or new."""
    pixels = np.random.default_rng(2).integers(0, 256, (96, 96, 3), np.uint8)
    bundle, bases, repository = embedder.bundle, tmp_path / "bases", tmp_path / "repository"
    served: list[Basis] = []
    with ExitStack() as stack:
        for texts in (
            ["red", "green", "blue", "yellow"],
            ["red", "green", "blue", "black"],
            ["red", "green", "blue", "yellow", "white", "black"],
            ["red", "green"],
        ):
            served.append(save(embedder, bases, "color", texts))
            if len(served) == 1:
                export_repository(bundle, bases, repository, Options(backend="python", threads=1))
                server = stack.enter_context(run_triton(repository, tmp_path))
                client = stack.enter_context(grpc.InferenceServerClient(server.grpc))
                callers = Callers(server, pixels, [served[0].sha256()], loaded=1)
                stack.enter_context(callers)
            else:
                callers.versions.append(served[-1].sha256())
                written = update_repository(bundle, bases, repository)
                assert written.load == ("crl_color",)
                callers.wait(5, served[-2].sha256())  # nothing changes before the load
                assert ("crl_color", served[-1].sha256()) not in callers.replies
                client.load_model("crl_color")
                callers.loaded += 1
            callers.wait(20, served[-1].sha256())

        # a further criterion appears, and a broken version leaves the old one in service
        save(embedder, bases, "size", ["small", "large"])
        (new,) = update_repository(bundle, bases, repository).load
        client.load_model(new)
        infer(client, "crl_pixels_size", "PIXELS", pixels[None])
        broken = repository / "crl_basis_color" / "9"
        broken.mkdir()
        (broken / "model.py").write_text("raise RuntimeError('broken')")
        client.load_model("crl_color")  # the ensemble can be loaded, with the old version
        index = client.get_model_repository_index().models
        (state,) = [x for x in index if (x.name, x.version) == ("crl_basis_color", "9")]
        assert state.state == "UNAVAILABLE" and "broken" in state.reason
        callers.wait(20, served[-1].sha256())
    assert callers.faults == []
    assert set(callers.first) == {basis.sha256() for basis in served}
    for basis in served:
        embedder.add_basis(basis)
        expected = embedder.embed([pixels], ["color"])["color"]
        np.testing.assert_allclose(callers.first[basis.sha256()], expected, atol=TOLERANCE)


def test_the_benchmark_beside_crl_serve(monkeypatch):
    monkeypatch.setattr(triton_ensemble, "CALLERS", (1, 4))
    monkeypatch.setattr(triton_ensemble, "WARM_UP", 0.1)
    page = triton_ensemble.run(demo_bundle(), rounds=1, seconds=0.3)
    for row in ("| 1 | Triton |", "| 4 | Triton |", "| 4 | crl serve |"):
        assert row in page


def read_configs(repository: Path) -> dict[str, ModelConfig]:
    return {
        path.parent.name: text_format.Parse(path.read_text(), ModelConfig())
        for path in repository.glob("*/config.pbtxt")
    }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"device": "gpu", "instances": 2},
        {"device": "gpu", "accelerator": "tensorrt"},
        {"accelerator": "openvino", "threads": 2},
        {"backend": "python"},
        {"backend": "tensorrt", "device": "gpu"},
    ],
    ids=str,
)
def test_triton_reads_the_configurations(bases, tmp_path, embedder, options, monkeypatch):
    """Parsed with Triton's protobuf. Only the backend `python` is also run."""
    bundle = embedder.bundle
    if options.get("backend") == "tensorrt":
        bundle = bundle_with_a_plan(tmp_path)
    written = export_repository(bundle, bases, tmp_path / "repository", Options(**options))
    found = read_configs(written.path)
    assert len(found) == 8
    tower, basis = found["crl_tower"], found["crl_basis_color"]
    assert tower.max_batch_size == 32 and tower.HasField("dynamic_batching")
    assert {each.batch_size for each in tower.model_warmup} == {1, 32}
    kinds = {"cpu": ModelInstanceGroup.KIND_CPU, "gpu": ModelInstanceGroup.KIND_GPU}
    (group,) = tower.instance_group
    assert (group.count, group.kind) == (
        options.get("instances", 1), kinds[options.get("device", "cpu")],
    )  # fmt: skip
    accelerators = tower.optimization.execution_accelerators
    named = [
        each.name
        for each in (
            *accelerators.gpu_execution_accelerator, *accelerators.cpu_execution_accelerator,
        )
    ]  # fmt: skip
    assert named == ([options["accelerator"]] if "accelerator" in options else [])
    backend = options.get("backend", "onnxruntime")
    assert (tower.backend or tower.platform) == {"tensorrt": "tensorrt_plan"}.get(backend, backend)
    assert basis.backend == ("python" if backend == "python" else "onnxruntime")
    assert [list(each.dims) for each in tower.input] == [[96, 96, 3]]
    outer = found["crl_color"].ensemble_scheduling.step
    inner = found["crl_pixels_color"].ensemble_scheduling.step
    assert [each.model_name for each in outer] == ["crl_decode", "crl_pixels_color"]
    assert [each.model_name for each in inner] == ["crl_tower", "crl_basis_color"]
    for steps in (outer, inner):
        for step in steps:
            model = found[step.model_name]
            assert set(step.input_map) == {each.name for each in model.input}
            assert set(step.output_map) <= {each.name for each in model.output}
    record = json.loads((written.path / "crl-repository.json").read_text())
    assert record["options"]["backend"] == backend


def bundle_with_a_plan(tmp_path: Path) -> ModelBundle:
    """Return a copy of the demo bundle with the record of a plan, and bytes in its place."""
    import hashlib
    import shutil

    from crl_sdk.engines import _tensorrt_plans as plans

    bundle = ModelBundle.open(shutil.copytree(demo_bundle(), tmp_path / "bundle"))
    spec = plans.PlanSpec(
        runtime="tensorrt", runtime_version="10.9.0", architectures=("sm90",), precision="fp32",
        batch=(1, 8, 32), max_columns=0, onnx_sha256=plans.graph_digest(bundle, "fp32"),
        baked=plans.Baked(criterion="color", sha256="0" * 64),
    )  # fmt: skip
    outputs = (("embedding", 128), ("projected", 3))
    record = plans.Plan(
        schema=plans.SCHEMA, spec=spec, fingerprint=bundle.fingerprint,
        sha256=hashlib.sha256(b"plan").hexdigest(), bytes=4,
        inputs=(plans.PlanTensor(name="image", dtype="uint8", shape=(-1, 96, 96, 3)),),
        outputs=tuple(plans.PlanTensor(name=n, dtype="float32", shape=(-1, d)) for n, d in outputs),
        layers=1, projection=(), seconds=0.0, peak_memory=0,
    )  # fmt: skip
    plans.write_plan(plans.plans_directory(bundle), record, b"plan")
    return bundle
