"""Method handlers of another handler's kind: what interceptors give in its place."""

from __future__ import annotations

from typing import Any

import grpc

_KINDS = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


def in_place_of(handler: Any, once: Any, many: Any) -> Any:
    """Give a handler that takes the same messages.

    Args:
        handler: the one it stands for.
        once: coroutine function (request or iterator, context) → reply.
        many: asynchronous generator function (request or iterator, context), for streamed replies.
    """
    kind: Any = _KINDS[handler.request_streaming, handler.response_streaming]
    return kind(
        many if handler.response_streaming else once,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
