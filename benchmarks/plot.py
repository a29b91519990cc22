"""Plot of latency over throughput, as PNG or as a self-contained HTML page."""

from __future__ import annotations

import html
import io
from pathlib import Path

import msgspec

from crl_benchmarks.bench_report import LoadResult, Report, find_figure, show_latency, show_setting
from crl_sdk.errors import InvalidInputError
from crl_sdk.storage._atomic_files import write_atomically

_SHOWN = ((50.0, "o-"), (90.0, "s--"), (99.0, "^:"))


def check_plot(path: Path) -> None:
    """Check that a plot can have this path, before anything is measured.

    Raises:
        InvalidInputError: If its suffix is another one.
    """
    if path.suffix not in (".png", ".html"):
        raise InvalidInputError(f"{path}: expected a path that ends in .png or .html")


def write_plot(report: Report, path: Path) -> None:
    """Draw the quotable runs of a report, one line per percentile and kind of load.

    A hollow marker is a percentile of too few calls.

    Args:
        report: Report of `crl bench`.
        path: Path of the file to write, ending in `.png` or `.html`.

    Raises:
        InvalidInputError: If no run is quotable, or the file cannot be written.
    """
    if not any(row.shown for row in report.rows):
        raise InvalidInputError(f"{path}: expected a quotable run to draw, got none")
    drawn = _draw(report, "png" if path.suffix == ".png" else "svg")
    if path.suffix == ".html":
        svg = drawn[drawn.index(b"<svg") :].decode()
        drawn = _page(report, svg).encode()
    write_atomically(path, drawn, InvalidInputError)


def _draw(report: Report, form: str) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    names = {"closed": "closed loop", "open": "open loop", "engine": "engine", "replay": "replay"}
    for mode, name in names.items():
        rows = [row for row in report.rows if row.mode == mode and row.shown]
        rows.sort(key=lambda row: row.load)
        for percent, style in _SHOWN if rows else ():
            x = [row.images_per_second for row in rows]
            figures = [find_figure(row.latency, percent) for row in rows]
            y = [each.latency_ms or 0.0 for each in figures]
            (line,) = axes.plot(x, y, style, label=f"{name}, p{percent:g}", markersize=4)
            few = [i for i, each in enumerate(figures) if each.high_ms is None]
            (hollow,) = axes.plot([x[i] for i in few], [y[i] for i in few], style[0], zorder=3)
            hollow.set(color=line.get_color(), markerfacecolor="white", markersize=4)
    axes.set(xlabel="images per second", ylabel="latency, ms", yscale="log")
    axes.set_title(report.command[:90], fontsize=9)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend(fontsize=8)
    target = io.BytesIO()
    metadata = {"Date": None} if form == "svg" else {"Software": None}
    figure.savefig(target, format=form, dpi=150, metadata=metadata)
    return target.getvalue()


def _page(report: Report, svg: str) -> str:
    parts = (report.target, report.settings, report.machine, report.versions)
    facts: dict[str, object] = {"time": report.time}
    for part in parts:
        facts |= msgspec.to_builtins(part)
    remarks = []
    if report.cached_share:
        remarks.append(
            f"The server's cache answered up to {report.cached_share:.0%} of the images."
        )
    if report.objective is not None:
        remarks.append(f"{report.objective.objective}: {report.objective.text}")
    if report.ended_early:
        remarks.append(f"Ended early: {report.ended_early}")
    fact_rows = "".join(
        f"<tr><th>{html.escape(key.replace('_', ' '))}</th>{_cell(show_setting(value))}</tr>"
        for key, value in facts.items()
    )
    heads = ("load", "calls/s", "images/s", "p50 ms", "p90", "p99", "p99.9", "failed", "")
    rows = "".join(f"<tr>{''.join(map(_cell, _cells(row)))}</tr>" for row in report.rows)
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>crl bench</title>"
        "<style>body{font:15px system-ui;margin:2em auto;max-width:60em}"
        "svg{width:100%;height:auto}table{border-collapse:collapse;margin:1em 0}"
        "th,td{border-bottom:1px solid #ccc;padding:.3em .8em;text-align:left}</style>"
        f"<h1>{html.escape(report.command)}</h1>"
        f"{''.join(f'<p>{html.escape(each)}</p>' for each in remarks)}{svg}"
        f"<table><tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr>{rows}</table>"
        f"<p>? and hollow markers: too few calls</p><table>{fact_rows}</table></html>"
    )


def _cells(row: LoadResult) -> list[str]:
    figures = ["-"] * 6
    if row.shown:
        figures = [f"{row.calls_per_second:.1f}", f"{row.images_per_second:.1f}"]
        figures += map(show_latency, row.latency)
    failed = row.offered_calls - row.served_calls
    return [row.name, *figures, str(failed), row.why]


def _cell(text: str) -> str:
    return f"<td>{html.escape(text)}</td>"
