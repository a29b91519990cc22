"""Bases through the service: changed while it runs, safe on disk, refused if they do not fit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import numpy as np
import pytest

from crl_sdk import Basis, Client, Embedder
from crl_sdk.basis._build import build_basis
from crl_sdk.basis._directory import BasisDirectory
from crl_sdk.basis._language_model import LanguageModel
from crl_sdk.basis._methods import PROJECTION_METHODS
from crl_sdk.errors import (
    BasisError,
    BasisExistsError,
    BasisMismatchError,
    CriterionError,
    GenerationError,
    IntegrityError,
    InvalidInputError,
    ServiceError,
    UnknownCriterionError,
)
from crl_sdk.pb.crl.v1 import basis_pb2, basis_pb2_grpc
from support import log_likelihoods


def make(embedder, criterion="mood", texts=("happy", "sad", "calm"), fingerprint=None) -> Basis:
    return build_basis(
        criterion, texts, embedder.embed_text,
        fingerprint=fingerprint or embedder.bundle.fingerprint,
        merge_threshold=1.0,  # the demo model's embeddings of moods are nearly equal
    )  # fmt: skip


def test_the_server_knows_no_method(client, embedder, image_files):
    """Bases of all methods can be served at the same time."""
    texts = ["red", "green", "blue", "yellow", "pink"]
    other = make(embedder, "size", ("small", "medium", "large"))
    client.put_basis(other.to_bytes())
    made = {}
    for method in PROJECTION_METHODS:
        name = f"by {method.name}"
        against = [other] if method.needs_against else []
        made[name] = build_basis(
            name, texts, embedder.embed_text, fingerprint=embedder.bundle.fingerprint,
            method=method.name, against=against, background=embedder.bundle.background,
        )  # fmt: skip
        client.create_basis(name, texts, method=method.name, against=[b.criterion for b in against])
    listed = {b.criterion: (b.method, b.output_dim) for b in client.bases()}
    for name, basis in made.items():
        assert listed[name] == (basis.method, basis.projection.output_dim)
    result = client.embed(image_files[:3], criteria=list(made))
    for name, basis in made.items():
        expected = basis.projection.apply(result.universal)
        np.testing.assert_allclose(result[name], expected, atol=1e-6)
    assert client.create_basis("color", texts, against=["size"]).method == "contrastive"
    with pytest.raises(InvalidInputError, match="needs other criteria"):
        client.create_basis("color", texts, method="exclusive-orthogonal")
    with pytest.raises(InvalidInputError, match="takes no other criteria"):
        client.create_basis("color", texts, method="cosine", against=["size"])
    for role in ("against", "ignore"):
        with pytest.raises(UnknownCriterionError, match="known are"):
            client.create_basis("color", texts, **{role: ["weight"]})
    ignored = client.create_basis("color", texts, ignore=["size"])
    expected = embedder.create_basis("color", texts, ignore=[other], load=False)
    rows = client.embed(image_files[:3], criteria=["color"])["color"]
    np.testing.assert_allclose(rows, expected.projection.apply(result.universal), atol=1e-6)
    assert ignored.output_dim == expected.projection.output_dim
    with pytest.raises(InvalidInputError, match="expected a method of"):
        client.create_basis("color", texts, method="nonsense")


def test_put_list_get_delete(server, client, embedder, image_files, tmp_path):
    basis = make(embedder)
    info = client.put_basis(basis.to_bytes())
    assert info.criterion == "mood" and info.sha256 == basis.sha256() and info.output_dim == 2
    assert [b.criterion for b in client.bases()] == ["color", "mood", "shape"]
    result = client.embed(image_files[:2], criteria=["mood"])
    assert result.basis_sha256["mood"] == basis.sha256()
    np.testing.assert_allclose(result["mood"], basis.projection.apply(result.universal), atol=1e-6)
    with grpc.insecure_channel(server.address) as channel:
        stub = basis_pb2_grpc.BasisServiceStub(channel)
        reply = stub.GetBasis(basis_pb2.GetBasisRequest(criterion="Mood"))
    assert reply.file == basis.to_bytes()
    path = BasisDirectory(tmp_path / "bases").path_of("mood", basis.fingerprint)
    assert path.read_bytes() == reply.file
    client.delete_basis("mood")
    assert not path.exists()
    with pytest.raises(UnknownCriterionError, match="known are"):
        client.embed(image_files[:1], criteria=["mood"])
    with pytest.raises(UnknownCriterionError):
        client.delete_basis("mood")


def test_the_servers_prompt(serve, bundle_copy):
    manifest = json.loads((bundle_copy / "manifest.json").read_text())
    manifest["text"]["prompt"] = "a photo of {}"
    (bundle_copy / "manifest.json").write_text(json.dumps(manifest))
    with Embedder.open(bundle_copy) as embedder, Client(serve(embedder).address) as client:
        assert client.model().prompt == "a photo of {}"
        assert client.create_basis("mood", ["red", "blue"]).prompts == ("a photo of {}",)
        assert client.create_basis("bare", ["red", "blue"], prompts=["{}"]).prompts == ("{}",)


def test_bases_outlive_the_server_and_strangers_are_left_alone(serve, embedder, tmp_path, caplog):
    first = serve(embedder)
    with Client(first.address) as client:
        client.create_basis("mood", ["red", "blue"], prompts=["a {} picture"])
    first.stop()
    directory = BasisDirectory(tmp_path / "bases").of_model(embedder.bundle.fingerprint)
    make(embedder, "loose").save(tmp_path / "bases" / "loose.safetensors")
    make(embedder, "alien", fingerprint="0" * 64).save(directory / "alien.safetensors")
    (directory / "torn.safetensors").write_bytes(b"\x08")
    left = directory / ".mood.safetensors.x.tmp"
    left.write_bytes(b"left by a write that was killed")
    os.utime(left, (0, 0))
    written = directory / ".size.safetensors.y.tmp"  # by another process, at this moment
    written.write_bytes(b"half")
    make(embedder, "real").save(directory / "other.safetensors")
    second = serve(embedder)
    with Client(second.address) as client:
        (info,) = client.bases()
    assert info.criterion == "mood" and list(info.prompts) == ["a {} picture"]
    for words in ("0000", "torn", "rename it", "such as loose.safetensors: move"):
        assert words in caplog.text
    assert (directory / "alien.safetensors").exists()
    assert not left.exists() and written.exists()


def test_what_is_refused(server, client, embedder):
    with pytest.raises(IntegrityError, match="not a valid basis file"):
        client.put_basis(b"PK\x03\x04")
    with pytest.raises(IntegrityError):
        client.put_basis(make(embedder).to_bytes()[:-1])
    with pytest.raises(BasisMismatchError, match="was made for model 000"):
        client.put_basis(make(embedder, fingerprint="0" * 64).to_bytes())
    for criterion, texts, error in [
        ("../x", ["a", "b"], CriterionError),
        ("mood", [], InvalidInputError),
        ("mood", ["happy"], InvalidInputError),
    ]:
        with pytest.raises(error):
            client.create_basis(criterion, texts)
    with grpc.insecure_channel(server.address) as channel:
        stub = basis_pb2_grpc.BasisServiceStub(channel)
        given = basis_pb2.BasisTexts(criterion="color", texts=["red", "blue"])
        with pytest.raises(grpc.RpcError) as caught:
            stub.PutBasis(basis_pb2.PutBasisRequest(texts=given, no_replace=True))
        assert caught.value.code() == grpc.StatusCode.ALREADY_EXISTS
        assert dict(caught.value.trailing_metadata())["crl-error"] == BasisExistsError.__name__
        with pytest.raises(grpc.RpcError, match="neither"):
            stub.PutBasis(basis_pb2.PutBasisRequest())
        strange = basis_pb2.BasisTexts(criterion="x", texts=["a", "b"], method="magic")
        with pytest.raises(grpc.RpcError, match="expected a method"):
            stub.PutBasis(basis_pb2.PutBasisRequest(texts=strange))
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.GenerateBasis(basis_pb2.GenerateBasisRequest(criterion="mood")))
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
    assert [b.criterion for b in client.bases()] == ["color", "shape"]


def test_a_full_disk_changes_nothing(server, embedder, image_files, monkeypatch, caplog):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    with Client(server.address) as client:
        before = client.embed(image_files[:1], criteria=["color"])
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(BasisError, match=r"cannot store 'color'.*No space left") as caught:
            client.put_basis(make(embedder, "color", ["x", "y"]).to_bytes())
        after = client.embed(image_files[:1], criteria=["color"])
    # the operator reads why and where, beside the id; the client learns no paths
    directory = server.pipeline.bases.directory
    written = f"{directory / 'color.safetensors'}: cannot be written (No space left on device)"
    assert "ended with INTERNAL" in caplog.text and written in caplog.text
    assert str(directory) not in str(caught.value)
    assert after.basis_sha256 == before.basis_sha256
    assert sorted(p.name for p in directory.iterdir()) == [
        ".lock", "color.safetensors", "shape.safetensors",
    ]  # fmt: skip


def test_a_basis_that_cannot_be_deleted_stays(server, monkeypatch, caplog):
    directory = server.pipeline.bases.directory
    with Client(server.address) as client:
        before = client.bases()
        with monkeypatch.context() as patched:

            def refuse(path, missing_ok=False):
                raise OSError(30, "Read-only file system")

            patched.setattr(Path, "unlink", refuse)
            with pytest.raises(BasisError, match=r"cannot delete 'color'.*Read-only") as caught:
                client.delete_basis("color")
        assert client.bases() == before
    assert str(directory) not in str(caught.value)
    assert f"{directory / 'color.safetensors'}: cannot be deleted (Read-only" in caplog.text


def test_a_language_model_that_is_gone_is_named_in_the_log_only(serve, embedder, tmp_path, caplog):
    path = tmp_path / "gone.gguf"
    server = serve(embedder, open_llm=lambda: LanguageModel.open(path))
    with (
        Client(server.address) as client,
        pytest.raises(GenerationError, match="cannot load its language model") as caught,
    ):
        client.generate_basis("mood")
    assert str(tmp_path) not in str(caught.value) and f"{path}: " in caplog.text


def test_two_servers_on_one_directory_or_port(serve, server, embedder, tmp_path):
    with pytest.raises(BasisError, match="another server owns it"):
        serve(embedder)
    with pytest.raises(ServiceError, match="cannot listen there"):
        serve(embedder, address=server.address, bases=tmp_path / "others")


def test_replies_never_mix_two_versions(server, client, embedder, image_files):
    """While a basis changes repeatedly, the rows of each reply match the version it names."""
    versions = {
        basis.sha256(): basis
        for basis in (make(embedder, "mood", texts) for texts in (["a", "b"], ["x", "y", "z"]))
    }
    files = [basis.to_bytes() for basis in versions.values()]
    client.put_basis(files[0])
    stop = threading.Event()

    def change():
        with Client(server.address) as other:
            for i in range(10_000):
                if stop.is_set():
                    return
                other.put_basis(files[i % 2])

    thread = threading.Thread(target=change)
    thread.start()
    try:
        seen, replies, ends = set(), 0, time.monotonic() + 30
        while replies < 150 or (len(seen) < 2 and time.monotonic() < ends):
            replies += 1
            result = client.embed(image_files[:3], criteria=["mood", "color"])
            version = result.basis_sha256["mood"]
            seen.add(version)
            expected = versions[version].projection.apply(result.universal)
            np.testing.assert_allclose(result["mood"], expected, atol=1e-6)
    finally:
        stop.set()
        thread.join()
    assert len(seen) == 2


def test_a_kill_at_any_moment_leaves_whole_bases(embedder, tmp_path):
    """After SIGKILL during writes, repeatedly, the next start reads every file."""
    bases = tmp_path / "bases"
    store = BasisDirectory(bases).of_model(embedder.bundle.fingerprint)
    files = [make(embedder, "mood", texts).to_bytes() for texts in (["a", "b"], ["x", "y", "z"])]
    writer = (
        "import sys, itertools\n"
        "from pathlib import Path\n"
        "from crl_sdk import Basis\n"
        "from crl_sdk.serving._bases import DirectoryBasisStore\n"
        "versions = [Basis.load(path) for path in sys.argv[2:]]\n"
        "store = DirectoryBasisStore(Path(sys.argv[1]), versions[0].fingerprint)\n"
        "store.open()\n"
        "assert all(name == 'mood' for name in store.snapshot), 'strange names'\n"
        "print('ready', len(store.snapshot), flush=True)\n"
        "for basis in itertools.cycle(versions): store.put(basis)\n"
    )
    for i, data in enumerate(files):
        (tmp_path / f"{i}.safetensors").write_bytes(data)
    arguments = [bases, tmp_path / "0.safetensors", tmp_path / "1.safetensors"]
    rng = np.random.default_rng(0)
    for round_ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", writer, *map(str, arguments)], stdout=subprocess.PIPE, text=True
        )
        line = process.stdout.readline()
        assert line == f"ready {min(round_, 1)}\n"
        time.sleep(0.05 + rng.uniform(0, 0.03))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert (store / "mood.safetensors").read_bytes() in files


class Scripted:
    """A language model that writes texts for moods and nothing else."""

    name, chats, tells_likelihoods = "scripted", False, True
    tokens, seconds = 0, 0.0

    def complete(self, prompt, grammar, sampling, on_token=None):
        time.sleep(0.05)
        for i in range(5):
            on_token(i + 1, sampling.seed + i / 5)
        return " red, blue, green, pink\n" if "mood" in prompt.splitlines()[-1] else " x\n"

    chat = complete

    def log_likelihoods(self, prefix, texts):
        return log_likelihoods(prefix, texts)

    def describe(self):
        return {"name": self.name}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_the_servers_language_model_writes_a_basis(serve, embedder, image_files):
    server = serve(embedder, open_llm=Scripted)
    with grpc.insecure_channel(server.address) as channel:
        stub = basis_pb2_grpc.BasisServiceStub(channel)
        events = list(stub.GenerateBasis(basis_pb2.GenerateBasisRequest(criterion="mood")))
        assert len(events) > 3
        assert all(event.HasField("progress") for event in events[:-1])
        assert list(events[-1].done.info.texts)[:2] == ["red", "blue"]
        with pytest.raises(grpc.RpcError, match="does not seem to know") as caught:
            list(stub.GenerateBasis(basis_pb2.GenerateBasisRequest(criterion="habitat")))
        assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        with pytest.raises(grpc.RpcError, match="expected hints"):
            list(stub.GenerateBasis(basis_pb2.GenerateBasisRequest(criterion="x", hint="<|a|>")))
        abandoned = stub.GenerateBasis(basis_pb2.GenerateBasisRequest(criterion="mood"))
        next(abandoned)
        abandoned.cancel()
    seen = []
    with Client(server.address) as client:
        assert client.embed(image_files[:1], criteria=["mood"])["mood"].shape[0] == 1
        info = client.generate_basis("mood", progress=seen.append, exclude=["blue"])
        assert "red" in info.texts and "blue" not in info.texts and seen
        late = []
        with pytest.raises(BasisExistsError):
            client.generate_basis("Mood", replace=False, progress=late.append)
        assert not late  # the language model was not asked
        client.create_basis("shape", ["circle", "square", "star"])
        info = client.generate_basis("mood", against=["shape"])
        assert info.method == "contrastive"
        with pytest.raises(UnknownCriterionError, match="known are"):
            client.generate_basis("mood", against=["weight"])


def test_a_request_says_how_to_ask_and_which_pictures_vote(serve, embedder, image_files):
    prompts = []

    class Asked(Scripted):
        def chat(self, prompt, grammar, sampling, on_token=None):
            prompts.append(prompt)
            on_token(1, 0.1)
            return "red\nblue\ngreen\npink\nyellow ochre of a clay wall\n"

    server = serve(embedder, open_llm=Asked)
    with Client(server.address) as client:
        pictures = client.embed([image_files[i % len(image_files)] for i in range(20)]).universal
        client.generate_basis(
            "mood", form="list", subject="the mood of paintings", max_words=8, any_script=True,
            pictures=pictures, accept_unsure=True,
        )  # fmt: skip
        provenance = Basis.from_bytes(client.get_basis("mood").file).provenance
    assert any("the mood of paintings" in prompt for prompt in prompts)
    options = provenance["options"]
    assert provenance["form"] == "list" and options["max_words"] == 8 and options["any_script"]
    assert provenance["pictures"]["count"] == 20


def test_a_curated_list_needs_neither_texts_nor_a_language_model(serve, embedder):
    server = serve(embedder)
    with Client(server.address) as client:
        info = client.create_basis("season", curated=True)
        assert {"spring", "autumn", "winter"} & set(info.texts)
        provenance = Basis.from_bytes(client.get_basis("season").file).provenance
        assert provenance["texts"] == "curated"
        with pytest.raises(InvalidInputError, match="got both"):
            client.create_basis("season", ["spring", "winter"], curated=True)
        with pytest.raises(InvalidInputError, match=r"expected a curated list of .*color"):
            client.create_basis("price", curated=True)


def test_an_unexpected_failure_of_the_language_model_ends_the_call(serve, embedder, caplog):
    def open_llm():
        raise ZeroDivisionError("a secret of the server")

    server = serve(embedder, open_llm=open_llm)
    with grpc.insecure_channel(server.address) as channel:
        stub = basis_pb2_grpc.BasisServiceStub(channel)
        for _ in range(2):  # the second call shows that the first one gave the lock back
            with pytest.raises(grpc.RpcError) as caught:
                list(
                    stub.GenerateBasis(basis_pb2.GenerateBasisRequest(criterion="mood"), timeout=20)
                )
            assert caught.value.code() == grpc.StatusCode.INTERNAL
            assert "secret" not in caught.value.details() and "secret" in caplog.text
