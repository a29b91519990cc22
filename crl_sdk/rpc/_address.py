"""Addresses of servers: `host:port`, `unix:PATH`, and for clients the other forms of gRPC."""

from __future__ import annotations

import ipaddress
import re

from crl_sdk.errors import InvalidInputError

DEFAULT_PORT = 50051

_HOST_AND_PORT = re.compile(r"(\[[^\[\]\s]+\]|[^\[\]:/\s]+):([0-9]{1,5})")
_SOCKET = re.compile(r"unix:(?!//[^/]).*[^/:].*", re.DOTALL)  # unix:PATH or unix:///PATH
_OTHER_SCHEMES = ("unix-abstract:", "vsock:", "xds:")


def check_address(address: str) -> None:
    """Check the address of a server that a client calls.

    gRPC would take port 443 in place of a missing one.

    Raises:
        InvalidInputError: If a port from 1 to 65535 is missing, or the path of a socket.

    Example:
        >>> check_address("localhost:50051")
    """
    if _SOCKET.fullmatch(address) or address.startswith(_OTHER_SCHEMES):
        return
    for target in _targets(address):
        if not _port(re.sub("^//[^/]+/", "", target)):  # dns://NAME_SERVER/host:port
            raise _bad_address(address)


def check_listening_address(address: str, *, sockets: bool = True) -> None:
    """Check the address on which a server shall listen.

    Args:
        address: `host:port`, with port 0 for any free port, or `unix:PATH`.
        sockets: Whether `unix:PATH` is allowed.

    Raises:
        InvalidInputError: If it has another form.
    """
    if not (sockets and _SOCKET.fullmatch(address)) and split_address(address) is None:
        raise _bad_address(address)


def split_address(address: str) -> tuple[str, int] | None:
    """Return the host and the port of `host:port`, or None if the address has another form.

    Example:
        >>> split_address("[::1]:50051"), split_address("localhost")
        (('[::1]', 50051), None)
    """
    match = _HOST_AND_PORT.fullmatch(address)
    if match is None or int(match[2]) > 65535:
        return None
    if match[1].startswith("[") and _ip_address(match[1][1:-1]) is None:
        return None
    return match[1], int(match[2])


def is_local(address: str) -> bool:
    """Return whether an address is one of this machine: a socket file or the loopback interface.

    Example:
        >>> is_local("127.0.0.1:50051"), is_local("0.0.0.0:50051")
        (True, False)
    """
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    return all(_is_loopback(target.rpartition(":")[0]) for target in _targets(address))


def _targets(address: str) -> list[str]:
    """Return the `host:port` of an address. The forms `ipv4:` and `ipv6:` may hold several."""
    scheme, _, rest = address.partition(":")
    if scheme in ("ipv4", "ipv6"):
        return rest.split(",")
    return [rest.removeprefix("///")] if scheme == "dns" else [address]


def _is_loopback(host: str) -> bool:
    address = _ip_address(host.strip("[]"))
    return host.lower() == "localhost" if address is None else address.is_loopback


def _ip_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _bad_address(address: str) -> InvalidInputError:
    """Return the error for an address, with the one that was probably meant."""
    rest = address.rpartition("://")[2].strip("/")
    guesses = (
        rest, f"localhost:{rest}", f"localhost{rest}",
        f"{rest.removesuffix(':')}:{DEFAULT_PORT}", f"[{rest}]:{DEFAULT_PORT}",
    )  # fmt: skip
    fitting = [] if address.startswith("unix:") else [each for each in guesses if _port(each)]
    hint = f"; do you mean {fitting[0]}?" if fitting else ""
    return InvalidInputError(
        "expected an address with a port, such as localhost:50051, or the path of a socket, such "
        f"as unix:/run/crl.sock, got {address!r}{hint}"
    )


def _port(address: str) -> int:
    """Return the port of `host:port`, or 0 if there is none."""
    parts = split_address(address)
    return 0 if parts is None else parts[1]
