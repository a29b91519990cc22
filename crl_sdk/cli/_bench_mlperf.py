"""`crl bench --mlperf`: MLPerf's LoadGen against a server, and what it says."""

from __future__ import annotations

import asyncio
import secrets
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import typer
from rich.markup import escape
from rich.table import Table

from crl_sdk.cli._console import note, out, print_error, print_facts, print_json, spinner
from crl_sdk.errors import CrlError, InvalidInputError, MissingDependencyError, ServiceError
from crl_sdk.storage._atomic_files import make_directory, write_record

if TYPE_CHECKING:
    from crl_benchmarks.bench import BenchSettings
    from crl_benchmarks.bench_objective import Objective
    from crl_benchmarks.bench_report import LoadResult, Setting
    from crl_benchmarks.mlperf import MlperfSettings, Probe
    from crl_benchmarks.mlperf_report import MlperfReport, ScenarioResult
    from crl_benchmarks.targets import Target

_CALLERS = 16
"""Calls of Offline that are under way at once, without --concurrency."""

_PERCENTILES = ("50.00", "90.00", "99.00")
"""Percentiles that are printed, as LoadGen writes them."""


def run_mlperf(
    target: Target,
    names: str,
    *,
    settings: BenchSettings,
    rates: Sequence[float],
    callers: Sequence[float],
    objective: Objective | None,
    logs: Path,
    overwrite: bool,
    out_file: Path | None,
    as_json: bool,
) -> None:
    """Run scenarios, print what LoadGen says, and write the report.

    Args:
        target: Server and calls; its `batch` is the number of images per call of Offline.
        names: Value of `--mlperf`.
        settings: Least seconds of each scenario, and seconds of warm-up before the probe.
        rates: Queries per second of Server, at most one; none to derive it from a probe.
        callers: Calls of Offline that are under way at once, at most one number.
        objective: Latency bound of Server; None to derive it from a probe.
        logs: Directory for LoadGen's logs; it is made if it is not there.
        overwrite: Whether logs that exist may be replaced.
        out_file: File for the report, or None.
        as_json: Whether to print the report as JSON.

    Raises:
        MissingDependencyError: If LoadGen is not installed.
        InvalidInputError: If an option is wrong, or logs exist.
        CrlError: If the first call or the probe fails.
        typer.Exit: With status 1, if a scenario had no verdict.
    """
    from crl_benchmarks.mlperf import choose_settings, parse_scenarios
    from crl_benchmarks.mlperf_report import mlperf_report
    from crl_benchmarks.targets import probe as ask

    scenarios = parse_scenarios(names)
    for option, values in (("--rate", rates), ("--concurrency", callers)):
        if len(values) > 1:
            raise InvalidInputError(f"{option}: expected one number with --mlperf, got {values}")
    if settings.processes > 1:
        raise InvalidInputError("--processes: not allowed with --mlperf, LoadGen has one process")
    if target.connections > 1:
        raise InvalidInputError("--connections: not allowed with --mlperf, which has one")
    if find_spec("mlperf_loadgen") is None:
        raise MissingDependencyError("mlcommons-loadgen", "mlperf", "crl bench --mlperf")
    directories = _log_directories(logs, scenarios, overwrite=overwrite)

    subject = asyncio.run(ask(target))
    at_once = int(callers[0]) if callers else _CALLERS
    chosen = choose_settings(
        _probe(target, settings, at_once),
        seconds=settings.seconds,
        rate=rates[0] if rates else None,
        bound=(objective.percent, objective.bound_ms) if objective is not None else None,
        batch=target.batch,
        callers=at_once,
    )
    _warn_of_the_rules(chosen)
    results, ended_early = _run_all(target, chosen, scenarios, directories)
    described = _describe(target, chosen, rates, objective)
    document = mlperf_report(
        shlex.join(["crl", *sys.argv[1:]]), subject, described, results, ended_early
    )
    _show(document, logs, out_file, as_json=as_json)
    if ended_early or not all(each.ended for each in results):
        raise typer.Exit(1)


def _log_directories(logs: Path, scenarios: Sequence[str], *, overwrite: bool) -> list[Path]:
    """Return a directory for each scenario, and make it."""
    directories = [logs / each for each in scenarios]
    there = [str(each) for each in directories if each.is_dir() and any(each.iterdir())]
    if there and not overwrite:
        raise InvalidInputError(
            f"{' and '.join(there)}: exists already; pass --overwrite to replace LoadGen's logs, "
            "or choose another directory with --mlperf-logs"
        )
    for each in directories:
        make_directory(each, InvalidInputError)
    return directories


def _probe(target: Target, settings: BenchSettings, at_once: int) -> Probe:
    """Return what short closed loops show."""
    from crl_benchmarks.bench import Generators
    from crl_benchmarks.mlperf import probe

    def measure(seconds: float, callers: int, batch: int) -> LoadResult:
        # generators count from the same number, so that distinct images need another mark
        calls = replace(target, batch=batch, mark=secrets.token_bytes(8))
        with Generators(calls, replace(settings, seconds=seconds)) as generators:
            return generators.measure("closed", callers)

    with spinner("a probe before the scenarios"):
        return probe(measure, batch=target.batch, callers=at_once)


def _warn_of_the_rules(settings: MlperfSettings) -> None:
    from crl_benchmarks.mlperf_report import RULES_SECONDS

    if settings.seconds < RULES_SECONDS:
        note(
            f"each scenario runs for at least {settings.seconds:g} s; MLPerf's own rules ask for "
            f"{RULES_SECONDS} s (--seconds {RULES_SECONDS})"
        )


def _run_all(
    target: Target,
    settings: MlperfSettings,
    scenarios: Sequence[str],
    directories: Sequence[Path],
) -> tuple[list[ScenarioResult], str]:
    """Return the results, and why not all scenarios were run."""
    from crl_benchmarks.mlperf import run_scenario

    results: list[ScenarioResult] = []
    with spinner("starting LoadGen") as status:
        try:
            for scenario, directory in zip(scenarios, directories, strict=True):
                status.update(f"LoadGen runs {scenario}")
                results.append(run_scenario(target, scenario, settings, directory))
        except ServiceError as error:
            return results, str(error)
        except KeyboardInterrupt:
            if not results:
                raise
            return results, "interrupted"
    return results, ""


def _describe(
    target: Target, chosen: MlperfSettings, rates: Sequence[float], objective: Objective | None
) -> dict[str, Setting]:
    """Return the settings for the report."""
    return {
        "address": target.address,
        "api": target.kind,
        "criteria": list(target.criteria),
        "different_images": len(target.images),
        "distinct": target.distinct,
        "timeout_seconds": target.timeout,
        "min_seconds": chosen.seconds,
        "server_queries_per_second": chosen.rate,
        "server_bound": f"p{chosen.percent:g} <= {chosen.bound_ms:.4g} ms",
        "server_target_from": ", ".join(
            (
                "the rate that was given" if rates else "70 % of what 8 callers got in the probe",
                "the bound that was given" if objective else "10 times one caller's median",
            )
        ),
        "offline_images_per_call": chosen.batch,
        "offline_calls_at_once": chosen.callers,
        "probe_median_ms": chosen.one_caller_ms,
        "probe_images_per_second": chosen.images_per_second,
        "probe_offline_images_per_second": chosen.offline_images_per_second,
    }


def _show(document: MlperfReport, logs: Path, out_file: Path | None, *, as_json: bool) -> None:
    """Print the report first, then write it: if that fails, the table is there."""
    if as_json:
        print_json(msgspec.to_builtins(document))
    else:
        _print(document)
    note(f"LoadGen's logs are in {logs}")
    try:
        if out_file is not None:
            write_record(out_file, document, InvalidInputError)
            note(f"wrote {out_file}")
        if document.ended_early:
            raise ServiceError(document.ended_early)
    except CrlError as error:
        print_error(error, as_json=False)  # stdout has its one document
        raise typer.Exit(1) from error


def _print(document: MlperfReport) -> None:
    from crl_benchmarks.bench_report import show_setting

    facts = {**msgspec.to_builtins(document.target), **document.settings}
    print_facts(
        document.command,
        {key.replace("_", " "): show_setting(value) for key, value in facts.items()},
    )
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("scenario", "verdict", "LoadGen's result", "p50 ms", "p90", "p99", "images"):
        table.add_column(heading, overflow="fold")
    for each in document.scenarios:
        table.add_row(
            each.scenario, each.verdict, *_cells(each), f"{each.answered_images:,}",
        )  # fmt: skip
    out.print(table)
    for each in document.scenarios:
        for reason in each.reasons:
            out.print(escape(f"{each.scenario} is {each.verdict}: {reason}"), soft_wrap=True)
        for remark in each.remarks:
            out.print(escape(f"{each.scenario}: {remark}"), soft_wrap=True)
    out.print(escape(document.claim), soft_wrap=True)


def _cells(result: ScenarioResult) -> list[str]:
    """Return LoadGen's result and its percentiles."""
    from crl_benchmarks.bench_report import show_ms, show_rate

    if not result.figures:
        return ["-"] * 4
    name, value = next(iter(result.figures.items()))
    if name.endswith(" (ns)"):
        first = f"{name.removesuffix(' (ns)')} {show_ms(value / 1e6)} ms"
    else:
        first = f"{name} {show_rate(value)}"
    found = [result.figures.get(f"{each} percentile latency (ns)") for each in _PERCENTILES]
    return [first, *("-" if each is None else show_ms(each / 1e6) for each in found)]
