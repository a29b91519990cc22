"""Plot of a report: engines as bars, services as latency over rate."""

from __future__ import annotations

import io
from pathlib import Path

from crl_benchmarks.peers.records import Report
from crl_sdk.errors import InvalidInputError
from crl_sdk.storage._atomic_files import write_atomically

_OURS, _THEIRS = "#c44e52", "#8c8c8c"


def write_plot(report: Report, path: Path) -> None:
    """Draw a report.

    Args:
        report: Report of a comparison with peers.
        path: Path of the PNG file to write.

    Raises:
        InvalidInputError: If the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    bars, lines = figure.subplots(1, 2)

    engines = [row for row in report.engines if row.counts]
    rates = {
        row.name: row.per_second("run 16") or row.per_second("embed 16") or 0.0 for row in engines
    }
    names = sorted(rates, key=lambda name: rates[name])
    ours = {row.name for row in engines if row.ours}
    colours = [_OURS if name in ours else _THEIRS for name in names]
    drawn = bars.barh(names, [rates[name] for name in names], color=colours)
    bars.bar_label(drawn, fmt="%.0f", padding=3, fontsize=8)
    bars.set(xlabel="images per second, batches of 16", title="Engines")

    for row in report.services:
        if not row.counts:
            continue
        opened = sorted(
            (run.load, run.p50_ms, run.p99_ms)
            for run in row.runs
            if run.mode == "open" and run.p50_ms is not None and run.p99_ms is not None
        )
        if not opened:
            continue
        loads, halves, tails = zip(*opened, strict=True)
        (line,) = lines.plot(loads, halves, "o-", label=f"{row.name}, p50", markersize=4)
        lines.plot(
            loads, tails, "^:", label=f"{row.name}, p99", markersize=4, color=line.get_color()
        )
    lines.set(xlabel="calls per second (Poisson)", ylabel="latency, ms", yscale="log")
    lines.set_title("Services")
    lines.yaxis.set_major_formatter("{x:g}")
    lines.yaxis.set_minor_formatter("{x:g}")
    lines.grid(visible=True, which="both", alpha=0.3)
    if lines.lines:
        figure.legend(fontsize=8, loc="outside right upper")
    machine = report.machine
    figure.suptitle(
        f"Random ViT-B/32, 640×480 JPEGs, {machine.get('cores', '?')} cores of "
        f"{machine.get('processor', '?')}",
        fontsize=10,
    )
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=110, metadata={"Software": None})
    write_atomically(path, target.getvalue(), InvalidInputError)
