"""The server: one event loop, our services, health and reflection, a graceful end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import start_http_server

from crl_sdk._embedder import Embedder
from crl_sdk.errors import ServiceError
from crl_sdk.pb.crl.v1 import basis_pb2, basis_pb2_grpc, embedding_pb2, embedding_pb2_grpc
from crl_sdk.pb.inference import kserve_pb2, kserve_pb2_grpc
from crl_sdk.serving._bases import BasisStore
from crl_sdk.serving._calls import CallInterceptor, access_log, failure_log
from crl_sdk.serving._kserve import InferenceService
from crl_sdk.serving._metrics import Metrics
from crl_sdk.serving._pipeline import Limits, Pipeline
from crl_sdk.serving._security import Tls, Token, TokenInterceptor
from crl_sdk.serving._service import BasisService, EmbeddingService, OpenModel
from crl_sdk.serving._tracing import Tracing

SERVICES = (
    embedding_pb2.DESCRIPTOR.services_by_name["EmbeddingService"].full_name,
    basis_pb2.DESCRIPTOR.services_by_name["BasisService"].full_name,
    kserve_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name,
)
HANG_SECONDS = 30.0
"""An engine run that takes longer counts as hanging: health says so until it ends."""

MAX_CONCURRENT_STREAMS = 1024
"""Calls of one connection at once; a client's further ones wait on its side, or are refused."""

KEEPALIVE_SECONDS = 60.0
"""Peers that are silent for so long are pinged: machines go away without a word."""

KEEPALIVE_TIMEOUT_SECONDS = 20.0
"""A peer that does not answer a ping in this time is gone, and its calls are cancelled."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """How the server listens.

    Attributes:
        address: `host:port`, port 0 for any free one, or `unix:PATH`.
        bases: directory of bases, which this server owns.
        limits: what it takes on.
        tls: files of its TLS; None for plain text.
        tokens: who may call; none for everybody.
        metrics_address: `host:port` of Prometheus' page over HTTP; None for none.
        max_message_bytes: of one message, in either direction.
        shared_memory: let KServe clients name shared memory objects of this machine.
        otlp: `http://host:port` of an OpenTelemetry collector; None for no traces.
        access_log: a log line per call; without it, only for those that fail by the server's fault.
        open_model: loads the language model of GenerateBasis; None to offer none.
        drain_seconds: how long calls that are under way may take after SIGTERM.
    """

    address: str = "127.0.0.1:50051"
    bases: Path = Path("bases")
    limits: Limits = field(default_factory=Limits)
    tls: Tls | None = None
    tokens: tuple[Token, ...] = ()
    metrics_address: str | None = None
    max_message_bytes: int = 64 * 2**20
    drain_seconds: float = 30.0
    shared_memory: bool = False
    access_log: bool = False
    otlp: str | None = None
    open_model: OpenModel | None = None


@dataclass(frozen=True, slots=True)
class Running:
    """A server that answers.

    Attributes:
        address: where it listens, with the port it got.
        pipeline: what it serves from.
        metrics: what it counts.
        metrics_address: `host:port` of Prometheus' page, with the port it got; empty for none.
    """

    address: str
    pipeline: Pipeline
    metrics: Metrics
    metrics_address: str


class _Health(health.aio.HealthServicer):
    """Health of the whole server and of each service, which is the same for all."""

    def __init__(self) -> None:
        super().__init__()
        self.serving = False

    async def turn(self, serving: bool) -> None:
        """Say of everything that it serves, or does not."""
        self.serving = serving
        states = health_pb2.HealthCheckResponse
        for name in ("", *SERVICES):
            await self.set(name, states.SERVING if serving else states.NOT_SERVING)

    async def drain(self) -> None:
        """Say for good that nothing serves any more."""
        self.serving = False
        await self.enter_graceful_shutdown()


@asynccontextmanager
async def running(embedder: Embedder, settings: ServerSettings) -> AsyncIterator[Running]:
    """Serve while the context is open; leaving it drains and stops.

    Args:
        embedder: the model; it is not closed.
        settings: how to listen.

    Raises:
        ServiceError: the address cannot be used.
        InvalidInputError: the files of its TLS cannot be read.
        BasisError: another server owns the directory of bases.
        EngineError: the engine fails on the warm-up.
    """
    bases = BasisStore(settings.bases, embedder.bundle.fingerprint)
    bases.open()
    pipeline = Pipeline(embedder, bases, settings.limits)
    metrics = Metrics(pipeline)
    tracing = Tracing(settings.otlp) if settings.otlp else None
    if tracing is not None:
        pipeline.on_result.append(tracing.served)
    size = settings.max_message_bytes
    server = grpc.aio.server(
        interceptors=[
            CallInterceptor(  # outermost: refused calls count too
                [metrics.ended, access_log if settings.access_log else failure_log]
            ),
            *([tracing.interceptor] if tracing else []),
            *([TokenInterceptor(settings.tokens)] if settings.tokens else []),
        ],
        options=[
            ("grpc.max_receive_message_length", size),
            ("grpc.max_send_message_length", size),
            ("grpc.so_reuseport", 0),  # a second server on the port is an error, not a twin
            ("grpc.max_concurrent_streams", MAX_CONCURRENT_STREAMS),
            ("grpc.keepalive_time_ms", round(KEEPALIVE_SECONDS * 1e3)),
            ("grpc.keepalive_timeout_ms", round(KEEPALIVE_TIMEOUT_SECONDS * 1e3)),
            ("grpc.http2.ping_timeout_ms", round(KEEPALIVE_TIMEOUT_SECONDS * 1e3)),
            ("grpc.keepalive_permit_without_calls", 1),
        ],
    )
    status = _Health()
    health_pb2_grpc.add_HealthServicer_to_server(status, server)
    embedding_pb2_grpc.add_EmbeddingServiceServicer_to_server(EmbeddingService(pipeline), server)
    basis_pb2_grpc.add_BasisServiceServicer_to_server(
        BasisService(pipeline, settings.open_model), server
    )
    inference = InferenceService(
        pipeline, ready=lambda: status.serving, shared_memory=settings.shared_memory
    )
    kserve_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(inference, server)
    names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    watcher: asyncio.Task[None] | None = None
    stop_metrics: Callable[[], None] = lambda: None  # noqa: E731
    try:
        address = _listen(server, settings)
        stop_metrics, metrics_address = _serve_metrics(metrics, settings.metrics_address)
        await status.turn(False)
        await server.start()
        pipeline.start()
        await pipeline.warm_up()
        await status.turn(True)
        watcher = asyncio.create_task(_watch(pipeline, status))
        yield Running(address, pipeline, metrics, metrics_address)
    finally:
        stop_metrics()
        if watcher is not None:
            watcher.cancel()
        await status.drain()  # health first: balancers look elsewhere
        await server.stop(settings.drain_seconds)
        await pipeline.stop()
        inference.close()
        bases.close()
        if tracing is not None:
            await asyncio.to_thread(tracing.close)


async def serve(embedder: Embedder, settings: ServerSettings) -> None:
    """Serve until SIGTERM or SIGINT, then let what is under way finish."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for kind in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(kind, stop.set)
    async with running(embedder, settings) as server:
        _log.info(
            "serving %s (%s) on %s, bases: %s; metrics: %s",
            embedder.bundle.manifest.name,
            embedder.engine,
            server.address,
            ", ".join(sorted(server.pipeline.bases.snapshot)) or "none",
            server.metrics_address or "none",
        )
        await stop.wait()
        _log.info("draining: calls under way have %.0f s", settings.drain_seconds)
    _log.info("stopped")


def _listen(server: grpc.aio.Server, settings: ServerSettings) -> str:
    address = settings.address
    try:
        if settings.tls is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, settings.tls.credentials())
    except RuntimeError as error:
        raise ServiceError(f"{address}: cannot listen there ({error}); is it taken?") from error
    return address if address.startswith("unix:") else f"{address.rpartition(':')[0]}:{port}"


def _serve_metrics(metrics: Metrics, address: str | None) -> tuple[Callable[[], None], str]:
    """Serve the page over HTTP in a thread; give what stops it, and where it is."""
    if address is None:
        return (lambda: None), ""
    host, _, port = address.rpartition(":")
    try:
        http, thread = start_http_server(int(port), host or "127.0.0.1", metrics.registry)
    except (OSError, ValueError) as error:
        raise ServiceError(f"{address}: cannot serve metrics there ({error})") from error

    def stop() -> None:
        http.shutdown()
        http.server_close()
        thread.join()

    return stop, f"{host or '127.0.0.1'}:{http.server_port}"


async def _watch(pipeline: Pipeline, status: _Health) -> None:
    """Keep health true: it turns when the engine fails or hangs, and back when it runs again."""
    healthy = True
    with contextlib.suppress(asyncio.CancelledError):
        while True:
            await asyncio.sleep(0.2)
            batcher = pipeline.batcher
            now = batcher.failed is None and batcher.running_seconds < HANG_SECONDS
            if now != healthy:
                healthy = now
                _log.log(
                    logging.INFO if now else logging.ERROR,
                    "the engine %s", "is back" if now else "fails or hangs: not serving",
                )  # fmt: skip
                await status.turn(now)
