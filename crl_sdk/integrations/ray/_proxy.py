"""What runs in Ray Serve's gRPC proxy: our calls, and a status that clients retry.

Serve 2.60 ends the calls of a replica that dies with INTERNAL, which no client retries. They can be
sent again to another replica, so their status here is UNAVAILABLE.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grpc
from grpc._utilities import RpcMethodHandler

from crl_sdk.pb.crl.v1.basis_pb2_grpc import add_BasisServiceServicer_to_server
from crl_sdk.pb.crl.v1.embedding_pb2_grpc import add_EmbeddingServiceServicer_to_server
from crl_sdk.pb.inference.kserve_pb2_grpc import add_GRPCInferenceServiceServicer_to_server

ADD_TO_SERVER: tuple[Callable[[Any, Any], None], ...] = (
    add_EmbeddingServiceServicer_to_server,
    add_BasisServiceServicer_to_server,
    add_GRPCInferenceServiceServicer_to_server,
)
"""Functions that register the handlers of a service with a server: embeddings, bases, KServe."""

_DEAD = re.compile(r"The actor \S*\s*(died|is (dead|(temporarily )?unavailable))")
"""Beginning of Ray's message about an actor that dies or cannot be reached."""


def add_services(servicer: Any, server: Any) -> None:
    """Register our services with Serve's proxy, which has this function's import path."""
    for add in ADD_TO_SERVER:
        add(servicer, _Server(server))


class _Server:
    """Serve's server, with handlers that Serve fills with `_Handler._replace`."""

    def __init__(self, server: Any) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: Sequence[Any]) -> None:
        (generic,) = handlers
        generic._method_handlers = _wrapped(generic._method_handlers)
        self._server.add_generic_rpc_handlers(handlers)

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        self._server.add_registered_method_handlers(service, _wrapped(handlers))


class _Handler(RpcMethodHandler):
    """A handler whose behaviour, once Serve has put its own in, changes the status of the dead."""

    def _replace(self, **changes: Any) -> Any:
        for name in ("unary_unary", "stream_unary"):
            if name in changes:
                changes[name] = _unary(changes[name])
        for name in ("unary_stream", "stream_stream"):
            if name in changes:
                changes[name] = _streaming(changes[name])
        return super()._replace(**changes)


def _wrapped(handlers: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _Handler(*handler) for name, handler in handlers.items()}


def _unary(behaviour: Any) -> Any:
    async def answer(request: Any, context: Any) -> Any:
        reply = await behaviour(request, context)
        _mend(context)
        return reply

    return answer


def _streaming(behaviour: Any) -> Any:
    async def answer(request: Any, context: Any) -> Any:
        async for reply in behaviour(request, context):
            yield reply
        _mend(context)

    return answer


def _mend(context: Any) -> None:
    """Change the status of a call whose replica died."""
    internal = grpc.StatusCode.INTERNAL
    if context.code() in (internal, internal.value[0]) and _DEAD.match(context.details() or ""):
        context.set_code(grpc.StatusCode.UNAVAILABLE)
        context.set_details("the replica of this call died: send the call again")
