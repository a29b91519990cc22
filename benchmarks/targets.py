"""Calls to servers with crl's own API or with KServe v2, which Triton speaks."""

from __future__ import annotations

import secrets
import struct
import zlib
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc

from crl_benchmarks.bench_report import Subject
from crl_benchmarks.calls import Call
from crl_benchmarks.load import Reply
from crl_sdk.client._connection import open_channel, typed_error
from crl_sdk.client._options import ClientOptions, ClientSecurity
from crl_sdk.errors import DeadlineError, ImageError, InvalidInputError
from crl_sdk.pb.crl.v1 import embedding_pb2, embedding_pb2_grpc
from crl_sdk.pb.inference import kserve_pb2, kserve_pb2_grpc

_JPEG = b"\xff\xd8"
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_HEADER = len(_PNG) + 25
"""Bytes of a PNG up to the end of its header: signature, and a chunk with 13 bytes of data."""


class SendCall(Protocol):
    """Sends call number n and returns its outcome. It never raises."""

    def __call__(self, number: int, call: Call | None = None) -> Awaitable[Reply]:
        """Send a call.

        Args:
            number: Number of the call, which decides its images.
            call: What the call asks for; None for what the calls of its target ask for.
        """
        ...


_FULL = (grpc.StatusCode.RESOURCE_EXHAUSTED,)


@dataclass(frozen=True, slots=True)
class Target:
    """A server and the calls to make.

    Attributes:
        address: Address as `host:port` or `unix:PATH`.
        kind: API of the server, `crl` or `kserve`.
        images: Encoded images; each call sends the next ones.
        batch: Number of images per call; the largest one if they differ.
        criteria: Criteria of each call, for `crl`; all of them if they differ.
        model: Name of the model, for `kserve`.
        timeout: Time limit of a call in seconds.
        security: Token and TLS files.
        distinct: Whether all images that are sent differ, so that no cache can answer. They must be
            JPEGs or PNGs.
        mark: Bytes in all distinct images of this target, which differ from those of any other.
        connections: Number of connections. Calls take turns on them.
    """

    address: str
    images: Sequence[bytes]
    kind: str = "crl"
    batch: int = 1
    criteria: tuple[str, ...] = ()
    model: str = ""
    timeout: float = 10.0
    security: ClientSecurity = field(default_factory=ClientSecurity)
    distinct: bool = False
    mark: bytes = field(default_factory=lambda: secrets.token_bytes(8))
    connections: int = 1

    @property
    def call(self) -> Call:
        """What each call asks for, unless they differ."""
        return Call(self.batch, self.criteria)

    def __post_init__(self) -> None:
        """Check the fields against each other.

        Raises:
            InvalidInputError: If `model` and `kind` do not fit, or if the images shall differ and
                one is neither a JPEG nor a PNG.
        """
        if (self.kind == "kserve") != bool(self.model):
            raise InvalidInputError(
                "--kserve-model: required with --api kserve, and not allowed without it"
            )
        if self.kind == "kserve" and self.criteria:
            raise InvalidInputError(
                "--api kserve: expected calls without criteria; name a model such as crl.color "
                "with --kserve-model instead"
            )
        others = sum(not data.startswith((_JPEG, _PNG)) for data in self.images)
        if self.distinct and others:
            raise InvalidInputError(
                "--distinct writes a number into each image, which works with JPEGs and PNGs; "
                f"{others} of {len(self.images)} images are neither: leave them out"
            )


def open_target(target: Target) -> grpc.aio.Channel:
    """Return a channel to the server."""
    options = ClientOptions(security=target.security, max_message_bytes=2**31 - 1)
    return open_channel(target.address, options)


def connect(target: Target, channel: grpc.aio.Channel) -> SendCall:
    """Return the function that sends call number n over a channel."""
    return (_crl if target.kind == "crl" else _kserve)(target, channel)


@asynccontextmanager
async def open_calls(target: Target) -> AsyncIterator[SendCall]:
    """Open the connections of a target, and yield the function that sends call number n."""
    async with AsyncExitStack() as opened:
        sends = [
            connect(target, await opened.enter_async_context(open_target(target)))
            for _ in range(target.connections)
        ]

        def send(number: int, call: Call | None = None) -> Awaitable[Reply]:
            return sends[number % len(sends)](number, call)

        yield send


async def probe(target: Target) -> Subject:
    """Make one call, without waiting for the server to come up, and ask what it runs.

    Raises:
        CrlError: If the call fails, with the server's message.
    """
    async with open_target(target) as channel:
        try:
            if target.kind == "kserve":
                await _infer(target, channel, _infer_request(target, 0, target.call))
                return await _ask_kserve(target, channel)
            reply = await _embed(target, channel, _embed_request(target, 0, target.call))
            for number, image in enumerate(reply.images, start=1):
                if image.code:
                    raise ImageError(image.message, source=f"image {number} of the first call")
            stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)
            model = await stub.GetModel(embedding_pb2.GetModelRequest(), **_options(target))
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise DeadlineError(
                    f"{target.address}: no answer to the first call within {target.timeout:g} s: "
                    "use a longer --timeout, or check that a server runs there"
                ) from error
            raise typed_error(error) from error
    return Subject(
        model=model.name,
        fingerprint=model.fingerprint,
        engine=model.engine,
        server=f"crl {model.server_version}",
    )


async def _ask_kserve(target: Target, channel: grpc.aio.Channel) -> Subject:
    """Return what a server of KServe says about itself. Some say nothing."""
    stub = kserve_pb2_grpc.GRPCInferenceServiceStub(channel)
    request = kserve_pb2.ModelMetadataRequest(name=target.model)
    try:
        model = await stub.ModelMetadata(request, **_options(target))
        server = await stub.ServerMetadata(kserve_pb2.ServerMetadataRequest(), **_options(target))
    except grpc.aio.AioRpcError:
        return Subject(model=target.model)
    named = f"{server.name} {server.version}".strip()
    return Subject(model=target.model, engine=model.platform or None, server=named or None)


def _embed_request(target: Target, number: int, call: Call) -> embedding_pb2.EmbedRequest:
    images = _images(target, number, call.images)
    return embedding_pb2.EmbedRequest(
        images=[embedding_pb2.Image(encoded=data) for data in images], criteria=call.criteria
    )


async def _embed(
    target: Target, channel: grpc.aio.Channel, request: embedding_pb2.EmbedRequest
) -> embedding_pb2.EmbedResponse:
    stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)
    return await stub.Embed(request, **_options(target))


def _crl(target: Target, channel: grpc.aio.Channel) -> SendCall:
    async def ask(request: embedding_pb2.EmbedRequest) -> Reply:
        try:
            reply = await _embed(target, channel, request)
        except grpc.aio.AioRpcError as error:
            return failed(error)
        bad = next((each for each in reply.images if each.code), None)
        if bad is not None:
            return Reply("error", "BAD_IMAGE", bad.message)
        timings = reply.timings
        return Reply(
            "ok",
            stages={
                "preprocess": timings.preprocess_us / 1e6,
                "queue": timings.queue_us / 1e6,
                "infer": timings.infer_us / 1e6,
                "project": timings.project_us / 1e6,
                "total": timings.total_us / 1e6,
            },
            cached=sum(each.cached for each in reply.images) / len(reply.images),
        )

    async def send(number: int, call: Call | None = None) -> Reply:
        call = call or target.call
        request = _embed_request(target, number, call)
        reply = await ask(request)
        reply.images, reply.criteria = call.images, call.criteria
        reply.sent_bytes = request.ByteSize()
        return reply

    return send


def _infer_request(target: Target, number: int, call: Call) -> kserve_pb2.ModelInferRequest:
    images = _images(target, number, call.images)
    return kserve_pb2.ModelInferRequest(
        model_name=target.model,
        inputs=[
            kserve_pb2.ModelInferRequest.InferInputTensor(
                name="IMAGE", datatype="BYTES", shape=[len(images), 1]
            )
        ],
        raw_input_contents=[b"".join(struct.pack("<I", len(image)) + image for image in images)],
    )


async def _infer(
    target: Target, channel: grpc.aio.Channel, request: kserve_pb2.ModelInferRequest
) -> None:
    stub = kserve_pb2_grpc.GRPCInferenceServiceStub(channel)
    await stub.ModelInfer(request, **_options(target))


def _kserve(target: Target, channel: grpc.aio.Channel) -> SendCall:
    async def send(number: int, call: Call | None = None) -> Reply:
        call = call or target.call
        request = _infer_request(target, number, call)
        try:
            await _infer(target, channel, request)
            reply = Reply("ok")
        except grpc.aio.AioRpcError as error:
            reply = failed(error)
        reply.images, reply.sent_bytes = call.images, request.ByteSize()
        return reply

    return send


def _images(target: Target, number: int, count: int) -> list[bytes]:
    first = number * target.batch  # no call has more images
    chosen = [(first + i, target.images[(first + i) % len(target.images)]) for i in range(count)]
    return [marked(data, target.mark, n) if target.distinct else data for n, data in chosen]


def marked(image: bytes, mark: bytes, number: int) -> bytes:
    """Return a JPEG or PNG with the same pixels and a comment that holds a mark and a number."""
    text = mark + number.to_bytes(8, "big")
    if image.startswith(_JPEG):
        length = (2 + len(text)).to_bytes(2, "big")
        return b"".join((_JPEG, b"\xff\xfe", length, text, image[len(_JPEG) :]))
    chunk = b"tEXtComment\0" + text.hex().encode()
    length, checksum = (len(chunk) - 4).to_bytes(4, "big"), zlib.crc32(chunk).to_bytes(4, "big")
    return b"".join((image[:_PNG_HEADER], length, chunk, checksum, image[_PNG_HEADER:]))


def _options(target: Target) -> dict[str, Any]:
    """Return the time limit and the metadata of each call."""
    token = target.security.token
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    return {"timeout": target.timeout, "metadata": metadata}


def failed(error: grpc.aio.AioRpcError) -> Reply:
    """Return the outcome of a call that ended with an error."""
    code = error.code()
    name = code.name if code is not None else "UNKNOWN"
    return Reply("rejected" if code in _FULL else "error", name, error.details() or "")
