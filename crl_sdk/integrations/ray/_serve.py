"""The gRPC service as a Ray Serve deployment: many replicas, one address, bases for all."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from crl_sdk._version import __version__
from crl_sdk.errors import EngineError, InvalidInputError, MissingDependencyError
from crl_sdk.integrations.ray._cluster import import_ray, require_version, use_assigned_processors

if TYPE_CHECKING:
    from crl_sdk.model._preprocess import Decode, ImageLimits
    from crl_sdk.serving import ServerSettings

DEFAULT_PORT = 9000
"""Port of Serve's gRPC proxy unless another one is named."""

DEFAULT_TIMEOUT = 60.0
"""Seconds that the proxy gives a call."""


def grpc_options(port: int = DEFAULT_PORT, timeout: float = DEFAULT_TIMEOUT) -> Any:
    """Return the options that make Serve's gRPC proxies accept our calls, for `serve.start`.

    The proxies listen on all addresses of their nodes, in plain text.

    Args:
        port: Port on each node that has a proxy.
        timeout: Seconds that a call may take.

    Raises:
        MissingDependencyError: If Ray Serve is not installed.
    """
    from crl_sdk.integrations.ray import _proxy

    serve_config = _import_serve().config
    return serve_config.gRPCOptions(
        port=port,
        grpc_servicer_functions=[f"{_proxy.__name__}.{_proxy.add_services.__name__}"],
        request_timeout_s=timeout,
    )


def make_application(
    bundle: str | os.PathLike[str],
    settings: ServerSettings,
    *,
    engine: str = "auto",
    threads: int | None = None,
    decode: Decode = "exact",
    limits: ImageLimits | None = None,
    timeout: float | None = DEFAULT_TIMEOUT,
    **deployment: Any,
) -> Any:
    """Return the gRPC service as an application for `serve.run`.

    Args:
        bundle: Directory that `crl export` wrote, at the same path on each node; or
            `crl_sdk.demo_bundle()`.
        settings: What the replicas offer. They share `shared_bases`. Address, TLS, metrics and
            traces belong to Serve and are not used.
        engine: Engine, see `crl_sdk.Embedder.open`.
        threads: Number of threads of an engine run; None for the processors of a replica.
        decode: How JPEGs are decoded, see `crl_sdk.model.load_pixels`.
        limits: Limits above which images are refused; None for the defaults.
        timeout: That of `grpc_options`. A call that cannot be done in time is refused.
        **deployment: Options of `serve.deployment`, such as `num_replicas`, `autoscaling_config`
            and `ray_actor_options={"num_cpus": 4}`.

    Raises:
        InvalidInputError: If the replicas would not share their bases, or `settings` asks for what
            Serve does not have.
        BundleError: If there is no such bundle here.
        MissingDependencyError: If Ray Serve is not installed.
    """
    from crl_sdk.model._bundle import ModelBundle

    serve = _import_serve()
    if settings.shared_bases is None:
        raise InvalidInputError(
            "expected ServerSettings(shared_bases=URL), a place that all replicas reach: write "
            "bases there with `crl basis publish --to URL`"
        )
    if settings.tls is not None or settings.shared_memory:
        raise InvalidInputError(
            "Ray Serve's gRPC proxy has neither TLS nor the memory of its clients: leave tls and "
            "shared_memory out, and put a proxy with TLS before it"
        )
    options: dict[str, Any] = {"engine": engine, "threads": threads, "decode": decode}
    if limits is not None:
        options["limits"] = limits
    chosen = {
        "name": "crl",
        # the queue of a replica refuses what is too much, and says when to try again
        "max_ongoing_requests": 64,
        "health_check_period_s": 5,
        "graceful_shutdown_timeout_s": settings.drain_seconds,
        **deployment,
    }
    made = serve.deployment(**chosen)(_with_methods(_Replica))
    return made.bind(
        os.fspath(bundle), ModelBundle.open(bundle).fingerprint, settings,
        options=options, timeout=timeout, version=__version__,
    )  # fmt: skip


class _Replica:
    """One server without a connection: the model, the bases and the handlers of all calls."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        bundle: str,
        fingerprint: str,
        settings: ServerSettings,
        *,
        options: dict[str, Any],
        timeout: float | None,
        version: str,
    ) -> None:
        """Open the model and the bases, and run the engine once."""
        from crl_sdk._embedder import Embedder
        from crl_sdk.integrations.ray._handlers import HandlerCollector
        from crl_sdk.model._bundle import ModelBundle
        from crl_sdk.model._fingerprint import require_same_model
        from crl_sdk.serving._basis_service import BasisService
        from crl_sdk.serving._call_interceptor import CallInterceptor, access_log, failure_log
        from crl_sdk.serving._embedding_service import EmbeddingService
        from crl_sdk.serving._kserve import InferenceService
        from crl_sdk.serving._pipeline import Pipeline
        from crl_sdk.serving._security import TokenInterceptor
        from crl_sdk.serving._server import make_basis_store

        require_version(version)
        use_assigned_processors()
        opened = ModelBundle.open(bundle)
        require_same_model(
            "the application", fingerprint, opened.fingerprint, used_with=f"{bundle} on this node",
            remedy="copy the bundle to each node",
        )  # fmt: skip
        self._timeout = timeout
        self._embedder = Embedder.open(opened, **options)
        self._bases = make_basis_store(opened.fingerprint, settings)
        self._bases.open()
        self._pipeline = Pipeline(self._embedder, self._bases, settings.limits)
        self._collector = HandlerCollector()
        self._collector.register(
            EmbeddingService(self._pipeline),
            BasisService(self._pipeline, settings.open_llm),
            InferenceService(self._pipeline, ready=self._is_healthy),
        )
        self._interceptors = [
            CallInterceptor([access_log if settings.access_log else failure_log]),
            *([TokenInterceptor(settings.tokens)] if settings.tokens else []),
        ]
        self._pipeline.start()
        await self._pipeline.warm_up()

    def _is_healthy(self) -> bool:
        from crl_sdk.serving._server import HANG_SECONDS

        batcher = self._pipeline.batcher
        return batcher.failed is None and batcher.running_seconds < HANG_SECONDS

    async def check_health(self) -> None:
        """Let Serve replace this replica if its engine fails or hangs.

        Raises:
            EngineError: If it does.
        """
        if not self._is_healthy():
            raise EngineError("the engine fails or hangs: Serve replaces this replica")

    async def __del__(self) -> None:
        """Finish what is in progress; Serve calls and awaits it."""
        await self._pipeline.stop()
        self._bases.close()
        self._embedder.close()

    async def _start(self, method: str, context: Any) -> tuple[Any, Any]:
        """Return the handler of a call, and the context for it."""
        from crl_sdk.integrations.ray._handlers import ServeCall

        call = ServeCall(context, self._timeout)
        return await self._collector.intercepted(self._interceptors, method, call), call


def _with_methods(base: type) -> type:
    """Return a class with a method for each call of our services, as Serve expects."""
    from crl_sdk.integrations.ray._handlers import METHODS, run_streaming, run_unary

    def unary(name: str) -> Any:
        async def answer(self: Any, request: Any, grpc_context: Any) -> Any:
            handler, call = await self._start(name, grpc_context)
            return await run_unary(handler, request, call)

        return answer

    def streaming(name: str) -> Any:
        async def answer(self: Any, request: Any, grpc_context: Any) -> AsyncIterator[Any]:
            handler, call = await self._start(name, grpc_context)
            async for reply in run_streaming(handler, request, call):
                yield reply

        return answer

    methods = {
        method: (streaming if streams else unary)(name)
        for method, (name, streams) in METHODS.items()
    }
    for method, function in methods.items():
        function.__name__ = method
    return type("CrlReplica", (base,), methods)


def _import_serve() -> Any:
    """Return the module `ray.serve`.

    Raises:
        MissingDependencyError: If it is not installed.
    """
    import_ray()
    try:
        from ray import serve
    except ImportError as error:
        raise MissingDependencyError(error.name or "ray", "ray", "a Ray Serve service") from error

    return serve
