"""Metrics for Prometheus: calls, images, stages, queue and cache, with few labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from crl_sdk.errors import ServiceError
from crl_sdk.serving._basis_watcher import BasisWatcher
from crl_sdk.serving._call_interceptor import FinishedCall
from crl_sdk.serving._models import Models
from crl_sdk.serving._pipeline import Pipeline
from crl_sdk.serving._results import EmbedResult

_SECONDS_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Metrics of one server, in a registry that no other server shares.

    With several models, all but the metrics of calls have the label `model`.
    """

    def __init__(self, models: Models) -> None:
        """Create the metrics and observe the results and batches of all models."""
        self.registry = CollectorRegistry()
        self._calls = Counter(
            "crl_calls", "Calls that ended.", ["method", "code"], registry=self.registry
        )
        self._seconds = Histogram(
            "crl_call_seconds", "From the start of a call to its end.", ["method"],
            buckets=_SECONDS_BUCKETS, registry=self.registry,
        )  # fmt: skip
        self._models = ["model"] if len(models.pipelines) > 1 else []
        self._images = Counter(
            "crl_images", "Images of Embed calls.", [*self._models, "outcome"],
            registry=self.registry,
        )  # fmt: skip
        self._criteria = Counter(
            "crl_criterion_images", "Images projected on a basis.", [*self._models, "criterion"],
            registry=self.registry,
        )  # fmt: skip
        self._stages = Histogram(
            "crl_stage_seconds", "Time of a request's slowest image in a stage.",
            [*self._models, "stage"], buckets=_SECONDS_BUCKETS, registry=self.registry,
        )  # fmt: skip
        batches = Histogram(
            "crl_batch_size", "Images of an engine run.", self._models, buckets=_BATCH_BUCKETS,
            registry=self.registry,
        )  # fmt: skip
        self.registry.register(_StateCollector(models, self._models))
        for name, pipeline in models.pipelines.items():
            pipeline.batcher.on_batch = (batches.labels(name) if self._models else batches).observe
            pipeline.on_result.append(partial(self.on_result, name))

    def on_result(self, model: str, result: EmbedResult) -> None:
        """Count the images and stages of a request to a model."""
        own = [model] if self._models else []
        for image in result.images:
            outcome = "failed" if image.error else "cached" if image.cached else "embedded"
            self._images.labels(*own, outcome).inc()
        for stored in result.bases:  # only existing bases, so clients cannot invent labels
            self._criteria.labels(*own, stored.basis.criterion).inc(len(result.images))
        timing = result.timing
        if timing.infer_seconds:
            self._stages.labels(*own, "preprocess").observe(timing.preprocess_seconds)
            self._stages.labels(*own, "queue").observe(timing.queue_seconds)
            self._stages.labels(*own, "infer").observe(timing.infer_seconds)
        self._stages.labels(*own, "project").observe(timing.project_seconds)

    def on_call_finished(self, call: FinishedCall) -> None:
        """Count a finished call."""
        self._calls.labels(call.method, call.code.name).inc()
        self._seconds.labels(call.method).observe(call.seconds)


_GAUGES: tuple[tuple[str, str, Callable[[Pipeline], float]], ...] = (
    ("crl_queue_depth", "Images that wait for the engine.", lambda p: p.batcher.depth),
    ("crl_cache_bytes", "Memory of the embedding cache.", lambda p: p.cache.used_bytes),
    ("crl_cache_entries", "Embeddings in the cache.", lambda p: len(p.cache)),
    ("crl_bases", "Bases loaded.", lambda p: len(p.bases.snapshot)),
    ("crl_engine_up", "1 while the engine runs.", lambda p: p.batcher.failed is None),
)
_WATCHER_GAUGES: tuple[tuple[str, str, Callable[[BasisWatcher], float]], ...] = (
    ("crl_bases_up", "1 while changes of bases are seen.", lambda w: w.problem is None),
    ("crl_bases_age_seconds", "Since the bases were last compared with their store.",
     lambda w: w.age),
)  # fmt: skip


class _StateCollector(Collector):
    """Reads the state of queues, engines, bases and caches when it is scraped."""

    def __init__(self, models: Models, labels: list[str]) -> None:
        self._pipelines = models.pipelines
        self._labels = labels

    def collect(self) -> Iterator[Metric]:
        own = {name: [name] if self._labels else [] for name in self._pipelines}
        for metric, text, read in _GAUGES:
            gauge = GaugeMetricFamily(metric, text, labels=self._labels)
            for name, pipeline in self._pipelines.items():
                gauge.add_metric(own[name], float(read(pipeline)))
            yield gauge
        watchers = {name: each.bases.watcher for name, each in self._pipelines.items()}
        for metric, text, read_watcher in _WATCHER_GAUGES:
            gauge = GaugeMetricFamily(metric, text, labels=self._labels)
            for name, watcher in watchers.items():
                if watcher is not None:
                    gauge.add_metric(own[name], float(read_watcher(watcher)))
            if gauge.samples:
                yield gauge
        dropped = CounterMetricFamily(
            "crl_dropped_images", "Images that never reached the engine.",
            labels=[*self._labels, "reason"],
        )  # fmt: skip
        lookups = CounterMetricFamily(
            "crl_cache_lookups", "Images looked up.", labels=[*self._labels, "result"]
        )
        for name, pipeline in self._pipelines.items():
            for reason in ("rejected", "expired", "cancelled"):
                count = getattr(pipeline.admission.dropped, reason)
                dropped.add_metric([*own[name], reason], count)
            lookups.add_metric([*own[name], "hit"], pipeline.cache.hits)
            lookups.add_metric([*own[name], "miss"], pipeline.cache.misses)
        yield dropped
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
