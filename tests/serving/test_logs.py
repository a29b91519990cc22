"""Request ids and log lines of calls: one line each, which a client cannot forge."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import logging
import os
from types import SimpleNamespace

import grpc
import pytest

from crl_sdk.pb.crl.v1 import embedding_pb2, embedding_pb2_grpc
from crl_sdk.serving._call_interceptor import REQUEST_ID_KEY, CallInterceptor, request_id
from crl_sdk.serving._logs import make_log_handler, stderr_in_the_log
from crl_sdk.serving._security import Token


def call(server, *metadata, criterion="nothing"):
    """Make a call that fails because the criterion is unknown; return its error."""
    with grpc.insecure_channel(server.address) as channel:
        stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)
        image = embedding_pb2.Image(encoded=b"x")
        request = embedding_pb2.EmbedRequest(images=[image], criteria=[criterion])
        with pytest.raises(grpc.RpcError) as caught:
            stub.Embed(request, metadata=metadata)
    return caught.value


def id_of(error) -> str:
    return dict(error.trailing_metadata())[REQUEST_ID_KEY]


def test_a_call_keeps_the_id_its_client_gave(server):
    error = call(server, (REQUEST_ID_KEY, "order-7/frame:12"))
    assert id_of(error) == "order-7/frame:12"
    assert dict(error.trailing_metadata())["crl-error"] == "UnknownCriterionError"


@pytest.mark.parametrize("bad", ["a b", "x" * 129, '"}', "a\\nb", "", "a;rm"])
def test_ids_that_could_forge_a_log_line_are_replaced(server, bad):
    given = id_of(call(server, (REQUEST_ID_KEY, bad)))
    assert given != bad and len(given) == 16


def test_ids_of_good_and_refused_calls(serve, embedder):
    token = Token("camera", "a-secret-of-some-length", frozenset({"embed"}))
    server = serve(embedder, tokens=(token,))
    assert id_of(call(server, (REQUEST_ID_KEY, "seven"))) == "seven"  # no token
    with grpc.insecure_channel(server.address) as channel:
        stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)
        metadata = (("authorization", f"Bearer {token.secret}"), (REQUEST_ID_KEY, "eight"))
        _, done = stub.GetModel.with_call(embedding_pb2.GetModelRequest(), metadata=metadata)
    assert dict(done.trailing_metadata())[REQUEST_ID_KEY] == "eight"


def test_an_unexpected_exception_is_logged_and_its_text_is_not_sent(server, monkeypatch, caplog):
    def broken(*_args, **_kwargs):
        raise ZeroDivisionError("the secret of the house")

    monkeypatch.setattr(server.pipeline, "embed", broken)
    with caplog.at_level(logging.WARNING, logger="crl_sdk"):
        error = call(server, (REQUEST_ID_KEY, "unlucky"))
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "unlucky" in error.details() and "secret" not in error.details()
    assert "the secret of the house" in caplog.text and "Traceback" in caplog.text


def test_a_client_that_leaves_before_it_is_refused_is_no_failure_of_the_server(caplog):
    """gRPC then fails to send the status, and ends the call itself."""
    ended = []

    class Context:
        def invocation_metadata(self):
            return ()

        def peer(self):
            return "ipv4:127.0.0.1:1"

        def set_trailing_metadata(self, _):
            pass

        def code(self):
            return grpc.StatusCode.RESOURCE_EXHAUSTED

        def details(self):
            return "no room"

        async def abort(self, *_):
            raise grpc.aio.InternalError("the call is over")

    async def call_it():
        async def find(_):
            return grpc.unary_unary_rpc_method_handler(lambda _, context: context.abort())

        details = SimpleNamespace(method="/crl.v1.EmbeddingService/Embed")
        handler = await CallInterceptor([ended.append]).intercept_service(find, details)
        await handler.unary_unary(b"", Context())

    with caplog.at_level(logging.WARNING, "crl_sdk"), pytest.raises(grpc.aio.InternalError):
        asyncio.run(call_it())
    assert not caplog.records
    assert [call.code for call in ended] == [grpc.StatusCode.RESOURCE_EXHAUSTED]


@pytest.mark.parametrize("method", ["Embed", "EmbedStream"])
def test_bytes_that_are_no_message_are_invalid_input(serve, embedder, caplog, method):
    token = Token("camera", "a-secret-of-some-length", frozenset({"embed"}))
    server = serve(embedder, tokens=(token,), access_log=True)
    path = f"/crl.v1.EmbeddingService/{method}"

    def send(*metadata):
        with (
            grpc.insecure_channel(server.address) as channel,
            pytest.raises(grpc.RpcError) as caught,
        ):
            if method == "Embed":
                channel.unary_unary(path)(b"\xff" * 9, metadata=metadata)
            else:
                list(channel.stream_stream(path)(iter([b"\xff" * 9]), metadata=metadata))
        return caught.value

    with caplog.at_level(logging.INFO):
        error = send(("authorization", f"Bearer {token.secret}"), (REQUEST_ID_KEY, "nine"))
        assert send().code() is grpc.StatusCode.UNAUTHENTICATED  # and is not parsed
        server.stop()
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT and id_of(error) == "nine"
    assert f"expected a message of {path}" in error.details()
    codes = [record.code for record in caplog.records if hasattr(record, "code")]
    assert codes == ["INVALID_ARGUMENT", "UNAUTHENTICATED"]
    assert not any(record.exc_info for record in caplog.records)


def test_the_access_log_has_a_line_per_call(serve, embedder, caplog):
    server = serve(embedder, access_log=True)
    with caplog.at_level(logging.INFO, logger="crl_sdk"):
        call(server)
        server.stop()
    (record,) = (r for r in caplog.records if getattr(r, "code", "") == "NOT_FOUND")
    assert record.method == "/crl.v1.EmbeddingService/Embed"
    assert record.peer and record.seconds > 0


def test_server_failures_are_logged_without_the_access_log(serve, faked, engine, caplog):
    server = serve(faked)
    engine.fails = True
    with grpc.insecure_channel(server.address) as channel:
        stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)
        pixels = embedding_pb2.Tensor(
            dtype=embedding_pb2.DTYPE_UINT8, shape=[4, 4], data=bytes(range(16))
        )
        request = embedding_pb2.EmbedRequest(images=[embedding_pb2.Image(pixels=pixels)])
        with caplog.at_level(logging.WARNING), pytest.raises(grpc.RpcError):
            stub.Embed(request)
    engine.fails = False
    server.stop()
    assert any(getattr(r, "code", "") == "UNAVAILABLE" for r in caplog.records)


@pytest.fixture
def handler():
    """Make log handlers; all are closed at the end of the test."""
    made = []

    def make(form):
        made.append(make_log_handler(form))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_json_lines_hold_the_id_and_stay_one_line(handler):
    text, handler = handler("text"), handler("json")
    record = logging.LogRecord("crl", logging.INFO, "", 0, 'two\nlines and "quotes"', None, None)
    record.method = "/a/b"
    token = request_id.set("seven")
    try:
        line = handler.format(record)
    finally:
        request_id.reset(token)
    assert "\n" not in line
    parsed = json.loads(line)
    assert parsed["request_id"] == "seven" and parsed["method"] == "/a/b"
    assert parsed["message"] == 'two\nlines and "quotes"' and parsed["time"].endswith("Z")
    assert "request_id" not in json.loads(handler.format(record))
    assert text.format(record).endswith('"quotes"')


def test_log_lines_are_not_lost_while_a_language_model_loads(handler, capfd):
    from llama_cpp._utils import suppress_stdout_stderr

    log = logging.Logger("crl")
    log.addHandler(handler("text"))
    with suppress_stdout_stderr():  # as llama_cpp.Llama does while it loads
        log.warning("the engine fails")
    assert "the engine fails" in capfd.readouterr().err


def test_what_others_write_to_stderr_becomes_lines_of_the_log(handler, capfd):
    log = logging.getLogger()
    chosen = handler("json")
    log.addHandler(chosen)
    try:
        with stderr_in_the_log():
            os.write(2, b'a C library says "hello"\r50 %\rdone\n\n\xff not UTF-8\n')
            os.write(2, b"without an end")
        os.write(2, b"afterwards\n")
    finally:
        log.removeHandler(chosen)
    *lines, last = capfd.readouterr().err.splitlines()
    messages = [json.loads(line)["message"] for line in lines]
    assert last == "afterwards"
    assert {
        'a C library says "hello"', "50 %", "done", "\\xff not UTF-8", "without an end"
    } <= set(messages)  # fmt: skip
    assert {json.loads(line)["logger"] for line in lines} == {"stderr"}


def test_more_than_the_pipe_holds_blocks_nobody(handler, capfd):
    """A C library that holds Python's lock would wait for the reader, which waits for the lock."""
    log = logging.getLogger()
    chosen = handler("json")
    log.addHandler(chosen)
    try:
        with stderr_in_the_log():
            written = ctypes.PyDLL(None).write(2, b"x" * 2**20, 2**20)  # holds the lock
    finally:
        log.removeHandler(chosen)
    assert 0 < written < 2**20
    assert all(json.loads(line) for line in capfd.readouterr().err.splitlines())


def test_a_log_on_a_full_disk_is_given_up_quietly(handler, monkeypatch):
    chosen = handler("json")
    chosen.stream.close()
    chosen.stream = open("/dev/full", "w", buffering=1)  # noqa: SIM115 - `handler` closes it
    log = logging.Logger("crl")
    log.addHandler(chosen)
    with stderr_in_the_log():
        log.warning("nobody can read this")  # no traceback, which would be logged, and so on
    with contextlib.suppress(OSError):
        chosen.stream.close()
