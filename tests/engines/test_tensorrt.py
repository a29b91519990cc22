"""The TensorRT engine on a simulated GPU: buffers, buckets, graphs, errors, and freed memory."""

from __future__ import annotations

import gc
import inspect
import logging
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np
import pytest
from gpu_fixtures import COLUMNS, MOST
from simulated_gpu import CUresult, Driver, tensorrt

from crl_sdk import Embedder
from crl_sdk.engines import _cuda as cuda
from crl_sdk.engines import _tensorrt as module
from crl_sdk.engines import _tensorrt_runtime as tensorrt_runtime
from crl_sdk.engines._selection import choose_engine, list_candidates
from crl_sdk.engines._tensorrt import TensorRTImageEngine
from crl_sdk.engines._tensorrt_plans import find_plan, plans_directory, read_plans
from crl_sdk.engines._verify import verify
from crl_sdk.errors import ClosedError, EngineError, PlanError
from crl_sdk.model import _parity as parity


def inputs(bundle, images, columns, seed=0):
    rng = np.random.default_rng(seed)
    spec = bundle.preprocess
    return (
        rng.integers(0, 256, (images, spec.height, spec.width, 3), np.uint8),
        rng.standard_normal((bundle.embedding_dim, columns)).astype(np.float32),
        rng.standard_normal(columns).astype(np.float32),
    )


def test_every_batch_size_and_number_of_columns_agrees_with_the_reference(gpu, bundle, reference):
    engine = TensorRTImageEngine.open(bundle)
    assert str(engine.name) == "tensorrt-rtx/cuda/fp32"
    for images in (1, 3, 2, MOST, 4, 1, MOST + 3, 2 * MOST):
        for columns in (0, 1, 63, 64, 65, COLUMNS):
            arrays = inputs(bundle, images, columns, seed=images + columns)
            for got, expected in zip(engine.run(*arrays), reference.run(*arrays), strict=True):
                assert got.shape == expected.shape and got.dtype == np.float32
                np.testing.assert_allclose(got, expected, atol=2e-5)
    rows, columns = engine.run(*inputs(bundle, 0, 3))
    assert rows.shape == (0, bundle.embedding_dim) and columns.shape == (0, 3)
    engine.close()


def test_one_graph_for_each_bucket_of_a_lane_and_none_recorded_twice(gpu, bundle):
    engine = TensorRTImageEngine.open(bundle)
    # for 1, 2, 4 and 5 images in each of the two lanes, before the first run
    assert len(gpu.driver.runnable) == 8
    for images in (1, 2, 3, 4, 5, 3, 1) * 2:
        engine.run(*inputs(bundle, images, 0))
    assert len(gpu.driver.runnable) == 8 and len(set(gpu.driver.launched)) == 8
    before = len(gpu.driver.buffers)
    for columns in (1, 40, 64, 64):  # one bucket of columns
        engine.run(*inputs(bundle, 1, columns))
    assert len(gpu.driver.runnable) == 10
    assert len(gpu.driver.buffers) == before  # all buckets share the memory
    engine.run(*inputs(bundle, 1, 65))
    assert len(gpu.driver.runnable) == 11
    engine.close()


def start_two(engine, bundle, columns=(7, 7)):
    """Start two runs before the first one is finished; return what they were given and yielded."""
    given = [inputs(bundle, 2 + i, columns[i], seed=i) for i in range(2)]
    finishes = [engine.start(*arrays) for arrays in given]
    return given, [finish() for finish in finishes]


def test_two_runs_are_under_way(gpu, bundle, reference):
    """The second run's pixels and bases are copied before the first run is finished."""
    engine = TensorRTImageEngine.open(bundle)
    for columns in ((7, 7), (7, 70), (0, 64)):
        given, got = start_two(engine, bundle, columns)
        for arrays, results in zip(given, got, strict=True):
            for ours, expected in zip(results, reference.run(*arrays), strict=True):
                np.testing.assert_allclose(ours, expected, atol=2e-5)
    engine.close()


@pytest.mark.parametrize("missing", ["uploaded", "computed", "done", "bases behind the last run"])
def test_every_wait_is_needed(gpu, bundle, reference, monkeypatch, missing):
    """Without one of them, a run reads pixels, bases or results of another one."""
    engine = TensorRTImageEngine.open(bundle)
    start_two(engine, bundle)  # records the graphs and leaves stale results to be read
    hold, wait_for, upload = (
        getattr(cuda.CudaDevice, name) for name in ("hold", "wait_for", "upload")
    )
    if missing in ("uploaded", "computed"):
        events = [getattr(lane, missing) for lane in engine._lanes]
        monkeypatch.setattr(
            cuda.CudaDevice, "hold",
            lambda self, stream, event: None if event in events else hold(self, stream, event),
        )  # fmt: skip
    elif missing == "done":
        monkeypatch.setattr(cuda.CudaDevice, "wait_for", lambda self, event: None)
    else:  # bases in another stream, which no run waits for

        def elsewhere(self, target, source, stream=None):
            other = engine._in if target in engine._addresses.values() else stream
            upload(self, target, source, other)
            if other is engine._in and stream is None:
                self.wait(other)

        monkeypatch.setattr(cuda.CudaDevice, "upload", elsewhere)
    given = [inputs(bundle, 2 + i, 7, seed=10 + i) for i in range(2)]
    finishes = [engine.start(*arrays) for arrays in given]
    got = [finish() for finish in finishes]
    assert not all(
        np.allclose(ours, expected, atol=2e-5)
        for arrays, results in zip(given, got, strict=True)
        for ours, expected in zip(results, reference.run(*arrays), strict=True)
    )
    monkeypatch.setattr(cuda.CudaDevice, "wait_for", wait_for)
    engine.close()


def test_a_third_run_waits_and_a_failed_one_frees_its_lane(gpu, bundle):
    engine = TensorRTImageEngine.open(bundle)
    arrays = inputs(bundle, 2, 0)
    first, second = engine.start(*arrays), engine.start(*arrays)
    with ThreadPoolExecutor(1) as others:
        third = others.submit(engine.run, *arrays)
        assert not third.done()
        first()
        third.result(timeout=30)
        second()
    gpu.driver.fail["cuEventRecord"] = CUresult.CUDA_ERROR_INVALID_VALUE
    for _ in range(5):
        with pytest.raises(EngineError, match="recording a CUDA event"):
            engine.run(*arrays)
    gpu.driver.fail.clear()
    for _ in range(3):
        engine.run(*inputs(bundle, 2 * MOST + 1, 3))
    engine.close()


def test_many_threads_with_runs_of_several_parts(gpu, bundle, reference):
    """A thread that holds one lane never waits for the other."""
    engine = TensorRTImageEngine.open(bundle)
    given = [inputs(bundle, 3 * MOST, 5, seed=seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as threads:
        got = list(threads.map(lambda arrays: engine.run(*arrays), given, timeout=120))
    for arrays, results in zip(given, got, strict=True):
        np.testing.assert_allclose(results[1], reference.run(*arrays)[1], atol=2e-5)
    engine.close()


def test_closing_while_a_run_is_under_way(gpu, bundle):
    engine = TensorRTImageEngine.open(bundle)
    finish = engine.start(*inputs(bundle, 2, 0))
    engine.close()
    with pytest.raises(ClosedError):
        finish()


def test_on_a_gpu_with_the_memory_of_the_processor_nothing_is_copied(gpu, bundle, reference):
    gpu.driver.integrated = True
    engine = TensorRTImageEngine.open(bundle)
    arrays = inputs(bundle, 3, 7)
    engine.run(*arrays)  # copies the bases
    before = gpu.driver.moved
    given, got = start_two(engine, bundle)
    for (pixels, weight, bias), results in zip(given, got, strict=True):
        for ours, expected in zip(results, reference.run(pixels, weight, bias), strict=True):
            np.testing.assert_allclose(ours, expected, atol=2e-5)
    bases = 2 * 4 * (bundle.embedding_dim + 1) * 64  # each run has other ones
    assert gpu.driver.moved - before == bases
    engine.close()


def test_weights_are_copied_only_when_they_change(gpu, bundle, reference, monkeypatch):
    engine = TensorRTImageEngine.open(bundle)
    copied = []
    upload = cuda.CudaDevice.upload
    monkeypatch.setattr(
        cuda.CudaDevice, "upload", lambda *a: (copied.append(a[2].shape), upload(*a))[1]
    )
    pixels, weight, bias = inputs(bundle, 2, 7)
    engine.run(pixels, weight, bias)
    assert len(copied) == 3  # weight, bias and pixels
    engine.run(pixels, weight.copy(), bias.copy())
    assert len(copied) == 4
    weight[3, 2] += 1  # changed in place
    got = engine.run(pixels, weight, bias)[1]
    assert len(copied) == 7
    np.testing.assert_allclose(got, reference.run(pixels, weight, bias)[1], atol=2e-5)
    engine.close()


def test_threads_share_an_engine(gpu, bundle, reference):
    engine = TensorRTImageEngine.open(bundle)

    def one(seed):
        arrays = inputs(bundle, 1 + seed % 6, seed % 3 * 30, seed)
        return max(
            float(np.abs(got - expected).max(initial=0))
            for got, expected in zip(engine.run(*arrays), reference.run(*arrays), strict=True)
        )

    with ThreadPoolExecutor(4) as pool:  # threads that have not entered the context
        assert max(pool.map(one, range(24))) < 2e-5
    engine.close()


def test_wrong_arrays_are_refused(gpu, bundle):
    engine = TensorRTImageEngine.open(bundle)
    pixels, weight, bias = inputs(bundle, 2, 3)
    for wrong, words in [
        ((pixels.astype(np.float32), weight, bias), "uint8"),
        ((pixels[:, 1:], weight, bias), "expected pixels"),
        ((pixels[0], weight, bias), "expected pixels"),
        ((pixels, weight[1:], bias), "expected weight"),
        ((pixels, weight, bias[1:]), "expected weight"),
        (inputs(bundle, 1, COLUMNS + 1), f"--max-columns {COLUMNS + 1}"),
    ]:
        with pytest.raises(EngineError, match=words):
            engine.run(*wrong)
    engine.run(pixels, weight, bias)
    engine.close()
    engine.close()
    with pytest.raises(ClosedError, match="the engine is closed: make a new one"):
        engine.run(pixels, weight, bias)


def test_compiled_kernels_are_kept_for_the_next_start(gpu, bundle):
    TensorRTImageEngine.open(bundle).close()
    (kept,) = plans_directory(bundle).glob("*.sm89.cache")
    assert kept.read_bytes() == b"kernels for this GPU" and gpu.trt.caches_read == []
    TensorRTImageEngine.open(bundle).close()
    assert gpu.trt.caches_read == [b"kernels for this GPU"]
    kept.write_bytes(b"of another driver")
    TensorRTImageEngine.open(bundle).close()
    assert kept.read_bytes() == b"kernels for this GPU"


def test_a_cache_that_cannot_be_written_is_a_warning(gpu, bundle, monkeypatch, caplog):
    def full(path, data, failure):
        raise failure(f"{path}: no space left")

    monkeypatch.setattr(module, "write_atomically", full)
    with caplog.at_level(logging.WARNING):
        TensorRTImageEngine.open(bundle).close()
    assert "no space left" in caplog.text and "every start" in caplog.text


def test_enterprise_tensorrt_uses_the_same_code(gpu, bundle, reference, monkeypatch):
    """Enterprise TensorRT has no runtime configuration. Its plan is the same under another name."""
    folder = plans_directory(bundle)
    (plan,) = read_plans(folder)
    data = (folder / f"{plan.spec.stem}.plan").read_bytes()
    spec = msgspec.structs.replace(plan.spec, runtime="tensorrt", runtime_version="10.3.0")
    module.choose_plan.__globals__["write_plan"](
        folder, msgspec.structs.replace(plan, spec=spec), data
    )
    gpu.kit.runtime, gpu.kit.version = "tensorrt", "10.3.0"
    engine = TensorRTImageEngine.open(bundle, runtime="tensorrt")
    arrays = inputs(bundle, 3, 5)
    np.testing.assert_allclose(engine.run(*arrays)[1], reference.run(*arrays)[1], atol=2e-5)
    assert str(engine.name) == "tensorrt/cuda/fp32" and not list(folder.glob("*.cache"))
    engine.close()


@pytest.mark.parametrize(
    "call",
    [
        "cuStreamCreate", "cuEventCreate", "cuMemAlloc", "cuMemHostAlloc", "cuMemcpyHtoDAsync",
        "cuMemcpyDtoHAsync", "cuStreamSynchronize", "cuEventRecord", "cuGraphLaunch",
    ],
)  # fmt: skip
def test_a_driver_that_fails_is_a_typed_error(gpu, bundle, call):
    running = call in ("cuGraphLaunch", "cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync", "cuEventRecord")
    if running:
        engine = TensorRTImageEngine.open(bundle)
    gpu.driver.fail[call] = CUresult.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(EngineError, match=r"CUDA_ERROR_OUT_OF_MEMORY.*memory is full"):
        if running:
            engine.run(*inputs(bundle, 1, 0))
        else:
            TensorRTImageEngine.open(bundle)
    gpu.driver.fail.clear()
    if running:
        engine.run(*inputs(bundle, 1, 0))  # it works again when the driver does
        engine.close()


@pytest.mark.parametrize(
    "call", ["cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphInstantiate"]
)
def test_a_run_that_cannot_be_recorded_works_without_a_graph(gpu, bundle, reference, call, caplog):
    refused = CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
    gpu.driver.fail[call] = refused
    engine = TensorRTImageEngine.open(bundle)
    assert "without a CUDA graph" in caplog.text and refused.name in caplog.text
    arrays = inputs(bundle, 3, 5)
    np.testing.assert_allclose(engine.run(*arrays)[1], reference.run(*arrays)[1], atol=2e-5)
    assert not gpu.driver.launched
    engine.close()


def test_a_deleted_engine_frees_its_memory(gpu, bundle):
    TensorRTImageEngine.open(bundle)
    gc.collect()
    assert gpu.driver.nothing_left()


def test_an_out_of_memory_error_says_what_the_memory_was_for(gpu, bundle):
    gpu.driver.free = 1000
    with pytest.raises(EngineError, match=r"weight: .* bytes of the GPU's memory"):
        TensorRTImageEngine.open(bundle)


def test_a_plan_that_cannot_run_is_refused_with_the_command_that_compiles_one(gpu, bundle):
    folder = plans_directory(bundle)
    with pytest.raises(PlanError, match=r"no plan in fp16 .*crl compile"):
        TensorRTImageEngine.open(bundle, precision="fp16")
    gpu.driver.capability = (12, 0)
    with pytest.raises(PlanError, match=r"on sm120 .*: for sm89.*--arch sm120"):
        TensorRTImageEngine.open(bundle)
    gpu.driver.capability = (8, 9)
    version, gpu.kit.version = gpu.kit.version, "9.9.9"
    with pytest.raises(PlanError, match=r"9.9.9 on sm89 .*for version"):
        TensorRTImageEngine.open(bundle)
    gpu.kit.version = version
    (file,) = folder.glob("*.plan")
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    with pytest.raises(PlanError, match="cut off"):
        TensorRTImageEngine.open(bundle)
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(PlanError, match="it was changed"):
        TensorRTImageEngine.open(bundle)
    file.write_bytes(data)
    gpu.trt.Runtime.deserialize_cuda_engine = lambda self, _: self._logger.errors.append("why")
    with pytest.raises(PlanError, match=r"does not load it \(why\).*--force"):
        TensorRTImageEngine.open(bundle)


def test_auto_chooses_a_plan_only_after_it_is_verified_here(gpu, bundle, monkeypatch, caplog):
    engines = list_candidates(bundle)
    first = choose_engine(engines, "tensorrt-rtx")
    assert first.usable and not first.automatic and "crl verify" in first.reason
    assert str(choose_engine(engines, "auto").name) == "onnx/cpu/fp32"
    record = verify(bundle, "tensorrt-rtx", batches=(1,), seconds=0.01)
    assert record.agrees and record.engine == "tensorrt-rtx/cuda/fp32"
    (plan,) = read_plans(plans_directory(bundle))
    assert plan.verified == ("sm89",) and find_plan(plans_directory(bundle), plan.spec) == plan
    with caplog.at_level(logging.INFO):
        embedder = Embedder.open(bundle)
    assert embedder.engine == "tensorrt-rtx/cuda/fp32" and "verified on sm89" in caplog.text
    basis = embedder.create_basis("color", ["red", "blue", "green"])
    images = list(parity.images(bundle.preprocess, 7))
    got = embedder.embed(images, [basis], batch_size=4)
    with Embedder.open(bundle, engine="onnx/cpu") as other:
        expected = other.embed(images, [basis])
    np.testing.assert_allclose(got["color"], expected["color"], atol=1e-4)
    embedder.close()


def test_a_wrong_engine_is_not_recorded_as_verified(gpu, bundle, reference, monkeypatch):
    run = reference.run
    reference.run = lambda *arrays: tuple(each[::-1] for each in run(*arrays))
    record = verify(bundle, "tensorrt-rtx", batches=(1,), seconds=0.01)
    assert not record.agrees and record.failures
    assert read_plans(plans_directory(bundle))[0].verified == ()
    reference.run = run
    assert verify(bundle, "tensorrt-rtx", batches=(1,), seconds=0.01).agrees
    assert read_plans(plans_directory(bundle))[0].verified == ("sm89",)
    reference.run = lambda *arrays: tuple(
        each * 1.1 for each in run(*arrays)
    )  # such as with a new driver
    assert not verify(bundle, "tensorrt-rtx", batches=(1,), seconds=0.01).agrees
    assert read_plans(plans_directory(bundle))[0].verified == ()


def test_a_baked_plan_runs_only_its_basis(gpu, bundle, reference, monkeypatch):
    from crl_export.tensorrt import compile_plan

    with Embedder.open(bundle, engine="onnx/cpu") as embedder:
        basis = embedder.create_basis("color", ["red", "blue", "green"])
    baked = compile_plan(
        bundle, precision="fp32", architectures=["sm89"], batch=(1, 2, MOST), baked=basis
    )
    projection = basis.projection

    class Fixed:
        def run(self, pixels, *_):
            return reference.run(pixels, projection.weight, projection.bias)

    fake = tensorrt(gpu.driver, Fixed(), baked.path.read_bytes(), (1, MOST), (1, 1))
    fake.classes[1].num_io_tensors = 3
    fake.classes[1].get_tensor_name = lambda _, i: ("image", "embedding", "projected")[i]
    fake.classes[2].infer_shapes = lambda _: []
    execute = fake.classes[2].execute_async_v3

    def with_constants(context, stream):
        context.shapes = {"image": context.shapes["image"], "weight": (0,), "bias": (0,)}
        context.addresses |= dict.fromkeys(("weight", "bias"), context.addresses["image"])
        return execute(context, stream)

    fake.classes[2].execute_async_v3 = with_constants
    gpu.kit.module = fake
    embedder = Embedder.open(bundle, engine="tensorrt-rtx", baked=basis)
    images = list(parity.images(bundle.preprocess, 3))
    with Embedder.open(bundle, engine="onnx/cpu") as other:
        expected = other.embed(images, [basis])["color"]
    np.testing.assert_allclose(embedder.embed(images, ["color"])["color"], expected, atol=1e-4)
    record = verify(bundle, "tensorrt-rtx", batches=(1,), seconds=0.01, baked=basis)
    assert record.agrees and record.engine == "tensorrt-rtx/cuda/fp32"
    with pytest.raises(EngineError, match="'color', which is fixed"):
        embedder._image_engine.run(*inputs(bundle, 1, 2))
    embedder.close()


def test_every_use_of_tensorrt_matches_the_real_bindings():
    from conformance.tensorrt_bindings import find_mismatches

    real = tensorrt_runtime.load_tensorrt("tensorrt-rtx").module
    seen, wrong = find_mismatches(real, rtx=True)
    assert not wrong and seen > 60


def test_the_simulation_has_the_names_of_the_real_bindings(gpu, bundle):
    from cuda.bindings import driver as real

    for name, member in vars(Driver).items():
        if name.startswith("cu"):
            parameters = list(inspect.signature(member).parameters)[1:]
            assert parameters == list(inspect.signature(getattr(real, name)).parameters), name
    for group in ("CUstreamCaptureMode", "CUdevice_attribute"):
        for name, number in vars(getattr(Driver, group)).items():
            assert int(getattr(getattr(real, group), name)) == number
    for result in CUresult:
        assert int(getattr(real.CUresult, result.name)) == result
    trt = tensorrt_runtime.load_tensorrt("tensorrt-rtx").module
    for simulated in gpu.trt.classes:
        genuine = getattr(trt, simulated.__name__)
        for name in vars(simulated):
            if not name.startswith("_") and name not in ("allocation", "cache", "data"):
                assert hasattr(genuine, name), f"{simulated.__name__}.{name}"
    assert hasattr(trt.ExecutionContextAllocationStrategy, "USER_MANAGED")
    assert hasattr(trt.DynamicShapesKernelSpecializationStrategy, "EAGER")
    assert hasattr(trt.CudaGraphStrategy, "DISABLED")
