"""Ask a server for its health: status 0 if it serves, 1 if not.

    python health.py                       # the address in CRL_SERVE_ADDRESS, or 127.0.0.1:50051
    python health.py localhost:50051 --wait 120

It needs only grpcio and grpcio-health-checking, which the extra `serve` installs. Health calls need
no token. With TLS (CRL_SERVE_TLS_CERT), it trusts the server's own certificate and nothing else.
"""

from __future__ import annotations

import argparse
import os
import socket
import ssl
import sys
import time
from pathlib import Path

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # read when grpc is imported

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

EVERY_HOST = ("0.0.0.0", "[::]", "")
"""Hosts that mean all interfaces to a server and nothing to a client."""

PAUSE_SECONDS = 0.5


def main(arguments: list[str] | None = None) -> int:
    """Ask until the server serves or the time is over, and print what it last said."""
    parser = argparse.ArgumentParser(description="Ask a CRL server for its health.")
    parser.add_argument(
        "address", nargs="?", default=os.environ.get("CRL_SERVE_ADDRESS") or "127.0.0.1:50051"
    )
    parser.add_argument("--wait", type=float, default=0, help="seconds to wait until it serves")
    parser.add_argument("--timeout", type=float, default=3, help="seconds for one answer")
    parser.add_argument(
        "--tls-cert",
        type=Path,
        default=os.environ.get("CRL_SERVE_TLS_CERT") or None,
        help="certificate file of the server, if it speaks TLS",
    )
    parser.add_argument("--cert", type=Path, help="certificate of a client, if the server asks")
    parser.add_argument("--key", type=Path, help="private key of that certificate")
    options = parser.parse_args(arguments)
    host, _, port = options.address.rpartition(":")
    address = f"127.0.0.1:{port}" if host in EVERY_HOST else options.address
    ends = time.monotonic() + options.wait
    while True:
        answer = ask(address, options.timeout, options.tls_cert, options.cert, options.key)
        if answer == "SERVING":
            return 0
        if time.monotonic() >= ends:
            print(f"{address}: {answer}", file=sys.stderr)
            return 1
        time.sleep(PAUSE_SECONDS)


def ask(
    address: str,
    seconds: float,
    trusted: str | Path | None = None,
    certificate: Path | None = None,
    key: Path | None = None,
) -> str:
    """Return the state of the server, or why there is no answer.

    Args:
        address: `host:port`, or `unix:PATH` in plain text.
        seconds: Time for the answer.
        trusted: Certificate file of the server. None for plain text.
        certificate: Certificate file of this client, if the server asks for one.
        key: Private key of that certificate.
    """
    options: list[tuple[str, str]] = []
    credentials = None
    try:
        if trusted is not None:
            name = server_name(address, seconds, trusted, certificate, key)
            options.append(("grpc.ssl_target_name_override", name))
            credentials = grpc.ssl_channel_credentials(
                *(path and Path(path).read_bytes() for path in (trusted, key, certificate))
            )
    except OSError as error:  # an error of TLS is one too
        return f"no connection: {error}"
    with (
        grpc.insecure_channel(address)
        if credentials is None
        else grpc.secure_channel(address, credentials, options)
    ) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=seconds
            )
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def server_name(
    address: str,
    seconds: float,
    trusted: str | Path,
    certificate: Path | None,
    key: Path | None,
) -> str:
    """Return a host name of the server's certificate, once it is verified to be the trusted one.

    The server is asked on this machine's loopback, for which its certificate was hardly made.
    """
    context = ssl.create_default_context(cafile=str(trusted))
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # the certificate itself is trusted
    context.check_hostname = False
    context.set_alpn_protocols(["h2"])
    if certificate is not None:
        context.load_cert_chain(certificate, key)
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host.strip("[]"), int(port)), timeout=seconds) as connection,
        context.wrap_socket(connection) as secured,
    ):
        found = secured.getpeercert() or {}
    names = [str(name) for kind, name in found.get("subjectAltName", ()) if kind == "DNS"]
    return names[0].replace("*", "health") if names else host


if __name__ == "__main__":
    sys.exit(main())
