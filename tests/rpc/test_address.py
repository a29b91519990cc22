"""Addresses: a missing port is an error, and loopback is recognised."""

from __future__ import annotations

import pytest

from crl_sdk import Client
from crl_sdk.errors import InvalidInputError
from crl_sdk.rpc._address import check_address, check_listening_address, is_local
from crl_sdk.serving._server import ServerSettings


@pytest.mark.parametrize(
    ("address", "meant"),
    [
        ("localhost", "localhost:50051"), ("localhost:", "localhost:50051"),
        (":50071", "localhost:50071"), ("50071", "localhost:50071"),
        ("1.2.3.4", "1.2.3.4:50051"), ("::1", "[::1]:50051"), ("[::1]", "[::1]:50051"),
        ("::", "[::]:50051"), ("http://crl.example:80/", "crl.example:80"),
        ("https://crl.example", "crl.example:50051"), ("dns:///localhost", "localhost:50051"),
        ("localhost:65536", None), ("host:grpc", None), ("", None), ("1.2.3.4:5:6", None),
        ("unix:", None), ("unix://x", None), ("unix:/", None), ("dns:localhost", None),
        ("ipv4:127.0.0.1", None), ("a b:5", None), ("localhost:5\n", None),
        ("localhost:\u0663", None),
    ],
)  # fmt: skip
def test_addresses_that_grpc_would_guess_at(address, meant):
    """gRPC takes port 443 if there is none. Client and server refuse alike."""
    for use in (
        check_address,
        check_listening_address,
        Client,
        lambda each: ServerSettings(address=each),
        lambda each: ServerSettings(metrics_address=each),
    ):
        with pytest.raises(InvalidInputError, match="such as localhost:50051") as caught:
            use(address)
        hint = f"; do you mean {meant}?" if meant else ""
        assert str(caught.value).endswith(f"got {address!r}{hint}")


def test_what_only_one_side_can_use():
    for address in ("localhost:0", "[::]:0"):
        check_listening_address(address)
        with pytest.raises(InvalidInputError):
            check_address(address)
    for address in ("dns://8.8.8.8/h:5", "ipv4:1.2.3.4:5,1.2.3.5:5", "ipv6:[::1]:5", "vsock:2:5"):
        check_address(address)
        with pytest.raises(InvalidInputError):
            check_listening_address(address)
    with pytest.raises(InvalidInputError):
        ServerSettings(metrics_address="unix:/run/metrics.sock")


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("localhost:50051", True), ("LOCALHOST:1", True), ("127.0.0.1:1", True),
        ("127.8.8.8:1", True), ("[::1]:5", True), ("unix:/run/crl.sock", True),
        ("unix:crl.sock", True), ("unix:///run/crl.sock", True), ("unix-abstract:crl", True),
        ("ipv4:127.0.0.1:5", True), ("ipv6:[::1]:5", True), ("dns:///localhost:5", True),
        ("0.0.0.0:50051", False), ("[::]:50051", False), ("example.org:443", False),
        ("dns:///example.org:443", False), ("10.0.0.1:50051", False),
        ("unix.example.org:50051", False), ("localhost.example.org:50051", False),
        ("ipv4:127.0.0.1:5,8.8.8.8:5", False), ("dns://8.8.8.8/localhost:5", False),
    ],
)  # fmt: skip
def test_addresses_of_this_machine(address, local):
    check_address(address)
    assert is_local(address) is local
