"""`crl embed`: embed images and write an .npz or .parquet file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from crl_sdk._criterion import normalise_criterion
from crl_sdk._embeddings import Embeddings
from crl_sdk.cli._console import JsonOption, leave_out, print_facts, print_json, progress_bar, warn
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
    require_new,
)
from crl_sdk.errors import InvalidInputError, MissingDependencyError
from crl_sdk.model._image_files import find_image_files, printable_path
from crl_sdk.model._image_formats import parse_formats
from crl_sdk.model._preprocess import ImageLimits
from crl_sdk.projection._row_dtypes import RowDtype, encode_rows, require_row_dtype
from crl_sdk.storage._atomic_files import new_file
from crl_sdk.stored._reader import UNIVERSAL


def embed(
    images: Annotated[
        list[Path], typer.Argument(help="Image files, and directories to search for image files.")
    ],
    out_file: Annotated[
        Path, typer.Option("--out", "-o", help="The .npz or .parquet file to write.")
    ],
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
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Embed images and write their embeddings to a file.

    Images that cannot be read are listed and left out, and the exit status is then 1.
    """
    _check_out(out_file)
    require_new(out_file, overwrite=overwrite)
    limits = ImageLimits(formats=parse_formats(formats))
    paths = find_image_files(images, formats=limits.formats, leave_out=leave_out)
    names = [normalise_criterion(part) for part in criteria.split(",") if part.strip()]
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


def _check_out(path: Path) -> None:
    if path.suffix not in (".npz", ".parquet"):
        raise InvalidInputError(f"--out: expected a .npz or .parquet file, got {str(path)!r}")
    if path.suffix == ".parquet":
        _pyarrow()


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
            pa, parquet = _pyarrow()
            columns = {"path": pa.array(names)}
            for name, rows in arrays.items():
                columns[name] = pa.FixedSizeListArray.from_arrays(
                    pa.array(rows.ravel()), rows.shape[1]
                )
            table = pa.table(columns).replace_schema_metadata({"crl_fingerprint": fingerprint})
            parquet.write_table(table, file)


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingDependencyError("pyarrow", "parquet", "writing .parquet files") from error
    return pyarrow, parquet
