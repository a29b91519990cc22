"""Several models in one server: each with its own engine, bases, queue and names."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
import urllib.request

import grpc
import numpy as np
import pytest

from crl_sdk import Client, ClientOptions, Embedder, demo_bundle
from crl_sdk.basis import BasisDirectory
from crl_sdk.basis._build import build_basis
from crl_sdk.errors import BasisMismatchError, UnknownCriterionError, UnknownModelError
from crl_sdk.model._manifest import fingerprint_of, parse_manifest
from crl_sdk.pb.crl.v1 import basis_pb2, basis_pb2_grpc, embedding_pb2, embedding_pb2_grpc
from crl_sdk.pb.inference import kserve_pb2 as kserve
from crl_sdk.pb.inference import kserve_pb2_grpc
from support import unseen_image


@pytest.fixture
def other_bundle(bundle_copy):
    """The demo bundle with another interpolation, which is another model."""
    path = bundle_copy / "manifest.json"
    manifest = parse_manifest(path.read_bytes())
    spec = dataclasses.replace(manifest.preprocess, interpolation="bilinear")
    sha256 = manifest.files[manifest.text.tokenizer].sha256
    raw = json.loads(path.read_text())
    raw["preprocess"]["interpolation"] = "bilinear"
    raw["fingerprint"] = fingerprint_of(manifest.source, spec, sha256)
    path.write_text(json.dumps(raw))
    return bundle_copy


@pytest.fixture
def both(serve, embedder, other_bundle):
    with Embedder.open(other_bundle) as other:
        yield serve({"a": embedder, "b": other}, metrics_address="127.0.0.1:0"), embedder, other


def connect(server, model=""):
    return Client(server.address, ClientOptions(model=model))


def pixels():
    return np.random.default_rng(0).integers(0, 256, (200, 150, 3), np.uint8)


def test_a_request_names_its_model_or_gets_the_first(both):
    server, embedder, other = both
    with connect(server) as client, connect(server, "a") as a, connect(server, "b") as b:
        image = pixels()
        expected = [each.embed([image]).universal for each in (embedder, other)]
        assert np.abs(expected[0] - expected[1]).max() > 1e-3
        for caller, rows, bundle in (
            (client, expected[0], embedder), (a, expected[0], embedder), (b, expected[1], other),
        ):  # fmt: skip
            result = caller.embed([image])
            np.testing.assert_allclose(result.universal, rows, atol=1e-6)
            assert caller.model().fingerprint == bundle.bundle.fingerprint
            assert caller.model().models == ("a", "b")
            assert caller.embed_text(["red"]).shape == (1, 128)
        assert b.model().preprocessing.interpolation == "bilinear"


def test_bases_belong_to_the_model_of_their_fingerprint(both, tmp_path, image_files):
    server, embedder, other = both
    with connect(server) as a, connect(server, "b") as b:
        a.create_basis("color", ["red", "green", "blue"])
        b.create_basis("shape", ["circle", "square", "star"])
        assert [each.criterion for each in a.bases()] == ["color"]
        assert [each.criterion for each in b.bases()] == ["shape"]
        assert b.embed(image_files[:1], criteria=["shape"])["shape"].shape == (1, 2)
        with pytest.raises(UnknownCriterionError, match=r"known are \['shape'\]"):
            b.embed(image_files[:1], criteria=["color"])
        with pytest.raises(UnknownCriterionError):
            b.get_basis("color")
        file = b.get_basis("shape").file
        with pytest.raises(BasisMismatchError, match=r"for the model 'b' .*ClientOptions\(model="):
            a.put_basis(file)
        strange = build_basis(
            "mood", ["happy", "sad"], embedder.embed_text, fingerprint="f" * 64, merge_threshold=1.0
        )
        with pytest.raises(BasisMismatchError, match="was made"):
            b.put_basis(strange.to_bytes())
        b.put_basis(file)
        a.delete_basis("color")
        b.delete_basis("shape")
    folders = BasisDirectory(tmp_path / "bases")
    assert all(folders.of_model(each.bundle.fingerprint).is_dir() for each in (embedder, other))


def test_an_unknown_model_is_not_found_and_the_known_are_named(both, image_files):
    server, *_ = both
    with connect(server, "c") as client:
        for call in (
            client.model, client.bases, lambda: client.embed(image_files[:1]),
            lambda: client.embed_text(["red"]), lambda: client.get_basis("color"),
            lambda: client.create_basis("color", ["red", "blue"]),
            lambda: client.delete_basis("color"),
        ):  # fmt: skip
            with pytest.raises(UnknownModelError, match=r"no model 'c'; known are \['a', 'b'\]"):
                call()
    with grpc.insecure_channel(server.address) as channel:
        embedding = embedding_pb2_grpc.EmbeddingServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            embedding.Embed(embedding_pb2.EmbedRequest(model="x" * 5000))
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
        assert len(caught.value.details()) < 300
        # of a stream, only this request fails
        good = embedding_pb2.Image(encoded=image_files[0].read_bytes())
        requests = [
            embedding_pb2.EmbedStreamRequest(
                id=model, request=embedding_pb2.EmbedRequest(images=[good], model=model)
            )
            for model in ("a", "c", "b")
        ]
        replies = {reply.id: reply for reply in embedding.EmbedStream(iter(requests))}
        assert replies["c"].error.code == grpc.StatusCode.NOT_FOUND.value[0]
        prints = {replies[model].response.fingerprint for model in ("a", "b")}
        assert len(prints) == 2
        bases = basis_pb2_grpc.BasisServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            list(bases.GenerateBasis(basis_pb2.GenerateBasisRequest(criterion="x", model="c")))


def test_names_for_triton_clients(both, image_files):
    server, embedder, other = both
    with connect(server) as a, connect(server, "b") as b:
        a.create_basis("color", ["red", "green", "blue"])
        b.create_basis("shape", ["circle", "square", "star"])
    with grpc.insecure_channel(server.address) as channel:
        stub = kserve_pb2_grpc.GRPCInferenceServiceStub(channel)
        index = [m.name for m in stub.RepositoryIndex(kserve.RepositoryIndexRequest()).models]
        assert index == [
            "crl", "crl-pixels", "crl-embedding", "crl.color", "crl-pixels.color",
            "crl-embedding.color", "crl@b", "crl-pixels@b", "crl-embedding@b", "crl@b.shape",
            "crl-pixels@b.shape", "crl-embedding@b.shape",
        ]  # fmt: skip
        data = image_files[0].read_bytes()
        for name, bundle in (("crl", embedder), ("crl@a.color", embedder), ("crl@b.shape", other)):
            request = kserve.ModelInferRequest(model_name=name)
            request.inputs.add(name="IMAGE", datatype="BYTES", shape=[1, 1])
            request.raw_input_contents.append(len(data).to_bytes(4, "little") + data)
            reply = stub.ModelInfer(request)
            assert reply.parameters["fingerprint"].string_param == bundle.bundle.fingerprint
            assert stub.ModelReady(kserve.ModelReadyRequest(name=name)).ready
            config = stub.ModelConfig(kserve.ModelConfigRequest(name=name)).config
            assert config.max_batch_size == server.pipeline.limits.max_images
        for name in (
            "crl@c",
            "crl@",
            "crl@b.",
            "crl@b@b",
            "crl@b.color",
            "other@b",
            "@b",
            "crl@.x",
        ):
            with pytest.raises(grpc.RpcError) as caught:
                stub.ModelMetadata(kserve.ModelMetadataRequest(name=name))
            assert caught.value.code() == grpc.StatusCode.NOT_FOUND
            assert not stub.ModelReady(kserve.ModelReadyRequest(name=name)).ready


def test_metrics_have_a_label_and_each_model_a_cache(both):
    server, *_ = both
    image = unseen_image()
    with connect(server) as a, connect(server, "b") as b:
        a.embed([image])
        b.embed([image])  # another model: not from the cache
        b.embed([image])
    url = f"http://{server.metrics_address}/metrics"
    page = urllib.request.urlopen(url, timeout=10).read().decode()
    for line in (
        'crl_images_total{model="a",outcome="embedded"} 1.0',
        'crl_images_total{model="b",outcome="embedded"} 1.0',
        'crl_images_total{model="b",outcome="cached"} 1.0',
        'crl_cache_lookups_total{model="b",result="hit"} 1.0',
        'crl_queue_depth{model="a"} 0.0',
        'crl_engine_up{model="b"} 1.0',
    ):
        assert line in page


def test_two_bundles_of_one_model_share_their_bases(serve, embedder, tmp_path):
    with Embedder.open(demo_bundle()) as second:
        server = serve({"a": embedder, "b": second})
        with connect(server) as a, connect(server, "b") as b:
            a.create_basis("color", ["red", "green", "blue"])
            assert [each.criterion for each in b.bases()] == ["color"]


def test_the_command(crl_serve, other_bundle, tmp_path):
    (tmp_path / "crl.toml").write_text(
        f'bundle = ["a={demo_bundle()}", "b={other_bundle}"]\naddress = "127.0.0.1:0"\n'
    )
    named = ["--bundle", f"a={demo_bundle()}", "--bundle", f"b={other_bundle}"]
    for arguments in (
        ["--config", "crl.toml"],
        [*named, "--address", "127.0.0.1:0", "--workers", 2],
    ):
        process, address = crl_serve(*arguments)
        with Client(address, ClientOptions(model="b")) as client:
            assert client.model().models == ("a", "b")
            assert client.model().preprocessing.interpolation == "bilinear"
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
        assert "serving a: crl-demo (onnx/cpu/fp32)" in stderr and "serving b: crl-demo" in stderr
    (tmp_path / "crl.toml").write_text(f'bundle = "{other_bundle}"\naddress = "127.0.0.1:0"\n')
    process, address = crl_serve("--config", "crl.toml")
    with Client(address) as client:
        assert client.model().models == ("crl-demo",)
        assert client.model().preprocessing.interpolation == "bilinear"


@pytest.mark.parametrize(
    ("bundles", "words"),
    [
        (["a={}", "a={}"], "two bundles have the name 'a'"),
        (["a={}", "{}"], "expected NAME=DIR for each of several bundles"),
        (["a b={}"], "expected a name of 1-64 letters"),
        (["={}"], "expected a name of 1-64 letters"),
        (["a=nowhere"], "nowhere"),
        (["a={}", "b="], "expected NAME=DIR, got 'b='"),
    ],
)
def test_bundles_that_cannot_be_served(crl_serve, bundles, words):
    given = [word for each in bundles for word in ("--bundle", each.format(demo_bundle()))]
    with pytest.raises(AssertionError, match=re.escape(words)) as caught:
        crl_serve("--address", "127.0.0.1:0", *given)
    assert "it ended with 1" in str(caught.value) and "Traceback" not in str(caught.value)
