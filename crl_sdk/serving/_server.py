"""The gRPC server: one event loop, all services, health, reflection and a graceful stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from crl_sdk._embedder import Embedder
from crl_sdk.errors import ServiceError
from crl_sdk.pb.crl.v1 import basis_pb2, basis_pb2_grpc, embedding_pb2, embedding_pb2_grpc
from crl_sdk.pb.inference import kserve_pb2, kserve_pb2_grpc
from crl_sdk.rpc._address import check_listening_address, is_local, split_address
from crl_sdk.serving._admission import ServerLimits
from crl_sdk.serving._bases import BasisStore, DirectoryBasisStore
from crl_sdk.serving._basis_service import BasisService, OpenLanguageModel
from crl_sdk.serving._call_interceptor import CallInterceptor, access_log, failure_log
from crl_sdk.serving._embedding_service import EmbeddingService
from crl_sdk.serving._kserve import InferenceService
from crl_sdk.serving._metrics import Metrics, serve_metrics
from crl_sdk.serving._models import Models
from crl_sdk.serving._pipeline import Pipeline
from crl_sdk.serving._security import ServerTls, Token, TokenInterceptor
from crl_sdk.serving._shared_bases import POLL_SECONDS, SharedBasisStore
from crl_sdk.serving._tracing import Tracing
from crl_sdk.serving._worker import Worker, answer_supervisor

BASIS_SERVICE = basis_pb2.DESCRIPTOR.services_by_name["BasisService"].full_name
SERVICES = (
    embedding_pb2.DESCRIPTOR.services_by_name["EmbeddingService"].full_name,
    BASIS_SERVICE,
    kserve_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name,
)
HANG_SECONDS = 30.0
"""An engine run that takes longer counts as hanging. Health is NOT_SERVING until it ends."""

MAX_CONCURRENT_STREAMS = 1024
"""Concurrent calls of one connection. Further calls wait in the client or are refused."""

KEEPALIVE_SECONDS = 60.0
"""Peers that are silent for this long are pinged, to notice machines that disappeared."""

KEEPALIVE_TIMEOUT_SECONDS = 20.0
"""A peer that does not answer a ping within this time is disconnected and its calls cancelled."""

PING_SECONDS = 5.0
"""Clients may ping as often as this. gRPC's own limit of five minutes ends the connections of
clients that ping each ten seconds, as those behind load balancers do."""

WORKER_POLL_SECONDS = 0.2
"""Seconds between two looks for bases that another worker of this server has changed."""

_HEALTH_CHECK_SECONDS = 0.2

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """How the server listens and what it offers.

    Attributes:
        address: Address to listen on: `host:port`, with port 0 for any free port, or `unix:PATH`.
        bases: Directory of bases. This server must be its only owner.
        shared_bases: Directory or fsspec URL of bases that many servers share, instead of `bases`.
        bases_poll: Seconds between two looks for changes of `shared_bases`.
        read_only_bases: Whether calls that change bases are refused.
        limits: Bounds on the work that the server accepts.
        tls: Files for TLS, or None for plain text.
        tokens: Tokens that may call the server. Without tokens everybody may.
        metrics_address: `host:port` of the Prometheus page over HTTP, or None for no page.
        max_message_bytes: Largest message in either direction, in bytes.
        shared_memory: Whether KServe clients may name shared memory objects of this machine.
        otlp: `http://host:port` of an OpenTelemetry collector, or None for no traces.
        access_log: Whether every call is logged. Otherwise only failures of the server itself are.
        open_llm: Function that loads the language model for GenerateBasis, or None to offer none.
        drain_seconds: Seconds that running calls may take after SIGTERM.
        worker: This process among several that listen at the same address, or None if it is alone.
    """

    address: str = "127.0.0.1:50051"
    bases: Path = Path("bases")
    shared_bases: str | None = None
    bases_poll: float = POLL_SECONDS
    read_only_bases: bool = False
    limits: ServerLimits = field(default_factory=ServerLimits)
    tls: ServerTls | None = None
    tokens: tuple[Token, ...] = ()
    metrics_address: str | None = None
    max_message_bytes: int = 64 * 2**20
    drain_seconds: float = 30.0
    shared_memory: bool = False
    access_log: bool = False
    otlp: str | None = None
    open_llm: OpenLanguageModel | None = None
    worker: Worker | None = None

    def __post_init__(self) -> None:
        """Check the addresses before a model is loaded.

        Raises:
            InvalidInputError: If one has no port.
        """
        check_listening_address(self.address)
        if self.metrics_address is not None:
            check_listening_address(self.metrics_address, sockets=False)


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server that answers calls.

    Attributes:
        address: Address it listens on, with the actual port.
        models: Models that serve the calls.
        metrics: Metrics of the server.
        metrics_address: `host:port` of the Prometheus page with the actual port, or None.
        is_serving: Function that returns whether the server is healthy.
    """

    address: str
    models: Models
    metrics: Metrics
    metrics_address: str | None
    is_serving: Callable[[], bool]

    @property
    def pipeline(self) -> Pipeline:
        """Pipeline of the default model."""
        return self.models.find("")


class _Health(health.aio.HealthServicer):
    """Health of the whole server and of each service.

    All have the same state, except that the service of bases does not serve while a shared store of
    bases is away. The server embeds with the last bases then.
    """

    def __init__(self) -> None:
        super().__init__()
        self.serving = False

    async def set_serving(self, serving: bool, bases: bool = True) -> None:
        """Set the state of all services.

        Args:
            serving: Whether the server embeds.
            bases: Whether the store of bases can be reached.
        """
        self.serving = serving
        states = health_pb2.HealthCheckResponse
        for name in ("", *SERVICES):
            good = serving and (bases or name != BASIS_SERVICE)
            await self.set(name, states.SERVING if good else states.NOT_SERVING)

    async def drain(self) -> None:
        """Set all services to NOT_SERVING permanently."""
        self.serving = False
        await self.enter_graceful_shutdown()


@asynccontextmanager
async def run_server(
    embedders: Embedder | Mapping[str, Embedder], settings: ServerSettings
) -> AsyncIterator[RunningServer]:
    """Serve while the context is open. Leaving it drains and stops the server.

    Args:
        embedders: Model to serve, or models by the names that requests give them, the default one
            first. They are not closed.
        settings: How to listen and what to offer.

    Raises:
        ServiceError: If the address cannot be used.
        InvalidInputError: If the TLS files cannot be read.
        BasisError: If another server owns the directory of bases.
        EngineError: If the engine fails during the warm-up.
    """
    async with AsyncExitStack() as cleanup:  # runs its callbacks in reverse order
        tracing = Tracing(settings.otlp) if settings.otlp else None
        if tracing is not None:
            cleanup.push_async_callback(asyncio.to_thread, tracing.close)
        models = _make_models(embedders, settings, cleanup)
        pipelines = list(models.pipelines.values())
        metrics = Metrics(models)
        if tracing is not None:
            for pipeline in pipelines:
                pipeline.on_result.append(tracing.on_result)
        server = _make_server(settings, metrics, tracing)
        status = _Health()
        inference = InferenceService(
            models, ready=lambda: status.serving, shared_memory=settings.shared_memory
        )
        register_services(
            server, status, EmbeddingService(models),
            BasisService(models, settings.open_llm), inference,
        )  # fmt: skip
        cleanup.callback(inference.close)
        for pipeline in pipelines:
            cleanup.push_async_callback(pipeline.stop)
        cleanup.push_async_callback(server.stop, settings.drain_seconds)
        cleanup.push_async_callback(status.drain)  # first, so that load balancers look elsewhere
        address = _listen(server, settings)
        is_first = settings.worker is None or settings.worker.number == 0
        if is_first and (warning := exposure(settings)) is not None:
            _log.warning("%s", warning)
        metrics_address = serve_metrics(metrics.registry, settings.metrics_address, cleanup)
        await status.set_serving(False)
        await server.start()
        for pipeline in pipelines:
            pipeline.start()
            await pipeline.warm_up()
        await status.set_serving(True)
        watcher = asyncio.create_task(_watch(pipelines, status))
        cleanup.callback(watcher.cancel)
        yield RunningServer(address, models, metrics, metrics_address, lambda: status.serving)


async def serve(
    embedders: Embedder | Mapping[str, Embedder],
    settings: ServerSettings,
    on_ready: Callable[[RunningServer], None] = lambda server: None,
) -> None:
    """Serve until SIGTERM or SIGINT, then let running calls finish.

    Args:
        embedders: Model to serve, or models by name, see `run_server`. They are not closed.
        settings: How to listen and what to offer.
        on_ready: Function called once, when the server answers calls.

    Raises:
        ServiceError: If the address cannot be used.
        InvalidInputError: If the TLS files cannot be read.
        BasisError: If another server owns the directory of bases.
        EngineError: If the engine fails during the warm-up.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signal_number, stop.set)
    async with run_server(embedders, settings) as server:
        for name, pipeline in server.models.pipelines.items():
            embedder = pipeline.embedder
            bundle = embedder.bundle.manifest.name
            _log.info(
                "serving %s (%s) on %s, bases: %s; metrics: %s",
                bundle if name == bundle else f"{name}: {bundle}",
                embedder.engine,
                server.address,
                ", ".join(sorted(pipeline.bases.snapshot)) or "none",
                server.metrics_address or "none",
            )
        on_ready(server)
        link = None
        if settings.worker is not None:
            link = asyncio.create_task(
                answer_supervisor(server.is_serving, server.metrics.registry, stop.set)
            )
        await stop.wait()
        if link is not None:
            link.cancel()
        _log.info("draining: running calls have %.0f s", settings.drain_seconds)
    _log.info("stopped")


def _make_models(
    embedders: Embedder | Mapping[str, Embedder], settings: ServerSettings, cleanup: AsyncExitStack
) -> Models:
    """Return the models with their bases, which are closed by `cleanup`."""
    if isinstance(embedders, Embedder):
        embedders = {embedders.bundle.manifest.name: embedders}
    stores: dict[str, BasisStore] = {}  # bundles of one model, such as two precisions, share one
    pipelines = {}
    for name, embedder in embedders.items():
        fingerprint = embedder.bundle.fingerprint
        if fingerprint not in stores:
            stores[fingerprint] = make_basis_store(fingerprint, settings)
            stores[fingerprint].open()
            cleanup.callback(stores[fingerprint].close)
        pipelines[name] = Pipeline(embedder, stores[fingerprint], settings.limits)
    return Models(pipelines)


def make_basis_store(fingerprint: str, settings: ServerSettings) -> BasisStore:
    """Return the store of a model's bases, not opened yet.

    Raises:
        InvalidInputError: If fsspec does not know the URL of shared bases.
        MissingDependencyError: If fsspec or its driver for the URL is not installed.
    """
    if settings.shared_bases is not None:
        return SharedBasisStore(
            settings.shared_bases, fingerprint, poll_seconds=settings.bases_poll,
            read_only=settings.read_only_bases,
        )  # fmt: skip
    return DirectoryBasisStore(
        settings.bases, fingerprint, read_only=settings.read_only_bases,
        worker_poll_seconds=None if settings.worker is None else WORKER_POLL_SECONDS,
    )  # fmt: skip


def register_services(
    server: grpc.aio.Server,
    status: health.aio.HealthServicer,
    embedding: embedding_pb2_grpc.EmbeddingServiceServicer,
    basis: basis_pb2_grpc.BasisServiceServicer,
    inference: kserve_pb2_grpc.GRPCInferenceServiceServicer,
) -> None:
    """Register all services of the server. `_rights.RPC_ACCESS` must list each of their RPCs."""
    health_pb2_grpc.add_HealthServicer_to_server(status, server)
    embedding_pb2_grpc.add_EmbeddingServiceServicer_to_server(embedding, server)
    basis_pb2_grpc.add_BasisServiceServicer_to_server(basis, server)
    kserve_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(inference, server)
    names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)


def exposure(settings: ServerSettings) -> str | None:
    """Return a warning if other machines can reach the server without protection, or None."""
    if is_local(settings.address):
        return None
    protected = bool(settings.tokens) or (
        settings.tls is not None and settings.tls.client_authority is not None
    )
    if settings.tls is None and protected:
        return (
            f"{settings.address} has no TLS: tokens and images travel in plain text. Add "
            "--tls-cert and --tls-key"
        )
    can = "embed, change the bases"
    if settings.shared_memory:
        can += ", read and write the shared memory of this user"
    if settings.tls is None:
        return (
            f"{settings.address} has neither TLS nor tokens: everyone who reaches it can {can} and "
            "read what others send. Add --tls-cert, --tls-key and --tokens"
        )
    if not protected:
        return (
            f"{settings.address} asks nobody for a token: everyone who reaches it can {can}. Add "
            "--tokens or --tls-client-ca"
        )
    return None


def _make_server(
    settings: ServerSettings, metrics: Metrics, tracing: Tracing | None
) -> grpc.aio.Server:
    size = settings.max_message_bytes
    return grpc.aio.server(
        interceptors=[
            CallInterceptor(  # outermost, so that refused calls are counted too
                [metrics.on_call_finished, access_log if settings.access_log else failure_log]
            ),
            *([tracing.interceptor] if tracing else []),
            *([TokenInterceptor(settings.tokens)] if settings.tokens else []),
        ],
        options=[
            ("grpc.max_receive_message_length", size),
            ("grpc.max_send_message_length", size),
            # A second server on the same port is an error. It must not share the calls, unless it
            # is another worker of this one.
            ("grpc.so_reuseport", int(settings.worker is not None)),
            ("grpc.max_concurrent_streams", MAX_CONCURRENT_STREAMS),
            ("grpc.keepalive_time_ms", round(KEEPALIVE_SECONDS * 1e3)),
            ("grpc.keepalive_timeout_ms", round(KEEPALIVE_TIMEOUT_SECONDS * 1e3)),
            ("grpc.http2.ping_timeout_ms", round(KEEPALIVE_TIMEOUT_SECONDS * 1e3)),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", round(PING_SECONDS * 1e3)),
        ],
    )


def _listen(server: grpc.aio.Server, settings: ServerSettings) -> str:
    """Bind the address and return it with the actual port."""
    address = settings.address
    path = _socket_path(address)
    if path is not None:
        _check_unused(path)
    credentials = None if settings.tls is None else settings.tls.credentials()
    try:
        if credentials is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise ServiceError(
            f"{address}: cannot listen there ({_why_not_bound(address)}); choose another address "
            "with --address"
        ) from error
    return address if path is not None else f"{address.rpartition(':')[0]}:{port}"


def _socket_path(address: str) -> Path | None:
    """Return the path of `unix:PATH`, or None for another address."""
    if not address.startswith("unix:"):
        return None
    return Path(address.removeprefix("unix:").removeprefix("//"))


def _why_not_bound(address: str) -> str:
    """Return why the system refuses an address. gRPC says only that it does."""
    path = _socket_path(address)
    try:
        if path is not None:
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(path))
            path.unlink()
        elif (parts := split_address(address)) is not None:
            host, port = parts
            for family, kind, protocol, _, name in socket.getaddrinfo(
                host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            ):
                with socket.socket(family, kind, protocol) as listener:
                    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    listener.bind(name)
    except OSError as error:
        return error.strerror or str(error)
    return "gRPC does not say why"


def _check_unused(path: Path) -> None:
    """Check that no server listens at a socket. A socket that a killed server left is no error."""
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
        except OSError:
            return
    raise ServiceError(
        f"{path}: cannot listen there, another server does; stop it, or choose another path"
    )


async def _watch(pipelines: Sequence[Pipeline], status: _Health) -> None:
    """Set health when an engine fails, hangs or recovers, and when the bases are away or back."""
    before = (True, True)
    with contextlib.suppress(asyncio.CancelledError):
        while True:
            await asyncio.sleep(_HEALTH_CHECK_SECONDS)
            healthy = all(
                each.batcher.failed is None and each.batcher.running_seconds < HANG_SECONDS
                for each in pipelines
            )
            watchers = [each.bases.watcher for each in pipelines]
            now = (healthy, all(each is None or each.problem is None for each in watchers))
            if now == before:
                continue
            if healthy and not before[0]:
                _log.info("the engine runs again: serving")
            if before[0] and not healthy:
                _log.error("the engine fails or hangs: not serving")
            before = now
            await status.set_serving(*now)
