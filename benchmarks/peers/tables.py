"""A report as Markdown, and the tables of the README that are made from it."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from crl_benchmarks.markdown import table
from crl_benchmarks.peers.catalogue import CRL_FP32
from crl_benchmarks.peers.records import EngineRow, Environment, Report, ServiceRow, TargetResult
from crl_benchmarks.peers.target_results import compared
from crl_sdk.engines._ranking import BATCHES, RankedEngine
from crl_sdk.errors import InvalidInputError

BEGIN = "<!-- from benchmarks/results/peers.json, by python -m crl_benchmarks.peers --readme -->"
END = "<!-- end of what is from benchmarks/results/peers.json -->"


def markdown(report: Report) -> str:
    """Return a report as a Markdown page."""
    machine = report.machine
    cores = f"{machine.get('cores', '?')} cores"
    parts = [
        "# Against peers",
        f"`{report.command}` at {report.commit}, {report.time}, {report.seconds / 60:.0f} minutes, "
        f"on {machine.get('processor', '?')} ({cores}, {machine.get('features', '')}, "
        f"{machine.get('memory', '?')}). Random ViT-B/32, the same weights and the same JPEGs for "
        "all; medians over the rounds, in which all take turns.",
        "## Targets",
        table(
            ("target", "measured", "wanted", "against", ""),
            (_target(each) for each in report.targets),
        ),
        "## Engines",
        "Milliseconds of one 640×480 JPEG (decoded and run) and of one image whose pixels are "
        "ready; images per second of batches whose pixels are ready, and of batches with decoding. "
        "The ratio is to crl fp32: above 1 is faster than it.",
        table(
            ("engine", "JPEG, ms", "run, ms", "8, /s", "16, /s", "32, /s", "with decoding, /s",
             "ratio at 1", "ratio at 16", "cosine min", "start, s", "peak, MB"),
            _engines(report.engines),
        ),
        "## What `auto` chose among",
        "The engines of crl, as `crl verify --all` measured them before the comparison: the cosine "
        "with the CPU's fp32 graph, and the median of a run. `auto` takes the first.",
        table(
            ("engine", "agrees", "1, ms", "16, ms", "measured"),
            _ranking(report.ranking),
        ),
        "## Services",
        "Closed loops find the throughput; open loops are Poisson arrivals. Memory is the sum of "
        "the peaks of all processes of a service.",
        table(
            ("service", "saturation, /s", "one caller, p50 ms", "start, s", "peak, MB",
             "cosine min"),
            _services(report.services),
        ),
        table(
            ("service", "load", "offered", "failed", "served, /s", "p50 ms", "p99 ms", "95 %"),
            _loads(report.services),
        ),
        *_absent([*report.engines, *report.services]),
        "## Settings",
        *_settings(report),
        table(
            ("environment", "Python", "versions", "made in, s"),
            (_environment(each) for each in report.environments),
        ),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def readme(report: Report) -> str:
    """Return the text between the markers of the README."""
    engines = [row for row in report.engines if row.counts]
    services = [row for row in report.services if row.counts]
    machine = report.machine
    lines = [
        f"Random weights (ViT-B/32), synthetic JPEGs of 640×480, {machine.get('cores', '?')} "
        f"cores of {machine.get('processor', '?')} ({machine.get('features', '')}), all in one run "
        "(`make bench-peers`; [everything, and what was missed](benchmarks/results/peers.md)).",
        "",
        table(
            ("engine", "one image, ms", "batches of 16, images/s", "cosine with fp32", "peak, MB"),
            (
                (
                    _bold(row.name, ours=row.ours),
                    _number(row.ms("run 1") or row.ms("image"), ".1f"),
                    _number(row.per_second("run 16") or row.per_second("embed 16"), ".1f"),
                    _cosine(row.cosine_mean),
                    _megabytes(row.peak_bytes),
                )
                for row in engines
            ),
        ),
    ]
    if services:
        lines += [
            "",
            table(
                ("service", "images/s at most", "p50 of one caller, ms", "start, s", "peak, MB"),
                (
                    (
                        _bold(row.name, ours=row.ours),
                        f"{row.saturation:.1f}",
                        _alone(row),
                        _number(statistics.median(row.start_seconds), ".1f"),
                        _megabytes(row.peak_bytes),
                    )
                    for row in services
                ),
            ),
        ]
    whole = [row.name for row in engines if "run 1" not in row.rounds]
    if whole:
        lines += ["", f"With decoding, which cannot be taken off: {', '.join(whole)}."]
    return "\n".join(lines)


def rewritten(text: str, report: Report) -> str:
    """Return the text of a README with the tables replaced by those of a report.

    Raises:
        InvalidInputError: If the text does not have both markers once, in this order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise InvalidInputError(f"expected the README to have {BEGIN!r} and then {END!r}, once")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n\n{readme(report)}\n\n{END}{after}"


def update_readme(path: Path, report: Report, *, check: bool) -> bool:
    """Rewrite the tables of a README from a report.

    Args:
        path: Path of the README.
        report: Report with the figures.
        check: Whether to compare only, and to write nothing.

    Returns:
        Whether the README already had these tables.

    Raises:
        InvalidInputError: If the README does not have the markers.
    """
    text = path.read_text(encoding="utf-8")
    wanted = rewritten(text, report)
    if wanted != text and not check:
        path.write_text(wanted, encoding="utf-8")
    return wanted == text


def _engines(rows: Sequence[EngineRow]) -> Iterable[Sequence[str]]:
    base = next((row for row in rows if row.name == CRL_FP32 and row.counts), None)
    for row in rows:
        if row.skipped:
            continue
        embeds = [row.per_second(work) for work in row.rounds if work.startswith("embed")]
        yield (
            _bold(row.name, ours=row.ours) + (f" (**void**: {row.void})" if row.void else ""),
            _number(row.ms("image"), ".1f"),
            _number(row.ms("run 1"), ".1f"),
            *(_number(row.per_second(f"run {batch}"), ".1f") for batch in (8, 16, 32)),
            _number(max((each for each in embeds if each), default=None), ".1f"),
            *(_ratio(base, row, batch) for batch in (1, 16)),
            _cosine(row.cosine_min),
            _number(row.start_seconds, ".1f"),
            _megabytes(row.peak_bytes),
        )


def _ratio(base: EngineRow | None, row: EngineRow, batch: int) -> str:
    found = compared(row, base, batch) if base is not None else None
    return "" if found is None else f"{found[0]:.2f}"


def _ranking(engines: Sequence[RankedEngine]) -> Iterable[Sequence[str]]:
    for each in engines:
        times = {run.batch: run.milliseconds for run in each.times}
        yield (
            each.engine,
            "yes" if each.agrees else "no",
            *(_number(times.get(batch), ".1f") for batch in BATCHES),
            each.reason,
        )


def _services(rows: Sequence[ServiceRow]) -> Iterable[Sequence[str]]:
    for row in rows:
        if not row.skipped:
            yield (
                _bold(row.name, ours=row.ours) + (f" (**void**: {row.void})" if row.void else ""),
                f"{row.saturation:.1f}",
                _alone(row),
                " ".join(f"{each:.1f}" for each in row.start_seconds),
                _megabytes(row.peak_bytes),
                _cosine(row.cosine_min),
            )


def _loads(rows: Sequence[ServiceRow]) -> Iterable[Sequence[str]]:
    loads = dict.fromkeys((run.mode, run.load, run.share) for row in rows for run in row.runs)
    for mode, load, share in loads:
        for row in rows:
            run = next(
                (r for r in row.runs if (r.mode, r.load, r.share) == (mode, load, share)), None
            )
            if run is None:
                continue
            unit = "callers" if mode == "closed" else "calls/s"
            of = "" if share is None else f" ({share:.0%} of PyTriton's saturation)"
            yield (
                _bold(row.name, ours=row.ours),
                f"{load:g} {unit}{of}",
                str(run.offered),
                str(run.failed),
                f"{run.per_second:.1f}",
                _number(run.p50_ms, ".1f", missing="∞"),
                _number(run.p99_ms, ".1f", missing="∞"),
                f"{_number(run.p99_low_ms, '.0f')}–{_number(run.p99_high_ms, '.0f')}"
                if run.p99_low_ms is not None and run.p99_high_ms is not None
                else "",
            )


def _absent(rows: Sequence[EngineRow | ServiceRow]) -> list[str]:
    lines = [f"- {row.name}: skipped: {row.skipped}" for row in rows if row.skipped]
    return ["## Not measured", "\n".join(lines)] if lines else []


def _settings(report: Report) -> Iterable[str]:
    lines = [f"- {name}: {value}" for name, value in report.settings.items()]
    rows: list[EngineRow | ServiceRow] = [*report.engines, *report.services]
    for row in rows:
        if row.settings:
            lines.append(f"- {row.name}: {row.settings}")
    return ["\n".join(lines)]


def _target(each: TargetResult) -> Sequence[str]:
    wanted = "at least" if each.at_least else "at most"
    outcome = each.outcome if each.held else f"**{each.outcome}**"
    return (
        each.target,
        "" if each.measured is None else f"{each.measured:.3g} {each.unit}",
        f"{wanted} {each.required:g} {each.unit}",
        each.against,
        outcome,
    )


def _environment(each: Environment) -> Sequence[str]:
    if each.skipped:
        return (each.name, "", f"skipped: {each.skipped}", "")
    versions = ", ".join(f"{name} {version}" for name, version in each.versions.items())
    return (each.name, each.python, versions, f"{each.seconds:.0f}" if each.seconds else "")


def _alone(row: ServiceRow) -> str:
    run = row.find("closed", 1.0)
    return _number(run.p50_ms if run else None, ".1f")


def _bold(name: str, *, ours: bool) -> str:
    return f"**{name}**" if ours else name


def _number(value: float | None, form: str, missing: str = "") -> str:
    return missing if value is None else f"{value:{form}}"


def _cosine(value: float | None) -> str:
    return _number(value, ".5f")


def _megabytes(value: int | None) -> str:
    return "" if value is None else f"{value / 1e6:.0f}"
