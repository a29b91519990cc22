"""The service as a Ray Serve deployment of two replicas, called by our unmodified client."""

from __future__ import annotations

import os
import queue
import signal
import socket
import threading
from functools import partial
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest

from crl_sdk import Basis, Client, demo_bundle
from crl_sdk.client import ClientOptions, ClientSecurity
from crl_sdk.errors import (
    AccessError,
    BasisExistsError,
    InvalidInputError,
    UnknownCriterionError,
)
from crl_sdk.integrations.ray import connect, grpc_options, make_application
from crl_sdk.pb.crl.v1 import embedding_pb2, embedding_pb2_grpc
from crl_sdk.rpc._tensors import decode_tensor, encode_tensor
from crl_sdk.serving import ServerLimits, ServerSettings, SharedBasisStore, Token
from support import unseen_image, wait_until

ray = pytest.importorskip("ray")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")  # of Ray, about itself

TOKEN = "a-token-of-twenty-chars"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def replicas() -> list[psutil.Process]:
    """Return the processes of replicas."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] and "ServeReplica:" in process.cmdline()[0]:
                found.append(process)
        except psutil.Error:
            pass
    return found


class Service:
    """An application on the cluster."""

    def __init__(self, port: int, bases: Path) -> None:
        self.address = f"127.0.0.1:{port}"
        self.bases = bases

    def client(self, token: str = TOKEN, **options) -> Client:
        security = ClientSecurity(token=token)
        return Client(self.address, ClientOptions(security=security, **options))


@pytest.fixture(scope="module")
def service(cluster, tmp_path_factory):
    from ray import serve

    bases = tmp_path_factory.mktemp("bases")
    port = free_port()
    settings = ServerSettings(
        shared_bases=str(bases), bases_poll=0.2, drain_seconds=2,
        limits=ServerLimits(max_queue=256),
        tokens=(Token("all", TOKEN, frozenset({"embed", "bases"})),
                Token("reader", TOKEN[::-1], frozenset({"embed"}))),
    )  # fmt: skip
    with connect(cluster.address):
        try:
            serve.start(
                proxy_location="HeadOnly", http_options={"port": free_port()},
                grpc_options=grpc_options(port), logging_config={"log_level": "ERROR"},
            )  # fmt: skip
            application = make_application(
                demo_bundle(), settings, engine="onnx/cpu/fp32", num_replicas=2,
                ray_actor_options={"num_cpus": 1},
            )  # fmt: skip
            serve.run(application, name="crl")
            with Service(port, bases).client() as client:
                client.create_basis("color", ["red", "green", "blue"])
            yield Service(port, bases)
        finally:
            serve.shutdown()


def test_a_reply_is_that_of_the_embedder(service, embedder, image_files):
    data = [path.read_bytes() for path in image_files]
    with service.client() as client:
        basis = Basis.from_bytes(client.get_basis("color").file)
        found = client.embed([*data, b"bad"], ["color"], on_error="collect")
    expected = embedder.embed([*data, b"bad"], [basis], on_error="collect")
    # The graph projects in the embedder and NumPy in the service; embeddings are equal.
    assert np.array_equal(found.universal, expected.universal, equal_nan=True)
    np.testing.assert_allclose(found["color"], expected["color"], atol=1e-5)
    assert list(found.errors) == [9] and found.basis_sha256 == {"color": basis.sha256()}


def test_streams_go_through_serve_in_both_directions(service, embedder):
    """A request is answered before the next one is sent, and an error ends its request alone."""
    images = [unseen_image() for _ in range(12)]

    def request(number: int, criterion: str = "") -> embedding_pb2.EmbedStreamRequest:
        image = embedding_pb2.Image(pixels=encode_tensor(images[number]))
        return embedding_pb2.EmbedStreamRequest(
            id=str(number),
            request=embedding_pb2.EmbedRequest(
                images=[image], criteria=[criterion] if criterion else []
            ),
        )

    sent: queue.Queue = queue.Queue()
    with grpc.insecure_channel(service.address) as channel:
        stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)
        metadata = (("authorization", f"Bearer {TOKEN}"),)
        replies = stub.EmbedStream(iter(sent.get, None), timeout=60, metadata=metadata)
        for number in range(4):
            sent.put(request(number))
            reply = next(replies)
            assert reply.id == str(number)
            rows = decode_tensor(reply.response.universal)
            assert np.array_equal(rows, embedder.embed([images[number]]).universal)
        sent.put(request(4, "nothing"))
        assert next(replies).error.code == grpc.StatusCode.NOT_FOUND.value[0]
        for number in range(5, 12):
            sent.put(request(number))
        sent.put(None)
        assert sorted(int(reply.id) for reply in replies) == list(range(5, 12))
        refused = stub.EmbedStream(iter([request(0)]), timeout=60)
        with pytest.raises(grpc.RpcError) as caught:
            list(refused)
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_errors_keep_their_class_and_rights_are_kept(service):
    with service.client() as client:
        with pytest.raises(UnknownCriterionError, match="known are"):
            client.embed([unseen_image()], ["nothing"])
        with pytest.raises(InvalidInputError):
            client.embed_text([" "])
        with pytest.raises(BasisExistsError):
            client.create_basis("color", ["red", "green", "blue"], replace=False)
    with service.client(token="") as client, pytest.raises(AccessError):
        client.model()
    with service.client(token=TOKEN[::-1]) as client:
        assert client.model().name == "crl-demo"
        with pytest.raises(AccessError, match="bases"):
            client.delete_basis("color")


def test_a_change_of_a_basis_reaches_all_replicas(service, embedder):
    """Each reply has one version, and within seconds every reply has the new one."""
    old = SharedBasisStore(str(service.bases), embedder.bundle.fingerprint)
    new = embedder.create_basis("color", ["red", "yellow", "black", "white"], load=False)
    image = unseen_image()
    with service.client() as client:
        before = client.get_basis("color").info.sha256
        stored, replaced = old.put(new)
        old.close()
        assert replaced and stored.sha256 != before
        wait_until(
            lambda: all(
                client.embed([image], ["color"]).basis_sha256 == {"color": stored.sha256}
                for _ in range(20)
            )
        )
        for _ in range(20):
            reply = client.embed([image], ["color"])
            np.testing.assert_allclose(
                reply["color"], new.projection.apply(reply.universal), atol=1e-6
            )


def test_a_replica_killed_under_load_loses_no_call(service):
    """What callers see of it, and that Serve starts another one."""
    stop, failures, done = threading.Event(), [], []

    def load() -> None:
        with service.client(timeout=30) as client:
            while not stop.is_set():
                try:
                    done.append(len(client.embed([unseen_image() for _ in range(4)]).universal))
                except Exception as error:
                    failures.append(repr(error))

    def replaced(victim: int, calls: int) -> bool:
        pids = {each.pid for each in replicas()} - {victim}
        return len(pids) == 2 and len(done) >= calls

    callers = [threading.Thread(target=load) for _ in range(4)]
    for caller in callers:
        caller.start()
    try:
        wait_until(lambda: len(done) > 40)
        first = [each.pid for each in replicas()]
        assert len(first) == 2
        for victim in first:  # the proxy prefers the replica of its node, so both are killed
            os.kill(victim, signal.SIGKILL)
            wait_until(partial(replaced, victim, len(done) + 20), 30)
    finally:
        stop.set()
        for caller in callers:
            caller.join()
    assert not failures


def test_bases_of_one_replica_alone_are_refused(tmp_path):
    with pytest.raises(InvalidInputError, match="crl basis publish"):
        make_application(demo_bundle(), ServerSettings(bases=tmp_path))
    with pytest.raises(InvalidInputError, match="leave tls and shared_memory out"):
        make_application(
            demo_bundle(), ServerSettings(shared_bases=str(tmp_path), shared_memory=True)
        )
