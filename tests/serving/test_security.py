"""TLS, mutual TLS and tokens: which calls are allowed, which are refused, and with what message."""

from __future__ import annotations

import asyncio

import grpc
import pytest
import trustme
from google.protobuf import descriptor_pool
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from crl_sdk import Client
from crl_sdk.client import ClientOptions, ClientSecurity
from crl_sdk.errors import AccessError, InvalidInputError, ServiceError
from crl_sdk.pb.crl.v1 import basis_pb2_grpc, embedding_pb2_grpc
from crl_sdk.pb.inference import kserve_pb2_grpc
from crl_sdk.serving._rights import RIGHTS, RPC_ACCESS
from crl_sdk.serving._security import ServerTls, Token, TokenInterceptor, read_tokens
from crl_sdk.serving._server import ServerSettings, exposure, register_services

EMBED, ADMIN = "embed-token-0123456789", "admin-token-0123456789"
TOKENS = (
    Token("camera", EMBED, frozenset({"embed"})),
    Token("admin", ADMIN, frozenset({"embed", "bases"})),
)


def connect(server, retries=0, **security) -> Client:
    return Client(
        server.address.replace("127.0.0.1", "localhost"),
        ClientOptions(timeout=5, retries=retries, security=ClientSecurity(**security)),
    )


@pytest.fixture
def pki(tmp_path):
    """An authority, the server's files and a client's."""
    authority = trustme.CA()
    paths = {"ca": tmp_path / "ca.pem"}
    authority.cert_pem.write_to_path(paths["ca"])
    for name, identity in (("server", "localhost"), ("client", "camera.example")):
        issued = authority.issue_cert(identity)
        paths[name] = tmp_path / f"{name}.pem"
        paths[f"{name}_key"] = tmp_path / f"{name}.key"
        issued.cert_chain_pems[0].write_to_path(paths[name])
        issued.private_key_pem.write_to_path(paths[f"{name}_key"])
    return paths


def test_tokens_and_their_rights(serve, embedder, image_files):
    server = serve(embedder, tokens=TOKENS)
    with connect(server) as client, pytest.raises(AccessError, match="Bearer TOKEN"):
        client.model()
    with connect(server, token="guess") as client, pytest.raises(AccessError, match="not known"):
        client.embed(image_files[:1])
    with connect(server, token=EMBED) as client:
        assert client.embed(image_files[:1]).universal.shape == (1, 128)
        assert client.bases() == []
        with pytest.raises(AccessError, match="'camera' lacks the right 'bases'"):
            client.create_basis("color", ["red", "blue"])
        with pytest.raises(AccessError):
            client.delete_basis("color")
    with connect(server, token=ADMIN) as client:
        client.create_basis("color", ["red", "blue"])
        assert client.embed(image_files[:1], criteria=["color"])["color"].shape == (1, 2)
    with grpc.insecure_channel(server.address) as channel:  # probes carry no tokens
        status = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert status.status == health_pb2.HealthCheckResponse.SERVING
        streams = (
            channel.stream_stream("/crl.v1.EmbeddingService/EmbedStream")(iter([])),
            channel.unary_stream("/crl.v1.BasisService/GenerateBasis")(b""),
        )
        for call in streams:
            with pytest.raises(grpc.RpcError) as caught:
                list(call)
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_tls(serve, embedder, image_files, pki, tmp_path):
    server = serve(embedder, tls=ServerTls(pki["server"], pki["server_key"]), tokens=TOKENS)
    with connect(server, authority=pki["ca"], token=EMBED) as client:
        assert client.embed(image_files[:1]).universal.shape == (1, 128)
    with connect(server, token=EMBED) as client, pytest.raises(ServiceError, match="UNAVAILABLE"):
        client.model()  # plain text on a TLS port
    other = tmp_path / "other.pem"
    trustme.CA().cert_pem.write_to_path(other)
    with connect(server, authority=other) as client, pytest.raises(ServiceError):
        client.model()


def test_mutual_tls(serve, embedder, pki):
    server = serve(embedder, tls=ServerTls(pki["server"], pki["server_key"], pki["ca"]))
    known = {"authority": pki["ca"], "certificate": pki["client"], "key": pki["client_key"]}
    with connect(server, **known) as client:
        assert client.model().embedding_dim == 128
    with connect(server, authority=pki["ca"]) as client, pytest.raises(ServiceError):
        client.model()


def test_files_that_are_no_certificates(serve, embedder, pki, tmp_path):
    junk = tmp_path / "junk.pem"
    junk.write_text("hello")
    for tls, words in [
        (ServerTls(tmp_path / "no.pem", pki["server_key"]), "cannot be read"),
        (ServerTls(junk, pki["server_key"]), "expected a PEM file"),
    ]:
        with pytest.raises(InvalidInputError, match=words):
            serve(embedder, tls=tls)
    with pytest.raises(InvalidInputError, match="needs TLS"):
        Client(options=ClientOptions(security=ClientSecurity(certificate=pki["client"]))).close()
    with pytest.raises(InvalidInputError, match="cannot be read"):
        Client(
            options=ClientOptions(security=ClientSecurity(authority=tmp_path / "no.pem"))
        ).close()


def test_token_files(tmp_path):
    path = tmp_path / "tokens.toml"
    path.write_text(f'[camera]\ntoken = "{EMBED}"\nrights = ["embed"]\n')
    assert read_tokens(path) == (TOKENS[0],)
    for text, words in [
        ("", "holds no tokens"),
        ("[a\n", "not a TOML file"),
        ('token = "x"\n', "expected .token."),
        ('[a]\ntoken = "short"\nrights = ["embed"]\n', "16 characters"),
        (f'[a]\ntoken = "{EMBED}\\n"\nrights = ["embed"]\n', "printable ASCII"),
        (f'[a]\ntoken = "{EMBED}"\nrights = ["root"]\n', "expected rights"),
        (f'[a]\ntoken = "{EMBED}"\nrights = []\n', "expected rights"),
        (f'[a]\ntoken = "{EMBED}"\n', "expected .a. with token"),
    ]:
        path.write_text(text)
        with pytest.raises(InvalidInputError, match=words):
            read_tokens(path)
    with pytest.raises(InvalidInputError, match=r"no\.toml"):
        read_tokens(tmp_path / "no.toml")


def test_every_rpc_of_the_server_declares_its_right():
    """Walk all services that the server registers, those of health and reflection included."""

    class Recorder:
        """Stands in for a gRPC server and records the names of the registered RPCs."""

        def __init__(self):
            self.services = set()

        def add_generic_rpc_handlers(self, handlers):
            self.services.update(handler.service_name() for handler in handlers)

        def add_registered_method_handlers(self, service, handlers):
            self.services.add(service)

    recorder = Recorder()
    register_services(
        recorder, health.aio.HealthServicer(), embedding_pb2_grpc.EmbeddingServiceServicer(),
        basis_pb2_grpc.BasisServiceServicer(), kserve_pb2_grpc.GRPCInferenceServiceServicer(),
    )  # fmt: skip
    pool = descriptor_pool.Default()
    registered = {
        f"/{service}/{method.name}"
        for service in recorder.services
        for method in pool.FindServiceByName(service).methods
    }
    assert {name.split("/")[1] for name in registered} > {
        "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection",
        "inference.GRPCInferenceService",
    }  # fmt: skip
    undeclared, stale = registered - set(RPC_ACCESS), set(RPC_ACCESS) - registered
    assert not undeclared, f"add a line to RPC_ACCESS for each of {sorted(undeclared)}"
    assert not stale, f"no longer registered: {sorted(stale)}"
    assert set(RPC_ACCESS.values()) <= {*RIGHTS, "public"}


def test_an_rpc_without_a_declared_right_is_refused():
    async def reply(request, context):
        return b"done"

    async def work():
        server = grpc.aio.server(interceptors=[TokenInterceptor(TOKENS)])
        handlers = {"New": grpc.unary_unary_rpc_method_handler(reply)}
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("crl.v1.BasisService", handlers),)
        )
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        codes = []
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            for method in ("New", "Unknown"):
                for token in (ADMIN, EMBED, None):
                    metadata = [("authorization", f"Bearer {token}")] if token else []
                    call = channel.unary_unary(f"/crl.v1.BasisService/{method}")
                    with pytest.raises(grpc.aio.AioRpcError) as caught:
                        await call(b"", metadata=metadata)
                    codes.append(caught.value.code())
                    if codes[-1] is grpc.StatusCode.PERMISSION_DENIED:
                        assert "declares no right for /crl.v1.BasisService/New" in str(caught.value)
        await server.stop(None)
        return codes

    status = grpc.StatusCode
    denied, unknown = status.PERMISSION_DENIED, status.UNIMPLEMENTED
    assert asyncio.run(work()) == [denied, denied, status.UNAUTHENTICATED, *[unknown] * 3]


def test_certificate_and_key_that_do_not_belong_together(pki):
    with pytest.raises(InvalidInputError, match="swap --tls-cert and --tls-key"):
        ServerTls(pki["server_key"], pki["server"]).credentials()
    with pytest.raises(InvalidInputError, match="not a certificate and its private key"):
        ServerTls(pki["server"], pki["client_key"]).credentials()
    assert ServerTls(pki["server"], pki["server_key"]).credentials() is not None


def test_plain_text_and_tls_that_meet_say_so(serve, embedder, pki, tmp_path):
    plain = serve(embedder)
    secure = serve(embedder, bases=tmp_path / "b", tls=ServerTls(pki["server"], pki["server_key"]))
    stranger = tmp_path / "stranger.pem"
    trustme.CA().cert_pem.write_to_path(stranger)
    for server, security, words in [
        (plain, {"authority": pki["ca"]}, "the server speaks plain text, and this client TLS"),
        (secure, {}, "it speaks TLS: set ClientSecurity.authority"),
        (secure, {"authority": stranger}, "was not signed by ClientSecurity.authority"),
    ]:
        with connect(server, **security) as client, pytest.raises(ServiceError, match=words):
            client.model()


def test_the_authorities_of_the_machine(serve, embedder, pki, monkeypatch):
    server = serve(embedder, tls=ServerTls(pki["server"], pki["server_key"]))
    with connect(server, authority="system") as client, pytest.raises(ServiceError, match="signed"):
        client.model()
    monkeypatch.setenv("SSL_CERT_FILE", str(pki["ca"]))
    with connect(server, authority="system") as client:
        assert client.model().name == "crl-demo"
    monkeypatch.setenv("SSL_CERT_FILE", str(pki["server_key"]))
    monkeypatch.setenv("SSL_CERT_DIR", "/nowhere")
    with pytest.raises(InvalidInputError, match="trusts no authority"):
        connect(server, authority="system")


@pytest.mark.parametrize(
    ("address", "warns"), [("example.org:50051", True), ("127.0.0.1:50051", False)]
)
def test_a_token_in_plain_text_is_warned_of(address, warns, caplog):
    Client(address, ClientOptions(security=ClientSecurity(token=EMBED))).close()
    assert ("in plain text" in caplog.text) == warns and EMBED not in caplog.text
    caplog.clear()
    Client(address).close()
    assert not caplog.records


def test_servers_that_others_can_reach_unprotected_are_warned_of(pki):
    tls = ServerTls(pki["server"], pki["server_key"])
    mutual = ServerTls(pki["server"], pki["server_key"], pki["ca"])
    for settings, words in [
        ({}, "neither TLS nor tokens: everyone"),
        ({"tokens": TOKENS}, "tokens and images travel in plain text"),
        ({"tls": tls}, "Add --tokens or --tls-client-ca"),
        ({"tls": tls, "tokens": TOKENS}, None),
        ({"tls": mutual}, None),
    ]:
        warning = exposure(ServerSettings(address="0.0.0.0:50051", **settings))
        assert warning is None if words is None else words in warning
        assert exposure(ServerSettings(address="127.0.0.1:50051", **settings)) is None
