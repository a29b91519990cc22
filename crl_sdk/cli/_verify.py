"""`crl verify`: compare an engine with the fp32 reference on this machine, and time it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.markup import escape
from rich.table import Table

from crl_sdk.basis._basis import Basis
from crl_sdk.cli._console import JsonOption, note, out, print_facts, print_json, spinner
from crl_sdk.cli._options import BakedOption, OverwriteOption, require_new
from crl_sdk.engines._ranking import Ranking
from crl_sdk.engines._selection import measure_engines
from crl_sdk.engines._verify import KernelVerification, Verification, verify_kernel
from crl_sdk.engines._verify import verify as run
from crl_sdk.errors import InvalidInputError
from crl_sdk.model._bundle import ModelBundle
from crl_sdk.storage._atomic_files import write_record


def verify(
    bundle: Annotated[Path, typer.Argument(help="Model bundle, from `crl export`.")],
    engine: Annotated[
        str | None,
        typer.Option(help="Engine, such as onnx/cpu/int8; by default the one that auto chooses."),
    ] = None,
    batches: Annotated[str, typer.Option(help="Comma-separated batch sizes.")] = "1,8,32",
    seconds: Annotated[float, typer.Option(help="Seconds to time each batch size for.")] = 2.0,
    every: Annotated[
        bool,
        typer.Option(
            "--all",
            help="Compare and time all engines that can run here, and keep the result, so that "
            "auto takes the fastest that agrees.",
        ),
    ] = False,
    baked: BakedOption = None,
    out_file: Annotated[
        Path | None, typer.Option("--out", "-o", help="File to write the record to, as JSON.")
    ] = None,
    kernel: Annotated[
        bool, typer.Option("--kernel", help="Verify the projection kernel against NumPy instead.")
    ] = False,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compare an engine with the fp32 graph, and time it. Status 1 if they disagree."""
    require_new(out_file, overwrite=overwrite)
    if every:
        if engine is not None or baked is not None or kernel:
            raise InvalidInputError(
                "--all tries every engine: leave out --engine, --baked and --kernel"
            )
        with spinner("opening") as status:
            ranking = measure_engines(
                ModelBundle.open(bundle), seconds=seconds, progress=status.update
            )
        _finish(ranking, out_file, as_json=as_json)
        return
    if kernel:
        with spinner("running the projection kernel"):
            checked = verify_kernel(ModelBundle.open(bundle))
        _finish(checked, out_file, as_json=as_json)
        return
    sizes = [part.strip() for part in batches.split(",")]
    if not all(part.isascii() and part.isdigit() for part in sizes):
        raise InvalidInputError(f"--batches: expected numbers such as 1,8,32, got {batches!r}")
    with spinner("opening") as status:
        record = run(
            ModelBundle.open(bundle),
            engine,
            batches=[int(part) for part in sizes],
            seconds=seconds,
            baked=Basis.load(baked) if baked is not None else None,
            progress=status.update,
        )
    _finish(record, out_file, as_json=as_json)


def _finish(
    record: Verification | KernelVerification | Ranking, out_file: Path | None, *, as_json: bool
) -> None:
    if out_file is not None:
        write_record(out_file, record, InvalidInputError)
        note(f"wrote {out_file}")
    if as_json:
        print_json(msgspec.to_builtins(record))
    elif isinstance(record, Ranking):
        _print_ranking(record)
    elif isinstance(record, Verification):
        _print(record)
    else:
        _print_kernel(record)
    if not record.agrees:
        raise typer.Exit(1)


def _print_ranking(ranking: Ranking) -> None:
    batches = [each.batch for each in ranking.engines[0].times]
    table = Table()
    table.add_column("engine", no_wrap=True)
    for title in (*(f"ms, batch {batch}" for batch in batches), "images/s", "cosine"):
        table.add_column(title)
    table.add_column("verdict", overflow="fold")
    for each in ranking.engines:
        times = [f"{one.milliseconds:.2f}" for one in each.times] or [""] * len(batches)
        best = max((one.batch / one.milliseconds * 1e3 for one in each.times), default=0.0)
        cosine = "" if each.parity is None else f"{each.parity.cosine_mean:.5f}"
        verdict = "agrees" if each.agrees else escape(each.reason)
        table.add_row(each.engine, *times, f"{best:.0f}" if best else "", cosine, verdict)
    out.print(table)
    if ranking.agrees:
        note(f"auto takes {ranking.engines[0].engine} here from now on")


def _print_kernel(record: KernelVerification) -> None:
    verdict = "agrees with NumPy" if record.agrees else "disagrees with NumPy"
    table = Table("embeddings", "max |Δ|", "rows", "p50 ms", "NumPy p50 ms", title=verdict)
    for each in record.checks:
        table.add_row(
            each.embeddings, f"{each.max_abs:.1e}", f"{each.rows:,}", f"{each.p50_ms:.1f}",
            f"{each.numpy_p50_ms:.1f}",
        )  # fmt: skip
    out.print(table)


def _print(record: Verification) -> None:
    parity = record.parity
    print_facts(
        f"{record.engine} on {record.model['name']}",
        {
            "verdict": "agrees with fp32" if record.agrees else "; ".join(record.failures),
            "cosine": f"{parity.cosine_mean:.7f} mean, {parity.cosine_min:.7f} minimum",
            "max |Δ|": f"{parity.max_abs:.1e}, projected {record.projected_max_abs:.1e}",
            "images": parity.samples,
        },
    )
    table = Table("images per run", "p50 ms", "p99 ms", "images/s", "runs")
    for each in record.latencies:
        rate = each.batch / each.p50_ms * 1e3
        table.add_row(
            str(each.batch), f"{each.p50_ms:.2f}", f"{each.p99_ms:.2f}", f"{rate:.0f}",
            str(each.runs),
        )  # fmt: skip
    out.print(table)
