"""Replace the behaviour of a gRPC method handler while keeping its kind."""

from __future__ import annotations

from typing import Any

import grpc

_HANDLER_FACTORIES = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


def replace_behavior(handler: Any, unary: Any, streaming: Any) -> Any:
    """Return a handler of the same kind as another one, with a new behaviour.

    Args:
        handler: Handler to imitate.
        unary: Coroutine function `(request, context) -> reply`, used if the method sends one reply.
            The request is the bytes of a message, or an asynchronous iterator of such bytes.
        streaming: Asynchronous generator function `(request, context)`, used if the method streams
            its replies.
    """
    make_handler: Any = _HANDLER_FACTORIES[handler.request_streaming, handler.response_streaming]
    return make_handler(
        streaming if handler.response_streaming else unary,
        request_deserializer=None,
        response_serializer=handler.response_serializer,
    )
