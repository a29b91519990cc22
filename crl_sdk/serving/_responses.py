"""Run the work of a call and turn its typed errors into the status of the call."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, TypeVar

import grpc

from crl_sdk.errors import CrlError
from crl_sdk.serving._call_interceptor import status_of

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
    await context.abort(*status_of(error))
