"""What a server does when its GPU is lost, full or shared, on a simulated GPU."""

from __future__ import annotations

import pytest
from gpu_fixtures import COLUMNS
from grpc_health.v1 import health_pb2
from simulated_gpu import CUresult

import crl_sdk.serving._batcher as batcher_module
from crl_sdk import Client, ClientOptions, Embedder
from crl_sdk.engines import _cuda as cuda
from crl_sdk.engines._tensorrt import TensorRTImageEngine
from crl_sdk.errors import EngineError
from support import health_of, unseen_image, wait_until

ENGINE = "tensorrt-rtx"
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVING = health_pb2.HealthCheckResponse.SERVING


@pytest.fixture
def embedder(gpu, bundle):
    with Embedder.open(bundle, engine=ENGINE) as opened:
        yield opened
        gpu.driver.lost = False  # so that the memory can be freed and counted
        gpu.driver.fail.clear()


def make(bundle, count, name="color"):
    with Embedder.open(bundle, engine="onnx/cpu/fp32") as other:
        texts = [f"a thing of kind {i}" for i in range(count)]
        return other.create_basis(name, texts, method="cosine", load=False)


@pytest.mark.parametrize("in_the_middle", [False, True])
def test_a_lost_gpu_is_an_error_at_once_and_health_says_so(
    gpu, embedder, serve, monkeypatch, in_the_middle
):
    monkeypatch.setattr(batcher_module, "_PROBE_SECONDS", 0.1)
    server = serve(embedder)
    with Client(server.address, ClientOptions(retries=0, timeout=30)) as client:
        client.embed([unseen_image()])
        if in_the_middle:  # the run was queued, and the wait for it fails
            wait_for = cuda.CudaDevice.wait_for

            def lose(self, event):
                gpu.driver.lost = True
                return wait_for(self, event)

            monkeypatch.setattr(cuda.CudaDevice, "wait_for", lose)
        else:
            gpu.driver.lost = True
        with pytest.raises(EngineError, match=r"LAUNCH_FAILED.*start the process again"):
            client.embed([unseen_image()])
        wait_until(lambda: health_of(server.address) == NOT_SERVING)
        with pytest.raises(EngineError):  # refused, and nobody waits
            client.embed([unseen_image()])
        monkeypatch.undo()
        gpu.driver.lost = False
        wait_until(lambda: health_of(server.address) == SERVING)
        assert client.embed([unseen_image()]).universal.shape == (1, 128)


def test_a_server_whose_gpu_is_lost_stops(gpu, embedder, serve):
    server = serve(embedder)
    gpu.driver.lost = True
    with Client(server.address, ClientOptions(retries=0)) as client, pytest.raises(EngineError):
        client.embed([unseen_image()])
    server.stop()


def test_memory_that_runs_out_under_load_costs_only_the_columns(
    embedder, serve, bundle, monkeypatch, caplog
):
    """The first request with bases needs new contexts, for which there is no memory."""
    server = serve(embedder)
    image = unseen_image()
    basis = make(bundle, 8)
    with Client(server.address, ClientOptions(retries=0)) as client:
        client.put_basis(basis.to_bytes())
        with monkeypatch.context() as full:
            full.setattr(TensorRTImageEngine, "_context", refuse)
            got = client.embed([image], ["color"])
        assert "the processor projects" in caplog.text
        assert abs(got["color"] - basis.projection.apply(got.universal)).max() < 1e-6
        del caplog.records[:]
        assert client.embed([unseen_image()], ["color"])["color"].shape == got["color"].shape
        assert not caplog.records and health_of(server.address) == SERVING


def refuse(*_):
    raise EngineError("TensorRT could not create an execution context")


def test_page_locked_memory_that_runs_out_fails_the_start_and_frees_the_rest(gpu, bundle):
    gpu.driver.fail["cuMemHostAlloc"] = CUresult.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(EngineError, match=r"page-locked memory failed .*close other programs"):
        TensorRTImageEngine.open(bundle)
    gpu.driver.fail.clear()
    assert gpu.driver.nothing_left()


def test_two_servers_on_one_gpu(gpu, bundle, serve, tmp_path):
    """Each has memory of its own. One that does not fit is refused, and the other one goes on."""
    basis = make(bundle, COLUMNS)
    with (
        Embedder.open(bundle, engine=ENGINE) as first,
        Embedder.open(bundle, engine=ENGINE) as second,
    ):
        image, other = unseen_image(), unseen_image()
        servers = [serve(each, bases=tmp_path / str(i)) for i, each in enumerate((first, second))]
        clients = [Client(server.address) for server in servers]
        try:
            for client in clients:
                client.put_basis(basis.to_bytes())
            one, two = (client.embed([image, other], ["color"]) for client in clients)
            assert (one["color"] == two["color"]).all()
            gpu.driver.free = 10
            with pytest.raises(EngineError, match=r"memory is full: close other programs"):
                Embedder.open(bundle, engine=ENGINE)
            assert (clients[0].embed([unseen_image()], ["color"])["color"].shape[0]) == 1
        finally:
            for client in clients:
                client.close()


def test_auto_takes_the_processor_where_the_gpu_is_full(gpu, bundle, caplog):
    from crl_sdk.engines._verify import verify

    assert verify(bundle, ENGINE, batches=(1,), seconds=0.01).agrees
    gpu.driver.free = 10
    with Embedder.open(bundle) as opened:
        assert opened.engine.startswith("onnx/cpu")
    assert "memory is full" in caplog.text
