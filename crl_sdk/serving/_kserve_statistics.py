"""Statistics of the KServe models, as `ModelStatistics` reports them."""

from __future__ import annotations

import time
from dataclasses import dataclass

from crl_sdk.pb.inference import kserve_pb2 as pb
from crl_sdk.serving._results import EmbedResult


@dataclass(slots=True)
class ModelStatistics:
    """Sums over the requests of one model since the start.

    Attributes:
        last_ms: Time of the last successful request, in milliseconds since 1970.
        images: Number of images in successful requests.
        engine_runs: Number of engine runs, where each run counts with the model's share of its
            images.
        success: Number of successful requests.
        success_ns: Their total time, in nanoseconds.
        fail: Number of failed requests.
        fail_ns: Their total time, in nanoseconds.
        queue_ns: Time in the queue, in nanoseconds.
        input_ns: Time for decoding, in nanoseconds.
        infer_ns: Time in the engine, in nanoseconds.
        output_ns: Time for projection, in nanoseconds.
        hits: Number of images found in the cache.
        misses: Number of images not found in the cache.
    """

    last_ms: int = 0
    images: int = 0
    engine_runs: float = 0.0
    success: int = 0
    success_ns: int = 0
    fail: int = 0
    fail_ns: int = 0
    queue_ns: int = 0
    input_ns: int = 0
    infer_ns: int = 0
    output_ns: int = 0
    hits: int = 0
    misses: int = 0

    def add_success(self, result: EmbedResult) -> None:
        """Add a successful request."""
        timing = result.timing
        self.last_ms = time.time_ns() // 1_000_000
        self.images += len(result.images)
        self.engine_runs += timing.engine_runs
        self.success += 1
        self.success_ns += round(timing.total_seconds * 1e9)
        self.queue_ns += round(timing.queue_seconds * 1e9)
        self.input_ns += round(timing.preprocess_seconds * 1e9)
        self.infer_ns += round(timing.infer_seconds * 1e9)
        self.output_ns += round(timing.project_seconds * 1e9)
        hits = sum(image.cached for image in result.images)
        self.hits += hits
        self.misses += len(result.images) - hits

    def add_failure(self, seconds: float) -> None:
        """Add a failed request that took so many seconds."""
        self.fail += 1
        self.fail_ns += round(seconds * 1e9)

    def to_message(self, name: str, version: str) -> pb.ModelStatistics:
        """Return the statistics as the message of a model."""

        def duration(count: int, ns: int = 0) -> pb.StatisticDuration:
            return pb.StatisticDuration(count=count, ns=ns)

        return pb.ModelStatistics(
            name=name, version=version, last_inference=self.last_ms,
            inference_count=self.images, execution_count=round(self.engine_runs),
            inference_stats=pb.InferStatistics(
                success=duration(self.success, self.success_ns),
                fail=duration(self.fail, self.fail_ns),
                queue=duration(self.success, self.queue_ns),
                compute_input=duration(self.success, self.input_ns),
                compute_infer=duration(self.success, self.infer_ns),
                compute_output=duration(self.success, self.output_ns),
                cache_hit=duration(self.hits), cache_miss=duration(self.misses),
            ),
        )  # fmt: skip
