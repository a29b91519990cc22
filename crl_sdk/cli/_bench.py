"""`crl bench`: latency and throughput of a server or an engine."""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
import typer
from rich import box
from rich.table import Table

from crl_sdk.cli._console import JsonOption, note, out, print_facts, print_json, spinner, warn
from crl_sdk.cli._options import EngineOption, OverwriteOption, ThreadsOption, require_new
from crl_sdk.errors import InvalidInputError, MissingDependencyError
from crl_sdk.storage._atomic_files import write_record

if TYPE_CHECKING:
    from crl_benchmarks.bench import BenchSettings, LoadResult, Objective, Report
    from crl_benchmarks.bench_compare import Ratio
    from crl_benchmarks.targets import Target

_MOSTLY_CACHED = 0.05
"""Share of images from the cache above which the output says so at the top."""


def bench(
    address: Annotated[
        str | None, typer.Argument(help="Address of a running server, host:port or unix:PATH.")
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option("--bundle", "-b", help="Time an engine of this bundle instead.")
    ] = None,
    engine: EngineOption = "auto",
    threads: ThreadsOption = None,
    batches: Annotated[
        str, typer.Option(help="With --bundle: batch sizes, comma-separated.")
    ] = "1,8,16,32",
    api: Annotated[
        Literal["crl", "kserve"],
        typer.Option(help="API of the server; kserve is KServe v2, as in Triton."),
    ] = "crl",
    criteria: Annotated[str, typer.Option(help="For --api crl: criteria, comma-separated.")] = "",
    kserve_model: Annotated[
        str, typer.Option(help="For --api kserve: name of the model, such as crl.color.")
    ] = "",
    images: Annotated[
        Path | None, typer.Option(help="Directory of images. Default: synthetic JPEGs.")
    ] = None,
    size: Annotated[
        str, typer.Option(help="Size of the synthetic JPEGs, width x height.")
    ] = "640x480",
    count: Annotated[int, typer.Option(min=1, help="Number of different synthetic JPEGs.")] = 256,
    batch: Annotated[int, typer.Option(min=1, help="Number of images per call.")] = 1,
    concurrency: Annotated[
        str, typer.Option(help="Closed loop: numbers of callers, such as 1,2,4,8.")
    ] = "",
    rate: Annotated[str, typer.Option(help="Open loop: calls per second, such as 50,100.")] = "",
    slo: Annotated[
        str | None, typer.Option(help="Find the highest rate that meets this, such as 'p99<50ms'.")
    ] = None,
    warm_up: Annotated[float, typer.Option(min=0, help="Seconds before anything counts.")] = 2.0,
    seconds: Annotated[float, typer.Option(min=0.1, help="Measured seconds of each run.")] = 10.0,
    processes: Annotated[int, typer.Option(min=1, help="Number of load generators.")] = 1,
    timeout: Annotated[
        float, typer.Option(min=0.001, help="Time limit of a call in seconds.")
    ] = 10.0,
    distinct: Annotated[
        bool,
        typer.Option(
            "--distinct",
            help="Write a number into each JPEG that is sent, so that the server's cache never "
            "answers.",
        ),
    ] = False,
    authority: Annotated[
        str | None,
        typer.Option(
            help="TLS: PEM file of the authority that signed the server's certificate, or `system`."
        ),
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option(help="Mutual TLS: PEM file of the client's certificate.")
    ] = None,
    key: Annotated[
        Path | None, typer.Option(help="Mutual TLS: PEM file of the client's private key.")
    ] = None,
    plain_text_token: Annotated[
        bool,
        typer.Option(
            "--plain-text-token",
            help="Send CRL_TOKEN to another machine without TLS, where everyone on the way can "
            "read it.",
        ),
    ] = False,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="Compare two reports of --out instead, as ratios with intervals."),
    ] = None,
    overwrite: OverwriteOption = False,
    out_file: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the report to this JSON file.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Plot latency over throughput to this .png or .html file.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure latency, throughput and failures of a server under load.

    The report also shows the times that the server reports. A bearer token is read from CRL_TOKEN.
    The server answers repeated images from its cache: pass --distinct to measure its engine.
    """
    if compare is not None:
        _compare(*compare, as_json)
        return
    require_new(out_file, plot, overwrite=overwrite)
    if (address is None) == (bundle is None):
        raise InvalidInputError("expected either the address of a server or --bundle")
    try:
        from crl_benchmarks.bench import BenchSettings, Objective, report, server_settings
        from crl_benchmarks.images import read_images, synthetic_jpegs
        from crl_benchmarks.targets import Target, probe
        from crl_sdk.client._options import ClientSecurity
    except ImportError as error:
        raise MissingDependencyError(error.name or "pillow", "cpu", "crl bench") from error

    settings = BenchSettings(warm_up=warm_up, seconds=seconds, processes=processes)
    objective = Objective.parse(slo) if slo is not None else None
    best: LoadResult | None = None
    if bundle is not None:
        about, described, rows = _engine(
            bundle, engine, threads, _numbers("--batches", batches, whole=True), settings
        )
    elif address is not None:
        if (api == "kserve") != bool(kserve_model):
            raise InvalidInputError(
                "--kserve-model: required with --api kserve, and not allowed without it"
            )
        loads = [("closed", each) for each in _numbers("--concurrency", concurrency, whole=True)]
        loads += [("open", each) for each in _numbers("--rate", rate, whole=False)]
        if not loads and objective is None:
            loads = [("closed", each) for each in (1, 2, 4, 8, 16)]
        target = Target(
            address=address,
            images=read_images(images) if images else synthetic_jpegs(count, _size(size)),
            kind=api,
            batch=batch,
            criteria=tuple(part.strip() for part in criteria.split(",") if part.strip()),
            model=kserve_model,
            timeout=timeout,
            security=ClientSecurity(
                os.environ.get("CRL_TOKEN", ""), authority, certificate, key, plain_text_token
            ),
            distinct=distinct,
        )
        about, described = asyncio.run(probe(target)), server_settings(target, settings)
        rows, best = _server(target, settings, loads, objective)
    verdict, judged = objective.verdict(rows, best) if objective is not None else ("", True)
    command = shlex.join(["crl", *sys.argv[1:]])
    document = report(command, about, described, rows, objective=slo, best=best, verdict=verdict)
    if out_file is not None:
        write_record(out_file, document, InvalidInputError)
        note(f"wrote {out_file}")
    if as_json:
        print_json(msgspec.to_builtins(document))
    else:
        _print(document)
    if plot is not None:  # last: if it fails, the table is there
        _plot(document, plot)
    if not judged:
        raise typer.Exit(1)


def _engine(
    path: Path, engine: str, threads: int | None, batches: list[float], settings: BenchSettings
) -> tuple[dict[str, str], dict[str, str | float], list[LoadResult]]:
    from crl_benchmarks.bench import engine_rows
    from crl_sdk.engines._selection import open_engine
    from crl_sdk.model._bundle import ModelBundle

    bundle = ModelBundle.open(path)
    with spinner("opening") as status:
        opened = open_engine(bundle, engine, threads=threads)
        sizes = [int(each) for each in batches]
        try:
            rows = engine_rows(
                bundle, opened, sizes, settings, lambda size: status.update(f"batches of {size}")
            )
        finally:
            opened.close()
    about = {
        "model": bundle.manifest.name, "fingerprint": bundle.fingerprint,
        "engine": str(opened.name),
    }  # fmt: skip
    described: dict[str, str | float] = {
        "threads": threads or "one per core",
        "warm_up_seconds": settings.warm_up,
        "measured_seconds": settings.seconds,
    }
    return about, described, rows


def _server(
    target: Target,
    settings: BenchSettings,
    loads: list[tuple[str, float]],
    objective: Objective | None,
) -> tuple[list[LoadResult], LoadResult | None]:
    from crl_benchmarks.bench import Generators, search

    best = None
    with spinner("starting the generators") as status, Generators(target, settings) as generators:

        def measure(mode: str, load: float) -> LoadResult:
            unit = "callers" if mode == "closed" else "calls/s"
            status.update(f"{load:.4g} {unit}")
            return generators.measure(mode, load)

        rows = [measure(mode, load) for mode, load in loads]
        if objective is not None:
            best = search(objective, measure, rows.append)
    return rows, best


def _plot(document: Report, path: Path) -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("matplotlib", "bench", "--plot") from error
    from crl_benchmarks.plot import write_plot

    write_plot(document, path)
    note(f"wrote {path}")


def _compare(first: Path, second: Path, as_json: bool) -> None:
    """Print the ratios of two reports."""
    from crl_benchmarks.bench_compare import (
        SHOWN,
        compare_latency,
        compare_throughput,
        differences,
        pairs,
        read_report,
    )

    one, other = read_report(first), read_report(second)
    rows = {
        _load(row): {
            "images_per_second": compare_throughput(row, same),
            **{f"p{percent:g}": compare_latency(row, same, percent) for percent in SHOWN},
        }
        for row, same in pairs(one, other)
    }
    apart = differences(one, other)
    for each in apart:
        warn(f"the reports differ in {each}")
    if as_json:
        ratios = {load: {name: asdict(r) for name, r in row.items()} for load, row in rows.items()}
        print_json({"first": str(first), "second": str(second), "differ": apart, "ratios": ratios})
        return
    table = Table("load", "images/s", *(f"p{percent:g}" for percent in SHOWN),
                  title=f"{second} / {first}", title_justify="left")  # fmt: skip
    for load, row in rows.items():
        table.add_row(load, *map(_ratio, row.values()))
    out.print(table)
    out.print("ratios with 95 % intervals; above 1, the second is larger")


def _ratio(ratio: Ratio) -> str:
    if ratio.low is None or ratio.high is None:
        return f"{ratio.value:.2f}"
    return f"{ratio.value:.2f} ({ratio.low:.2f}–{ratio.high:.2f})"


def _print(document: Report) -> None:
    cached = max((row.cached or 0.0 for row in document.rows), default=0.0)
    if cached > _MOSTLY_CACHED:
        warn(
            f"the server's cache answered {cached:.0%} of the images, so this is not the speed of "
            "its engine: pass --distinct"
        )
    settings = {name.replace("_", " "): value for name, value in document.settings.items()}
    print_facts(document.command, {**document.target, **settings})
    headings = ("load", "calls/s", "images/s", "p50 ms", "p90", "p99", "p99.9", "95 %", "failed")
    table = Table(*headings, box=box.SIMPLE, pad_edge=False)  # fits 80 columns
    for row in document.rows:
        table.add_row(*_cells(row))
    out.print(table)
    out.print("95 %: interval of p99; - if there are too few calls. --json has all intervals")
    for row in document.rows:
        stages = ", ".join(f"{name} {ms:.1f}" for name, ms in row.stages_ms.items())
        remarks = [f"reported by the server, p50 ms: {stages}"] if stages else []
        remarks += [] if row.steady else ["not steady"]
        remarks += [f"not quotable: {row.why}"] if row.why else []
        if remarks:
            out.print(f"{_load(row)}: {'; '.join(remarks)}")
    if document.objective is not None:
        out.print(f"{document.objective}: {document.verdict}")


def _load(row: LoadResult) -> str:
    unit = {"closed": "callers", "open": "calls/s", "engine": "images"}[row.mode]
    return f"{row.load:.4g} {unit}"


def _cells(row: LoadResult) -> Iterable[str]:
    figures = ["-"] * 7
    if row.quotable and row.served:
        figures = [f"{row.calls_per_second:.1f}", f"{row.images_per_second:.1f}"]
        figures += [f"{each.ms:.1f}" for each in row.latency]
        tail = next(each for each in row.latency if each.percent == 99)
        known = tail.low is not None and tail.high is not None
        figures.append(f"{tail.low:.0f}–{tail.high:.0f}" if known else "-")
    failed = {"rejected": row.rejected, **row.errors}
    failures = ", ".join(f"{name} {count}" for name, count in failed.items() if count)
    return (_load(row), *figures, failures or "0")


def _numbers(option: str, text: str, *, whole: bool) -> list[float]:
    try:
        values = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        values = [0.0]
    if any(not 0 < value < 1e6 or (whole and value != int(value)) for value in values):
        example = "1,2,4" if whole else "50,100"
        raise InvalidInputError(f"{option}: expected numbers, such as {example}; got {text!r}")
    return values


def _size(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() for part in parts):
        raise InvalidInputError(f"--size: expected width x height, such as 640x480; got {text!r}")
    return int(parts[0]), int(parts[1])
