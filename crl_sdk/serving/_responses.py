"""Run the work of a call and turn its typed errors into the status of the call."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, TypeVar

import grpc

from crl_sdk.errors import CrlError
from crl_sdk.rpc._status import error_trailers, status_code
from crl_sdk.serving._call_interceptor import REQUEST_ID_KEY, request_id

Context = grpc.aio.ServicerContext[Any, Any]
Reply = TypeVar("Reply")


async def respond(context: Context, work: Callable[[], Awaitable[Reply]]) -> Reply:
    """Return the reply of `work`, or end the call with the status of its `CrlError`."""
    try:
        return await work()
    except CrlError as error:
        await abort(context, error)


async def abort(context: Context, error: CrlError) -> NoReturn:
    """End a call with the status, the message and the trailers of an error."""
    trailers = (*error_trailers(error), (REQUEST_ID_KEY, request_id.get()))
    await context.abort(status_code(error), str(error), trailers)
