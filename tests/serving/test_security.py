"""TLS, mutual TLS and tokens: who gets in, who does not, and what they are told."""

from __future__ import annotations

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc

from crl_sdk import Client
from crl_sdk.client import ClientOptions, ClientSecurity
from crl_sdk.errors import AccessError, InvalidInputError, ServiceError
from crl_sdk.serving._security import Tls, Token, read_tokens

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


def test_tokens_and_their_rights(serve, embedder, pictures):
    server = serve(embedder, tokens=TOKENS)
    with connect(server) as client, pytest.raises(AccessError, match="Bearer TOKEN"):
        client.model()
    with connect(server, token="guess") as client, pytest.raises(AccessError, match="not known"):
        client.embed(pictures[:1])
    with connect(server, token=EMBED) as client:
        assert client.embed(pictures[:1]).universal.shape == (1, 128)
        assert client.bases() == []
        with pytest.raises(AccessError, match="'camera' lacks the right 'bases'"):
            client.create_basis("color", ["red", "blue"])
        with pytest.raises(AccessError):
            client.delete_basis("color")
    with connect(server, token=ADMIN) as client:
        client.create_basis("color", ["red", "blue"])
        assert client.embed(pictures[:1], criteria=["color"])["color"].shape == (1, 2)
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


def test_tls(serve, embedder, pictures, pki, tmp_path):
    server = serve(embedder, tls=Tls(pki["server"], pki["server_key"]), tokens=TOKENS)
    with connect(server, authority=pki["ca"], token=EMBED) as client:
        assert client.embed(pictures[:1]).universal.shape == (1, 128)
    with connect(server, token=EMBED) as client, pytest.raises(ServiceError, match="UNAVAILABLE"):
        client.model()  # plain text on a TLS port
    other = tmp_path / "other.pem"
    trustme.CA().cert_pem.write_to_path(other)
    with connect(server, authority=other) as client, pytest.raises(ServiceError):
        client.model()


def test_mutual_tls(serve, embedder, pki):
    server = serve(embedder, tls=Tls(pki["server"], pki["server_key"], pki["ca"]))
    known = {"authority": pki["ca"], "certificate": pki["client"], "key": pki["client_key"]}
    with connect(server, **known) as client:
        assert client.model().embedding_dim == 128
    with connect(server, authority=pki["ca"]) as client, pytest.raises(ServiceError):
        client.model()


def test_files_that_are_no_certificates(serve, embedder, pki, tmp_path):
    junk = tmp_path / "junk.pem"
    junk.write_text("hello")
    for tls, words in [
        (Tls(tmp_path / "no.pem", pki["server_key"]), "cannot be read"),
        (Tls(junk, pki["server_key"]), "expected a PEM file"),
    ]:
        with pytest.raises(InvalidInputError, match=words):
            serve(embedder, tls=tls)
    with pytest.raises(InvalidInputError, match="authority too"):
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
        ('[a]\ntoken = "short"\nrights = ["embed"]\n', "16 ASCII characters"),
        (f'[a]\ntoken = "{EMBED}"\nrights = ["root"]\n', "expected rights"),
        (f'[a]\ntoken = "{EMBED}"\nrights = []\n', "expected rights"),
        (f'[a]\ntoken = "{EMBED}"\n', "expected .a. with token"),
    ]:
        path.write_text(text)
        with pytest.raises(InvalidInputError, match=words):
            read_tokens(path)
    with pytest.raises(InvalidInputError, match=r"no\.toml"):
        read_tokens(tmp_path / "no.toml")
