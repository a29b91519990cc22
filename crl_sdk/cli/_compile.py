"""`crl compile`: a TensorRT plan of a bundle's image graph."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
import typer
from rich.table import Table

from crl_sdk.basis._basis import Basis
from crl_sdk.cli._console import JsonOption, note, out, print_facts, print_json, progress_bar
from crl_sdk.engines._kernels import kernels_directory
from crl_sdk.engines._tensorrt_plans import Plan, PlanRuntime
from crl_sdk.errors import InvalidInputError, MissingDependencyError
from crl_sdk.model._bundle import ModelBundle


def compile_bundle(
    bundle: Annotated[Path, typer.Argument(help="Model bundle, from `crl export`.")],
    runtime: Annotated[
        PlanRuntime, typer.Option(help="tensorrt compiles for the GPU of this machine only.")
    ] = "tensorrt-rtx",
    precision: Annotated[
        Literal["fp16", "fp32"], typer.Option(help="Of the tower; the bundle must have the graph.")
    ] = "fp16",
    arch: Annotated[
        str, typer.Option(help="Comma-separated, such as sm86,sm89; all of TensorRT-RTX if empty.")
    ] = "",
    batch: Annotated[str, typer.Option(help="Images of a run, min:opt:max.")] = "1:8:32",
    max_columns: Annotated[
        int, typer.Option(help="Columns of all bases of a run together, at most.")
    ] = 4096,
    baked: Annotated[
        Path | None, typer.Option(help="Basis file to fix in the plan; it then takes images alone.")
    ] = None,
    out_dir: Annotated[
        Path | None, typer.Option("--out", "-o", help="Directory; BUNDLE/engines by default.")
    ] = None,
    force: Annotated[bool, typer.Option(help="Compile even if the plan is there.")] = False,
    kernel: Annotated[
        bool,
        typer.Option(
            "--kernel",
            help="Compile the projection kernel for stored embeddings instead; only --arch and "
            "--out count.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Compile image tower and projection into one TensorRT plan. TensorRT-RTX needs no GPU here."""
    architectures = [part.strip() for part in arch.split(",") if part.strip()]
    if kernel:
        _compile_kernels(bundle, architectures, out_dir, as_json=as_json)
        return
    try:
        from crl_export.tensorrt import compile_plan
    except ImportError as error:
        raise MissingDependencyError(
            error.name or "tensorrt-rtx", "tensorrt-rtx", "crl compile"
        ) from error

    with progress_bar() as progress:
        task = progress.add_task("reading the graph", total=None)
        compiled = compile_plan(
            ModelBundle.open(bundle),
            runtime=runtime,
            precision=precision,
            architectures=architectures,
            batch=_batch(batch),
            max_columns=max_columns,
            baked=Basis.load(baked) if baked is not None else None,
            directory=out_dir,
            force=force,
            progress=lambda stage, done, total: progress.update(
                task, description=stage, completed=done, total=total
            ),
        )
    note(f"{'found' if compiled.cached else 'wrote'} {compiled.path}; not run on hardware")
    plan = compiled.plan
    if as_json:
        told = {"path": str(compiled.path), "cached": compiled.cached}
        print_json({**told, **msgspec.to_builtins(plan)})
    else:
        print_facts(str(compiled.path), _facts(plan))


def _compile_kernels(
    bundle: Path, architectures: list[str], out_dir: Path | None, *, as_json: bool
) -> None:
    try:
        from crl_export.kernels.ahead import compile_kernels
    except ImportError as error:
        raise MissingDependencyError(
            error.name or "triton", "export", "crl compile --kernel"
        ) from error

    folder = out_dir or kernels_directory(ModelBundle.open(bundle))
    with progress_bar() as progress:
        task = progress.add_task("compiling", total=None)
        kernels = compile_kernels(
            folder,
            architectures,
            progress=lambda stage, done, total: progress.update(
                task, description=stage, completed=done, total=total
            ),
        )
    note(f"wrote {len(kernels.variants)} kernels to {folder}; not run on hardware")
    if as_json:
        print_json({"path": str(folder), **msgspec.to_builtins(kernels)})
        return
    table = Table("architecture", "embeddings", "unit", "single", "registers", "shared", "bytes")
    for each in kernels.variants:
        table.add_row(
            each.architecture, each.embeddings, str(each.unit), str(each.single),
            str(each.registers), str(each.shared), str(each.bytes),
        )  # fmt: skip
    out.print(table)


def _batch(value: str) -> tuple[int, int, int]:
    parts = value.split(":")
    if len(parts) != 3 or not all(part.isascii() and part.isdigit() for part in parts):
        raise InvalidInputError(f"--batch: expected min:opt:max such as 1:8:32, got {value!r}")
    fewest, usual, most = (int(part) for part in parts)
    return fewest, usual, most


def _facts(plan: Plan) -> dict[str, object]:
    spec = plan.spec
    return {
        "runtime": f"{spec.runtime} {spec.runtime_version}",
        "architectures": ", ".join(spec.architectures),
        "precision": spec.precision,
        "images of a run": f"{spec.batch[0]} to {spec.batch[2]}, best at {spec.batch[1]}",
        "basis": spec.baked.criterion if spec.baked else f"any, {spec.max_columns} columns",
        "size": f"{plan.bytes / 1e6:.1f} MB",
        "layers": plan.layers,
        "projection": ", ".join(plan.projection),
        "compiled in": f"{plan.seconds:.1f} s, {plan.peak_memory / 1e6:.0f} MB at most",
    }
