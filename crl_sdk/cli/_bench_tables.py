"""What `crl bench` prints: a report, and the comparison of two."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from rich.markup import escape
from rich.table import Table

from crl_sdk.cli._console import out, print_facts, print_json, warn

if TYPE_CHECKING:
    from crl_benchmarks.bench_compare import Ratio
    from crl_benchmarks.bench_report import ColdStart, LoadResult, Report
    from crl_benchmarks.metrics_page import MetricChange

_BLOCKS, _BLOCKS_OF_A_LINE = "▁▂▃▄▅▆▇█", 60
"""What latency over time is drawn with, and how many of them fit into a line."""

_FEW_CALLS = 5
"""The median of fewer calls is no sign that a part of a run was slower …"""

_SLOW = 1.5
"""… than the whole, by this factor."""

_MOST_KINDS = 12
"""Number of kinds of calls that are printed for a run. A report has all of them."""

_MOST_METRICS = 40
"""Number of metrics that are printed. A report has all of them."""


def print_report(report: Report) -> None:
    """Print what was measured, the runs and what to know about them."""
    from crl_benchmarks.bench_report import show_setting

    if cached := _cached(report):
        out.print(f"[bold yellow]{escape(cached)}[/]")
    facts = {**msgspec.to_builtins(report.target), **report.settings}
    print_facts(
        report.command, {key.replace("_", " "): show_setting(value) for key, value in facts.items()}
    )
    _print_cold(report.cold)
    if report.rows:
        _print_runs(report.rows)
    _print_kinds(report.rows)
    _print_stages(report.rows)
    _print_devices(report.rows)
    _print_metrics(report.rows)
    for row in report.rows:
        failures = {"RESOURCE_EXHAUSTED": row.rejected_calls, **row.failed_calls}
        remarks = [
            f"{count:,} calls ended with {name} ({row.messages.get(name) or 'no message'})"
            for name, count in failures.items()
            if count and row.shown
        ]
        remarks += [] if row.steady or not row.served_calls else ["not steady"]
        remarks += [f"not quotable: {row.why}"] if row.why else []
        remarks += [
            f"{device.name} throttled ({', '.join(device.throttle_reasons)}): it can be faster"
            for device in row.devices
            if device.throttled
        ]
        remarks += [*_metrics_remarks(row), *_slices_remarks(row)]
        if remarks:
            out.print(escape(f"{row.name}: {'; '.join(remarks)}"), soft_wrap=True)
    if report.objective is not None:
        out.print(escape(f"{report.objective.objective}: {report.objective.text}"), soft_wrap=True)


def warn_of_cache(report: Report) -> None:
    """Print a warning on stderr if the cache answered."""
    if cached := _cached(report):
        warn(cached)


def print_comparison(first: Path, second: Path, *, as_json: bool) -> None:
    """Print the ratios of two reports."""
    from crl_benchmarks.bench_compare import SHOWN, compare, find_differences
    from crl_benchmarks.bench_report import read_report

    one, other = read_report(first), read_report(second)
    ratios, differences = compare(one, other), find_differences(one, other)
    for each in differences:
        warn(f"the reports differ in {each}")
    if as_json:
        rows = {load: {name: asdict(each) for name, each in row.items()}
                for load, row in ratios.items()}  # fmt: skip
        print_json(
            {"first": str(first), "second": str(second), "differences": differences, "ratios": rows}
        )
        return
    columns = ("images_per_second", *(f"p{percent:g}" for percent in SHOWN))
    out.print(escape(f"{second} / {first}"), soft_wrap=True)
    table = _table("load", "images/s", *columns[1:])
    for load, row in ratios.items():
        table.add_row(load, *(_ratio(row.get(name)) for name in columns))
    out.print(table)
    out.print("ratios with 95 % intervals (?: too few calls); above 1, the second is larger")


def _cached(report: Report) -> str:
    """Return what to say at the top about the cache of the server, or an empty text."""
    from crl_benchmarks.bench_report import MOSTLY_CACHED

    share = report.cached_share
    if share is not None and share > MOSTLY_CACHED:
        return (
            f"the server's cache answered {share:.0%} of the images, so this is not the speed of "
            "its engine: pass --distinct"
        )
    if report.settings.get("api") == "kserve" and not report.settings["distinct"]:
        return (
            "the server does not say whether its cache answered, so this may not be the speed of "
            "its engine: pass --distinct"
        )
    return ""


def _print_cold(cold: ColdStart | None) -> None:
    """Print the latency of the first calls of a new connection."""
    from crl_benchmarks.bench_report import show_ms

    if cold is None:
        return
    first = "failed" if cold.calls_ms[0] is None else f"{show_ms(cold.calls_ms[0])} ms"
    if total := cold.first_server_ms.get("total"):
        first += f" ({show_ms(total)} ms in the server)"
    told = f"first call of a new connection: {first}"
    if cold.later_p50_ms is not None and cold.later_max_ms is not None:
        told += (
            f"; the next {len(cold.calls_ms) - 1}: p50 {show_ms(cold.later_p50_ms)} ms, "
            f"at most {show_ms(cold.later_max_ms)} ms"
        )
    if cold.failed_calls:
        failed = ", ".join(f"{count:,} with {why}" for why, count in cold.failed_calls.items())
        told += f"; failed: {failed}"
    out.print(escape(told), soft_wrap=True)
    out.print("The server may have been warm: start it again to measure its own first call.")


def _print_runs(rows: Iterable[LoadResult]) -> None:
    from crl_benchmarks.bench_report import find_figure, show_latency, show_ms, show_rate
    from crl_benchmarks.quantiles import PERCENTILES, values_needed

    names = [f"p{percent:g}" for percent in PERCENTILES]
    table = _table("load", "images/s", f"{names[0]} ms", *names[1:], "p99 95 %", "failed")
    open_ended = set()
    for row in rows:
        cells = ["-"] * 6
        if row.shown:
            tail = find_figure(row.latency, 99.0)
            cells = [show_rate(row.images_per_second), *map(show_latency, row.latency)]
            ends = [show_ms(end) for end in (tail.low_ms, tail.high_ms) if end is not None]
            cells.append("–".join(ends) if len(ends) == 2 else "-")
            open_ended |= {each.percent for each in row.latency if each.high_ms is None}
        failed = row.offered_calls - row.served_calls
        table.add_row(row.name, *cells, f"{failed:,}")
    out.print(table)
    if open_ended:
        needed = ", ".join(f"p{each:g} {values_needed(each):,}" for each in sorted(open_ended))
        out.print(f"?: too few calls for an upper bound, which needs: {needed}")


def _print_kinds(rows: Iterable[LoadResult]) -> None:
    """Print the latency by what calls ask for, if they ask for different things."""
    from crl_benchmarks.bench_report import show_latency
    from crl_benchmarks.quantiles import PERCENTILES

    names = [f"p{percent:g}" for percent in PERCENTILES]
    table = _table("load", "calls", "served", f"{names[0]} ms", *names[1:])
    for row in rows:
        for kind in row.kinds[:_MOST_KINDS] if row.shown else ():
            cells = [show_latency(each) for each in kind.latency] or ["-"] * len(names)
            served = f"{kind.served_calls:,} of {kind.offered_calls:,}"
            table.add_row(row.name, escape(kind.name), served, *cells)
        if row.shown and len(row.kinds) > _MOST_KINDS:
            table.add_row(row.name, f"{len(row.kinds) - _MOST_KINDS} more kinds", *["-"] * 5)
    if table.row_count:
        out.print("\nby what the calls ask for:")
        out.print(table)


def _print_stages(rows: Iterable[LoadResult]) -> None:
    """Print the times that the server reports, if it does."""
    told = [row for row in rows if row.server_p50_ms]
    if not told:
        return
    stages = list(told[0].server_p50_ms)
    table = _table("load", *stages)
    for row in told:
        table.add_row(row.name, *(f"{row.server_p50_ms.get(each, 0.0):.1f}" for each in stages))
    out.print("\nreported by the server, p50 ms:")
    out.print(table)


def _print_devices(rows: Iterable[LoadResult]) -> None:
    """Print power, temperature and clocks of this machine, where they are known."""
    from crl_benchmarks.bench_report import show_rate

    heads = ("load", "device", "W", "J", "J/image", "max °C", "min MHz")
    table = _table(*heads)
    for row in rows:
        for device in row.devices:
            values = (
                device.mean_power_watts, device.energy_joules, device.joules_per_image,
                device.peak_celsius, device.lowest_clock_mhz,
            )  # fmt: skip
            if any(value is not None for value in values):
                cells = ("-" if value is None else show_rate(value) for value in values)
                table.add_row(row.name, escape(device.name), *cells)
    if table.row_count:
        out.print("\ndevices of this machine in the measured time:")
        out.print(table)


def _print_metrics(rows: Iterable[LoadResult]) -> None:
    """Print what changed on the server's page of metrics: a line per metric, a column per run."""
    told = [row for row in rows if row.server_metrics is not None]
    changed = [row.server_metrics.changed if row.server_metrics else {} for row in told]
    names = sorted({name for each in changed for name in each})
    if not names:
        return
    table = _table("metric", *(row.name for row in told))
    for name in names[:_MOST_METRICS]:
        table.add_row(escape(name), *(_change(each.get(name)) for each in changed))
    out.print("\nmetrics of the server that changed in the measured time:")
    out.print(table)
    if len(names) > _MOST_METRICS:
        out.print(f"{len(names) - _MOST_METRICS} more are in the JSON report (--json, --out)")


def _change(metric: MetricChange | None) -> str:
    if metric is None:
        return "-"
    if metric.kind == "gauge":
        return f"{metric.low:g} to {metric.high:g}"
    mean = "" if metric.mean is None else f", mean {metric.mean:.3g}"
    return f"+{metric.change:g}{mean}"


def _metrics_remarks(row: LoadResult) -> list[str]:
    """Return what to know about the page of metrics in a run."""
    metrics = row.server_metrics
    if metrics is None:
        return []
    remarks = []
    if metrics.failed_scrapes:
        failed = f"{metrics.failed_scrapes} scrapes of the metrics failed"
        remarks.append(f"{failed} ({metrics.problem})")
    if metrics.restarted:
        remarks.append("counters of the server fell: it started again")
    return remarks


def _slices_remarks(row: LoadResult) -> list[str]:
    """Return the median over the time of a run as blocks, if it says more than the whole."""
    from crl_benchmarks.bench_report import find_figure, show_ms

    width = math.ceil(len(row.slices) / _BLOCKS_OF_A_LINE) or 1
    groups = [row.slices[i : i + width] for i in range(0, len(row.slices), width)]
    medians = [max((each.p50_ms or 0.0 for each in group), default=0.0) for group in groups]
    counted = [each.p50_ms or 0.0 for each in row.slices if each.served_calls >= _FEW_CALLS]
    whole = find_figure(row.latency, 50.0).latency_ms
    if not row.shown or not whole or not counted:
        return []
    if row.steady and max(counted) < _SLOW * whole:
        return []
    highest = max(medians)
    blocks = "".join(
        _BLOCKS[min(int(median / highest * len(_BLOCKS)), len(_BLOCKS) - 1)] for median in medians
    )
    seconds = sum(each.length_seconds for each in groups[0])
    return [f"p50 each {seconds:.3g} s: {blocks}, at most {show_ms(highest)} ms"]


def _table(*headings: str) -> Table:
    """Return a table that does not cut numbers at 80 columns."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _ratio(ratio: Ratio | None) -> str:
    if ratio is None:
        return "-"
    if ratio.low is None or ratio.high is None:
        return f"{ratio.value:.2f}?"
    return f"{ratio.value:.2f} ({ratio.low:.2f}–{ratio.high:.2f})"
