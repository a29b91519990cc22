"""Calls to servers with crl's own API or with KServe v2, which Triton speaks."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from crl_benchmarks.load import Reply, Send
from crl_sdk.pb.crl.v1 import embedding_pb2, embedding_pb2_grpc
from crl_sdk.pb.inference import kserve_pb2, kserve_pb2_grpc

_FULL = (grpc.StatusCode.RESOURCE_EXHAUSTED,)


@dataclass(frozen=True, slots=True)
class Target:
    """A server and the calls to make.

    Attributes:
        address: Address as `host:port` or `unix:PATH`.
        kind: API of the server, `crl` or `kserve`.
        images: Encoded images; each call sends the next ones.
        batch: Number of images per call.
        criteria: Criteria of each call, for `crl`.
        model: Name of the model, for `kserve`.
        timeout: Time limit of a call in seconds.
        token: Bearer token, if the server requires one.
    """

    address: str
    images: Sequence[bytes]
    kind: str = "crl"
    batch: int = 1
    criteria: tuple[str, ...] = ()
    model: str = ""
    timeout: float = 10.0
    token: str | None = None


def connect(target: Target, channel: grpc.aio.Channel) -> Send:
    """Return the function that sends call number n."""
    return (_crl if target.kind == "crl" else _kserve)(target, channel)


def _crl(target: Target, channel: grpc.aio.Channel) -> Send:
    stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)

    async def send(number: int) -> Reply:
        request = embedding_pb2.EmbedRequest(
            images=[embedding_pb2.Image(encoded=data) for data in _images(target, number)],
            criteria=target.criteria,
        )
        try:
            reply = await stub.Embed(request, timeout=target.timeout, metadata=_metadata(target))
        except grpc.aio.AioRpcError as error:
            return failed(error)
        bad = next((each for each in reply.images if each.code), None)
        if bad is not None:
            return Reply("error", f"image: {bad.message}")
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
        )

    return send


def _kserve(target: Target, channel: grpc.aio.Channel) -> Send:
    stub = kserve_pb2_grpc.GRPCInferenceServiceStub(channel)

    async def send(number: int) -> Reply:
        images = _images(target, number)
        request = kserve_pb2.ModelInferRequest(
            model_name=target.model,
            inputs=[
                kserve_pb2.ModelInferRequest.InferInputTensor(
                    name="IMAGE", datatype="BYTES", shape=[len(images), 1]
                )
            ],
            raw_input_contents=[
                b"".join(struct.pack("<I", len(image)) + image for image in images)
            ],
        )
        try:
            await stub.ModelInfer(request, timeout=target.timeout, metadata=_metadata(target))
        except grpc.aio.AioRpcError as error:
            return failed(error)
        return Reply("ok")

    return send


def _images(target: Target, number: int) -> list[bytes]:
    first = number * target.batch
    return [target.images[(first + i) % len(target.images)] for i in range(target.batch)]


def _metadata(target: Target) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {target.token}"),) if target.token else ()


def failed(error: grpc.aio.AioRpcError) -> Reply:
    """Return the outcome of a call that ended with an error."""
    code = error.code()
    name = code.name if code is not None else "UNKNOWN"
    return Reply("rejected" if code in _FULL else "error", name)
