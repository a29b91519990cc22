"""Our gRPC services without a gRPC server: Ray Serve has the connection, a replica the handlers.

Serve's proxy gives a replica a message, and a context that can be sent between processes. The
handlers and interceptors of `crl_sdk.serving` expect the context of grpcio. `ServeCall` is that.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, NoReturn

import grpc

from crl_sdk.integrations.ray._proxy import ADD_TO_SERVER
from crl_sdk.pb.crl.v1 import basis_pb2, basis_pb2_grpc, embedding_pb2, embedding_pb2_grpc
from crl_sdk.pb.inference import kserve_pb2, kserve_pb2_grpc

METHODS = {
    method.name: (f"/{service.full_name}/{method.name}", method.server_streaming)
    for file in (embedding_pb2, basis_pb2, kserve_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
"""For each method, by which Serve finds it: its full name, and whether it streams replies."""


class HandlerCollector:
    """Takes the place of a gRPC server: services are registered, and their handlers kept.

    Attributes:
        handlers: Handlers of all methods by full name.
    """

    def __init__(self) -> None:
        """Begin without handlers."""
        self.handlers: dict[str, Any] = {}

    def register(
        self,
        embedding: embedding_pb2_grpc.EmbeddingServiceServicer,
        basis: basis_pb2_grpc.BasisServiceServicer,
        inference: kserve_pb2_grpc.GRPCInferenceServiceServicer,
    ) -> None:
        """Keep the handlers of our services."""
        for add, servicer in zip(ADD_TO_SERVER, (embedding, basis, inference), strict=True):
            add(servicer, self)

    def add_generic_rpc_handlers(self, handlers: Sequence[Any]) -> None:
        """Do nothing: generated code registers each method by name too."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """Keep the handlers of a service. Serve has parsed the messages already."""
        for name, handler in handlers.items():
            self.handlers[f"/{service}/{name}"] = handler._replace(request_deserializer=None)

    async def intercepted(
        self, interceptors: Sequence[grpc.aio.ServerInterceptor], method: str, call: ServeCall
    ) -> Any:
        """Return the handler of a call, as interceptors leave it; the first is the outermost."""

        async def step(position: int, details: Any) -> Any:
            if position == len(interceptors):
                return self.handlers[method]
            return await interceptors[position].intercept_service(
                lambda inner: step(position + 1, inner), details
            )

        return await step(0, _Details(method, call.invocation_metadata()))


class _Details(grpc.HandlerCallDetails):
    """What interceptors know of a call."""

    def __init__(self, method: str, metadata: Any) -> None:
        self.method = method
        self.invocation_metadata = metadata


class ServeCall:
    """The context of a call for our handlers, on top of that of Serve."""

    def __init__(self, context: Any, timeout: float | None) -> None:
        """Store the parts.

        Args:
            context: Context of Serve, `RayServegRPCContext`.
            timeout: Seconds that the proxy gives a call; None for no limit. Serve does not tell
                a replica the deadline of the client.
        """
        self._context = context
        self._ends = None if timeout is None else time.monotonic() + timeout

    def invocation_metadata(self) -> Any:
        """Return the metadata that the client sent."""
        return self._context.invocation_metadata()

    def peer(self) -> str:
        """Return the address of the client."""
        return str(self._context.peer())

    def time_remaining(self) -> float | None:
        """Return the seconds that are left for the call, or None."""
        return None if self._ends is None else self._ends - time.monotonic()

    def set_trailing_metadata(self, trailers: Sequence[tuple[str, str]]) -> None:
        """Set what is sent after the reply."""
        self._context.set_trailing_metadata(list(trailers))

    def code(self) -> Any:
        """Return the status, if one was set."""
        return self._context.code()

    def details(self) -> str:
        """Return the message of the status."""
        return str(self._context.details() or "")

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailers: Sequence[tuple[str, str]] = ()
    ) -> NoReturn:
        """End the call with a status."""
        self._context.set_code(code)
        self._context.set_details(details)
        self._context.set_trailing_metadata(list(trailers))
        raise grpc.aio.AbortError(details)


async def run_unary(handler: Any, request: Any, call: ServeCall) -> Any:
    """Return the reply of a call, or an empty one with the status of an error.

    Serve sends the trailers with a reply only, and they name the class of the error.
    """
    behaviour = handler.stream_unary if handler.request_streaming else handler.unary_unary
    try:
        return await behaviour(request, call)
    except grpc.aio.AbortError:
        return _EMPTY


async def run_streaming(handler: Any, request: Any, call: ServeCall) -> AsyncIterator[Any]:
    """Yield the replies of a call."""
    behaviour = handler.stream_stream if handler.request_streaming else handler.unary_stream
    async for reply in behaviour(request, call):
        yield reply


_EMPTY = embedding_pb2.EmbedResponse()
