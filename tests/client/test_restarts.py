"""Servers that go away and come back, and pings on idle connections."""

from __future__ import annotations

import queue
import threading
import time

import grpc
import pytest

from crl_sdk import Client, ClientOptions
from crl_sdk.client import _connection
from crl_sdk.errors import ServiceError
from crl_sdk.pb.crl.v1 import embedding_pb2, embedding_pb2_grpc


@pytest.mark.parametrize("down_seconds", [0.0, 2.5])
def test_a_restart_goes_unnoticed(serve, embedder, image_files, down_seconds):
    first = serve(embedder)
    with Client(first.address, ClientOptions(timeout=120)) as client:
        rows = client.embed(image_files[:1]).universal
        first.stop()
        starting = threading.Timer(down_seconds, serve, [embedder], {"address": first.address})
        starting.start()
        try:
            if down_seconds == 0:
                starting.join()
            again = client.embed(image_files[:1]).universal
        finally:
            starting.join()
    assert (again == rows).all()


def test_a_server_that_stays_away_is_waited_for_until_the_timeout(serve, embedder, monkeypatch):
    attempts, real = [], _connection._retry_pause

    def retry_pause(code, error, attempt):
        attempts.append(attempt)
        return real(code, error, attempt)

    server = serve(embedder)
    patient = ClientOptions(timeout=8)
    with (
        Client(server.address, patient) as client,
        Client(server.address, ClientOptions(timeout=60, retries=0)) as impatient,
    ):
        client.model()
        impatient.model()
        server.stop()
        monkeypatch.setattr(_connection, "_retry_pause", retry_pause)
        with pytest.raises(ServiceError):
            client.model()
        assert attempts == list(range(len(attempts))) and len(attempts) > patient.retries + 1
        attempts.clear()
        with pytest.raises(ServiceError, match="UNAVAILABLE"):
            impatient.model()
        assert attempts == [0]


def idle_stream(address, seconds):
    """Keep a stream open that sends nothing but pings, and then use it.

    Args:
        address: Address of the server.
        seconds: Seconds after which to use it, or None to wait for its end.

    Returns:
        The id in the reply, or the reason why the stream ended.
    """
    requests: queue.Queue[object] = queue.Queue()
    options = [("grpc.keepalive_time_ms", 200), ("grpc.keepalive_timeout_ms", 60_000),
               ("grpc.http2.max_pings_without_data", 0)]  # fmt: skip
    with grpc.insecure_channel(address, options=options) as channel:
        stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)
        replies = stub.EmbedStream(iter(requests.get, None), timeout=120)
        request = embedding_pb2.EmbedStreamRequest(id="1")
        requests.put(request)
        next(replies)
        if seconds is not None:
            time.sleep(seconds)
            requests.put(request)
        try:
            return next(replies).id
        except grpc.RpcError as error:
            return error.details()
        finally:
            requests.put(None)


def test_clients_may_ping_as_often_as_the_server_says(serve, embedder, monkeypatch, tmp_path):
    assert idle_stream(serve(embedder).address, None) == "Too many pings"  # more often than 5 s
    monkeypatch.setattr("crl_sdk.serving._server.PING_SECONDS", 0.1)
    other = serve(embedder, bases=tmp_path / "others")
    assert idle_stream(other.address, 2) == "1"
