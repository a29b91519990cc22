"""Puts load on services from a separate process, over gRPC or HTTP."""

from __future__ import annotations

import asyncio
import base64
import multiprocessing
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from crl_benchmarks.load import Reply, Run, Send, closed_loop, open_loop
from crl_benchmarks.targets import failed
from crl_sdk.pb.crl.v1 import embedding_pb2, embedding_pb2_grpc
from crl_sdk.pb.inference import kserve_pb2, kserve_pb2_grpc
from crl_sdk.rpc import decode_tensor

Call = Callable[[Sequence[bytes]], Awaitable[NDArray[np.float32]]]
"""Sends JPEGs in one call and returns their embeddings, shape (n, d)."""

_LIMITS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Address and protocol of a service.

    Attributes:
        api: `crl`, `kserve`, `infinity` or `clip-server`.
        address: Address as `host:port`.
        timeout: Time limit of a call in seconds.
    """

    api: str
    address: str
    timeout: float = 20.0


class _Refused(Exception):
    """The service answered with an HTTP status other than 200."""


async def connect(endpoint: Endpoint, stack: AsyncExitStack) -> Call:
    """Open a connection, which `stack` closes, and return the function that sends a call."""
    if endpoint.api in ("crl", "kserve"):
        channel = await stack.enter_async_context(
            grpc.aio.insecure_channel(endpoint.address, options=_LIMITS)
        )
        return (_crl if endpoint.api == "crl" else _kserve)(channel, endpoint.timeout)
    import httpx2

    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    client = await stack.enter_async_context(
        httpx2.AsyncClient(
            base_url=f"http://{endpoint.address}", timeout=endpoint.timeout, limits=limits
        )
    )
    return (_infinity if endpoint.api == "infinity" else _clip_server)(client)


def _crl(channel: grpc.aio.Channel, timeout: float) -> Call:
    stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)

    async def call(images: Sequence[bytes]) -> NDArray[np.float32]:
        sent = [embedding_pb2.Image(encoded=data) for data in images]
        reply = await stub.Embed(embedding_pb2.EmbedRequest(images=sent), timeout=timeout)
        return np.asarray(decode_tensor(reply.universal), np.float32)

    return call


def _kserve(channel: grpc.aio.Channel, timeout: float) -> Call:
    stub = kserve_pb2_grpc.GRPCInferenceServiceStub(channel)

    async def call(images: Sequence[bytes]) -> NDArray[np.float32]:
        shape = [len(images), 1]
        tensor = kserve_pb2.ModelInferRequest.InferInputTensor(
            name="IMAGE", datatype="BYTES", shape=shape
        )
        raw = b"".join(struct.pack("<I", len(image)) + image for image in images)
        request = kserve_pb2.ModelInferRequest(
            model_name="clip", inputs=[tensor], raw_input_contents=[raw]
        )
        reply = await stub.ModelInfer(request, timeout=timeout)
        return np.frombuffer(reply.raw_output_contents[0], np.float32).reshape(len(images), -1)

    return call


def _infinity(client: object) -> Call:
    async def call(images: Sequence[bytes]) -> NDArray[np.float32]:
        urls = ["data:image/jpeg;base64," + base64.b64encode(each).decode() for each in images]
        body = {"model": "clip", "modality": "image", "encoding_format": "base64", "input": urls}
        data = (await _post(client, "/embeddings", body))["data"]
        rows = [np.frombuffer(base64.b64decode(each["embedding"]), np.float32) for each in data]
        return np.stack(rows)

    return call


def _clip_server(client: object) -> Call:
    async def call(images: Sequence[bytes]) -> NDArray[np.float32]:
        documents = [{"blob": base64.b64encode(each).decode()} for each in images]
        body = {"data": documents, "execEndpoint": "/", "parameters": {"drop_image_content": True}}
        data = (await _post(client, "/post", body))["data"]
        return np.array([each["embedding"] for each in data], np.float32)

    return call


async def _post(client: object, path: str, body: Mapping[str, object]) -> dict[str, Any]:
    answer = await client.post(path, json=body)  # type: ignore[attr-defined]
    if answer.status_code != 200:
        raise _Refused(f"HTTP {answer.status_code}: {answer.text[:200]}")
    answered: dict[str, Any] = answer.json()
    return answered


def embed(endpoint: Endpoint, images: Sequence[bytes]) -> NDArray[np.float32]:
    """Embed JPEGs one after the other, each in its own call.

    Raises:
        Exception: If the service does not answer; the type depends on the transport.
    """

    async def all_of_them() -> NDArray[np.float32]:
        async with AsyncExitStack() as stack:
            call = await connect(endpoint, stack)
            return np.concatenate([await call([image]) for image in images])

    return asyncio.run(all_of_them())


@dataclass(frozen=True, slots=True)
class Job:
    """A run of the generator.

    Attributes:
        endpoint: Service to call.
        images: JPEG files; each call sends the next one.
        mode: `closed` or `open`.
        load: Number of callers (closed) or calls per second (open).
        warm_up: Seconds before anything counts.
        seconds: Measured seconds.
        seed: Seed of the arrival times, and index of the first image. All services get the same
            seed, so that the draw favours none.
    """

    endpoint: Endpoint
    images: tuple[Path, ...]
    mode: str
    load: float
    warm_up: float
    seconds: float
    seed: int


class Generator:
    """A process that puts load on services. Use as a context manager."""

    def __init__(self) -> None:
        """Prepare the process; it starts at the first run."""
        context = multiprocessing.get_context("spawn")  # gRPC does not survive a fork
        self._pool = ProcessPoolExecutor(1, mp_context=context)

    def __enter__(self) -> Generator:
        """Return the generator itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the process."""
        self._pool.shutdown(cancel_futures=True)

    def measure(self, job: Job) -> Run:
        """Put one load on a service and return the measurements."""
        return self._pool.submit(_generate, job).result()


def _generate(job: Job) -> Run:
    images = [path.read_bytes() for path in job.images]

    async def generate() -> Run:
        async with AsyncExitStack() as stack:
            send = _sending(await connect(job.endpoint, stack), images, job.seed)
            if job.mode == "closed":
                return await closed_loop(
                    send, callers=int(job.load), warm_up=job.warm_up, seconds=job.seconds
                )
            return await open_loop(
                send, rate=job.load, warm_up=job.warm_up, seconds=job.seconds, seed=job.seed
            )

    return asyncio.run(generate())


def _sending(call: Call, images: Sequence[bytes], seed: int) -> Send:
    async def send(number: int) -> Reply:
        try:
            await call([images[(seed + number) % len(images)]])
        except grpc.aio.AioRpcError as error:
            return failed(error)
        except Exception as error:  # the HTTP client raises many types
            return Reply("error", type(error).__name__)
        return Reply("ok")

    return send


def wait_until_served(
    endpoint: Endpoint, image: bytes, ended: Callable[[], str], seconds: float
) -> None:
    """Ask for an embedding repeatedly until the service returns one.

    Args:
        endpoint: Service to ask.
        image: JPEG to embed.
        ended: Function that returns why the process of the service ended, or an empty string while
            it runs.
        seconds: Time limit.

    Raises:
        TimeoutError: If there is no embedding within the time limit.
        ChildProcessError: If the process of the service ended.
    """
    gives_up, why = time.monotonic() + seconds, "no connection"
    while time.monotonic() < gives_up:
        if words := ended():
            raise ChildProcessError(words)
        try:
            host, _, port = endpoint.address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=1.0).close()
            embed(endpoint, [image])
        except Exception as error:  # not ready yet; every peer fails in its own way
            why = f"{type(error).__name__}: {error}"[:300]
            time.sleep(0.02)
        else:
            return
    raise TimeoutError(f"no embedding in {seconds:.0f} s ({why})")
