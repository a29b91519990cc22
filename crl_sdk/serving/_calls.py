"""Around every call: a request id, how the call ended, and what nobody expected."""

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

from crl_sdk.serving._handlers import in_place_of

REQUEST_ID_KEY = "x-request-id"
"""Metadata with a call's id: the client's if it is well-formed; told in the trailers."""

OTHER = "other"
"""Name of methods that this server does not have: what clients invent must not fill memory."""

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Id of the call that is being served; log lines carry it."""

caller: ContextVar[str] = ContextVar("caller", default="")
"""Who makes the call, as gRPC names it. Asked once, at its start: gRPC reads freed memory when a
context is asked for its peer after the call is over (seen with grpcio 1.85.1)."""

_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ended:
    """A call that is over.

    Attributes:
        method: `/package.Service/Method`, or `other`.
        code: of its status.
        seconds: from its start.
        peer: who called, as gRPC names it; empty for methods that are not there.
        request_id: of the call.
    """

    method: str
    code: grpc.StatusCode
    seconds: float
    peer: str
    request_id: str


Observer = Callable[[Ended], None]


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Gives calls their ids and tells observers how they ended; streams count once, at their end.

    An exception that is no status of ours is logged with its traceback; the client gets INTERNAL
    and the request's id, and none of the text.
    """

    def __init__(self, observers: Sequence[Observer]) -> None:
        """Store whom to tell."""
        self._observers = tuple(observers)
        self._wrapped: dict[str, tuple[Any, Any]] = {}

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap the handler of a method."""
        handler = await continuation(handler_call_details)
        if handler is None:
            self._tell(Ended(OTHER, grpc.StatusCode.UNIMPLEMENTED, 0.0, "", ""))
            return None
        method = handler_call_details.method
        known = self._wrapped.get(method)
        if known is None or known[0] is not handler:
            known = self._wrapped[method] = (handler, self._wrap(method, handler))
        return known[1]

    def _tell(self, ended: Ended) -> None:
        for observer in self._observers:
            observer(ended)

    def _wrap(self, method: str, handler: Any) -> Any:
        """Give a handler that does the same, with an id, and tells how it ended."""
        answered = handler.stream_unary if handler.request_streaming else handler.unary_unary
        streamed = handler.stream_stream if handler.request_streaming else handler.unary_stream

        def end(context: Any, started: float, error: BaseException | None) -> None:
            code = _code_of(context, error)
            seconds = time.monotonic() - started
            self._tell(Ended(method, code, seconds, caller.get(), request_id.get()))

        async def once(request: Any, context: Any) -> Any:
            started, error = _begin(context), None
            try:
                return await answered(request, context)
            except BaseException as caught:
                error = caught
                await _report(context, method, caught)
                raise
            finally:
                end(context, started, error)

        async def many(request: Any, context: Any) -> Any:
            started, error = _begin(context), None
            try:
                async for reply in streamed(request, context):
                    yield reply
            except BaseException as caught:
                error = caught
                await _report(context, method, caught)
                raise
            finally:
                end(context, started, error)

        return in_place_of(handler, once, many)


def access_log(ended: Ended) -> None:
    """Log a call that is over; an observer."""
    _log.info(
        "%s %s %.1f ms", ended.method, ended.code.name, ended.seconds * 1e3,
        extra={"method": ended.method, "code": ended.code.name, "peer": ended.peer,
               "seconds": round(ended.seconds, 6)},
    )  # fmt: skip


def failure_log(ended: Ended) -> None:
    """Log a call that ended for a reason of the server's; an observer."""
    if ended.code in _FAILURES:
        _log.warning(
            "%s ended with %s", ended.method, ended.code.name,
            extra={"method": ended.method, "code": ended.code.name, "peer": ended.peer},
        )  # fmt: skip


def unexpected(method: str, error: Exception) -> str:
    """Log an exception that nobody expected, and give what its client may know of it."""
    _log.error("%s failed", method, exc_info=error)
    return f"the server failed; its log tells why under the request id {request_id.get()}"


_FAILURES = frozenset(
    {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE}
)


def _begin(context: Any) -> float:
    """Give a call its id and note when it began."""
    given = next(
        (value for key, value in context.invocation_metadata() or () if key == REQUEST_ID_KEY), ""
    )
    usable = isinstance(given, str) and _ID.fullmatch(given)
    name = given if usable else secrets.token_hex(8)
    request_id.set(name)
    caller.set(context.peer())
    context.set_trailing_metadata(((REQUEST_ID_KEY, name),))
    return time.monotonic()


async def _report(context: Any, method: str, error: BaseException) -> None:
    """Log an exception that nobody meant the client to see, and give INTERNAL in its place."""
    meant = isinstance(error, grpc.aio.AbortError | asyncio.CancelledError | GeneratorExit)
    if meant or not isinstance(error, Exception):
        return
    await context.abort(
        grpc.StatusCode.INTERNAL, unexpected(method, error), ((REQUEST_ID_KEY, request_id.get()),)
    )


def _code_of(context: Any, error: BaseException | None) -> grpc.StatusCode:
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return grpc.StatusCode.CANCELLED
    if error is None:
        return grpc.StatusCode.OK
    told = context.code()
    if isinstance(told, int):
        told = next((code for code in grpc.StatusCode if code.value[0] == told), None)
    return told if isinstance(told, grpc.StatusCode) else grpc.StatusCode.UNKNOWN
