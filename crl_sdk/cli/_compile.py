"""`crl compile`: compile a bundle's image graph to a TensorRT plan, or the projection kernel."""

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
        PlanRuntime,
        typer.Option(help="TensorRT to use; tensorrt compiles only for this machine's GPU."),
    ] = "tensorrt-rtx",
    precision: Annotated[
        Literal["fp16", "fp32"],
        typer.Option(help="Precision of the bundle's graph to compile."),
    ] = "fp16",
    arch: Annotated[
        str,
        typer.Option(help="GPU architectures, such as sm86,sm89; all supported ones if empty."),
    ] = "",
    batch: Annotated[
        str, typer.Option(help="Images per run, min:opt:max; tuned for opt.")
    ] = "1:8:32",
    max_columns: Annotated[
        int, typer.Option(help="Maximum number of columns of all bases together.")
    ] = 4096,
    baked: Annotated[
        Path | None,
        typer.Option(help="Basis file to compile into the plan as a constant."),
    ] = None,
    out_dir: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Output directory; BUNDLE/engines by default."),
    ] = None,
    force: Annotated[bool, typer.Option(help="Compile even if the plan exists already.")] = False,
    kernel: Annotated[
        bool,
        typer.Option(
            "--kernel",
            help="Compile the projection kernel for stored embeddings instead. It uses only --arch "
            "and --out.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Compile the image tower and projection to a TensorRT plan. TensorRT-RTX needs no GPU."""
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
    note(f"{'found' if compiled.cached else 'wrote'} {compiled.path}; crl verify tests it on a GPU")
    plan = compiled.plan
    if as_json:
        file = {"path": str(compiled.path), "cached": compiled.cached}
        print_json({**file, **msgspec.to_builtins(plan)})
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
    note(
        f"wrote {len(kernels.variants)} kernels to {folder}; crl verify --kernel tests them on a "
        "GPU"
    )
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
    minimum, usual, maximum = (int(part) for part in parts)
    return minimum, usual, maximum


def _facts(plan: Plan) -> dict[str, object]:
    spec = plan.spec
    return {
        "runtime": f"{spec.runtime} {spec.runtime_version}",
        "architectures": ", ".join(spec.architectures),
        "precision": spec.precision,
        "images per run": f"{spec.batch[0]} to {spec.batch[2]}, fastest at {spec.batch[1]}",
        "basis": spec.baked.criterion if spec.baked else f"any, {spec.max_columns} columns",
        "size": f"{plan.bytes / 1e6:.1f} MB",
        "layers": plan.layers,
        "projection": ", ".join(plan.projection),
        "compiled in": f"{plan.seconds:.1f} s, {plan.peak_memory / 1e6:.0f} MB of memory",
    }
