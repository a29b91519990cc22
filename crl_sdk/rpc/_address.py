"""Addresses of servers: `host:port`, `unix:PATH`, or another form with a scheme of gRPC."""

from __future__ import annotations

import ipaddress

from crl_sdk.errors import InvalidInputError

_SCHEMES = ("unix:", "unix-abstract:", "dns:", "ipv4:", "ipv6:", "vsock:", "xds:")


def check_address(address: str) -> None:
    """Check the address of a server before gRPC would use port 443 in place of a missing one.

    Raises:
        InvalidInputError: If it has no port from 1 to 65535 and no scheme of gRPC.

    Example:
        >>> check_address("localhost:50051")
    """
    if address.startswith(_SCHEMES):
        return
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 65536:
        raise InvalidInputError(
            f"expected an address such as localhost:50051 or unix:/run/crl.sock, got {address!r}"
        )


def is_local(address: str) -> bool:
    """Return whether an address is one of this machine: a socket file or the loopback interface.

    Example:
        >>> is_local("127.0.0.1:50051"), is_local("0.0.0.0:50051")
        (True, False)
    """
    if address.startswith("unix"):
        return True
    host = address.rpartition(":")[0].removeprefix("ipv4:").removeprefix("ipv6:").strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
