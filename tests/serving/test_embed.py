"""Embed through the service: rows equal the embedder's; bad input affects no other image."""

from __future__ import annotations

import io
import re
import time

import grpc
import numpy as np
import pytest
from PIL import Image

from crl_sdk import AsyncClient, Client
from crl_sdk.client import ClientOptions
from crl_sdk.errors import (
    CriterionError,
    ImageBatchError,
    ImageError,
    ImageTooLargeError,
    InvalidInputError,
    ServiceError,
    UnknownCriterionError,
)
from crl_sdk.pb.crl.v1 import embedding_pb2, embedding_pb2_grpc
from crl_sdk.rpc import decode_tensor, encode_tensor

COLOR_TEXTS = ["red", "green", "blue", "yellow"]


def local(embedder, images, criteria=("color",)):
    """Return what the embedder returns for the same images, without a server."""
    texts = {"color": COLOR_TEXTS, "shape": ["circle", "square", "star"]}
    from crl_sdk.basis._build import build_basis

    bases = [
        build_basis(
            name,
            texts[name],
            embedder.embed_text,
            fingerprint=embedder.bundle.fingerprint,
            background=embedder.bundle.background,
        )
        for name in criteria
    ]
    return embedder.embed(images, bases)


def test_rows_equal_the_embedders(client, embedder, image_files):
    """Every form of an image gives the embedder's rows, within 1e-6."""
    path = image_files[0]
    picture = Image.open(path)
    expected = local(embedder, [path, picture], ("color", "shape"))
    images = [path, str(path), path.read_bytes(), picture, np.asarray(picture)]
    images.append(expected.universal[1])
    result = client.embed(images, criteria=["shape", "color"])
    for i in range(len(images)):
        which = 0 if i < 3 else 1
        np.testing.assert_allclose(result.universal[i], expected.universal[which], atol=1e-6)
        np.testing.assert_allclose(result["color"][i], expected["color"][which], atol=1e-6)
        np.testing.assert_allclose(result["Shape"][i], expected["shape"][which], atol=1e-6)
    assert result.universal.dtype == np.float32 and not result.errors
    assert result.fingerprint == embedder.bundle.fingerprint
    assert set(result.basis_sha256) == {"shape", "color"}
    with pytest.raises(CriterionError, match="it has"):
        result["mood"]


def test_a_single_reply_is_not_copied(client, image_files):
    rows = client.embed(image_files, criteria=["color"])["color"]
    assert isinstance(rows.base, bytes) or rows.base is not None
    assert not rows.flags.owndata


def test_a_known_image_under_a_new_criterion_costs_only_a_projection(server, client, image_files):
    first = client.embed(image_files, criteria=["color"])
    assert not first.cached.any() and first.timings["infer_us"] > 0
    batches = server.pipeline.batcher.batches
    second = client.embed(image_files, criteria=["shape", "color"])
    assert second.cached.all() and second.timings["infer_us"] == 0
    assert server.pipeline.batcher.batches == batches
    np.testing.assert_array_equal(second["color"], first["color"])
    stored = client.embed(list(first.universal), criteria=["color"])
    np.testing.assert_allclose(stored["color"], first["color"], atol=1e-6)


def test_bad_images_fail_alone(client, image_files, tmp_path):
    good = image_files[0].read_bytes()
    buffer = io.BytesIO()
    Image.new("RGB", (1, 20_000)).save(buffer, "PNG")
    bad = [good[:300], b"", b"not an image", np.zeros((1, 1, 3), np.uint8), tmp_path / "no.jpg"]
    images = [good, *bad, buffer.getvalue(), good]
    with pytest.raises(ImageBatchError) as caught:
        client.embed(images, criteria=["color"])
    result = caught.value.result
    assert sorted(result.errors) == list(range(1, 7))
    assert isinstance(result.errors[6], ImageError)
    assert np.isfinite(result["color"][[0, 7]]).all()
    assert np.isnan(result["color"][1:7]).all() and np.isnan(result.universal[1:7]).all()
    np.testing.assert_array_equal(result["color"][0], result["color"][7])
    collected = client.embed(images, criteria=["color"], on_error="collect")
    assert collected.errors.keys() == result.errors.keys()
    nothing = client.embed([tmp_path / "no.jpg"] * 2, on_error="collect")
    assert sorted(nothing.errors) == [0, 1]


def test_an_image_over_the_limits_is_called_so(serve, faked, image_files):
    from crl_sdk.model._preprocess import ImageLimits

    faked.limits = ImageLimits(max_bytes=500)
    with Client(serve(faked).address) as client:
        result = client.embed([image_files[0]], on_error="collect")
    assert isinstance(result.errors[0], ImageTooLargeError)


@pytest.mark.parametrize("name", ["mood", "../../etc/passwd", "x" * 100, "", "色", "a\x00b"])
def test_unknown_and_malformed_criteria(client, image_files, name):
    with pytest.raises(CriterionError) as caught:
        client.embed(image_files[:1], criteria=[name])
    if name == "mood":
        assert isinstance(caught.value, UnknownCriterionError)
        assert "['color', 'shape']" in str(caught.value)
    with pytest.raises(CriterionError, match="each criterion once"):
        client.embed(image_files[:1], criteria=["color", "Color"])


def test_long_iterables_keep_their_order_in_bounded_memory(server, image_files):
    taken = 0

    def stream():
        nonlocal taken
        for i in range(100):
            taken += 1
            yield image_files[i % len(image_files)]

    options = ClientOptions(batch_size=5, max_in_flight=3)
    with Client(server.address, options) as client:
        batches = client.embed_batches(stream(), ["color"])
        first = next(batches)
        assert taken <= 20  # it reads ahead only for the calls that may run at once
        rest = list(batches)
        assert taken == 100 and len(rest) == 19
        rows = np.concatenate([first["color"], *(part["color"] for part in rest)])
        whole = client.embed(image_files, criteria=["color"])["color"]
        expected = np.concatenate([whole] * 12)[:100]
        np.testing.assert_allclose(rows, expected, atol=1e-6)
        abandoned = client.embed_batches(stream(), ["color"])
        next(abandoned)
        abandoned.close()


@pytest.mark.parametrize("images", ["a.jpg", b"bytes", 7])
def test_one_image_is_not_a_list(client, images):
    with pytest.raises(InvalidInputError, match="expected a list of images"):
        client.embed(images)


def test_an_empty_list(client):
    with pytest.raises(InvalidInputError, match="at least one image"):
        client.embed([])


def test_texts(client, embedder):
    np.testing.assert_allclose(
        client.embed_text(["red", "a photo of blue"]),
        embedder.embed_text(["red", "a photo of blue"]),
        atol=1e-6,
    )
    for texts, words in ([[], "at least one"], [["red " * 99], "tokens"], [[" "], "visible"]):
        with pytest.raises(InvalidInputError, match=words):
            client.embed_text(texts)


def test_model(client, embedder):
    model = client.model()
    assert model.fingerprint == embedder.bundle.fingerprint
    assert model.embedding_dim == 128 and model.preprocessing.height == 96
    assert model.engine == "onnx/cpu/fp32" and model.max_images > 0


@pytest.fixture
def stub(server):
    with grpc.insecure_channel(server.address) as channel:
        yield embedding_pb2_grpc.EmbeddingServiceStub(channel)


def pixels(shape, data, dtype=embedding_pb2.DTYPE_UINT8):
    return embedding_pb2.Image(pixels=embedding_pb2.Tensor(dtype=dtype, shape=shape, data=data))


def prepared(array):
    return embedding_pb2.Image(prepared=encode_tensor(np.asarray(array)))


def test_prepared_pixels_are_embedded_as_they_are(stub, embedder):
    array = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    both = [prepared(array), embedding_pb2.Image(pixels=encode_tensor(array))]
    reply = stub.Embed(embedding_pb2.EmbedRequest(images=both))
    assert [each.code for each in reply.images] == [embedding_pb2.ImageStatus.CODE_OK] * 2
    assert reply.images[0].digest != reply.images[1].digest
    rows = decode_tensor(reply.universal)
    np.testing.assert_allclose(rows, embedder.embed([array] * 2).universal, atol=1e-6)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (embedding_pb2.Image(), "expected encoded bytes, pixels or an embedding"),
        (pixels([4, 4, 3], b"12"), "expected 48 bytes"),
        (pixels([2**40, 2**40], b"12"), "expected .* bytes"),
        (pixels([48], bytes(48)), "expected pixels UINT8 of shape"),
        (pixels([4, 4, 1, 3], bytes(48)), "expected pixels UINT8 of shape"),
        (pixels([2, 2], bytes(16), embedding_pb2.DTYPE_FLOAT32), "expected pixels UINT8"),
        (pixels([4, 4], bytes(16), 77), "expected a tensor of dtype"),
        (prepared(np.zeros((96, 95, 3), np.uint8)), r"shape \(96, 96, 3\), got \(96, 95, 3\)"),
        (prepared(np.zeros((96, 96), np.uint8)), r"shape \(96, 96, 3\), got \(96, 96\)"),
        (prepared(np.zeros((1, 96, 96, 3), np.uint8)), r"shape \(96, 96, 3\), got \(1, 96"),
        (prepared(np.zeros((96, 96, 3), np.float32)), "expected prepared pixels UINT8"),
        (prepared(np.zeros((96, 96, 3), np.int8)), "expected prepared pixels UINT8"),
        (embedding_pb2.Image(embedding=encode_tensor(np.ones(5, np.float32))), r"shape \(128,\)"),
        (embedding_pb2.Image(embedding=encode_tensor(np.full(128, np.nan, np.float32))), "NaN"),
        (embedding_pb2.Image(embedding=encode_tensor(np.zeros(128, np.int8))), "NaN"),
        (embedding_pb2.Image(embedding=encode_tensor(np.ones(128, np.uint8))), "FLOAT16 or INT8"),
        (embedding_pb2.Image(embedding=encode_tensor(np.ones((1, 128), np.float32))), "of shape"),
    ],
)
def test_tensors_that_do_not_fit(stub, image_files, image, words):
    good = embedding_pb2.Image(encoded=image_files[0].read_bytes())
    reply = stub.Embed(embedding_pb2.EmbedRequest(images=[good, image]))
    codes = embedding_pb2.ImageStatus
    assert [each.code for each in reply.images] == [codes.CODE_OK, codes.CODE_INVALID]
    assert re.search(words, reply.images[1].message)


def test_the_form_of_the_reply(stub, image_files):
    image = embedding_pb2.Image(encoded=image_files[0].read_bytes())
    request = embedding_pb2.EmbedRequest(
        images=[image], criteria=["color"], dtype=embedding_pb2.DTYPE_FLOAT16, omit_universal=True
    )
    reply = stub.Embed(request)
    assert not reply.HasField("universal")
    rows = decode_tensor(reply.conditional[0].rows)
    assert rows.dtype == np.float16 and rows.shape == (1, 3)
    assert len(reply.images[0].digest) == 32 and reply.timings.total_us > 0
    with pytest.raises(grpc.RpcError, match="FLOAT32, FLOAT16 or INT8"):
        stub.Embed(embedding_pb2.EmbedRequest(images=[image], dtype=embedding_pb2.DTYPE_UINT8))
    with pytest.raises(grpc.RpcError, match="expected 1 to 256 images"):
        stub.Embed(embedding_pb2.EmbedRequest())


def test_bytes_that_are_no_message_and_messages_too_large(server, image_files):
    with grpc.insecure_channel(server.address) as channel:
        call = channel.unary_unary("/crl.v1.EmbeddingService/Embed")
        with pytest.raises(grpc.RpcError):
            call(b"\xff\xff\xff garbage")
        with pytest.raises(grpc.RpcError) as caught:
            call(bytes(65 * 2**20))
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    with Client(server.address) as client:  # the server still works
        assert client.embed(image_files[:1]).universal.shape == (1, 128)


def test_a_server_that_is_not_there():
    started = time.monotonic()
    with (
        Client("127.0.0.1:1", ClientOptions(timeout=2, retries=1)) as client,
        pytest.raises(ServiceError, match="UNAVAILABLE"),
    ):
        client.model()
    assert time.monotonic() - started < 10


def test_the_asynchronous_client(server, image_files):
    async def work():
        async with AsyncClient(server.address) as client:
            result = await client.embed(image_files, criteria=["color"])
            return result["color"], [info.criterion for info in await client.bases()]

    rows, names = server.wait(work())
    assert rows.shape == (9, 3) and names == ["color", "shape"]


def send(stub, messages):
    return {reply.id: reply for reply in stub.EmbedStream(iter(messages))}


def test_a_stream_answers_each_request_by_its_id(stub, image_files):
    def message(i, data, criteria=("color",)):
        request = embedding_pb2.EmbedRequest(
            images=[embedding_pb2.Image(encoded=data)], criteria=criteria
        )
        return embedding_pb2.EmbedStreamRequest(id=str(i), request=request)

    good = [path.read_bytes() for path in image_files]
    messages = [message(i, good[i % 9]) for i in range(40)]
    messages[5] = message("unknown", good[0], ["mood"])
    messages[6] = message("bad", good[0][:99])
    replies = send(stub, messages)
    assert len(replies) == 40
    assert replies["unknown"].error.code == grpc.StatusCode.NOT_FOUND.value[0]
    assert replies["bad"].response.images[0].code == embedding_pb2.ImageStatus.CODE_INVALID
    for i in (0, 7, 39):
        direct = stub.Embed(messages[i].request)
        np.testing.assert_array_equal(
            decode_tensor(replies[str(i)].response.conditional[0].rows),
            decode_tensor(direct.conditional[0].rows),
        )
    assert send(stub, []) == {}
