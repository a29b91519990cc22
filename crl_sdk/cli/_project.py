"""`crl project`: project stored universal embeddings onto bases."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from crl_sdk.bulk._add_criteria import add_criteria
from crl_sdk.cli._console import JsonOption, note, print_facts, print_json, progress_bar, warn
from crl_sdk.cli._options import DEFAULT_BASES, BasesOption, DtypeOption, load_basis, parse_criteria
from crl_sdk.errors import CrlError, InvalidInputError
from crl_sdk.model._bundle import ModelBundle
from crl_sdk.model._fingerprint import require_same_model, short_fingerprint
from crl_sdk.stored._directory import EmbeddingDirectory
from crl_sdk.stored._project import RECORD, project_stored
from crl_sdk.stored._reader import StoredEmbeddings


def project(
    stored: Annotated[
        Path,
        typer.Argument(
            help="Universal embeddings: .npz, .parquet or a directory from `crl embed`, or .npy of "
            "shape (n, d)."
        ),
    ],
    criteria: Annotated[str, typer.Option(help="Names of bases, separated by commas.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Directory to write to. Without it, a directory of `crl embed` itself gets a "
            "column for each criterion.",
        ),
    ] = None,
    dtype: DtypeOption = "float32",
    bundle: Annotated[
        Path | None,
        typer.Option(
            "--bundle",
            "-b",
            envvar="CRL_BUNDLE",
            help="Model bundle that made the embeddings, to verify that it did.",
        ),
    ] = None,
    bases: BasesOption = DEFAULT_BASES,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Number of threads. Default: one per core.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Project stored embeddings onto criteria, without images and without the model."""
    names = parse_criteria(criteria)
    if not names:
        raise InvalidInputError("--criteria: expected at least one, such as 'color, shape'")
    if out is None:
        if not stored.is_dir():
            raise InvalidInputError(
                f"--out: expected a directory to write to; only a directory of crl embed can take "
                f"further criteria itself, and {stored} is none"
            )
        _add_columns(stored, names, dtype=dtype, bundle=bundle, bases=bases, as_json=as_json)
        return
    opened = StoredEmbeddings.open(stored)
    fingerprint = ModelBundle.open(bundle).fingerprint if bundle is not None else None
    model = opened.fingerprint or fingerprint
    loaded = [load_basis(bases, name, model, bundle) for name in names]
    if opened.fingerprint is None and fingerprint is None:
        warn(
            f"{stored} does not say which model made it; assuming the model of the bases, "
            f"{short_fingerprint(loaded[0].fingerprint)}"
        )
    if not opened.mapped:
        note(f"{stored}: compressed, so it is loaded into memory")
    started = time.perf_counter()
    with progress_bar() as progress:
        task = progress.add_task("projecting", total=len(opened.embeddings))
        record = project_stored(
            opened,
            loaded,
            out,
            fingerprint=fingerprint,
            dtype=dtype,
            overwrite=overwrite,
            threads=threads,
            progress=lambda done: progress.update(task, completed=done),
        )
    seconds = time.perf_counter() - started
    facts: dict[str, Any] = {
        "out": str(out),
        "rows": len(opened.embeddings),
        **msgspec.to_builtins(record),
        "seconds": round(seconds, 3),
    }
    if as_json:
        print_json(facts)
    else:
        shown = {
            each.criterion: f"{each.file} {each.shape} {each.dtype}" for each in record.outputs
        }
        print_facts(
            str(out / RECORD),
            {"rows": facts["rows"], **shown, "fingerprint": record.fingerprint,
             "seconds": facts["seconds"]},
        )  # fmt: skip


def _add_columns(
    stored: Path,
    names: Sequence[str],
    *,
    dtype: str,
    bundle: Path | None,
    bases: Path,
    as_json: bool,
) -> None:
    """Add criteria to a directory of `crl embed`. No image is read."""
    directory = EmbeddingDirectory.open(stored)
    if dtype not in ("float32", directory.manifest.dtype):
        raise InvalidInputError(
            f"--dtype: the columns of {stored} have the dtype {directory.manifest.dtype}, got "
            f"{dtype}: leave the option out"
        )
    if bundle is not None:
        require_same_model(
            str(stored), directory.fingerprint, ModelBundle.open(bundle).fingerprint,
            remedy="name the bundle that made the embeddings",
        )  # fmt: skip
    loaded = [load_basis(bases, name, directory.fingerprint, bundle) for name in names]
    started = time.perf_counter()
    try:
        with progress_bar() as progress:
            task = progress.add_task("projecting", total=directory.manifest.rows)
            add_criteria(stored, loaded, lambda done: progress.update(task, completed=done))
    except (CrlError, KeyboardInterrupt):
        note("no part is half done; run the same command again to go on")
        raise
    seconds = round(time.perf_counter() - started, 3)
    after = EmbeddingDirectory.open(stored).manifest
    facts = {
        "out": str(stored), "rows": after.rows, "added": list(names),
        "criteria": list(after.criteria), "fingerprint": after.fingerprint, "seconds": seconds,
    }  # fmt: skip
    if as_json:
        print_json(facts)
    else:
        shown = {**facts, "added": ", ".join(names), "criteria": ", ".join(after.criteria)}
        print_facts(str(stored), {name: shown[name] for name in shown if name != "out"})
