"""Objectives of `crl bench --slo`, and the search for the highest rate that meets one."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from crl_benchmarks.bench_report import (
    MOSTLY_CACHED,
    LoadResult,
    ObjectiveResult,
    find_figure,
    show_ms,
    show_rate,
)
from crl_benchmarks.quantiles import PERCENTILES, values_needed
from crl_sdk.errors import InvalidInputError

_LATE = 0.1
"""A miss is the generator's own if it woke later than this share of the bound, and would be none
without that."""

_BEHIND = 0.8
"""A server falls behind if it serves less than this share of the calls per second that it needs to.
Its latency then depends on how long the run is."""


@dataclass(frozen=True, slots=True)
class Objective:
    """An upper bound for a percentile of the latency.

    Attributes:
        percent: Such as 99.
        bound_ms: Bound in milliseconds.
    """

    percent: float
    bound_ms: float

    def __str__(self) -> str:
        """Return the form that `parse` reads."""
        return f"p{self.percent:g}<{self.bound_ms:g}ms"

    @classmethod
    def parse(cls, text: str) -> Objective:
        """Parse text such as `p99<50ms`.

        Raises:
            InvalidInputError: If the text has another form, or the percentile is not reported.
        """
        found = re.fullmatch(r"p(\d+(?:\.\d+)?)<(\d+(?:\.\d+)?)ms", text.replace(" ", ""))
        if not found or float(found[1]) not in PERCENTILES or not float(found[2]):
            known = ", ".join(f"p{each:g}" for each in PERCENTILES)
            raise InvalidInputError(
                f"expected an objective such as p99<50ms with one of {known}; got {text!r}"
            )
        return cls(float(found[1]), float(found[2]))

    def judge(self, row: LoadResult) -> Literal["met", "missed", "not_judged"]:
        """Return whether a run met the objective.

        A failed call counts as one that never ended. A rate at which the server falls behind is
        missed.
        """
        if not row.quotable or not row.offered_calls:
            return "not_judged"
        latency = find_figure(row.latency_of_all_calls, self.percent).latency_ms
        needed = row.served_calls / row.measured_seconds
        if row.calls_per_second < _BEHIND * needed:
            return "missed"
        if latency is not None and latency < self.bound_ms:
            return "met"
        late = row.generator_late_ms if row.generator_late_ms > _LATE * self.bound_ms else 0.0
        if latency is not None and latency - late < self.bound_ms:
            return "not_judged"
        return "missed"

    def conclude(self, rows: Sequence[LoadResult]) -> ObjectiveResult:
        """Return what the runs of a search have shown."""
        met = [row for row in rows if row.mode == "open" and self.judge(row) == "met"]
        best = max(met, key=lambda row: row.load, default=None)
        missed, doubt = self._next_higher(rows, best)
        if best is not None:
            outcome, text = self._claim(best)
            if (best.cached_share or 0.0) > MOSTLY_CACHED:
                text += f". The cache answered {best.cached_share:.0%} of the images"
            if not missed:
                text += f". This is a lower bound, as higher rates could not be judged: {doubt}"
        elif missed:
            outcome, text = "met_at_no_rate", "met at no rate"
        else:
            outcome, text = "not_judged", f"could not be judged: {doubt}"
        return ObjectiveResult(
            objective=str(self), percent=self.percent, bound_ms=self.bound_ms, outcome=outcome,
            text=text, needed_calls=values_needed(self.percent), higher_rates_judged=missed,
            best=best,
        )  # fmt: skip

    def _next_higher(self, rows: Sequence[LoadResult], best: LoadResult | None) -> tuple[bool, str]:
        """Return whether the lowest rate above the best one was judged, and if not, why."""
        above = [
            row for row in rows if row.mode == "open" and (best is None or row.load > best.load)
        ]
        if not above:
            return False, next((row.why for row in rows if row.why), "no call succeeded")
        lowest = min(row.load for row in above)
        runs = [row for row in above if row.load == lowest]
        if any(self.judge(row) == "missed" for row in runs):
            return True, ""
        late = f"a generator woke {runs[-1].generator_late_ms:.1f} ms late, which decides"
        return False, next((row.why for row in runs if row.why), late)

    def _claim(self, best: LoadResult) -> tuple[str, str]:
        """Return outcome and text for the best run."""
        figure = find_figure(best.latency_of_all_calls, self.percent)
        text = (
            f"met at {show_rate(best.calls_per_second)} calls/s "
            f"({show_rate(best.images_per_second)} images/s), "
            f"p{self.percent:g} {show_ms(figure.latency_ms or 0.0)} ms"
        )
        needed = values_needed(self.percent)
        if best.offered_calls < needed:
            seconds = math.ceil(1.1 * needed / max(best.calls_per_second, 1e-9))
            return "met_in_too_few_calls", (
                f"{text}, but in {best.offered_calls:,} calls, which are too few to show it: "
                f"p{self.percent:g} needs {needed:,}, so use --seconds {seconds}"
            )
        if figure.high_ms is None:
            return "met", f"{text}; so many calls failed that its 95 % interval has no upper end"
        beyond = "" if figure.high_ms < self.bound_ms else ", which reaches beyond the objective"
        interval = f"95 % interval {show_ms(figure.low_ms or 0.0)} to {show_ms(figure.high_ms)} ms"
        return "met", f"{text} ({interval}{beyond})"


def search(
    objective: Objective, measure: Callable[[str, float], LoadResult], *, callers: int = 8
) -> None:
    """Find the highest rate that meets an objective, to within 5 %.

    A closed loop measures the capacity. Bisection then searches rates up to 1.1 times the capacity,
    and twice as far as long as all of them meet the objective: more callers may fill larger
    batches. A rate fails only after two runs that do not meet the objective, since one pause of a
    shared machine spoils a tail.

    Args:
        objective: Objective to meet.
        measure: Function that makes a run of a mode and a load.
        callers: Number of callers of the closed loop.
    """
    capacity = measure("closed", callers).calls_per_second
    low, high, failed = 0.0, capacity * 1.1, False
    while high > capacity / 64:
        if (high - low) / high <= 0.05:
            if failed:
                break
            high *= 2
        rate = (low + high) / 2
        row = measure("open", rate)
        if objective.judge(row) != "met":
            row = measure("open", rate)
        if objective.judge(row) == "met":
            low = rate
        else:
            high, failed = rate, True
