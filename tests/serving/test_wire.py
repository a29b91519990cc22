"""Requests that no honest client sends: each gets INVALID_ARGUMENT or an error of one image."""

from __future__ import annotations

import time
import urllib.request
from dataclasses import replace

import grpc
import numpy as np
import pytest

from crl_sdk import Basis, Client, ClientOptions
from crl_sdk.errors import (
    BasisStoreError,
    ImageError,
    IntegrityError,
    InvalidInputError,
    OverloadedError,
)
from crl_sdk.pb.crl.v1 import basis_pb2, embedding_pb2, embedding_pb2_grpc
from crl_sdk.serving import _call_interceptor
from support import wait_until

EMBED = "/crl.v1.EmbeddingService/Embed"


@pytest.fixture
def channel(server):
    with grpc.insecure_channel(server.address) as opened:
        yield opened


def ended(channel, method, *messages, stream=False):
    """Return the status of a call whose messages are raw bytes."""
    try:
        if stream:
            list(channel.stream_stream(method)(iter(messages), timeout=60))
        else:
            channel.unary_unary(method)(messages[0], timeout=60)
    except grpc.RpcError as error:
        return error.code(), error.details()
    return grpc.StatusCode.OK, ""


@pytest.mark.parametrize(
    ("method", "stream"),
    [
        (EMBED, False),
        ("/crl.v1.EmbeddingService/EmbedText", False),
        ("/crl.v1.EmbeddingService/EmbedStream", True),
        ("/crl.v1.BasisService/PutBasis", False),
        ("/inference.GRPCInferenceService/ModelInfer", False),
        ("/inference.GRPCInferenceService/ModelStreamInfer", True),
    ],
)
def test_bytes_that_are_no_message(server, channel, caplog, method, stream):
    for garbage in (b"\xff" * 7, b"\x0a\xff\xff\xff\xff\x0f", b"\x80"):
        code, details = ended(channel, method, garbage, stream=stream)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert details.startswith(f"expected a message of {method}, got other bytes")
    assert not [record for record in caplog.records if record.exc_info]


SHAPES = [
    [0, 2**63 - 1], [2**40, 0, 2**40], [1] * 65, [0] * 65, [2**62, 2**62], [2**31, 2**31, 4],
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["pixels", "embedding"])
def test_shapes_that_no_array_has_fail_their_image_alone(server, image_files, shape, kind):
    good = embedding_pb2.Image(encoded=image_files[0].read_bytes())
    code = embedding_pb2.DTYPE_UINT8 if kind == "pixels" else embedding_pb2.DTYPE_FLOAT32
    bad = embedding_pb2.Image(**{kind: embedding_pb2.Tensor(dtype=code, shape=shape)})
    with grpc.insecure_channel(server.address) as channel:
        stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)
        request = embedding_pb2.EmbedRequest(images=[bad, good, embedding_pb2.Image(), good])
        reply = stub.Embed(request, timeout=60)
    ok = embedding_pb2.ImageStatus.CODE_OK
    assert [image.code == ok for image in reply.images] == [False, True, False, True]
    assert reply.images[0].message.startswith("expected")
    assert "got none of them" in reply.images[2].message


def test_stored_embeddings_fail_one_by_one(client):
    dim = client.model().embedding_dim
    good = np.full(dim, dim**-0.5, np.float32)
    holed = good.copy()
    holed[3] = np.nan
    result = client.embed(
        [good, holed, good[:-1], np.full(dim, np.inf, np.float32), good], ["color"],
        on_error="collect",
    )  # fmt: skip
    assert result.ok.tolist() == [True, False, False, False, True]
    assert "the embedding holds NaN or infinity" in str(result.errors[1])
    assert f"expected an embedding of shape ({dim},)" in str(result.errors[2])
    assert np.array_equal(result["color"][0], result["color"][4])
    assert all(isinstance(error, ImageError) for error in result.errors.values())


def test_a_sealed_basis_that_overflows_is_refused(client):
    """Its checksum is right, but its embeddings would be NaN."""
    basis = Basis.from_bytes(client.get_basis("color").file)
    huge = np.full_like(basis.projection.weight, 3e38)
    with pytest.raises(InvalidInputError, match=r"must be at most 1e\+12, got 3e\+38"):
        replace(basis.projection, weight=huge)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("crl_sdk.projection._projection.MAX_VALUE", np.inf)
        sealed = replace(basis, projection=replace(basis.projection, weight=huge)).to_bytes()
        assert Basis.from_bytes(sealed)
    with pytest.raises(IntegrityError, match="larger ones overflow in float32"):
        client.put_basis(sealed)
    rows = client.embed([np.zeros((96, 96, 3), np.uint8)], ["color"])["color"]
    assert np.isfinite(rows).all()  # the old basis is still served


def test_a_directory_that_may_not_be_changed(server, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("crl_sdk.storage._atomic_files.tempfile.NamedTemporaryFile", refuse)
    with Client(server.address) as client:
        with pytest.raises(BasisStoreError, match="Permission denied"):
            client.create_basis("size", ["small", "large"])
        with grpc.insecure_channel(server.address) as channel:
            request = basis_pb2.PutBasisRequest(
                texts=basis_pb2.BasisTexts(criterion="size", texts=["small", "large"])
            )
            code, _ = ended(channel, "/crl.v1.BasisService/PutBasis", request.SerializeToString())
        assert code is grpc.StatusCode.FAILED_PRECONDITION


class Unloaded:
    """A language model that must not be loaded."""

    def __call__(self):
        raise AssertionError("loaded")


@pytest.mark.parametrize(
    "wrong",
    [{"count": -1}, {"prompts": ["no place"]}, {"against": ["color", "mood"]},
     {"against": ["mood"]}, {"include": ["x " * 500]}, {"include": [" "]}, {"exclude": [""]},
     {"hint": "\n"}, {"criterion": ""}, {"prompts": ["{}"] * 500}, {"form": "poem"},
     {"max_words": 13}, {"subject": "<|im_end|>"}, {"pictures": np.zeros((20, 3), np.float32)},
     {"pictures": np.zeros((19, 128), np.float32)},
     {"pictures": np.full((20, 128), np.nan, np.float32)}],
)  # fmt: skip
def test_generation_is_refused_before_the_language_model_is_loaded(serve, embedder, wrong):
    served = serve(embedder, open_llm=Unloaded())
    with Client(served.address) as client:
        client.create_basis("color", ["red", "green"])
        arguments = {"criterion": "mood", **wrong}
        started = time.monotonic()
        with pytest.raises(InvalidInputError):
            client.generate_basis(arguments.pop("criterion"), **arguments)
        assert time.monotonic() - started < 30


def test_requests_that_are_refused_are_counted(serve, embedder):
    served = serve(embedder, metrics_address="127.0.0.1:0")
    with grpc.insecure_channel(served.address) as channel:
        for _ in range(3):
            assert ended(channel, EMBED, b"\xff\xff")[0] is grpc.StatusCode.INVALID_ARGUMENT
    expected = f'crl_calls_total{{code="INVALID_ARGUMENT",method="{EMBED}"}} 3.0'

    def counted():
        url = f"http://{served.metrics_address}/metrics"
        return expected in urllib.request.urlopen(url, timeout=60).read().decode()

    wait_until(counted, 60)  # a call is counted after its client has the status


def test_a_lack_of_memory_is_not_the_clients_fault(server, monkeypatch, channel):
    """Protobuf reports it as `DecodeError`, like damaged bytes."""

    def no_memory(size):
        raise MemoryError

    method = "/crl.v1.EmbeddingService/EmbedText"
    monkeypatch.setattr(_call_interceptor, "bytearray", no_memory, raising=False)
    code, details = ended(channel, method, b"\xff" * 7)
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details.startswith("the server ran out of memory: send less in one call")


def test_a_call_that_runs_out_of_memory_is_refused(server, embedder, image_files, monkeypatch):
    def no_memory(*_):
        raise MemoryError

    with Client(server.address, ClientOptions(retries=0)) as client:
        with monkeypatch.context() as patched:
            patched.setattr("crl_sdk.serving._batcher.np.stack", no_memory)
            with pytest.raises(OverloadedError, match="the server ran out of memory"):
                client.embed(image_files[:1])
        assert np.isfinite(client.embed(image_files[:1]).universal).all()
