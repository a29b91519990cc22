"""The metrics of all workers of a server on one page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

_Key = tuple[str, tuple[tuple[str, str], ...]]


class WorkerMetrics:
    """Sums counters and histograms over the workers, and tells their gauges apart by `worker`.

    What a worker had counted before it died stays in the sum. Otherwise the sum would fall, which
    Prometheus takes for a restart of the whole server.
    """

    def __init__(self) -> None:
        """Begin without workers."""
        self._pages: dict[int, list[Metric]] = {}
        self._retired: dict[_Key, float] = {}

    def update(self, worker: int, page: str) -> None:
        """Take the page of a worker, in Prometheus' text format, in place of its last one."""
        self._pages[worker] = [
            family
            for family in text_string_to_metric_families(page)
            if not family.name.endswith("_created")
        ]

    def retire(self, worker: int) -> None:
        """Keep what a worker had counted, because the process has ended."""
        for family in self._pages.pop(worker, []):
            if family.type != "gauge":
                _add(self._retired, family)

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of all workers."""
        families: dict[str, Metric] = {}
        sums: dict[str, dict[_Key, float]] = {}
        for worker, page in sorted(self._pages.items()):
            for family in page:
                merged = families.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                if family.type == "gauge":
                    for sample in family.samples:
                        labels = {**sample.labels, "worker": str(worker)}
                        merged.add_sample(sample.name, labels, sample.value)
                else:
                    _add(sums.setdefault(family.name, {}), family)
        for name, total in sums.items():
            for key, value in self._retired_of(families[name], total).items():
                families[name].add_sample(key[0], dict(key[1]), value)
        yield from families.values()

    def _retired_of(self, family: Metric, total: Mapping[_Key, float]) -> dict[_Key, float]:
        """Return the sums of a family with what workers had counted that have ended."""
        names = {f"{family.name}{suffix}" for suffix in ("", "_total", "_bucket", "_sum", "_count")}
        retired = {key: value for key, value in self._retired.items() if key[0] in names}
        return {key: total.get(key, 0) + retired.get(key, 0) for key in {**total, **retired}}


def _add(sums: dict[_Key, float], family: Metric) -> None:
    for sample in family.samples:
        key = (sample.name, tuple(sample.labels.items()))
        sums[key] = sums.get(key, 0) + sample.value
