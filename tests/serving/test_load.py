"""Deadlines, overload, clients that go away, a failing engine: no work is done for nobody."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2

from crl_sdk import AsyncClient, Client
from crl_sdk.client import ClientOptions
from crl_sdk.engines._engine_name import EngineName
from crl_sdk.errors import DeadlineError, EngineError, OverloadedError
from crl_sdk.pb.crl.v1 import embedding_pb2, embedding_pb2_grpc
from crl_sdk.serving import _batcher as batcher_module
from crl_sdk.serving._admission import Admission, ServerLimits
from crl_sdk.serving._batcher import Batcher
from crl_sdk.serving._cache import EmbeddingCache
from support import health_of, unseen_image, wait_until


def test_images_past_their_deadline_are_not_computed(serve, faked, engine):
    server = serve(faked)
    before = sum(engine.batches)
    engine.gate.clear()
    hopeless = ClientOptions(timeout=0.3, retries=0)
    with Client(server.address, hopeless) as client, Client(server.address) as patient:
        batcher, dropped = server.pipeline.batcher, server.pipeline.admission.dropped
        for _ in range(2):  # the first is in the engine, the second waits
            with pytest.raises(DeadlineError):
                client.embed([unseen_image()])
        engine.gate.set()
        patient.embed([unseen_image()])
    wait_until(lambda: batcher.depth == 0)
    assert sum(engine.batches) - before == 2  # the one in the engine and the patient one
    assert dropped.expired + dropped.cancelled == 1


def test_a_deadline_of_a_millisecond(serve, faked, engine):
    server = serve(faked)
    engine.seconds = 0.2
    with Client(server.address, ClientOptions(timeout=0.001, retries=0)) as client:
        for _ in range(20):  # late, or refused because it would be late
            with pytest.raises((DeadlineError, OverloadedError)):
                client.embed([unseen_image()])
    with Client(server.address) as client:
        assert client.embed([unseen_image()]).universal.shape == (1, 128)


def test_calls_over_the_queue_bound_are_refused_at_once(serve, faked, engine):
    server = serve(faked, limits=ServerLimits(max_queue=8, max_images=8, max_batch=4))
    engine.seconds = 0.3

    async def flood():
        options = ClientOptions(retries=0, timeout=600)  # so that time never decides
        async with AsyncClient(server.address, options) as client:

            async def call():
                try:
                    await client.embed([unseen_image()])
                except OverloadedError as error:
                    assert error.retry_after > 0 and "the queue is full" in str(error)
                    return "refused"
                return "served"

            return await asyncio.gather(*(call() for _ in range(100)))

    outcomes = asyncio.run(flood())
    refused = outcomes.count("refused")
    assert 8 <= 100 - refused <= 60
    assert server.pipeline.admission.dropped.rejected == refused  # none waited in the queue
    assert server.pipeline.batcher.depth == 0
    with Client(server.address) as client:  # afterwards there is room again
        assert client.embed([unseen_image()]).universal.shape == (1, 128)


def test_a_client_retries_until_there_is_room(serve, faked, engine):
    server = serve(faked, limits=ServerLimits(max_queue=2, max_images=2, max_batch=2))
    engine.seconds = 0.05

    async def all_at_once():
        async with AsyncClient(server.address, ClientOptions(retries=20)) as client:
            return await asyncio.gather(*(client.embed([unseen_image()]) for _ in range(12)))

    assert len(asyncio.run(all_at_once())) == 12
    assert server.pipeline.admission.dropped.rejected > 0


@pytest.mark.parametrize("device", ["gpu", "cpu"])
def test_images_are_decoded_beside_an_engine_unless_it_runs_on_the_cpu(
    serve, faked, engine, device, monkeypatch
):
    engine.name = EngineName("fake", device, "fp32")
    decoded: list[float] = []
    load_pixels = faked.load_pixels

    def watched(source):
        decoded.append(time.monotonic())
        return load_pixels(source)

    monkeypatch.setattr(faked, "load_pixels", watched)
    server = serve(faked)
    assert engine.batches == ([1, server.pipeline.limits.max_batch] if device == "gpu" else [1])
    engine.gate.clear()
    runs = len(engine.entered)
    with ThreadPoolExecutor(2) as callers, Client(server.address) as client:
        first = callers.submit(client.embed, [unseen_image()])
        wait_until(lambda: len(engine.entered) == runs + 1)  # now the engine runs
        second = callers.submit(client.embed, [unseen_image()])
        wait_until(lambda: server.pipeline.admission.in_progress == 2)
        if device == "gpu":
            wait_until(lambda: len(decoded) == 2)
        else:
            time.sleep(0.2)
            assert len(decoded) == 1
        engine.gate.set()
        for call in (first, second):
            assert call.result(timeout=30).universal.shape == (1, 128)
    assert len(decoded) == 2


@pytest.mark.parametrize("device", ["gpu", "cpu"])
def test_cancelled_calls_are_not_computed(serve, faked, engine, device):
    """Images wait decoded for an engine on a GPU, and encoded for one on the CPU."""
    engine.name = EngineName("fake", device, "fp32")
    server = serve(faked)
    engine.gate.clear()
    before, entered = sum(engine.batches), sum(engine.entered)
    with grpc.insecure_channel(server.address) as channel:
        stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)
        from crl_sdk.rpc import encode_tensor

        def ask():
            image = embedding_pb2.Image(pixels=encode_tensor(unseen_image()))
            return stub.Embed.future(embedding_pb2.EmbedRequest(images=[image]))

        calls = [ask()]
        wait_until(lambda: sum(engine.entered) > entered)  # alone, so that the others must wait
        calls += [ask() for _ in range(5)]
        if device == "gpu":
            wait_until(lambda: sum(engine.entered) - entered + server.pipeline.batcher.depth == 6)
        else:
            wait_until(lambda: server.pipeline.admission.in_progress == 6)
        running = sum(engine.entered) - entered
        for call in calls:
            call.cancel()
        time.sleep(0.2)
    engine.gate.set()
    wait_until(lambda: server.pipeline.admission.dropped.cancelled == 6 - running)
    wait_until(lambda: sum(engine.batches) - before == running)
    assert server.pipeline.batcher.depth == 0 and running < 6


def test_health_is_not_serving_while_the_engine_fails(serve, faked, engine, monkeypatch):
    monkeypatch.setattr(batcher_module, "_PROBE_SECONDS", 0.1)
    server = serve(faked)
    assert health_of(server.address) == health_pb2.HealthCheckResponse.SERVING
    engine.fails = True
    with Client(server.address, ClientOptions(retries=0)) as client:
        with pytest.raises(EngineError, match="fell off the bus"):
            client.embed([unseen_image()])
        not_serving = health_pb2.HealthCheckResponse.NOT_SERVING
        wait_until(lambda: health_of(server.address) == not_serving)
        with pytest.raises(EngineError):
            client.embed([unseen_image()])
        engine.fails = False
        wait_until(lambda: health_of(server.address, "crl.v1.EmbeddingService") != not_serving)
        assert client.embed([unseen_image()]).universal.shape == (1, 128)


def test_health_is_not_serving_while_the_engine_hangs(serve, faked, engine, monkeypatch):
    from crl_sdk.serving import _server as server_module

    monkeypatch.setattr(server_module, "HANG_SECONDS", 0.3)
    server = serve(faked)
    engine.gate.clear()
    with Client(server.address, ClientOptions(timeout=0.2, retries=0)) as client:
        with pytest.raises(DeadlineError):
            client.embed([unseen_image()])
        wait_until(lambda: health_of(server.address) == health_pb2.HealthCheckResponse.NOT_SERVING)
    engine.gate.set()
    wait_until(lambda: health_of(server.address) == health_pb2.HealthCheckResponse.SERVING)


def test_images_that_wait_are_batched_without_a_timer(serve, faked, engine):
    server = serve(faked, limits=ServerLimits(max_batch=16))
    del engine.batches[:]
    with Client(server.address) as client:
        client.embed([unseen_image()])
    assert engine.batches == [1]  # an idle engine starts at once
    engine.gate.clear()
    del engine.entered[:]

    async def many():
        async with AsyncClient(server.address) as client:
            tasks = [asyncio.create_task(client.embed([unseen_image()])) for _ in range(20)]
            while sum(engine.entered) + server.pipeline.batcher.depth < 20:
                await asyncio.sleep(0.01)
            first = engine.entered[0]  # what had arrived when the engine started
            engine.gate.set()
            await asyncio.gather(*tasks)
            return first

    first = asyncio.run(asyncio.wait_for(many(), timeout=30))
    assert engine.batches[1:3] == [first, min(16, 20 - first)] and sum(engine.batches) == 21


def test_clients_take_turns():
    """A client that queues hundreds of images does not delay the others by all of them."""
    seen: list[np.ndarray] = []

    def run(pixels):
        seen.append(pixels[:, 0, 0, 0].copy())
        time.sleep(0.01)
        return lambda: np.ones((len(pixels), 4), np.float32)

    async def work():
        drop = Admission(256, 1024, queued=lambda: 0).drop
        batcher = Batcher(run, np.zeros((1, 2, 2, 3), np.uint8), drop=drop, max_batch=4)
        greedy = [np.full((2, 2, 3), 1, np.uint8)] * 200
        modest = [np.full((2, 2, 3), 2, np.uint8)] * 2
        loop = asyncio.get_running_loop()
        batcher._loop = loop  # both are queued before the thread starts
        futures = batcher.submit(greedy, deadline=None, client="greedy")
        futures += batcher.submit(modest, deadline=None, client="modest")
        batcher.start(loop)
        await asyncio.gather(*futures)
        await asyncio.to_thread(batcher.stop)

    asyncio.run(work())
    assert seen[0].tolist() == [1, 2, 1, 2]
    assert sum(len(batch) for batch in seen) == 202


def make_batcher() -> Batcher:
    return Batcher(
        lambda pixels: lambda: np.ones((len(pixels), 4), np.float32),
        np.zeros((1, 2, 2, 3), np.uint8),
        drop=Admission(256, 1024, queued=lambda: 0).drop,
    )


def test_refusals_while_the_engine_fails_do_not_pile_up_in_memory():
    """An exception that is raised again keeps the frames of every earlier raise, with pixels."""
    batcher = make_batcher()
    batcher.failed = EngineError("the accelerator fell off the bus")
    for _ in range(3):
        with pytest.raises(EngineError, match="fell off the bus"):
            batcher.enqueue([], [], deadline=None, client="")
    assert batcher.failed.__traceback__ is None


def test_an_engine_that_recovers_during_a_refusal():
    class Recovering(Batcher):
        reads = 0

        @property
        def failed(self):
            self.reads += 1
            return EngineError("it failed") if self.reads == 1 else None

        @failed.setter
        def failed(self, error):
            pass

    batcher = make_batcher()
    batcher.__class__ = Recovering
    with pytest.raises(EngineError, match="it failed"):
        batcher.enqueue([], [], deadline=None, client="")


@pytest.mark.parametrize("when", ["while images wait to be decoded", "before the call"])
def test_a_call_fails_if_the_embedder_is_closed(serve, faked, engine, when, monkeypatch):
    """The call must not wait for ever for images that nobody will decode."""
    server = serve(faked, drain_seconds=0.1)
    gate, decoding = threading.Event(), threading.Event()

    def held(source):
        decoding.set()
        gate.wait(30)
        return source

    monkeypatch.setattr(faked, "load_pixels", held)
    with Client(server.address, ClientOptions(retries=0, batch_size=64)) as client:
        with ThreadPoolExecutor(1) as callers:
            if when == "before the call":
                faked.close()
            call = callers.submit(client.embed, [unseen_image() for _ in range(64)])
            if when != "before the call":
                decoding.wait(30)
                wait_until(lambda: faked.decode_pool._work_queue.qsize() > 16)
                faked.close()
            try:
                with pytest.raises(EngineError, match="the embedder was closed"):
                    call.result(timeout=5)
            finally:
                gate.set()
        assert server.pipeline.admission.in_progress == 0


def test_stopping_finishes_what_waits_and_refuses_the_rest(serve, faked, engine):
    server = serve(faked)
    engine.seconds = 0.3

    async def work():
        async with AsyncClient(server.address, ClientOptions(retries=0)) as client:
            call = asyncio.create_task(client.embed([unseen_image()]))
            await asyncio.sleep(0.1)
            stopping = asyncio.create_task(asyncio.to_thread(server.stop))
            result = await call
            await stopping
            return result

    assert asyncio.run(work()).universal.shape == (1, 128)


def test_the_cache_is_bounded_and_forgets_the_least_used():
    rows = np.random.default_rng(0).standard_normal((100, 16)).astype(np.float32)
    cache = EmbeddingCache(max_bytes=10 * (64 + 200))
    for i in range(10):
        cache.put(bytes([i]), rows[i])
    assert len(cache) == 10 and cache.used_bytes <= cache.max_bytes
    assert cache.get(bytes([0])) is not None  # used again, so the second is dropped first
    cache.put(b"new", rows[50])
    assert cache.get(bytes([1])) is None and cache.get(bytes([0])) is not None
    kept = cache.get(b"new")
    np.testing.assert_array_equal(kept, rows[50])
    assert kept.base is None and not kept.flags.writeable  # not a view of its batch
    assert (cache.hits, cache.misses) == (3, 1)
    nothing = EmbeddingCache(0)
    nothing.put(b"a", rows[0])
    assert nothing.get(b"a") is None and nothing.used_bytes == 0


def test_requests_that_would_be_late_are_refused_and_the_others_are_in_time(serve, faked, engine):
    """At ten times the load, nearly all accepted requests meet their deadlines.

    The server keeps half of the time in reserve. A machine that stands still for longer than that
    makes requests late, which is not the server's fault.
    """
    server = serve(faked, limits=ServerLimits(max_batch=4))
    engine.seconds = 0.2  # 20 images a second
    before = sum(engine.batches)

    async def flood():
        outcomes = {"served": 0, "refused": 0, "late": 0}
        async with AsyncClient(server.address, ClientOptions(retries=0, timeout=4.0)) as client:

            async def call():
                try:
                    await client.embed([unseen_image()])
                except OverloadedError as error:
                    assert "deadline" in str(error) and error.retry_after > 0
                    outcomes["refused"] += 1
                except DeadlineError:
                    outcomes["late"] += 1
                else:
                    outcomes["served"] += 1

            tasks = []
            for _ in range(300):
                tasks.append(asyncio.create_task(call()))
                await asyncio.sleep(0.005)
            await asyncio.gather(*tasks)
        return outcomes

    outcomes = asyncio.run(flood())
    assert sum(outcomes.values()) == 300
    assert outcomes["served"] >= 20 and outcomes["refused"] >= 100
    assert outcomes["late"] <= outcomes["served"] / 4
    wasted = sum(engine.batches) - before - outcomes["served"]
    assert 0 <= wasted <= outcomes["late"]
