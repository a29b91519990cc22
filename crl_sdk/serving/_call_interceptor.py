"""What happens around every call: a request id, a record of how it ended, unexpected errors."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from crl_sdk.errors import CrlError, InvalidInputError, OverloadedError, ServiceError
from crl_sdk.rpc._status import error_trailers, status_code
from crl_sdk.serving._method_handlers import replace_behavior

REQUEST_ID_KEY = "x-request-id"
"""Metadata key of a call's id. The client may send an id; the trailers return the one in use."""

OTHER_METHODS = "other"
"""Common name of methods that this server does not have.

Clients can invent any number of names, and a metric for each of them would fill the memory.
"""

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Id of the current call. Log lines carry it."""

caller: ContextVar[str] = ContextVar("caller", default="")
"""Address of the current call's client, as gRPC names it.

It is read once, at the start of the call: gRPC reads freed memory when a context is asked for its
peer after the call is over (seen with grpcio 1.85.1).
"""

_PARSE_BYTES = 1 << 20
"""Bytes that it takes to parse a message, beside its own."""

_ID_PATTERN = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_SERVER_FAILURES = frozenset(
    {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE}
)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FinishedCall:
    """Record of a call that is over.

    Attributes:
        method: Name of the method, `/package.Service/Method`, or `other` if there is none.
        code: Status code that the client received.
        seconds: Duration of the call, in seconds.
        peer: Address of the client, as gRPC names it; empty if the method does not exist.
        request_id: Id of the call; empty if the method does not exist.
        message: Message of the status; empty if the call succeeded.
    """

    method: str
    code: grpc.StatusCode
    seconds: float
    peer: str
    request_id: str
    message: str = ""


Observer = Callable[[FinishedCall], None]


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Assigns request ids and reports each finished call to observers. A stream is one call.

    An exception that the code does not expect is logged with its traceback. The client receives
    INTERNAL and the request id, but not the text of the exception.
    """

    def __init__(self, observers: Sequence[Observer]) -> None:
        """Store the functions that receive each finished call."""
        self._observers = tuple(observers)
        self._wrapped: dict[str, tuple[Any, Any]] = {}

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Return the wrapped handler of a method."""
        handler = await continuation(handler_call_details)
        if handler is None:
            self._notify(FinishedCall(OTHER_METHODS, grpc.StatusCode.UNIMPLEMENTED, 0.0, "", ""))
            return None
        method = handler_call_details.method
        known = self._wrapped.get(method)
        if known is None or known[0] is not handler:
            known = self._wrapped[method] = (handler, self._wrap(method, handler))
        return known[1]

    def _notify(self, call: FinishedCall) -> None:
        for observer in self._observers:
            observer(call)

    def _wrap(self, method: str, handler: Any) -> Any:
        """Return a handler that does the same, with a request id, and reports how it ended."""
        run_unary = handler.stream_unary if handler.request_streaming else handler.unary_unary
        run_streaming = handler.stream_stream if handler.request_streaming else handler.unary_stream
        parse = handler.request_deserializer

        async def parse_each(messages: Any) -> Any:
            async for message in messages:
                yield _parse(parse, message)

        def read(request: Any) -> Any:
            if parse is None:
                return request
            return parse_each(request) if handler.request_streaming else _parse(parse, request)

        def finish(context: Any, started: float, error: BaseException | None) -> None:
            code = _status_code(context, error)
            seconds = time.monotonic() - started
            message = context.details() or ""
            self._notify(
                FinishedCall(method, code, seconds, caller.get(), request_id.get(), str(message))
            )

        async def unary(request: Any, context: Any) -> Any:
            started, error = _begin(context), None
            try:
                return await run_unary(read(request), context)
            except BaseException as caught:
                error = caught
                await _abort_if_unexpected(context, method, caught)
                raise
            finally:
                finish(context, started, error)

        async def streaming(request: Any, context: Any) -> Any:
            started, error = _begin(context), None
            try:
                async for reply in run_streaming(read(request), context):
                    yield reply
            except BaseException as caught:
                error = caught
                await _abort_if_unexpected(context, method, caught)
                raise
            finally:
                finish(context, started, error)

        # Requests are parsed in this handler, so that a failure ends the call like any other one.
        return replace_behavior(handler, unary, streaming)


def access_log(call: FinishedCall) -> None:
    """Log a finished call; an observer."""
    _log.info(
        "%s %s %.1f ms%s", call.method, call.code.name, call.seconds * 1e3,
        f": {call.message}" if call.code in _SERVER_FAILURES else "",
        extra={"method": call.method, "code": call.code.name, "peer": call.peer,
               "seconds": round(call.seconds, 6)},
    )  # fmt: skip


def failure_log(call: FinishedCall) -> None:
    """Log a call that failed because of the server, not of the client; an observer."""
    if call.code in _SERVER_FAILURES:
        _log.warning(
            "%s ended with %s: %s", call.method, call.code.name, call.message,
            extra={"method": call.method, "code": call.code.name, "peer": call.peer},
        )  # fmt: skip


def typed_error(method: str, error: Exception) -> CrlError:
    """Return what to tell the client about an exception; log one that was not expected.

    Args:
        method: Method that was called.
        error: What its handler raised.
    """
    if isinstance(error, CrlError):
        return error
    if isinstance(error, MemoryError):
        _log.warning("%s: the server ran out of memory", method)
        return OverloadedError(
            "the server ran out of memory: send less in one call, or try again later"
        )
    if isinstance(error, DecodeError):
        return InvalidInputError(
            f"expected a message of {method}, got other bytes: check the client's proto files"
        )
    _log.error("%s failed", method, exc_info=error)
    return ServiceError(
        f"the server failed; its log has the reason under the request id {request_id.get()}: "
        "send this id to its operator"
    )


def _parse(parse: Callable[[bytes], Any], data: bytes) -> Any:
    """Return the message in some bytes.

    Raises:
        DecodeError: If the bytes are not such a message.
        MemoryError: If there is not enough memory. Protobuf does not tell this from damaged bytes.
    """
    try:
        return parse(data)
    except DecodeError:
        bytearray(2 * len(data) + _PARSE_BYTES)  # raises MemoryError if that is why it failed
        return parse(data)


def status_of(error: CrlError) -> tuple[grpc.StatusCode, str, tuple[tuple[str, str], ...]]:
    """Return the status, the message and the trailers of a call that ends with an error."""
    trailers = (*error_trailers(error), (REQUEST_ID_KEY, request_id.get()))
    return status_code(error), str(error), trailers


def _begin(context: Any) -> float:
    """Assign an id to a call and return its start time."""
    sent = next(
        (value for key, value in context.invocation_metadata() or () if key == REQUEST_ID_KEY), ""
    )
    usable = isinstance(sent, str) and _ID_PATTERN.fullmatch(sent)
    chosen = sent if usable else secrets.token_hex(8)
    request_id.set(chosen)
    caller.set(context.peer())
    context.set_trailing_metadata(((REQUEST_ID_KEY, chosen),))
    return time.monotonic()


async def _abort_if_unexpected(context: Any, method: str, error: BaseException) -> None:
    """End the call with a status for an exception that is not one of ours, see `typed_error`."""
    # gRPC raises InternalError if the client has gone before its status could be sent.
    expected = isinstance(error, grpc.aio.AbortError | grpc.aio.InternalError)
    if expected or not isinstance(error, Exception):
        return
    await context.abort(*status_of(typed_error(method, error)))


def _status_code(context: Any, error: BaseException | None) -> grpc.StatusCode:
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return grpc.StatusCode.CANCELLED
    if error is None:
        return grpc.StatusCode.OK
    code = context.code()
    if isinstance(code, int):
        code = next((known for known in grpc.StatusCode if known.value[0] == code), None)
    return code if isinstance(code, grpc.StatusCode) else grpc.StatusCode.UNKNOWN
