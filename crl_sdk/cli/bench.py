"""`crl bench`: how fast a server is, measured so that the figures can be trusted."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
import typer
from rich.table import Table

from crl_sdk.cli.console import JsonOption, note, out, print_facts, print_json, spinner
from crl_sdk.errors import InvalidInputError, MissingDependencyError
from crl_sdk.files import write_atomically

if TYPE_CHECKING:
    from crl_benchmarks.bench import Report, Row


def bench(
    address: Annotated[str, typer.Argument(help="host:port or unix:PATH of a running server.")],
    api: Annotated[
        Literal["crl", "kserve"], typer.Option(help="Its contract; kserve: KServe v2, Triton's.")
    ] = "crl",
    criteria: Annotated[str, typer.Option(help="Comma-separated, for crl.")] = "",
    model: Annotated[str, typer.Option(help="For kserve, such as crl.color.")] = "",
    images: Annotated[
        Path | None, typer.Option(help="Directory of pictures; synthetic JPEGs without one.")
    ] = None,
    size: Annotated[str, typer.Option(help="Of synthetic JPEGs, width x height.")] = "640x480",
    count: Annotated[int, typer.Option(min=1, help="Different synthetic JPEGs.")] = 256,
    batch: Annotated[int, typer.Option(min=1, help="Images of a call.")] = 1,
    concurrency: Annotated[
        str, typer.Option(help="Closed loop: callers, comma-separated, such as 1,2,4,8.")
    ] = "",
    rate: Annotated[str, typer.Option(help="Open loop: calls a second, comma-separated.")] = "",
    slo: Annotated[
        str | None, typer.Option(help="Find the highest rate that holds, such as 'p99<50ms'.")
    ] = None,
    warm_up: Annotated[float, typer.Option(min=0, help="Seconds before anything counts.")] = 2.0,
    seconds: Annotated[float, typer.Option(min=0.1, help="Measured, of each run.")] = 10.0,
    processes: Annotated[int, typer.Option(min=1, help="Of the load generator.")] = 1,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds of a call.")] = 10.0,
    out_file: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the report (JSON) there.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Put load on a server: latency, throughput, failures, and the server's own account of them.

    Bearer tokens come from CRL_TOKEN. Known images are answered from the server's cache: start it
    with --cache-mb 0, or send more different ones than it holds, to measure the engine.
    """
    try:
        from crl_benchmarks.bench import Generators, Objective, Settings, report, search
        from crl_benchmarks.pictures import read_images, synthetic_jpegs
        from crl_benchmarks.targets import Target
    except ImportError as error:
        raise MissingDependencyError(error.name or "pillow", "cpu", "crl bench") from error

    if (api == "kserve") != bool(model):
        raise InvalidInputError("expected --model with --api kserve, and only there")
    objective = Objective.parse(slo) if slo is not None else None
    loads = [("closed", value) for value in _numbers("--concurrency", concurrency, whole=True)]
    loads += [("open", value) for value in _numbers("--rate", rate, whole=False)]
    if not loads and objective is None:
        loads = [("closed", value) for value in (1, 2, 4, 8, 16)]
    target = Target(
        address=address,
        images=read_images(images) if images is not None else synthetic_jpegs(count, _size(size)),
        kind=api,
        batch=batch,
        criteria=tuple(part.strip() for part in criteria.split(",") if part.strip()),
        model=model,
        timeout=timeout,
        token=os.environ.get("CRL_TOKEN"),
    )
    settings = Settings(warm_up=warm_up, seconds=seconds, processes=processes)
    rows: list[Row] = []
    best = None
    with spinner("starting the generators") as status, Generators(target, settings) as generators:

        def measure(mode: str, load: float) -> Row:
            unit = "callers" if mode == "closed" else "calls/s"
            status.update(f"{load:.4g} {unit}")
            return generators.measure(mode, load)

        rows += [measure(mode, load) for mode, load in loads]
        if objective is not None:
            best = search(objective, measure, rows.append)
    command = shlex.join(["crl", *sys.argv[1:]])
    document = report(command, target, settings, rows, objective=slo, best=best)
    if out_file is not None:
        text = msgspec.json.format(msgspec.json.encode(document), indent=2)
        write_atomically(out_file, text + b"\n", InvalidInputError)
        note(f"wrote {out_file}")
    if as_json:
        print_json(msgspec.to_builtins(document))
    else:
        _print(document)


def _print(document: Report) -> None:
    print_facts(document.settings["address"], dict(document.settings))
    headings = ("load", "calls/s", "images/s", "p50 ms", "p90", "p99", "p99.9", "failed")
    table = Table(*headings)
    for row in document.rows:
        table.add_row(*_cells(row))
    out.print(table)
    for row in document.rows:
        stages = ", ".join(f"{name} {ms:.1f}" for name, ms in row.stages_ms.items())
        remarks = [f"server's own account, p50 ms: {stages}"] if stages else []
        remarks += [] if row.steady else ["not steady"]
        remarks += [f"not quoted: {row.why}"] if row.why else []
        if remarks:
            out.print(f"{_load(row)}: {'; '.join(remarks)}")
    if document.objective is not None and document.best is not None:
        best = document.best
        out.print(
            f"{document.objective}: held at {best.calls_per_second:.4g} calls/s "
            f"({best.images_per_second:.4g} images/s)"
        )
    elif document.objective is not None:
        out.print(f"{document.objective}: held at no rate")


def _load(row: Row) -> str:
    return f"{row.load:g} callers" if row.mode == "closed" else f"{row.load:.4g} calls/s"


def _cells(row: Row) -> Iterable[str]:
    figures = ["-"] * 6
    if row.quotable:
        figures = [f"{row.calls_per_second:.1f}", f"{row.images_per_second:.1f}"]
        figures += [_interval(each.ms, each.low, each.high) for each in row.latency]
    failed = {"rejected": row.rejected, **row.errors}
    told = ", ".join(f"{name} {count}" for name, count in failed.items() if count)
    return (_load(row), *figures, told or "0")


def _interval(ms: float, low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return f"{ms:.1f} (too few)"
    return f"{ms:.1f} ({low:.1f}–{high:.1f})"


def _numbers(option: str, text: str, *, whole: bool) -> list[float]:
    try:
        values = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        values = [0.0]
    if any(not 0 < value < 1e6 or (whole and value != int(value)) for value in values):
        example = "1,2,4" if whole else "50,100"
        raise InvalidInputError(f"{option}: expected numbers such as {example}, got {text!r}")
    return values


def _size(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() for part in parts):
        raise InvalidInputError(f"--size: expected width x height such as 640x480, got {text!r}")
    return int(parts[0]), int(parts[1])
