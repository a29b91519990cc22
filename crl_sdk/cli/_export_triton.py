"""`crl export-triton`: write a model repository of Triton from a bundle and its bases."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import typer

from crl_sdk.cli._console import JsonOption, note, print_facts, print_json, progress_bar
from crl_sdk.cli._options import DEFAULT_BASES, BasesOption, ThreadsOption
from crl_sdk.errors import InvalidInputError, MissingDependencyError
from crl_sdk.model._bundle import ModelBundle

if TYPE_CHECKING:
    from crl_export.triton_server.repository import Written


def export_triton(
    bundle: Annotated[Path, typer.Argument(help="Model bundle, from `crl export`.")],
    out_dir: Annotated[Path, typer.Option("--out", "-o", help="Directory of the repository.")],
    bases: BasesOption = DEFAULT_BASES,
    update: Annotated[
        bool,
        typer.Option(
            "--update",
            help="Add new and changed bases to an existing repository. It keeps its options.",
        ),
    ] = False,
    precision: Annotated[
        Literal["fp32", "fp16", "int8"] | None,
        typer.Option(help="Precision of the tower. Default: fp32."),
    ] = None,
    backend: Annotated[
        Literal["onnxruntime", "tensorrt", "python"] | None,
        typer.Option(
            help="What runs the tower. tensorrt takes a plan of the bundle (`crl compile --runtime "
            "tensorrt --baked`); python runs ONNX Runtime in a model.py, also for the bases. "
            "Default: onnxruntime."
        ),
    ] = None,
    device: Annotated[
        Literal["cpu", "gpu"] | None,
        typer.Option(help="Device of the tower. Default: cpu."),
    ] = None,
    accelerator: Annotated[
        Literal["tensorrt", "openvino"] | None,
        typer.Option(help="Execution accelerator of ONNX Runtime. Default: none."),
    ] = None,
    instances: Annotated[
        int | None, typer.Option(help="Instances of the tower, on each device. Default: 1.")
    ] = None,
    threads: ThreadsOption = None,
    max_batch: Annotated[
        int | None, typer.Option(help="Largest batch that Triton forms. Default: 32.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a model repository for NVIDIA's Triton Inference Server.

    It has an ensemble `crl_NAME` for each basis, which takes encoded images, and `crl_pixels_NAME`,
    which takes pixels.
    """
    try:
        from crl_export.triton_server.repository import (
            Options,
            export_repository,
            update_repository,
        )
    except ImportError as error:
        raise MissingDependencyError(
            error.name or "onnx", "export", "crl export-triton",
            otherwise="or without torch: pip install 'crl-embeddings[cpu]' onnx",
        ) from error  # fmt: skip

    values: dict[str, Any] = {
        "precision": precision, "backend": backend, "device": device, "accelerator": accelerator,
        "instances": instances, "threads": threads, "max_batch": max_batch,
    }  # fmt: skip
    given = {name: value for name, value in values.items() if value is not None}
    if update and given:
        flag = "--" + next(iter(given)).replace("_", "-")
        raise InvalidInputError(
            f"--update keeps the options of the repository, got {flag}; leave it out, or write a "
            "new repository"
        )
    with progress_bar() as progress:
        task = progress.add_task("reading the bundle", total=None)

        def show(stage: str, done: int, total: int) -> None:
            progress.update(task, description=stage, completed=done, total=total)

        opened = ModelBundle.open(bundle)
        written = (
            update_repository(opened, bases, out_dir, progress=show)
            if update
            else export_repository(opened, bases, out_dir, Options(**given), progress=show)
        )
    _print(written, update, as_json)


def _print(written: Written, update: bool, as_json: bool) -> None:
    repository = written.repository
    note(f"{'updated' if update else 'wrote'} {written.path}")
    if written.kept:
        note(f"kept, without a basis in the directory: {', '.join(written.kept)}")
    if not update:
        note(
            f"serve it: tritonserver --model-repository={written.path} "
            "--model-control-mode=explicit --load-model='*'"
        )
    elif not written.load:
        note("nothing has changed")
    else:
        for model in written.load:
            note(f"load it: curl -X POST localhost:8000/v2/repository/models/{model}/load")
    if as_json:
        described = {"path": str(written.path), "load": list(written.load)}
        print_json({**described, **msgspec.to_builtins(repository)})
        return
    options = repository.options
    runs = f"{options.backend}, {options.device}, {options.precision}"
    facts: dict[str, object] = {
        "fingerprint": repository.fingerprint,
        "tower": runs + (f", {options.accelerator}" if options.accelerator else ""),
        "largest batch": options.max_batch,
    }
    for criterion, basis in repository.bases.items():
        facts[criterion] = f"crl_{basis.name}, crl_pixels_{basis.name}; version {basis.version}"
    print_facts(str(written.path), facts)
