"""`crl embed`: embed images and write a file, or a directory of parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from crl_sdk._embeddings import Embeddings
from crl_sdk.bulk._job import DEFAULT_PART_ROWS, BulkJob
from crl_sdk.bulk._sources import ParquetColumns
from crl_sdk.cli._console import JsonOption, leave_out, print_facts, print_json, progress_bar, warn
from crl_sdk.cli._embed_directory import RunParts, embed_directory
from crl_sdk.cli._options import (
    DEFAULT_BASES,
    BakedOption,
    BasesOption,
    BundleOption,
    DecodeOption,
    DtypeOption,
    EngineOption,
    FormatsOption,
    OverwriteOption,
    ThreadsOption,
    load_basis,
    open_bundle,
    open_embedder,
    parse_criteria,
    require_new,
)
from crl_sdk.errors import InvalidInputError
from crl_sdk.model._image_files import find_image_files, printable_path
from crl_sdk.model._image_formats import parse_formats
from crl_sdk.model._preprocess import ImageLimits
from crl_sdk.projection._row_dtypes import RowDtype, encode_rows, require_row_dtype
from crl_sdk.storage._atomic_files import new_file
from crl_sdk.stored._directory import UNIVERSAL, import_pyarrow


def embed(
    context: typer.Context,
    out_file: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help="The .npz or .parquet file to write, or a directory for any number of images.",
        ),
    ],
    images: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Image files, and directories to search for image files. Into a directory also "
            ".tar archives, .parquet files, and .txt lists of paths."
        ),
    ] = None,
    criteria: Annotated[
        str, typer.Option(help="Criteria whose bases to use, separated by commas.")
    ] = "",
    bundle: BundleOption = None,
    bases: BasesOption = DEFAULT_BASES,
    engine: EngineOption = "auto",
    baked: BakedOption = None,
    threads: ThreadsOption = None,
    decode: DecodeOption = "exact",
    formats: FormatsOption = "",
    dtype: DtypeOption = "float32",
    batch_size: Annotated[int, typer.Option(min=1, help="Images per engine run.")] = 32,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a directory that is not complete.")
    ] = False,
    part_rows: Annotated[
        int, typer.Option(min=1, help="Rows of a part of a directory.")
    ] = DEFAULT_PART_ROWS,
    image_column: Annotated[
        str, typer.Option(help="Column of .parquet sources with encoded images.")
    ] = "",
    path_column: Annotated[
        str, typer.Option(help="Column of .parquet sources with paths of images.")
    ] = "",
    id_column: Annotated[
        str, typer.Option(help="Column of .parquet sources with names of rows.")
    ] = "",
    ray: Annotated[
        str,
        typer.Option(
            help="Ray cluster that makes the parts of a directory: host:port, auto or local."
        ),
    ] = "",
    ray_workers: Annotated[
        int | None,
        typer.Option(min=1, help="Workers on the cluster; default: what it has room for."),
    ] = None,
    ray_cpus: Annotated[
        float, typer.Option(min=0.1, help="Processors of a worker, which are its threads.")
    ] = 1.0,
    ray_gpus: Annotated[float, typer.Option(min=0, help="GPUs of a worker.")] = 0.0,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Embed images, into a file or a directory.

    Into a file, images that cannot be read are listed and left out. Into a directory, they are rows
    without embeddings, with the reason. The exit status is then 1. A directory may be interrupted
    at any moment; --resume goes on.
    """
    names = parse_criteria(criteria)
    if _is_directory(out_file):
        if baked is not None or overwrite:
            raise InvalidInputError(
                f"--{'baked' if baked is not None else 'overwrite'}: only for a file, and --out "
                f"{out_file} is a directory"
            )
        options = {
            "engine": engine, "threads": threads, "decode": decode, "formats": formats,
            "dtype": dtype, "batch_size": batch_size, "part_rows": part_rows,
        }  # fmt: skip
        given = {
            name: value
            for name, value in {**options, "criteria": names, "bundle": bundle}.items()
            if (source := context.get_parameter_source(name)) and source.name != "DEFAULT"
        }
        with _parts_runner(ray, ray_workers, ray_cpus, ray_gpus) as run:
            embed_directory(
                out_file, images or [], given, bundle=bundle, bases=bases, criteria=names,
                options=options, columns=ParquetColumns(image_column, path_column, id_column),
                resume=resume, as_json=as_json, run=run,
            )  # fmt: skip
        return
    if ray:
        raise InvalidInputError(f"--ray: only for a directory; --out {out_file} is a file")
    if resume or image_column or path_column or id_column or part_rows != DEFAULT_PART_ROWS:
        raise InvalidInputError(
            f"--resume, --part-rows and columns: only for a directory; --out {out_file} is a file"
        )
    if not images:
        raise InvalidInputError("expected images to embed, got none; see crl embed --help")
    _check_out(out_file)
    require_new(out_file, overwrite=overwrite)
    limits = ImageLimits(formats=parse_formats(formats))
    paths = find_image_files(images, formats=limits.formats, leave_out=leave_out)
    opened = open_bundle(bundle)
    loaded = [load_basis(bases, name, opened.fingerprint, bundle) for name in names]
    for basis in loaded:
        require_row_dtype(dtype, basis.projection.post)
    with (
        open_embedder(opened, engine, threads, baked, decode, limits) as embedder,
        progress_bar() as progress,
    ):
        task = progress.add_task("embedding", total=len(paths))
        result = embedder.embed(
            paths,
            loaded,
            batch_size=batch_size,
            on_error="collect",
            progress=lambda done: progress.update(task, completed=done),
        )
        engine, fingerprint = embedder.engine, embedder.bundle.fingerprint
    good = [path for path, ok in zip(paths, result.ok, strict=True) if ok]
    if good:
        _write(out_file, good, result, fingerprint, dtype)
    summary: dict[str, Any] = {
        "out": str(out_file) if good else None,
        "images": len(good),
        "failed": [
            {"path": printable_path(paths[i]), "reason": error.reason}
            for i, error in result.errors.items()
        ],
        "universal": result.universal.shape[1],
        "conditional": {name: result[name].shape[1] for name in names},
        "dtype": dtype,
        "engine": engine,
        "fingerprint": fingerprint,
    }
    if as_json:
        print_json(summary)
    else:
        for error in result.errors.values():
            warn(str(error))
        sizes = [f"{name} {size}" for name, size in summary["conditional"].items()]
        print_facts(
            str(out_file) if good else "nothing written",
            {
                "images": len(good),
                "failed": len(result.errors),
                "universal": f"{summary['universal']} values",
                "conditional": f"{', '.join(sizes)} values" if sizes else "none",
                "dtype": dtype,
                "engine": engine,
                "fingerprint": fingerprint,
            },
        )
    if result.errors:
        raise typer.Exit(1)


def _is_directory(path: Path) -> bool:
    if path.suffix in (".npz", ".parquet"):
        return False
    if path.suffix[1:].isalpha() and not path.is_dir():  # a slip, rather than a directory
        raise InvalidInputError(
            f"--out: expected a .npz or .parquet file, or a directory, got {str(path)!r}"
        )
    return True


@contextmanager
def _parts_runner(
    ray: str, workers: int | None, processors: float, gpus: float
) -> Iterator[RunParts]:
    """Yield what makes the parts of a job: this process, or a cluster that has answered."""
    if not ray:
        yield BulkJob.run
        return
    from crl_sdk.integrations.ray._bulk import RayWorkers, run_on_ray
    from crl_sdk.integrations.ray._cluster import connect

    with connect(ray):
        yield partial(run_on_ray, address=ray, workers=RayWorkers(workers, processors, gpus))


def _check_out(path: Path) -> None:
    if path.suffix == ".parquet":
        import_pyarrow("writing .parquet files")


def _write(
    path: Path, images: Sequence[Path], result: Embeddings, fingerprint: str, dtype: RowDtype
) -> None:
    """Write the embeddings of readable images, with their paths and the model's fingerprint."""
    names = [printable_path(image) for image in images]
    given = {UNIVERSAL: result.universal, **result.conditional}
    arrays: dict[str, Any] = {
        name: encode_rows(rows[result.ok], dtype) for name, rows in given.items()
    }
    with new_file(path, InvalidInputError) as file:
        if path.suffix == ".npz":
            np.savez(file, path=np.array(names), fingerprint=np.array(fingerprint), **arrays)
        else:
            pa, parquet = import_pyarrow("writing .parquet files")
            columns = {"path": pa.array(names)}
            for name, rows in arrays.items():
                columns[name] = pa.FixedSizeListArray.from_arrays(
                    pa.array(rows.ravel()), rows.shape[1]
                )
            table = pa.table(columns).replace_schema_metadata({"crl_fingerprint": fingerprint})
            parquet.write_table(table, file)
