"""Optional OpenTelemetry: a span per call and one per request inside it, sent over OTLP/gRPC."""

from __future__ import annotations

import time
from typing import Any
from urllib.parse import urlsplit

from crl_sdk._version import __version__
from crl_sdk.errors import InvalidInputError, MissingDependencyError
from crl_sdk.serving._call_interceptor import request_id
from crl_sdk.serving._results import EmbedResult

_STAGES = ("preprocess", "queue", "infer", "project")


class Tracing:
    """Makes spans and sends them in the background; what cannot be sent is dropped.

    `interceptor` continues the trace that a call's `traceparent` metadata names (W3C Trace Context)
    and makes its span. Sampling, resource attributes, headers and certificates are those of
    OpenTelemetry's own environment variables (`OTEL_TRACES_SAMPLER`, `OTEL_SERVICE_NAME`, …).
    """

    def __init__(self, endpoint: str) -> None:
        """Connect lazily.

        Args:
            endpoint: of the collector: `http://host:port`, or `https://…` for TLS.

        Raises:
            InvalidInputError: that is no such endpoint.
            MissingDependencyError: OpenTelemetry is not installed.
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
        ours = Resource.create({"service.name": "crl", "service.version": __version__})
        self._provider = TracerProvider(resource=ours.merge(OTELResourceDetector().detect()))
        exporter = OTLPSpanExporter(endpoint, insecure=parts.scheme == "http", timeout=5)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("crl_sdk", __version__)
        interceptor: Any = aio_server_interceptor  # it has no types
        self.interceptor: Any = interceptor(tracer_provider=self._provider)

    def on_result(self, result: EmbedResult) -> None:
        """Make the span of a request, inside the call that is being served."""
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
                **{
                    f"crl.{stage}_seconds": getattr(timing, f"{stage}_seconds") for stage in _STAGES
                },
            },
        )
        span.end(now)

    def close(self) -> None:
        """Send what is left, for some seconds at most. Call it in a thread that may block."""
        self._provider.force_flush(5_000)
        self._provider.shutdown()
