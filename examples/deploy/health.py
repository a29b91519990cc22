"""Ask a server for its health: status 0 if it serves, 1 if not.

    python health.py                       # the address in CRL_SERVE_ADDRESS, or 127.0.0.1:50051
    python health.py localhost:50051 --wait 120

It needs only grpcio and grpcio-health-checking, which the extra `serve` installs. Health calls need
no token. With TLS, it trusts the server's own certificate file and nothing else.
"""

from __future__ import annotations

import argparse
import os
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
    try:
        trusted, certificate, key = (
            path and Path(path).read_bytes()
            for path in (options.tls_cert, options.cert, options.key)
        )
    except OSError as error:
        print(f"{error.filename}: cannot be read ({error.strerror})", file=sys.stderr)
        return 1
    ends = time.monotonic() + options.wait
    while True:
        answer = ask(address, options.timeout, trusted, certificate, key)
        if answer == "SERVING":
            return 0
        if time.monotonic() >= ends:
            print(f"{address}: {answer}", file=sys.stderr)
            return 1
        time.sleep(PAUSE_SECONDS)


def ask(
    address: str,
    seconds: float,
    trusted: bytes | None = None,
    certificate: bytes | None = None,
    key: bytes | None = None,
) -> str:
    """Return the state of the server, or why there is no answer.

    Args:
        address: `host:port` or `unix:PATH`.
        seconds: Time for the answer.
        trusted: PEM certificate of the server. None for plain text.
        certificate: PEM certificate of this client, if the server asks for one.
        key: PEM private key of that certificate.
    """
    if trusted is None:
        channel = grpc.insecure_channel(address)
    else:
        credentials = grpc.ssl_channel_credentials(trusted, key, certificate)
        channel = grpc.secure_channel(address, credentials)
    with channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=seconds
            )
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


if __name__ == "__main__":
    sys.exit(main())
