"""TLS, mutual TLS and tokens: which calls are allowed, which are refused, and with what message."""

from __future__ import annotations

import asyncio
from datetime import datetime

import grpc
import pytest
import trustme
from cryptography.hazmat.primitives import serialization
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


def connect(server, retries=0, host="localhost", **security) -> Client:
    return Client(
        server.address.replace("127.0.0.1", host),
        ClientOptions(timeout=5, retries=retries, security=ClientSecurity(**security)),
    )


@pytest.fixture
def pki(tmp_path):
    """An authority, the server's files and a client's."""
    authority = trustme.CA()
    paths = {"ca": tmp_path / "ca.pem", "ca_key": tmp_path / "ca.key"}
    authority.cert_pem.write_to_path(paths["ca"])
    authority.private_key_pem.write_to_path(paths["ca_key"])
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


@pytest.mark.parametrize(
    ("security", "words"),
    [
        ({"certificate": "client"}, "certificate and ClientSecurity.key together"),
        ({"authority": "ca", "certificate": "client"}, "together"),  # gRPC ends the process
        ({"authority": "ca", "key": "client_key"}, "together"),
        ({"certificate": "client", "key": "client_key"}, "needs TLS"),
        ({"authority": "missing"}, r"missing: cannot be read.*check ClientSecurity.authority"),
        ({"authority": "junk"}, "expected a PEM file; check ClientSecurity.authority"),
        ({"authority": "client_key"}, "expected the certificate of an authority"),
        ({"authority": "torn"}, "expected the certificate of an authority"),
        (
            {"authority": "ca", "certificate": "client_key", "key": "client"},
            "swap ClientSecurity.certificate and ClientSecurity.key",
        ),
        (
            {"authority": "ca", "certificate": "client", "key": "server_key"},
            "not a certificate and its private key.*check ClientSecurity.certificate",
        ),
        (
            {"authority": "ca", "certificate": "client", "key": "locked"},
            "not a certificate and its private key, without a password",
        ),
    ],
)
def test_files_that_a_client_cannot_use(pki, tmp_path, security, words):
    files = {**pki, "missing": tmp_path / "missing"}
    key = serialization.load_pem_private_key(pki["client_key"].read_bytes(), None)
    locked = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"password"),
    )  # fmt: skip
    torn = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    for name, data in {"junk": b"hello", "torn": torn, "locked": locked}.items():
        files[name] = tmp_path / name
        files[name].write_bytes(data)
    chosen = {name: files[file] for name, file in security.items()}
    with pytest.raises(InvalidInputError, match=words):
        Client(options=ClientOptions(security=ClientSecurity(**chosen))).close()


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


def test_files_of_a_server_that_do_not_belong_together(pki):
    with pytest.raises(InvalidInputError, match="swap --tls-cert and --tls-key"):
        ServerTls(pki["server_key"], pki["server"]).credentials()
    with pytest.raises(InvalidInputError, match="not a certificate and its private key"):
        ServerTls(pki["server"], pki["client_key"]).credentials()
    with pytest.raises(InvalidInputError, match=r"of an authority.*check --tls-client-ca"):
        ServerTls(pki["server"], pki["server_key"], pki["client_key"]).credentials()
    assert ServerTls(pki["server"], pki["server_key"]).credentials() is not None


def test_sides_that_do_not_agree_on_tls_say_so(serve, embedder, pki, tmp_path):
    authority = trustme.CA.from_pem(pki["ca"].read_bytes(), pki["ca_key"].read_bytes())
    old = authority.issue_cert(
        "localhost", not_before=datetime(2020, 1, 1), not_after=datetime(2021, 1, 1)
    )
    old.cert_chain_pems[0].write_to_path(tmp_path / "old.pem")
    old.private_key_pem.write_to_path(tmp_path / "old.key")
    tls = ServerTls(pki["server"], pki["server_key"])
    servers = {
        name: serve(embedder, bases=tmp_path / name, tls=each)
        for name, each in [
            ("plain", None), ("secure", tls),
            ("mutual", ServerTls(pki["server"], pki["server_key"], pki["ca"])),
            ("old", ServerTls(tmp_path / "old.pem", tmp_path / "old.key")),
        ]
    }  # fmt: skip
    stranger = trustme.CA()
    stranger.cert_pem.write_to_path(tmp_path / "stranger.pem")
    issued = stranger.issue_cert("camera.example")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "other.pem")
    issued.private_key_pem.write_to_path(tmp_path / "other.key")
    known = {"authority": pki["ca"]}
    other = {"certificate": tmp_path / "other.pem", "key": tmp_path / "other.key"}
    number = {"host": "127.0.0.1"}  # one address; of several, gRPC names the error of the last
    for name, options, words in [
        ("plain", known, "the server speaks plain text, and this client TLS"),
        ("secure", number, "it speaks TLS and this client plain text: set ClientSecurity.auth"),
        ("secure", {"authority": tmp_path / "stranger.pem"}, "not signed by ClientSecurity.auth"),
        ("secure", {**number, **known}, "certificate is for another host name"),
        ("old", known, "certificate has expired"),
        ("mutual", known, "asks for a client certificate that its --tls-client-ca signed"),
        ("mutual", {**known, **other}, "asks for a client certificate that its --tls-client-ca"),
    ]:
        with (
            connect(servers[name], **options) as client,
            pytest.raises(ServiceError, match=words),
        ):
            client.model()


def test_the_authorities_of_the_machine(serve, embedder, pki, tmp_path, monkeypatch):
    server = serve(embedder, tls=ServerTls(pki["server"], pki["server_key"]))
    with connect(server, authority="system") as client, pytest.raises(ServiceError, match="signed"):
        client.model()
    folder = tmp_path / "certs"
    folder.mkdir()
    for file, directory in [(pki["ca"], "/nowhere"), ("/nowhere", folder)]:
        monkeypatch.setenv("SSL_CERT_FILE", str(file))
        monkeypatch.setenv("SSL_CERT_DIR", str(directory))
        (folder / "README").write_text("not a certificate")
        (folder / "ours.pem").write_bytes(pki["ca"].read_bytes())
        with connect(server, authority="system") as client:
            assert client.model().name == "crl-demo"
    monkeypatch.setenv("SSL_CERT_DIR", "/nowhere")
    with pytest.raises(InvalidInputError, match="trusts no authority"):
        connect(server, authority="system")


def test_a_token_does_not_leave_this_machine_in_plain_text(caplog):
    for address in ("127.0.0.1:50051", "localhost:50051", "unix:crl.sock"):
        Client(address, ClientOptions(security=ClientSecurity(token=EMBED))).close()
    for address in ("example.org:50051", "10.0.0.1:50051", "unix.example.org:50051"):
        with pytest.raises(InvalidInputError, match=r"plain text: set.*plain_text_token") as caught:
            Client(address, ClientOptions(security=ClientSecurity(token=EMBED)))
        assert EMBED not in str(caught.value)
        allowed = ClientSecurity(token=EMBED, plain_text_token=True)
        Client(address, ClientOptions(security=allowed)).close()
        Client(address).close()
    assert not caplog.records


def test_calls_to_this_machine_use_no_proxy(serve, embedder, monkeypatch):
    """A proxy on another machine would read the token."""
    server = serve(embedder, tokens=TOKENS)
    for name in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("grpc_proxy", "https_proxy", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with connect(server, token=EMBED) as client:
        assert client.model().name == "crl-demo"


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
    for address in ("[::]:0", "10.0.0.1:0", "unix.example.org:0"):
        assert "neither TLS" in exposure(ServerSettings(address=address))
    assert "read and write the shared memory" in exposure(
        ServerSettings(address="0.0.0.0:0", shared_memory=True)
    )
