"""Addresses: a missing port is an error, and loopback is recognised."""

from __future__ import annotations

import pytest

from crl_sdk import Client
from crl_sdk.errors import InvalidInputError
from crl_sdk.rpc._address import check_address, is_local


@pytest.mark.parametrize(
    "address",
    [
        "localhost",
        "localhost:",
        ":50051",
        "localhost:0",
        "localhost:65536",
        "host:grpc",
        "",
        "1.2.3.4",
    ],
)
def test_addresses_that_grpc_would_guess_at(address):
    with pytest.raises(
        InvalidInputError, match=r"such as localhost:50051 or unix:/run/crl\.sock, got"
    ):
        check_address(address)
    with pytest.raises(InvalidInputError, match="such as localhost:50051"):
        Client(address)


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("localhost:50051", True), ("127.0.0.1:1", True), ("127.8.8.8:1", True), ("[::1]:5", True),
        ("unix:/run/crl.sock", True), ("ipv4:127.0.0.1:5", True), ("0.0.0.0:50051", False),
        ("[::]:50051", False), ("example.org:443", False), ("dns:///example.org:443", False),
        ("10.0.0.1:50051", False),
    ],
)  # fmt: skip
def test_addresses_of_this_machine(address, local):
    check_address(address)
    assert is_local(address) is local
