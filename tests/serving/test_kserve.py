"""KServe v2 with our own stubs: requests that Triton's clients never send, and malformed ones.

tests/conformance tests Triton's own clients, in a separate process.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from crl_sdk import Client
from crl_sdk.errors import InvalidInputError
from crl_sdk.pb.inference import kserve_pb2 as pb
from crl_sdk.pb.inference import kserve_pb2_grpc
from crl_sdk.serving._shared_memory import MAX_REGIONS, SharedMemory


@pytest.fixture
def stub(server) -> Iterator[kserve_pb2_grpc.GRPCInferenceServiceStub]:
    with grpc.insecure_channel(server.address) as channel:
        yield kserve_pb2_grpc.GRPCInferenceServiceStub(channel)


def infer_request(model: str = "crl.color", *, name: str = "IMAGE", datatype: str = "BYTES", shape,
                  raw: bytes | None = None, **more) -> pb.ModelInferRequest:  # fmt: skip
    tensor = pb.ModelInferRequest.InferInputTensor(name=name, datatype=datatype, shape=shape)
    raws = [] if raw is None else [raw]
    return pb.ModelInferRequest(model_name=model, inputs=[tensor], raw_input_contents=raws, **more)


def element(data: bytes) -> bytes:
    return struct.pack("<I", len(data)) + data


def rows_of(reply: pb.ModelInferResponse, name: str) -> np.ndarray:
    (at,) = (i for i, output in enumerate(reply.outputs) if output.name == name)
    flat = np.frombuffer(reply.raw_output_contents[at], "<f4")
    return flat.reshape(reply.outputs[at].shape)


def refused(call, code: grpc.StatusCode, *words: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert caught.value.code() is code, caught.value.details()
    for word in words:
        assert word in caught.value.details()


def test_all_three_forms_of_bytes_give_the_same_rows(server, stub, image_files):
    data = image_files[0].read_bytes()
    with Client(server.address) as client:
        expected = client.embed([data], ["color"])
    framed = stub.ModelInfer(infer_request(shape=[1, 1], raw=element(data)))
    bare = stub.ModelInfer(infer_request(shape=[1], raw=data))  # as perf_analyzer sends files
    typed = infer_request(shape=[1, 1])
    typed.inputs[0].contents.bytes_contents.append(data)
    for reply in (framed, bare, stub.ModelInfer(typed)):
        np.testing.assert_array_equal(rows_of(reply, "CONDITIONAL"), expected["color"])
        np.testing.assert_array_equal(rows_of(reply, "UNIVERSAL"), expected.universal)
        assert reply.parameters["basis_sha256"].string_param == expected.basis_sha256["color"]
        assert reply.parameters["cached_images"].int64_param == 1


def test_typed_pixels_and_embeddings(server, stub):
    pixels = np.random.default_rng(0).integers(0, 255, (2, 20, 30, 3), np.uint8)
    with Client(server.address) as client:
        expected = client.embed(list(pixels), ["color"])
    request = infer_request("crl-pixels.color", name="PIXELS", datatype="UINT8", shape=pixels.shape)
    request.inputs[0].contents.uint_contents.extend(pixels.ravel().tolist())
    reply = stub.ModelInfer(request)
    np.testing.assert_allclose(rows_of(reply, "CONDITIONAL"), expected["color"], atol=1e-5)
    request = infer_request("crl-embedding.color", name="EMBEDDING", datatype="FP32",
                            shape=expected.universal.shape)  # fmt: skip
    request.inputs[0].contents.fp32_contents.extend(expected.universal.ravel().tolist())
    reply = stub.ModelInfer(request)
    np.testing.assert_allclose(rows_of(reply, "CONDITIONAL"), expected["color"], atol=1e-5)
    request.inputs[0].contents.fp32_contents.pop()
    refused(lambda: stub.ModelInfer(request), grpc.StatusCode.INVALID_ARGUMENT, "expected 1024")


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (pb.ModelInferRequest(model_name="crl.color"), ["takes one input, IMAGE", "[]"]),
        (infer_request(shape=[1, 1]), ["IMAGE", "its data once"]),
        (infer_request(shape=[], raw=b""), ["shape (n"]),
        (infer_request(shape=[-1, 1], raw=b""), ["shape (n"]),
        (infer_request(shape=[1, 2], raw=b""), ["shape (n, 1)"]),
        (infer_request(shape=[2, 1], raw=element(b"x")), ["expected 2 elements"]),
        (infer_request(shape=[1, 1], raw=element(b"x") * 2), ["expected 1 elements"]),
        (infer_request(shape=[1, 1], raw=struct.pack("<I", 2**32 - 1)), ["end within element"]),
        (infer_request(shape=[1, 1], raw=b"ab"), ["end within element"]),
        (infer_request(shape=[1, 1], datatype="FP32", raw=b""), ["datatype BYTES", "FP32"]),
        (infer_request(shape=[2**62, 1], raw=element(b"x")), ["elements"]),
        (infer_request("crl-pixels", name="PIXELS", datatype="UINT8", shape=[1, 9, 9, 3],
                       raw=bytes(242)), ["expected 243 bytes", "242"]),
        (infer_request("crl-pixels", name="PIXELS", datatype="UINT8", shape=[1, 9, 9, 4],
                       raw=bytes(324)), ["(n, h, w, 3)"]),
        (infer_request("crl-pixels", name="PIXELS", datatype="UINT8",
                       shape=[2**40, 2**40, 2**40, 3], raw=bytes(9)), ["got 9"]),
        (infer_request("crl-embedding", name="EMBEDDING", datatype="FP32", shape=[1, 3],
                       raw=bytes(12)), ["128"]),
        (infer_request("crl-embedding", name="EMBEDDING", datatype="FP32", shape=[1, 128],
                       raw=np.full(128, np.nan, "<f4").tobytes()), ["NaN"]),
    ],
)  # fmt: skip
def test_malformed_tensors_are_refused_with_what_was_expected(stub, request_, words):
    refused(lambda: stub.ModelInfer(request_), grpc.StatusCode.INVALID_ARGUMENT, *words)


def test_names_versions_and_criteria_that_are_not_there(stub, image_files):
    data = image_files[0].read_bytes()
    for name in ("resnet50", "crl.", "crl.nothing", "crl..color", "", "crl.color.shape"):
        request = infer_request(name, shape=[1, 1], raw=element(data))
        with pytest.raises(grpc.RpcError) as caught:
            stub.ModelInfer(request)
        assert caught.value.code() in (
            grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT,
        )  # fmt: skip
    request = infer_request(shape=[1, 1], raw=element(data), model_version="2")
    refused(lambda: stub.ModelInfer(request), grpc.StatusCode.NOT_FOUND, "version '1'")
    request = infer_request(shape=[1, 1], raw=element(data))
    request.parameters["criterion"].string_param = "shape"
    refused(lambda: stub.ModelInfer(request), grpc.StatusCode.INVALID_ARGUMENT, "'crl'")


def test_the_timeout_of_a_request_is_in_microseconds(stub, image_files):
    request = infer_request(shape=[1, 1], raw=element(image_files[1].read_bytes()))
    request.parameters["timeout"].int64_param = 1
    refused(lambda: stub.ModelInfer(request), grpc.StatusCode.DEADLINE_EXCEEDED)
    request.parameters["timeout"].int64_param = 30_000_000
    assert len(stub.ModelInfer(request).outputs) == 2


def test_a_stream_goes_on_after_a_request_that_fails(stub, image_files):
    good = [path.read_bytes() for path in image_files]
    requests = [
        infer_request(shape=[1, 1], raw=element(data), id=str(number))
        for number, data in enumerate([good[0], b"junk", *good * 5])
    ]
    replies = list(stub.ModelStreamInfer(iter(requests)))
    assert [reply.infer_response.id for reply in replies] == [r.id for r in requests]  # in order
    assert [bool(reply.error_message) for reply in replies[:3]] == [False, True, False]
    assert "not a readable image" in replies[1].error_message


def test_a_stream_goes_on_after_what_nobody_foresaw(server, stub, image_files, monkeypatch, caplog):
    embed = server.pipeline.embed

    async def fails(sources, *arguments, **options):
        if sources[0] == b"junk":
            raise ZeroDivisionError("a secret of the server")
        return await embed(sources, *arguments, **options)

    monkeypatch.setattr(server.pipeline, "embed", fails)
    data = [image_files[0].read_bytes(), b"junk", *[path.read_bytes() for path in image_files] * 3]
    requests = [infer_request(shape=[1, 1], raw=element(d), id=str(i)) for i, d in enumerate(data)]
    replies = list(stub.ModelStreamInfer(iter(requests)))
    assert [reply.infer_response.id for reply in replies] == [r.id for r in requests]
    assert [i for i, reply in enumerate(replies) if reply.error_message] == [1]
    assert "secret" not in replies[1].error_message and "secret" in caplog.text


def test_shared_memory_is_off_unless_the_operator_allows_it(stub):
    request = pb.SystemSharedMemoryRegisterRequest(name="a", key="/a", byte_size=4)
    code = grpc.StatusCode.UNIMPLEMENTED
    refused(lambda: stub.SystemSharedMemoryRegister(request), code, "--shared-memory")
    stub.SystemSharedMemoryUnregister(pb.SystemSharedMemoryUnregisterRequest())
    stub.CudaSharedMemoryUnregister(pb.CudaSharedMemoryUnregisterRequest())
    assert "system_shared_memory" not in stub.ServerMetadata(pb.ServerMetadataRequest()).extensions


@pytest.fixture
def segment() -> Iterator[Path]:
    path = Path(f"/dev/shm/crl-test-{os.getpid()}")
    path.write_bytes(bytes(range(100)))
    yield path
    path.unlink()


def test_regions_are_read_and_written_within_their_bounds(segment):
    memory = SharedMemory(enabled=True)
    memory.register("part", f"/{segment.name}", 10, 50)
    memory.register("part", f"/{segment.name}", 10, 50)  # the same again is no error
    assert memory.read("part", 5, 3) == bytes([15, 16, 17])
    memory.write("part", 0, 4, b"abcd")
    assert segment.read_bytes()[8:16] == bytes([8, 9]) + b"abcd" + bytes([14, 15])
    for offset, size in ((0, 51), (50, 1), (-1, 2), (2**63, 1)):
        with pytest.raises(InvalidInputError, match="within the 50"):
            memory.read("part", offset, size)
    with pytest.raises(InvalidInputError, match="room for 2"):
        memory.write("part", 0, 2, b"abcd")
    with pytest.raises(InvalidInputError, match="unregister it first"):
        memory.register("part", f"/{segment.name}", 0, 50)
    memory.unregister("part")
    memory.unregister("part")
    with pytest.raises(InvalidInputError, match="no shared memory region"):
        memory.read("part", 0, 1)


def test_an_object_cut_short_is_an_error_and_kills_nothing(segment):
    memory = SharedMemory(enabled=True)
    memory.register("all", segment.name, 0, 100)
    os.truncate(segment, 20)
    with pytest.raises(InvalidInputError, match="was shortened"):
        memory.read("all", 0, 100)
    with pytest.raises(InvalidInputError, match="was shortened"):
        memory.write("all", 0, 100, bytes(100))
    memory.unregister("")


@pytest.mark.parametrize("key", ["", "/", "..", "/../tmp/x", "a/b", "/a\0b", "x" * 300, "."])
def test_keys_never_leave_the_directory_of_shared_memory(key):
    with pytest.raises(InvalidInputError, match="expected the key"):
        SharedMemory(enabled=True).register("a", key, 0, 1)


def test_links_pipes_and_small_or_missing_objects_are_refused(segment, tmp_path):
    memory = SharedMemory(enabled=True)
    link, pipe = Path(f"{segment}-link"), Path(f"{segment}-pipe")
    link.symlink_to(tmp_path)
    os.mkfifo(pipe)
    try:
        for key, offset, size in (
            (link.name, 0, 1), (pipe.name, 0, 1), ("crl-not-there", 0, 1),
            (segment.name, 0, 101), (segment.name, 2**62, 1), (segment.name, 0, 0),
        ):  # fmt: skip
            with pytest.raises(InvalidInputError):
                memory.register("a", key, offset, size)
    finally:
        link.unlink()
        pipe.unlink()
    assert not memory.regions


def test_regions_are_bounded_in_number(segment):
    memory = SharedMemory(enabled=True)
    for number in range(MAX_REGIONS):
        memory.register(str(number), segment.name, 0, 1)
    with pytest.raises(InvalidInputError, match="unregister those"):
        memory.register("one more", segment.name, 0, 1)
    memory.unregister("")
    assert not memory.regions
