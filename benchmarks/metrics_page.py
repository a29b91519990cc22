"""The server's own metrics beside a run: what changed on its Prometheus page."""

from __future__ import annotations

import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from itertools import pairwise
from urllib.parse import urlsplit

import msgspec

from crl_sdk.errors import InvalidInputError, MissingDependencyError, ServiceError

_TIMEOUT = 2.0
"""Seconds after which a page that does not come counts as failed."""

_OBSERVED = ("histogram", "summary")


class MetricChange(msgspec.Struct, frozen=True, kw_only=True):
    """How a metric changed in the measured time. The metric's name has the unit.

    Attributes:
        kind: `counter`, `gauge`, or `histogram`, which summaries count as too.
        change: Increase of a counter, or number of values that a histogram got; None for a gauge.
        mean: Mean of the values that a histogram got, or of a gauge's scrapes.
        low: Lowest value of a gauge.
        high: Highest value of a gauge.
        buckets: Number of values that a histogram got, by the upper bound of their bucket. Empty
            buckets are left out.
    """

    kind: str
    change: float | None = None
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    buckets: dict[str, float] = {}


class ServerMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """What changed on a server's Prometheus page in the measured time.

    Attributes:
        scrapes: Number of scrapes that worked.
        failed_scrapes: Number of scrapes that failed. What changed ends with the last one that
            worked.
        problem: Why the first of these failed, else empty.
        restarted: Whether a counter fell, as it does when a server starts again.
        changed: The metrics that changed, by name and labels.
    """

    scrapes: int
    failed_scrapes: int
    problem: str
    restarted: bool
    changed: dict[str, MetricChange]


@dataclass(frozen=True, slots=True)
class Scrape:
    """A Prometheus page.

    Attributes:
        counters: Values of counters, by name and labels.
        gauges: Values of gauges and of metrics without a type.
        histograms: Parts of histograms: `sum`, `count`, and the buckets by their upper bounds.
        problem: Why there is no page, else empty.
    """

    counters: dict[str, float] = field(default_factory=dict)
    gauges: dict[str, float] = field(default_factory=dict)
    histograms: dict[str, dict[str, float]] = field(default_factory=dict)
    problem: str = ""


class MetricsPage:
    """The Prometheus page of a server.

    Attributes:
        url: Its URL.
    """

    def __init__(self, address: str) -> None:
        """Scrape the page once, before anything is measured.

        Args:
            address: URL, or `host:port`, to which `/metrics` is added.

        Raises:
            InvalidInputError: If the address has another form.
            ServiceError: If there is no such page.
            MissingDependencyError: If prometheus-client is not installed.
        """
        self.url = _find_url(address)
        self._parse = _find_parser()
        # a proxy would ask another machine for a page that may be meant for this one only
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        if problem := self.scrape().problem:
            raise ServiceError(
                f"--metrics: {self.url}: expected a Prometheus page, got none ({problem}): start "
                "the server with crl serve --metrics HOST:PORT and pass that address"
            )

    def scrape(self) -> Scrape:
        """Return what the page says now. It never raises."""
        try:
            with self._opener.open(self.url, timeout=_TIMEOUT) as page:
                return self._parse(page.read().decode())
        except (OSError, HTTPException, ValueError) as error:
            return Scrape(problem=str(error) or type(error).__name__)


def summarise(scrapes: Sequence[Scrape]) -> ServerMetrics:
    """Return what changed between the first and the last scrape that worked."""
    good = [scrape for scrape in scrapes if not scrape.problem]
    problems = [scrape.problem for scrape in scrapes if scrape.problem]
    changed, restarted = {}, False
    for key in _keys([scrape.counters for scrape in good]):
        values = [scrape.counters.get(key, 0.0) for scrape in good]  # it appears with its first use
        restarted |= _fell(values)
        if increase := _increase(values):
            changed[key] = MetricChange(kind="counter", change=increase)
    for key in _keys([scrape.gauges for scrape in good]):
        values = [scrape.gauges[key] for scrape in good if key in scrape.gauges]
        if min(values) != max(values):
            mean = round(sum(values) / len(values), 6)
            changed[key] = MetricChange(kind="gauge", mean=mean, low=min(values), high=max(values))
    for key in _keys([scrape.histograms for scrape in good]):
        parts = [scrape.histograms.get(key, {}) for scrape in good]
        grown = {part: _increase([each.get(part, 0.0) for each in parts]) for part in _keys(parts)}
        restarted |= _fell([each.get("count", 0.0) for each in parts])
        if count := grown.get("count"):
            total = grown.get("sum")
            changed[key] = MetricChange(
                kind="histogram",
                change=count,
                mean=None if total is None else round(total / count, 6),
                buckets=_separate(grown),
            )
    return ServerMetrics(
        scrapes=len(good),
        failed_scrapes=len(problems),
        problem=problems[0] if problems else "",
        restarted=restarted,
        changed=dict(sorted(changed.items())),
    )


def _find_url(address: str) -> str:
    url = address if "://" in address else f"http://{address}"
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # the port is no number
        known = False
    if not known or ("://" not in address and parts.port is None):
        raise InvalidInputError(
            f"--metrics: expected host:port or a URL, such as 127.0.0.1:9464; got {address!r}"
        )
    return parts._replace(path=parts.path.rstrip("/") or "/metrics").geturl()


def _find_parser() -> Callable[[str], Scrape]:
    try:
        from prometheus_client.parser import text_string_to_metric_families
    except ImportError as error:
        raise MissingDependencyError("prometheus-client", "serve", "--metrics") from error

    def parse(text: str) -> Scrape:
        scrape = Scrape()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name.endswith("_created"):  # a time
                    continue
                if family.type == "counter":
                    scrape.counters[_name(sample.name, sample.labels)] = sample.value
                elif family.type in _OBSERVED:
                    labels = dict(sample.labels)
                    labels.pop("quantile", "")
                    bound = labels.pop("le", "")
                    part = bound or sample.name.removeprefix(f"{family.name}_")
                    if bound or part in ("sum", "count"):  # a quantile is none of this time alone
                        key = _name(family.name, labels)
                        scrape.histograms.setdefault(key, {})[part] = sample.value
                else:
                    scrape.gauges[_name(sample.name, sample.labels)] = sample.value
        if not (scrape.counters or scrape.gauges or scrape.histograms):
            raise ValueError("the page has no metrics")
        return scrape

    return parse


def _name(name: str, labels: dict[str, str]) -> str:
    inside = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
    return f"{name}{{{inside}}}" if inside else name


def _keys(parts: Sequence[Mapping[str, object]]) -> list[str]:
    return list(dict.fromkeys(key for part in parts for key in part))


def _fell(values: Sequence[float]) -> bool:
    return any(after < before for before, after in pairwise(values))


def _increase(values: Sequence[float]) -> float:
    """Return how much a counter rose. One that fell began again at zero."""
    steps = (b - a if b >= a else b for a, b in pairwise(values))
    return round(sum(steps), 6)


def _separate(grown: dict[str, float]) -> dict[str, float]:
    """Return the values of each bucket, which the page adds to those of the buckets below it."""
    bounds = sorted((part for part in grown if part not in ("sum", "count")), key=float)
    below, found = 0.0, {}
    for bound in bounds:
        if grown[bound] > below:
            found[bound] = grown[bound] - below
        below = grown[bound]
    return found
