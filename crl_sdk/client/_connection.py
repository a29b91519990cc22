"""The connection to a service: its channel, its token, and when a call is retried."""

from __future__ import annotations

import asyncio
import os
import random
import time
from pathlib import Path
from typing import TypeVar

import grpc

from crl_sdk.client._options import ClientOptions
from crl_sdk.errors import CrlError, InvalidInputError, OverloadedError
from crl_sdk.rpc._status import error_from_status

Request = TypeVar("Request")
Response = TypeVar("Response")

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
            InvalidInputError: If a file of `options.security` cannot be read, or if there is a
                certificate without an authority.
        """
        self.options = options
        self.channel = _open_channel(address, options)
        token = options.security.token
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


def _open_channel(address: str, options: ClientOptions) -> grpc.aio.Channel:
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
    credentials = grpc.ssl_channel_credentials(
        _read_pem(security.authority), _read_pem(security.key), _read_pem(security.certificate)
    )
    return grpc.aio.secure_channel(address, credentials, options=sizes)


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
