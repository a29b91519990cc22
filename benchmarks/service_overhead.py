"""Cost of the service compared with the work inside it, measured in one run on one machine.

`python -m crl_benchmarks.service_overhead` measures two things, alternating between the variants:

- Latency: `Embed` of one new JPEG at concurrency 1, against decoding and running the same image in
  process. The difference is the overhead of the service: gRPC, digest, queue, threads, reply. The
  time of a bare gRPC call whose reply has as many bytes is reported as well.
- Throughput: `Embed` of a cached JPEG from several concurrent callers, against a bare gRPC server
  of the same library whose replies have as many bytes.

Rows are compared with the embedder's in the same run. The last line of output is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from PIL import Image

from crl_export.demo.scenes import encode_scene, sample_scene
from crl_sdk import Client, Embedder, __version__, demo_bundle
from crl_sdk.cli._local_server import local_server
from crl_sdk.model._preprocess import load_pixels
from crl_sdk.pb.crl.v1 import embedding_pb2, embedding_pb2_grpc
from crl_sdk.rpc import decode_tensor

CRITERION, TEXTS = "color", ["red", "green", "blue", "yellow", "black", "white"]
CALLERS = 8

_ECHO = """
import asyncio, sys
import grpc

async def main():
    reply = bytes(int(sys.argv[1]))

    async def echo(request, context):
        return reply

    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(echo)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("bare.Echo", {"Echo": handler}),)
    )
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await server.wait_for_termination()

asyncio.run(main())
"""


@contextmanager
def _echo_server(reply_bytes: int) -> Iterator[str]:
    """Start a process that answers every call with `reply_bytes` bytes; yield its address."""
    command = [sys.executable, "-c", _ECHO, str(reply_bytes)]
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield f"127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.terminate()


def new_image(number: int, side: int) -> bytes:
    """Return a JPEG of a scene that no cache has seen, `side` × `side` pixels."""
    image = Image.open(io.BytesIO(encode_scene(sample_scene(10_000_000 + number))))
    buffer = io.BytesIO()
    image.resize((side, side)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def latency(address: str, embedder: Embedder, runs: int, side: int) -> dict[str, float]:
    """Time single calls with new images, the same work in process, and bare calls, alternating."""
    spec = embedder.bundle.preprocess
    remote, local, bare = [], [], []
    with (
        _echo_server(745) as bare_address,
        grpc.insecure_channel(bare_address) as bare_channel,
        grpc.insecure_channel(address) as channel,
    ):
        echo: grpc.UnaryUnaryMultiCallable[bytes, bytes]
        echo = bare_channel.unary_unary("/bare.Echo/Echo")
        stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)
        for i in range(runs + 20):
            data = new_image(i, side)
            image = embedding_pb2.Image(encoded=data)
            request = embedding_pb2.EmbedRequest(images=[image], criteria=[CRITERION])
            started = time.perf_counter()
            reply = stub.Embed(request)
            middle = time.perf_counter()
            rows = embedder.embed_pixels(load_pixels(data, spec)[None])
            ended = time.perf_counter()
            echo(request.SerializeToString())
            echoed = time.perf_counter()
            assert np.abs(decode_tensor(reply.universal) - rows).max() < 1e-5, "wrong rows"
            if i >= 20:
                remote.append(middle - started)
                local.append(ended - middle)
                bare.append(echoed - ended)
    extra = np.array(remote) - np.array(local)
    return {
        "service_p50_ms": _ms(remote, 50), "service_p99_ms": _ms(remote, 99),
        "pieces_p50_ms": _ms(local, 50), "pieces_p99_ms": _ms(local, 99),
        "overhead_p50_ms": _ms(extra, 50), "bare_grpc_p50_ms": _ms(bare, 50),
    }  # fmt: skip


async def _rate(address: str, method: str, request: bytes, seconds: float) -> float:
    """Call repeatedly from `CALLERS` callers; return calls per second."""
    async with grpc.aio.insecure_channel(address) as channel:
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(method)
        await call(request)
        ends = time.perf_counter() + seconds
        started, done = time.perf_counter(), 0

        async def caller() -> None:
            nonlocal done
            while time.perf_counter() < ends:
                await call(request)
                done += 1

        await asyncio.gather(*(caller() for _ in range(CALLERS)))
        return done / (time.perf_counter() - started)


def throughput(address: str, rounds: int, seconds: float, side: int) -> dict[str, float]:
    """Compare calls per second of a cached image with those of a bare server, alternating."""
    image = embedding_pb2.Image(encoded=new_image(-1, side))
    request = embedding_pb2.EmbedRequest(images=[image], criteria=[CRITERION])
    with grpc.insecure_channel(address) as channel:
        stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)
        stub.Embed(request)
        reply = stub.Embed(request)
    assert reply.images[0].cached, "expected a cache hit"
    data = request.SerializeToString()
    with _echo_server(reply.ByteSize()) as bare_address:
        pairs = []
        for _ in range(rounds):
            bare = asyncio.run(_rate(bare_address, "/bare.Echo/Echo", data, seconds))
            hits = asyncio.run(_rate(address, "/crl.v1.EmbeddingService/Embed", data, seconds))
            pairs.append((bare, hits))
    bare_rates, hit_rates = np.array(pairs).T
    return {
        "request_bytes": len(data),
        "reply_bytes": reply.ByteSize(),
        "bare_per_second": round(float(np.median(bare_rates))),
        "cached_per_second": round(float(np.median(hit_rates))),
        "ratio": round(float(np.median(hit_rates / bare_rates)), 3),
    }


def measure(runs: int, rounds: int, seconds: float, side: int) -> dict[str, Any]:
    """Measure both with the demo model and a server in a separate process."""
    with (
        tempfile.TemporaryDirectory() as folder,
        Embedder.open(demo_bundle()) as embedder,
        local_server(demo_bundle(), Path(folder) / "serve.log") as server,
    ):
        with Client(server.address) as client:
            client.create_basis(CRITERION, TEXTS)
        return {
            "image": f"JPEG {side}x{side}",
            "latency": latency(server.address, embedder, runs, side),
            "throughput": throughput(server.address, rounds, seconds, side),
        }


def _ms(values: Any, percentile: float) -> float:
    return round(float(np.percentile(values, percentile)) * 1e3, 3)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--side", type=int, default=224)
    arguments = parser.parse_args()
    result = measure(arguments.runs, arguments.rounds, arguments.seconds, arguments.side)
    for part in ("latency", "throughput"):
        for name, value in result[part].items():
            print(f"{part:11} {name:18} {value}")
    versions = {"crl_sdk": __version__, "grpc": grpc.__version__, "machine": platform.machine()}
    print(json.dumps(result | versions))


if __name__ == "__main__":
    main()
