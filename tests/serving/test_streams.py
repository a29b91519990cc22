"""Streams whose clients are slow, do not read or go away; unexpected failures."""

from __future__ import annotations

import socket
import threading
import time
from itertools import count

import grpc
import numpy as np
import pytest

from crl_sdk import Client
from crl_sdk.pb.crl.v1 import embedding_pb2, embedding_pb2_grpc
from crl_sdk.rpc import encode_tensor
from crl_sdk.serving import _server as server_module
from crl_sdk.serving._embedding_service import STREAM_WINDOW
from support import unseen_image, wait_until

_numbers = count()


@pytest.fixture
def channel_of():
    """Open channels; all are closed at the end of the test."""
    channels = []

    def connect(server) -> grpc.Channel:
        channels.append(grpc.insecure_channel(server.address))
        return channels[-1]

    yield connect
    for channel in channels:
        channel.close()


def message(images: int = 1) -> embedding_pb2.EmbedStreamRequest:
    """Return a request with images that no cache has seen."""
    image = embedding_pb2.Image(pixels=encode_tensor(unseen_image()))
    request = embedding_pb2.EmbedRequest(images=[image] * images)
    return embedding_pb2.EmbedStreamRequest(id=str(next(_numbers)), request=request)


def test_slow_streams_delay_nobody(serve, faked, channel_of):
    server = serve(faked, drain_seconds=1)
    stub = embedding_pb2_grpc.EmbeddingServiceStub(channel_of(server))
    leave = threading.Event()

    def drip():
        yield message()
        leave.wait(60)

    streams = [stub.EmbedStream(drip()) for _ in range(50)]
    for stream in streams:
        assert next(stream).response.images[0].code == embedding_pb2.ImageStatus.CODE_OK
    with Client(server.address) as client:
        assert client.embed([np.full((96, 96, 3), 7, np.uint8)]).universal.shape == (1, 128)
    started = time.monotonic()
    server.stop()  # the streams delay it by the drain time at most
    assert time.monotonic() - started < 10
    leave.set()
    for stream in streams:
        with pytest.raises(grpc.RpcError):
            list(stream)


def test_a_client_that_does_not_read_is_not_read_either(serve, faked, channel_of):
    server = serve(faked)
    rows = encode_tensor(np.ones(128, np.float32) / np.float32(np.sqrt(128)))
    known = [embedding_pb2.Image(embedding=rows)] * 256  # each reply has 128 KiB
    results, sent, leave = [], [], threading.Event()
    server.pipeline.on_result.append(results.append)

    def flood():
        for i in range(1000):
            if leave.is_set():
                return
            sent.append(i)
            request = embedding_pb2.EmbedRequest(images=known)
            yield embedding_pb2.EmbedStreamRequest(id=str(i), request=request)

    stream = embedding_pb2_grpc.EmbeddingServiceStub(channel_of(server)).EmbedStream(flood())
    wait_until(lambda: len(results) >= STREAM_WINDOW)
    before = -1
    while before != len(results):  # until no more requests are answered
        before = len(results)
        time.sleep(0.5)
    assert len(results) < 500 and len(sent) < 1000
    with Client(server.address) as client:
        assert client.embed([np.full((96, 96, 3), 9, np.uint8)]).universal.shape == (1, 128)
    # Now the client reads, and the stream goes on.
    assert sum(1 for _ in zip(stream, range(1000), strict=False)) == 1000
    leave.set()


def test_the_work_of_a_cancelled_stream_is_dropped(serve, faked, engine, channel_of):
    server = serve(faked)
    batcher = server.pipeline.batcher
    engine.gate.clear()
    entered, computed = sum(engine.entered), sum(engine.batches)
    stub = embedding_pb2_grpc.EmbeddingServiceStub(channel_of(server))
    stream = stub.EmbedStream(iter([message() for _ in range(STREAM_WINDOW)]))
    wait_until(lambda: sum(engine.entered) - entered + batcher.depth == STREAM_WINDOW)
    running = sum(engine.entered) - entered
    stream.cancel()
    time.sleep(0.2)
    engine.gate.set()
    wait_until(lambda: batcher.depth == 0)
    assert sum(engine.batches) - computed == running < STREAM_WINDOW
    assert server.pipeline.admission.dropped.cancelled == STREAM_WINDOW - running


def test_a_request_that_fails_unexpectedly_is_answered(
    serve, faked, channel_of, monkeypatch, caplog
):
    server = serve(faked)
    embed = server.pipeline.embed

    async def fails(sources, *arguments, **options):
        if len(sources) == 2:
            raise ZeroDivisionError("a secret of the server")
        return await embed(sources, *arguments, **options)

    monkeypatch.setattr(server.pipeline, "embed", fails)
    stub = embedding_pb2_grpc.EmbeddingServiceStub(channel_of(server))
    messages = [message(), message(images=2), *(message() for _ in range(3 * STREAM_WINDOW))]
    replies = {reply.id: reply for reply in stub.EmbedStream(iter(messages))}
    assert set(replies) == {sent.id for sent in messages}
    broken = replies[messages[1].id].error
    assert broken.code == grpc.StatusCode.INTERNAL.value[0]
    assert "secret" not in broken.message and "secret" in caplog.text
    assert sum(reply.HasField("response") for reply in replies.values()) == len(messages) - 1


class Forwarder:
    """A TCP forwarder that can be cut while both connections stay open."""

    def __init__(self, address: str) -> None:
        self._to = ("127.0.0.1", int(address.rpartition(":")[2]))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.cut = threading.Event()
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        try:
            here, _ = self._listener.accept()
            there = socket.create_connection(self._to)
        except OSError:
            return
        self._sockets += [here, there]
        for source, target in ((here, there), (there, here)):
            threading.Thread(target=self._copy, args=(source, target), daemon=True).start()

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                if not self.cut.is_set():
                    target.sendall(data)
        except OSError:
            pass

    def close(self) -> None:
        for each in (self._listener, *self._sockets):
            each.close()


def test_a_client_machine_that_disappeared_is_disconnected(serve, faked, engine, monkeypatch):
    monkeypatch.setattr(server_module, "KEEPALIVE_SECONDS", 1.0)
    monkeypatch.setattr(server_module, "KEEPALIVE_TIMEOUT_SECONDS", 1.0)
    server = serve(faked)
    batcher = server.pipeline.batcher
    line = Forwarder(server.address)
    engine.gate.clear()
    with grpc.insecure_channel(line.address) as channel:
        stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)
        entered = sum(engine.entered)
        calls = [stub.Embed.future(message().request)]
        wait_until(lambda: sum(engine.entered) - entered == 1)  # alone, so that the others wait
        calls += [stub.Embed.future(message().request) for _ in range(3)]
        wait_until(lambda: batcher.depth == 3)
        waiting = batcher.depth
        line.cut.set()
        time.sleep(4)  # one second of silence and one without an answer to the ping
        engine.gate.set()
        wait_until(lambda: batcher.depth == 0)
        line.close()
        for call in calls:
            call.cancel()
    assert waiting and server.pipeline.admission.dropped.cancelled == waiting


def test_the_concurrent_calls_of_a_connection_are_bounded(
    serve, faked, engine, channel_of, monkeypatch
):
    monkeypatch.setattr(server_module, "MAX_CONCURRENT_STREAMS", 4)
    server = serve(faked)
    batcher = server.pipeline.batcher
    engine.gate.clear()
    entered = sum(engine.entered)
    stub = embedding_pb2_grpc.EmbeddingServiceStub(channel_of(server))
    calls = [stub.Embed.future(message().request) for _ in range(50)]
    wait_until(lambda: sum(engine.entered) - entered + batcher.depth == 4)
    time.sleep(0.3)
    assert sum(engine.entered) - entered + batcher.depth == 4
    engine.gate.set()
    # The other calls waited in the client, or were refused because they came too fast.
    codes = {call.code() for call in calls}
    assert codes <= {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}
    assert grpc.StatusCode.OK in codes
