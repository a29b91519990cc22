"""The connection to a service: its channel, its token, and when a call is retried."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import grpc

from crl_sdk._lifetime import ForkGuard, Lifetime
from crl_sdk.client._options import ClientOptions
from crl_sdk.errors import CrlError, InvalidInputError, OverloadedError
from crl_sdk.rpc._address import check_address, is_local
from crl_sdk.rpc._status import error_from_status
from crl_sdk.rpc._tls_files import read_authority, read_pair, read_system_authorities

Request = TypeVar("Request")
Response = TypeVar("Response")

SYSTEM_AUTHORITIES = "system"
"""Value of `ClientSecurity.authority` for the authorities that this machine trusts."""

_UNAVAILABLE_PAUSE = 0.05
_MAX_PAUSE = 5.0
_MAX_UNAVAILABLE_PAUSE = 1.0

_RECONNECT = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)
"""How long gRPC waits before it connects again. By default it waits for up to two minutes, in which
calls to a server that has come back would fail."""


_grpc = ForkGuard("gRPC", "fork before the first client is made")


class Connection:
    """A channel that makes calls with the token, timeout and retries of its options.

    Attributes:
        options: Options of the client.
        metadata: Metadata of each call, with the token if there is one.
    """

    def __init__(self, address: str, options: ClientOptions) -> None:
        """Check the options. The channel is made at the first call.

        Raises:
            InvalidInputError: If the address has no port, a file of `options.security` cannot be
                used, or the token would travel in plain text.
            ForkError: If this process was forked after its parent had made a client.
        """
        self.options = options
        self._lifetime = Lifetime("client")
        self._make_channel = _channel_maker(address, options)
        self._channel: grpc.aio.Channel | None = None
        self._answered = False
        self._loop: asyncio.AbstractEventLoop | None = None
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
                unavailable. A server that has answered before is waited for until the timeout.

        Raises:
            CrlError: If the call fails. The class is that of the server's error.
        """
        ends = time.monotonic() + self.options.timeout
        attempt = 0
        while True:
            try:
                remaining = max(ends - time.monotonic(), 0.001)
                response = await method(request, timeout=remaining, metadata=self.metadata)
                self._answered = True
                return response
            except grpc.aio.AioRpcError as error:
                typed = typed_error(error)
                pause = _retry_pause(error.code(), typed, attempt)
                late = pause is not None and time.monotonic() + pause >= ends
                # A server that has answered before is being restarted, and is waited for. One that
                # has not is more likely at another address.
                away = self._answered and error.code() == grpc.StatusCode.UNAVAILABLE
                tries = math.inf if away and self.options.retries else self.options.retries
                if not retry or pause is None or late or attempt >= tries:
                    raise typed from error
            await asyncio.sleep(pause)
            attempt += 1

    @property
    def channel(self) -> grpc.aio.Channel:
        """Channel for the stubs of the services. It belongs to the event loop of the first call.

        Raises:
            ClosedError: If the client is closed.
            ForkError: If this process was forked after the client had been made.
            InvalidInputError: If the client was used in another event loop before.
        """
        self._lifetime.require()
        loop = asyncio.get_running_loop()
        if self._channel is None:
            self._channel, self._loop = self._make_channel(), loop
        elif self._loop is not loop:
            raise InvalidInputError(
                "this AsyncClient was used in another event loop, to which its connection belongs: "
                "make one AsyncClient for each event loop, or use Client, which any thread may use"
            )
        return self._channel

    async def close(self) -> None:
        """Close the channel. Further calls do nothing."""
        if not (self._lifetime.closed or self._lifetime.forked):
            self._lifetime.closed = True
            if self._channel is not None:
                await self._channel.close()


def typed_error(error: grpc.aio.AioRpcError) -> CrlError:
    """Return the SDK's error for a failed call."""
    return error_from_status(error.code(), error.details() or "", error.trailing_metadata())


def open_channel(address: str, options: ClientOptions) -> grpc.aio.Channel:
    """Return a channel for the running event loop, which connects at the first call.

    Raises:
        InvalidInputError: If the address has no port, a file of `options.security` cannot be used,
            or the token would travel in plain text.
        ForkError: If this process was forked after its parent had made a client.
    """
    return _channel_maker(address, options)()


def _channel_maker(address: str, options: ClientOptions) -> Callable[[], grpc.aio.Channel]:
    """Check where and how to connect, and return a function that makes the channel."""
    check_address(address)
    _grpc.use()
    settings = [
        ("grpc.max_receive_message_length", options.max_message_bytes),
        ("grpc.max_send_message_length", options.max_message_bytes),
        # Each client has a connection of its own, which one worker of the server answers. gRPC
        # would share one among all channels to an address.
        ("grpc.use_local_subchannel_pool", 1),
        *_RECONNECT,
    ]
    if is_local(address):  # gRPC would send the calls to the proxy of $http_proxy
        settings.append(("grpc.enable_http_proxy", 0))
    security = options.security
    if security.authority is None:
        if security.token and not security.plain_text_token and not is_local(address):
            raise InvalidInputError(
                f"the token would travel to {address} in plain text: set ClientSecurity.authority "
                "(crl bench --authority) to the PEM file of the server's authority or to 'system', "
                "or plain_text_token=True (--plain-text-token) if everyone on the way may read it"
            )
        return partial(grpc.aio.insecure_channel, address, options=settings)
    if security.authority == SYSTEM_AUTHORITIES:
        authority = read_system_authorities("ClientSecurity.authority")
    else:
        authority = read_authority(security.authority, "ClientSecurity.authority")
    chain, key = None, None
    if security.certificate is not None and security.key is not None:
        names = ("ClientSecurity.certificate", "ClientSecurity.key")
        chain, key = read_pair(security.certificate, security.key, names)
    credentials = grpc.ssl_channel_credentials(authority, key, chain)
    return partial(grpc.aio.secure_channel, address, credentials, options=settings)


def _retry_pause(code: grpc.StatusCode, error: CrlError, attempt: int) -> float | None:
    """Return the seconds to wait before a retry, or None if a retry would not help."""
    if isinstance(error, OverloadedError):
        base, most = error.retry_after, _MAX_PAUSE
    elif code == grpc.StatusCode.UNAVAILABLE:
        base, most = _UNAVAILABLE_PAUSE, _MAX_UNAVAILABLE_PAUSE
    else:
        return None
    # the random factor keeps clients that failed together from retrying together
    return float(min(base * 2.0 ** min(attempt, 30), most) * random.uniform(0.5, 1.5))
