"""Optional OpenTelemetry traces: a span per call and one per request inside it, over OTLP/gRPC."""

from __future__ import annotations

import time
from typing import Any
from urllib.parse import urlsplit

from crl_sdk._version import __version__
from crl_sdk.errors import InvalidInputError, MissingDependencyError
from crl_sdk.serving._call_interceptor import request_id
from crl_sdk.serving._results import EmbedResult

_FLUSH_MILLISECONDS = 5_000


class Tracing:
    """Makes spans and sends them in the background. Spans that cannot be sent are dropped.

    `interceptor` makes the span of each call. It continues the trace named by the call's
    `traceparent` metadata (W3C Trace Context). OpenTelemetry's environment variables
    (`OTEL_TRACES_SAMPLER`, `OTEL_SERVICE_NAME`, …) set sampling, resource attributes, headers and
    certificates.
    """

    def __init__(self, endpoint: str) -> None:
        """Set up the exporter. It connects when it first sends.

        Args:
            endpoint: Address of the collector: `http://host:port`, or `https://host:port` for TLS.

        Raises:
            InvalidInputError: If the endpoint has another form.
            MissingDependencyError: If OpenTelemetry is not installed.
        """
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InvalidInputError(
                f"expected a collector as http://host:port or https://host:port, got {endpoint!r}"
            )
        try:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            from opentelemetry.instrumentation.grpc import aio_server_interceptor
            from opentelemetry.sdk.resources import OTELResourceDetector, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise MissingDependencyError("opentelemetry-sdk", "otel", "--otlp") from error
        resource = Resource.create({"service.name": "crl", "service.version": __version__})
        resource = resource.merge(OTELResourceDetector().detect())  # the environment's values win
        self._provider = TracerProvider(resource=resource)
        exporter = OTLPSpanExporter(endpoint, insecure=parts.scheme == "http", timeout=5)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("crl_sdk", __version__)
        make_interceptor: Any = aio_server_interceptor  # the package has no type annotations
        self.interceptor: Any = make_interceptor(tracer_provider=self._provider)

    def on_result(self, result: EmbedResult) -> None:
        """Make the span of a request. Call it inside the call that sent the request."""
        now = time.time_ns()
        images, timing = result.images, result.timing
        span = self._tracer.start_span(
            "crl.embed",
            start_time=now - round(timing.total_seconds * 1e9),
            attributes={
                "crl.request_id": request_id.get(),
                "crl.criteria": [stored.basis.criterion for stored in result.bases],
                "crl.images": len(images),
                "crl.images.cached": sum(image.cached for image in images),
                "crl.images.failed": sum(image.error is not None for image in images),
                "crl.engine_runs": timing.engine_runs,
                "crl.preprocess_seconds": timing.preprocess_seconds,
                "crl.queue_seconds": timing.queue_seconds,
                "crl.infer_seconds": timing.infer_seconds,
                "crl.project_seconds": timing.project_seconds,
            },
        )
        span.end(now)

    def close(self) -> None:
        """Send the remaining spans, for five seconds at most. It blocks until then."""
        self._provider.force_flush(_FLUSH_MILLISECONDS)
        self._provider.shutdown()
