"""`crl tune`: the settings of `crl serve` that serve a bundle best on this machine."""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.markup import escape
from rich.table import Table

from crl_sdk._processors import count_cores
from crl_sdk.cli._console import (
    JsonOption,
    note,
    out,
    print_error,
    print_facts,
    print_json,
    spinner,
)
from crl_sdk.cli._local_server import local_server
from crl_sdk.cli._options import BundleOption, OverwriteOption, open_bundle, require_new
from crl_sdk.engines._hardware import inspect_hardware
from crl_sdk.engines._ranking import RankedEngine, read_ranking
from crl_sdk.engines._selection import measure_engines
from crl_sdk.errors import CrlError, InvalidInputError, MissingDependencyError, ServiceError
from crl_sdk.model._bundle import ModelBundle
from crl_sdk.storage._atomic_files import write_atomically, write_record

if TYPE_CHECKING:
    from crl_benchmarks.bench import BenchSettings
    from crl_benchmarks.tune import Subject
    from crl_benchmarks.tune_report import Candidate, TuneReport, TuneRow

_IMAGES = 64
"""Number of different synthetic JPEGs of 640×480. Each call sends one with a number of its own."""


def tune(
    slo: Annotated[
        str, typer.Option(help="Objective that the server shall meet, such as 'p99<50ms'.")
    ],
    bundle: BundleOption = None,
    engines: Annotated[
        str,
        typer.Option(
            help="Engines to try, comma-separated, or the start of names. Default: all that agree "
            "with fp32."
        ),
    ] = "",
    threads: Annotated[
        str,
        typer.Option(
            help="Threads of an engine run on a CPU, such as 1,2,4. Default: one per core, and "
            "half of that."
        ),
    ] = "",
    max_batch: Annotated[
        str, typer.Option(help="Largest numbers of images in one engine run, such as 1,8,32.")
    ] = "1,8,32",
    workers: Annotated[
        str, typer.Option(help="Numbers of processes (crl serve --workers), such as 1,2.")
    ] = "1",
    allow_fast_decode: Annotated[
        bool,
        typer.Option(
            "--allow-fast-decode",
            help="Also try --decode fast, which changes embeddings slightly.",
        ),
    ] = False,
    images: Annotated[
        Path | None,
        typer.Option(help="Directory of JPEGs and PNGs. Default: synthetic JPEGs of 640x480."),
    ] = None,
    warm_up: Annotated[float, typer.Option(min=0, help="Seconds before anything counts.")] = 0.5,
    seconds: Annotated[float, typer.Option(min=0.1, help="Measured seconds of each run.")] = 3.0,
    rounds: Annotated[
        int, typer.Option(min=1, help="Rounds in which all candidates are compared.")
    ] = 2,
    finalists: Annotated[
        int, typer.Option(min=1, help="Largest number of servers that run side by side.")
    ] = 4,
    timeout: Annotated[
        float, typer.Option(min=0.001, help="Time limit of a call in seconds.")
    ] = 10.0,
    overwrite: OverwriteOption = False,
    out_file: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Write the best settings to this TOML file: `crl serve --config`."
        ),
    ] = None,
    report_file: Annotated[
        Path | None, typer.Option("--report", help="Write everything to this JSON file.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Plot rate against one caller's latency to this .png file."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Find the engine, threads and batch size that serve a bundle best on this machine.

    Servers start on free local ports, with the cache off, and are measured in turns. The exit
    status is 1 if no settings met the objective, or if the measurement was interrupted.
    """
    require_new(out_file, report_file, plot, overwrite=overwrite)
    try:
        from crl_benchmarks.bench import BenchSettings
        from crl_benchmarks.bench_objective import Objective
        from crl_benchmarks.images import read_images, synthetic_jpegs
        from crl_benchmarks.targets import Target
        from crl_benchmarks.tune import Sweep, list_settings
        from crl_benchmarks.tune_report import mark, tune_report
    except ImportError as error:
        raise MissingDependencyError(error.name or "pillow", "cpu", "crl tune") from error
    _check_plot(plot)
    objective = Objective.parse(slo)
    numbers = _numbers("--threads", threads) or sorted({count_cores(), -(-count_cores() // 2)})
    batches = _numbers("--max-batch", max_batch)
    if not batches:
        raise InvalidInputError("--max-batch: expected numbers, such as 1,8,32; got none")
    processes = _numbers("--workers", workers) or [1]
    pictures = read_images(images) if images else synthetic_jpegs(_IMAGES, (640, 480))
    Target("checked:1", pictures, distinct=True)  # before any server starts
    settings = BenchSettings(warm_up=warm_up, seconds=seconds)

    begins = time.perf_counter()
    opened = open_bundle(bundle)
    with spinner("comparing engines") as status:
        chosen, others = _choose_engines(opened, engines, status.update)
        decodes = ["exact", *(["fast"] if allow_fast_decode else [])]
        candidates = list_settings(
            chosen, numbers, batches, decodes, workers=processes, cores=count_cores()
        )
        least = rounds * len(candidates) * 2 * (warm_up + seconds)
        note(f"{len(candidates)} candidates; their rounds take at least {least:.0f} s")
        sweep = Sweep(
            candidates,
            objective,
            partial(_serve, opened, pictures, settings, timeout),
            rounds=rounds,
            finalists=finalists,
            tell=status.update,
        )
        ended_early = ""
        try:
            sweep.run()
        except KeyboardInterrupt:
            ended_early = "interrupted"
    rows = sweep.rows("its search had not begun")
    document = tune_report(
        shlex.join(["crl", *sys.argv[1:]]),
        model=opened.manifest.name,
        fingerprint=opened.fingerprint,
        objective=objective,
        settings={
            "images": str(images) if images else f"{_IMAGES} synthetic JPEGs of 640x480",
            "cache": "off, and all images differ",
            "warm_up_seconds": warm_up,
            "measured_seconds": seconds,
            "rounds": rounds,
            "finalists": finalists,
            "timeout_seconds": timeout,
        },
        rows=mark([*rows, *others]),
        seconds=time.perf_counter() - begins,
        ended_early=ended_early,
    )
    _show(document, bundle, out_file, report_file, plot, as_json=as_json)


def _numbers(option: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isascii() and part.isdigit() and 0 < int(part) < 10**5 for part in parts):
        raise InvalidInputError(f"{option}: expected whole numbers, such as 1,2,4; got {text!r}")
    return list(dict.fromkeys(map(int, parts)))


def _check_plot(path: Path | None) -> None:
    """Check before any work that a picture can be drawn."""
    if path is None:
        return
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("matplotlib", "bench", "--plot") from error
    from crl_benchmarks.tune_report import check_pareto

    check_pareto(path)


def _choose_engines(
    bundle: ModelBundle, wanted: str, tell: Callable[[str], None]
) -> tuple[list[str], list[TuneRow]]:
    """Return the engines to try, fastest first, and rows that say why the others are not tried."""
    ranking = read_ranking(bundle, inspect_hardware())
    if ranking is None:
        ranking = measure_engines(bundle, progress=tell)
        note("the engines were compared; the record is kept for `--engine auto`, as by crl verify")
    starts = [part.strip() for part in wanted.split(",") if part.strip()]
    names = [each.engine for each in ranking.engines]
    unknown = [start for start in starts if not any(_starts(name, start) for name in names)]
    if unknown:
        raise InvalidInputError(
            f"--engines: expected some of {', '.join(names)}, or the start of names; got "
            f"{', '.join(unknown)}"
        )
    asked = [
        each
        for each in ranking.engines
        if not starts or any(_starts(each.engine, start) for start in starts)
    ]
    tried = [each.engine for each in asked if each.agrees]
    if not tried:
        reasons = "; ".join(f"{each.engine}: {each.reason}" for each in asked)
        raise InvalidInputError(
            f"expected an engine that agrees with fp32, found none ({reasons}); run crl verify "
            f"{shlex.quote(str(bundle.path))} --all"
        )
    return tried, [_not_tried(each) for each in asked if not each.agrees]


def _starts(name: str, start: str) -> bool:
    return f"{name}/".startswith(f"{start}/")


def _not_tried(engine: RankedEngine) -> TuneRow:
    from crl_benchmarks.tune_report import TuneRow

    what = "" if engine.failed else "does not agree with fp32: "
    return TuneRow(
        engine=engine.engine, threads=None, max_batch=None, decode=None, state="not_tried",
        reason=f"{what}{engine.reason}",
    )  # fmt: skip


@contextmanager
def _serve(
    bundle: ModelBundle,
    images: Sequence[bytes],
    settings: BenchSettings,
    timeout: float,
    candidate: Candidate,
) -> Iterator[Subject]:
    """Start the server of a candidate, and its load generator."""
    from crl_benchmarks.bench import Generators
    from crl_benchmarks.targets import Target
    from crl_benchmarks.tune import CALLERS, Subject, peak_memory

    options = [f"--{name}={value}" for name, value in candidate.settings.items()]
    with (
        tempfile.TemporaryDirectory(prefix="crl-tune-") as directory,
        local_server(
            bundle.path, Path(directory) / "serve.log", *options, "--cache-mb=0"
        ) as server,
        Generators(
            Target(
                server.address,
                images,
                timeout=timeout,
                distinct=True,
                connections=CALLERS if candidate.workers > 1 else 1,
            ),
            settings,
        ) as generators,
    ):
        yield Subject(generators.measure, partial(peak_memory, server.pid))


def _show(
    document: TuneReport,
    bundle: Path | None,
    out_file: Path | None,
    report_file: Path | None,
    plot: Path | None,
    *,
    as_json: bool,
) -> None:
    """Print the result first, then write the files: if that fails, the table is there."""
    if as_json:
        print_json(msgspec.to_builtins(document))
    else:
        _print(document)
    try:
        if report_file is not None:
            write_record(report_file, document, InvalidInputError)
            note(f"wrote {report_file}")
        if document.best is not None:
            config = config_text(document, bundle)
            if out_file is not None:
                write_atomically(out_file, config.encode(), InvalidInputError)
                command = shlex.join(["crl", "serve", "--config", str(out_file)])
                note(f"wrote {out_file}; run {command}")
            elif not as_json:
                out.print(f"\nfor crl serve --config:\n{escape(config)}", soft_wrap=True)
        if plot is not None and document.best is not None:
            from crl_benchmarks.tune_report import write_pareto

            write_pareto(document, plot)
            note(f"wrote {plot}")
        if document.ended_early:
            raise ServiceError(document.ended_early)
        if document.best is None:
            raise ServiceError(
                f"no settings met {document.objective}, so that no file for crl serve was written; "
                "the table says why. Choose a longer latency with --slo, or more --seconds"
            )
    except CrlError as error:
        print_error(error, as_json=False)  # stdout has its one document
        raise typer.Exit(1) from error


def config_text(document: TuneReport, bundle: Path | None) -> str:
    """Return the best settings in the form that `crl serve --config` reads.

    Args:
        document: Report with a best candidate.
        bundle: Bundle on the command line; None for the demo model, which is the default.

    Raises:
        InvalidInputError: If the path of the bundle is not UTF-8.
    """
    from crl_benchmarks.tune_report import Candidate

    best = document.best
    assert best is not None and best.objective is not None
    assert best.max_batch is not None and best.decode is not None
    candidate = Candidate(best.engine, best.threads, best.max_batch, best.decode, best.workers)
    path = {} if bundle is None else {"bundle": str(bundle.resolve())}
    values = {**path, **candidate.settings}
    comments = [
        f"crl tune, {document.time}: {document.model} on {document.machine.processor}",
        f"{document.objective}: {best.objective.text}",
    ]
    if best.decode == "fast":
        comments.append("decode = fast changes embeddings slightly")
    lines = [f"# {' '.join(each.split())}" for each in comments]
    # a string of JSON is one of TOML
    lines += [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in values.items()]
    text = "\n".join(lines) + "\n"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInputError(
            f"{bundle}: expected a path in UTF-8, which TOML needs; rename the directory"
        ) from error
    return text


def _print(document: TuneReport) -> None:
    from crl_benchmarks.bench_report import find_figure, show_latency, show_ms, show_rate

    print_facts(
        document.command,
        {
            "model": document.model,
            "processor": f"{document.machine.processor}, {document.machine.cores} cores",
            "versions": ", ".join(f"{name} {each}" for name, each in document.versions.items()),
            "duration": f"{document.seconds:.0f} s",
            **{key.replace("_", " "): value for key, value in document.settings.items()},
        },
    )
    few = False
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("settings", overflow="fold")
    for heading in ("images/s at SLO", "p50 ms", "p99", "one caller ms", "MiB", ""):
        table.add_column(heading, overflow="fold")
    for row in document.rows:
        if row.max_batch is None:
            continue
        cells = ["-"] * 3
        if row.objective is not None and row.objective.best is not None:
            best = row.objective.best
            tails = [find_figure(best.latency_of_all_calls, percent) for percent in (50.0, 99.0)]
            cells = [show_rate(best.images_per_second), *map(show_latency, tails)]
            few = few or any(each.high_ms is None for each in tails)
        one = "-" if row.one_caller_p50_ms is None else show_ms(row.one_caller_p50_ms)
        memory = "-" if row.memory_mib is None else f"{row.memory_mib:,.0f}"
        what = "best" if row.best else "Pareto" if row.pareto else row.state
        table.add_row(escape(row.name), *cells, one, memory, what.replace("measured", ""))
    out.print(escape(f"objective {document.objective}"))
    out.print(table)
    for row in document.rows:
        remarks = [row.reason] if row.reason else []
        if row.objective is not None:
            remarks.append(row.objective.text)
        remarks += [f"the rounds are not quotable: {row.doubt}"] if row.doubt else []
        if remarks:
            out.print(escape(f"{row.name}: {'; '.join(remarks)}"), soft_wrap=True)
    if few:
        out.print("?: too few calls for an upper bound; use more --seconds")
    if any(row.decode == "fast" for row in document.rows):
        out.print("fast decoding changes embeddings slightly")
