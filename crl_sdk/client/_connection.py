"""The connection to a service: its channel, its token, and when a call is retried."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import ssl
import time
from pathlib import Path
from typing import TypeVar

import grpc

from crl_sdk.client._options import ClientOptions
from crl_sdk.errors import CrlError, InvalidInputError, OverloadedError
from crl_sdk.rpc._address import check_address, is_local
from crl_sdk.rpc._status import error_from_status

Request = TypeVar("Request")
Response = TypeVar("Response")

SYSTEM_AUTHORITIES = "system"
"""Value of `ClientSecurity.authority` for the authorities that this machine trusts."""

_log = logging.getLogger(__name__)

_UNAVAILABLE_PAUSE = 0.05
_MAX_PAUSE = 5.0


class Connection:
    """A channel that makes calls with the token, timeout and retries of its options.

    Attributes:
        options: Options of the client.
        channel: Channel for the stubs of the services.
        metadata: Metadata of each call, with the token if there is one.
    """

    def __init__(self, address: str, options: ClientOptions) -> None:
        """Make a channel, which connects at the first call.

        Raises:
            InvalidInputError: If the address has no port, a file of `options.security` cannot be
                read, or there is a certificate without an authority.
        """
        self.options = options
        self.channel = open_channel(address, options)
        token = options.security.token
        if token and options.security.authority is None and not is_local(address):
            _log.warning(
                "the token travels to %s in plain text, because ClientSecurity.authority is not "
                "set: name the PEM file of the server's authority, or 'system'", address,
            )  # fmt: skip
        self.metadata = (("authorization", f"Bearer {token}"),) if token else ()

    async def call(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[Request, Response],
        request: Request,
        *,
        retry: bool = True,
    ) -> Response:
        """Make a call and return its response.

        Args:
            method: RPC of a stub on this channel.
            request: Message to send.
            retry: Whether to retry, with growing pauses, while the server is overloaded or
                unavailable.

        Raises:
            CrlError: If the call fails. The class is that of the server's error.
        """
        ends = time.monotonic() + self.options.timeout
        attempt = 0
        while True:
            try:
                remaining = max(ends - time.monotonic(), 0.001)
                return await method(request, timeout=remaining, metadata=self.metadata)
            except grpc.aio.AioRpcError as error:
                typed = typed_error(error)
                pause = _retry_pause(error.code(), typed, attempt)
                late = pause is not None and time.monotonic() + pause >= ends
                if not retry or pause is None or late or attempt == self.options.retries:
                    raise typed from error
            await asyncio.sleep(pause)
            attempt += 1

    async def close(self) -> None:
        """Close the channel."""
        await self.channel.close()


def typed_error(error: grpc.aio.AioRpcError) -> CrlError:
    """Return the SDK's error for a failed call."""
    return error_from_status(error.code(), error.details() or "", error.trailing_metadata())


def open_channel(address: str, options: ClientOptions) -> grpc.aio.Channel:
    """Return a channel, which connects at the first call.

    Raises:
        InvalidInputError: If the address has no port, a file of `options.security` cannot be read,
            or there is a certificate without an authority.
    """
    check_address(address)
    sizes = [
        ("grpc.max_receive_message_length", options.max_message_bytes),
        ("grpc.max_send_message_length", options.max_message_bytes),
    ]
    security = options.security
    if security.authority is None:
        if security.certificate is not None:
            raise InvalidInputError(
                "a client certificate needs TLS: set ClientSecurity.authority to the PEM file of "
                "the authority that signed the server's certificate"
            )
        return grpc.aio.insecure_channel(address, options=sizes)
    authority = (
        _system_authorities()
        if security.authority == SYSTEM_AUTHORITIES
        else _read_pem(security.authority)
    )
    credentials = grpc.ssl_channel_credentials(
        authority, _read_pem(security.key), _read_pem(security.certificate)
    )
    return grpc.aio.secure_channel(address, credentials, options=sizes)


def _system_authorities() -> bytes:
    """Return the certificates of the authorities that this machine trusts, as PEM."""
    trusted = ssl.create_default_context().get_ca_certs(binary_form=True)
    if not trusted:
        raise InvalidInputError(
            "this machine trusts no authority that can be read: set ClientSecurity.authority to a "
            "PEM file"
        )
    return "".join(map(ssl.DER_cert_to_PEM_cert, trusted)).encode()


def _read_pem(path: str | os.PathLike[str] | None) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InvalidInputError(
            f"{path}: cannot be read ({error.strerror}); check the paths of ClientSecurity"
        ) from error


def _retry_pause(code: grpc.StatusCode, error: CrlError, attempt: int) -> float | None:
    """Return the seconds to wait before a retry, or None if a retry would not help."""
    if isinstance(error, OverloadedError):
        base = error.retry_after
    elif code == grpc.StatusCode.UNAVAILABLE:
        base = _UNAVAILABLE_PAUSE
    else:
        return None
    # the random factor keeps clients that failed together from retrying together
    return float(min(base * 2**attempt, _MAX_PAUSE) * random.uniform(0.5, 1.5))
