"""What runs in Serve's gRPC proxy: our methods, and the status of a call whose replica died."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from crl_sdk.integrations.ray._handlers import METHODS
from crl_sdk.integrations.ray._proxy import add_services
from crl_sdk.serving._rights import RPC_ACCESS

DEAD = "The actor died unexpectedly before finishing this task.\n\tclass_name: ServeReplica"


class ServeServer:
    """Puts its own behaviour into handlers, as Serve's server does."""

    def __init__(self, code, details):
        self.code, self.details = code, details
        self.handlers = {}

    def add_generic_rpc_handlers(self, handlers):
        names = handlers[0]._method_handlers
        self.handlers |= {name: self.fill(handler) for name, handler in names.items()}

    def add_registered_method_handlers(self, service, handlers):
        for name, handler in handlers.items():
            self.handlers[f"/{service}/{name}"] = self.fill(handler)

    def fill(self, handler):
        async def unary(request, context):
            context.set_code(self.code)
            context.set_details(self.details)
            return b"reply"

        async def streaming(request, context):
            yield await unary(request, context)

        return handler._replace(
            response_serializer=None, unary_unary=unary, unary_stream=streaming,
            stream_unary=unary, stream_stream=streaming,
        )  # fmt: skip


class Context:
    def __init__(self):
        self._code, self._details = 0, ""

    def code(self):
        return self._code

    def details(self):
        return self._details

    def set_code(self, code):
        self._code = code

    def set_details(self, details):
        self._details = details


def test_all_rpcs_with_a_right_of_ours_are_registered():
    server = ServeServer(0, "")
    add_services(_Servicer(), server)
    ours = {name for name in RPC_ACCESS if name.startswith(("/crl.", "/inference."))}
    assert set(server.handlers) == ours == {name for name, _ in METHODS.values()}
    assert len(METHODS) == len(ours), "Serve finds a method by its last name alone"


class _Servicer:
    def __getattr__(self, name):
        return lambda request, context: None


@pytest.mark.parametrize(
    ("code", "details", "expected"),
    [
        (grpc.StatusCode.INTERNAL, DEAD, grpc.StatusCode.UNAVAILABLE),
        (grpc.StatusCode.INTERNAL.value[0], DEAD, grpc.StatusCode.UNAVAILABLE),
        (
            grpc.StatusCode.INTERNAL, "The actor 2bb4a765dd is unavailable: lost",
            grpc.StatusCode.UNAVAILABLE,
        ),
        (grpc.StatusCode.INTERNAL, "the server failed", grpc.StatusCode.INTERNAL),
        (grpc.StatusCode.NOT_FOUND, DEAD, grpc.StatusCode.NOT_FOUND),
        (0, "", 0),
    ],
)  # fmt: skip
def test_only_the_death_of_a_replica_may_be_retried(code, details, expected):
    server = ServeServer(code, details)
    add_services(_Servicer(), server)

    async def call(name):
        handler, context = server.handlers[name], Context()
        if handler.response_streaming:
            replies = [each async for each in handler.stream_stream(None, context)]
        else:
            replies = [await handler.unary_unary(None, context)]
        assert replies == [b"reply"]
        return context.code()

    for name in ("/crl.v1.EmbeddingService/Embed", "/crl.v1.EmbeddingService/EmbedStream"):
        assert asyncio.run(call(name)) == expected
