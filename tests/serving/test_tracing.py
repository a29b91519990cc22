"""OpenTelemetry: the spans that a collector receives, and a server without a collector."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc

from crl_sdk import Client
from crl_sdk.errors import InvalidInputError
from crl_sdk.pb.crl.v1 import embedding_pb2, embedding_pb2_grpc
from crl_sdk.rpc import encode_tensor
from support import unseen_image, wait_until

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self) -> None:
        self.exports = []

    def Export(self, request, context):
        self.exports.append(request)
        return pb.ExportTraceServiceResponse()

    def spans(self, name):
        return [
            span
            for export in self.exports
            for resource in export.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
            if span.name == name
        ]


@pytest.fixture
def collector():
    server = grpc.server(ThreadPoolExecutor(2))
    service = Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(service, server)
    service.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield service
    server.stop(None).wait()


def test_a_call_continues_its_callers_trace(serve, embedder, collector):
    server = serve(embedder, otlp=collector.endpoint)
    with Client(server.address) as client:
        client.create_basis("color", ["red", "green"])
    image = embedding_pb2.Image(pixels=encode_tensor(unseen_image()))
    request = embedding_pb2.EmbedRequest(images=[image], criteria=["color"])
    unknown = embedding_pb2.EmbedRequest(images=[image], criteria=["colour"])
    with grpc.insecure_channel(server.address) as channel:
        stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)
        metadata = (("traceparent", f"00-{TRACE}-{PARENT}-01"), ("x-request-id", "seven"))
        reply = stub.Embed(request, metadata=metadata)
        with pytest.raises(grpc.RpcError) as refused:
            stub.Embed(unknown, metadata=metadata)
        assert refused.value.code() == grpc.StatusCode.NOT_FOUND
    assert reply.images[0].code == embedding_pb2.ImageStatus.CODE_OK
    server.stop()  # sends the remaining spans
    good, bad = collector.spans("/crl.v1.EmbeddingService/Embed")
    for span in (good, bad):
        assert span.trace_id.hex() == TRACE and span.parent_span_id.hex() == PARENT
    facts = {item.key: item.value for item in bad.attributes}
    assert facts["rpc.grpc.status_code"].int_value == grpc.StatusCode.NOT_FOUND.value[0]
    (inside,) = collector.spans("crl.embed")
    assert inside.parent_span_id == good.span_id
    assert good.start_time_unix_nano <= inside.start_time_unix_nano + 1_000_000
    request_facts = {item.key: item.value for item in inside.attributes}
    assert request_facts["crl.request_id"].string_value == "seven"
    assert request_facts["crl.images"].int_value == 1
    assert [item.string_value for item in request_facts["crl.criteria"].array_value.values] == [
        "color"
    ]
    spent = sum(request_facts[f"crl.{stage}_seconds"].double_value for stage in ("queue", "infer"))
    seconds = (inside.end_time_unix_nano - inside.start_time_unix_nano) / 1e9
    assert 0 < spent <= seconds


def test_each_request_of_a_stream_has_a_span(serve, embedder, collector):
    server = serve(embedder, otlp=collector.endpoint)
    image = embedding_pb2.Image(pixels=encode_tensor(unseen_image()))
    with grpc.insecure_channel(server.address) as channel:
        stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)
        messages = [
            embedding_pb2.EmbedStreamRequest(
                id=str(i), request=embedding_pb2.EmbedRequest(images=[image])
            )
            for i in range(5)
        ]
        assert len(list(stub.EmbedStream(iter(messages)))) == 5
    server.stop()
    (call,) = collector.spans("/crl.v1.EmbeddingService/EmbedStream")
    inside = collector.spans("crl.embed")
    assert len(inside) == 5 and {span.parent_span_id for span in inside} == {call.span_id}


def test_a_server_without_its_collector_serves_and_ends(serve, embedder, caplog):
    server = serve(embedder, otlp="http://127.0.0.1:1")
    with Client(server.address) as client:
        assert client.embed([unseen_image()]).universal.shape == (1, 128)
    started = time.monotonic()
    server.stop()
    assert time.monotonic() - started < 20
    wait_until(lambda: any("opentelemetry" in record.name for record in caplog.records))


@pytest.mark.parametrize("endpoint", ["collector:4317", "ftp://collector", "http://"])
def test_malformed_endpoints(serve, embedder, endpoint):
    with pytest.raises(InvalidInputError, match="http://host:port"):
        serve(embedder, otlp=endpoint)
