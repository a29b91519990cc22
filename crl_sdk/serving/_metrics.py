"""Metrics for Prometheus: calls, images, stages, queue and cache, with few labels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AsyncExitStack

from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from crl_sdk.errors import ServiceError
from crl_sdk.serving._call_interceptor import FinishedCall
from crl_sdk.serving._pipeline import Pipeline
from crl_sdk.serving._results import EmbedResult

_SECONDS_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Metrics of one server, in a registry that no other server shares."""

    def __init__(self, pipeline: Pipeline) -> None:
        """Create the metrics and observe the pipeline's results and batches."""
        self.registry = CollectorRegistry()
        self._calls = Counter(
            "crl_calls", "Calls that ended.", ["method", "code"], registry=self.registry
        )
        self._seconds = Histogram(
            "crl_call_seconds", "From the start of a call to its end.", ["method"],
            buckets=_SECONDS_BUCKETS, registry=self.registry,
        )  # fmt: skip
        self._images = Counter(
            "crl_images", "Images of Embed calls.", ["outcome"], registry=self.registry
        )
        self._criteria = Counter(
            "crl_criterion_images", "Images projected on a basis.", ["criterion"],
            registry=self.registry,
        )  # fmt: skip
        self._stages = Histogram(
            "crl_stage_seconds", "Time of a request's slowest image in a stage.", ["stage"],
            buckets=_SECONDS_BUCKETS, registry=self.registry,
        )  # fmt: skip
        self._batches = Histogram(
            "crl_batch_size", "Images of an engine run.", buckets=_BATCH_BUCKETS,
            registry=self.registry,
        )  # fmt: skip
        self.registry.register(_StateCollector(pipeline))
        pipeline.batcher.on_batch = self._batches.observe
        pipeline.on_result.append(self.on_result)

    def on_result(self, result: EmbedResult) -> None:
        """Count the images and stages of a request."""
        for image in result.images:
            outcome = "failed" if image.error else "cached" if image.cached else "embedded"
            self._images.labels(outcome).inc()
        for stored in result.bases:  # only existing bases, so clients cannot invent labels
            self._criteria.labels(stored.basis.criterion).inc(len(result.images))
        timing = result.timing
        if timing.infer_seconds:
            self._stages.labels("preprocess").observe(timing.preprocess_seconds)
            self._stages.labels("queue").observe(timing.queue_seconds)
            self._stages.labels("infer").observe(timing.infer_seconds)
        self._stages.labels("project").observe(timing.project_seconds)

    def on_call_finished(self, call: FinishedCall) -> None:
        """Count a finished call."""
        self._calls.labels(call.method, call.code.name).inc()
        self._seconds.labels(call.method).observe(call.seconds)


class _StateCollector(Collector):
    """Reads the state of the queue, the engine, the bases and the cache when it is scraped."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline

    def collect(self) -> Iterator[Metric]:
        pipeline, counts = self._pipeline, self._pipeline.admission.dropped
        watcher = pipeline.bases.watcher
        if watcher is not None:
            yield GaugeMetricFamily(
                "crl_bases_up", "1 while changes of bases are seen.", value=watcher.problem is None
            )
            yield GaugeMetricFamily(
                "crl_bases_age_seconds", "Since the bases were last compared with their store.",
                value=watcher.age,
            )  # fmt: skip
        for name, text, value in (
            ("crl_queue_depth", "Images that wait for the engine.", pipeline.batcher.depth),
            ("crl_cache_bytes", "Memory of the embedding cache.", pipeline.cache.used_bytes),
            ("crl_cache_entries", "Embeddings in the cache.", len(pipeline.cache)),
            ("crl_bases", "Bases loaded.", len(pipeline.bases.snapshot)),
            ("crl_engine_up", "1 while the engine runs.", int(pipeline.batcher.failed is None)),
        ):
            yield GaugeMetricFamily(name, text, value=value)
        dropped = CounterMetricFamily(
            "crl_dropped_images", "Images that never reached the engine.", labels=["reason"]
        )
        for reason in ("rejected", "expired", "cancelled"):
            dropped.add_metric([reason], getattr(counts, reason))
        yield dropped
        lookups = CounterMetricFamily("crl_cache_lookups", "Images looked up.", labels=["result"])
        lookups.add_metric(["hit"], pipeline.cache.hits)
        lookups.add_metric(["miss"], pipeline.cache.misses)
        yield lookups


def serve_metrics(
    registry: CollectorRegistry, address: str | None, cleanup: AsyncExitStack
) -> str | None:
    """Serve the Prometheus page in a thread until `cleanup` runs; return its actual address.

    Raises:
        ServiceError: If the address cannot be used.
    """
    if address is None:
        return None
    host, _, port = address.rpartition(":")
    try:
        http, thread = start_http_server(int(port), host.strip("[]"), registry)
    except OSError as error:
        raise ServiceError(
            f"{address}: cannot serve metrics there ({error.strerror or error}); choose another "
            "address with --metrics"
        ) from error
    cleanup.callback(thread.join)
    cleanup.callback(http.server_close)
    cleanup.callback(http.shutdown)
    return f"{host}:{http.server_port}"
