"""`crl store`: write stored embeddings to a vector store, one vector for each criterion."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from crl_sdk.cli._console import JsonOption, note, print_facts, print_json, progress_bar, warn
from crl_sdk.cli._options import (
    DEFAULT_BASES,
    BasesOption,
    PasswordOption,
    load_basis,
    parse_criteria,
)
from crl_sdk.model._bundle import ModelBundle
from crl_sdk.model._fingerprint import short_fingerprint
from crl_sdk.vector_stores._address import parse_address
from crl_sdk.vector_stores._load import LoadReport, store_embeddings
from crl_sdk.vector_stores._open import open_store
from crl_sdk.vector_stores._registry import FORMS
from crl_sdk.vector_stores._rows import StoredRows

_INTERRUPTED = 130  # exit status of a program that Ctrl-C ended


def store(
    stored: Annotated[
        Path,
        typer.Argument(
            help="Universal embeddings: a directory, .npz or .parquet from `crl embed`, or .npy of "
            "shape (n, d)."
        ),
    ],
    to: Annotated[
        str,
        typer.Option(
            help=f"Store: {' or '.join(FORMS)}. `#NAME` at the end names the table, where the "
            "address names no COLLECTION."
        ),
    ],
    criteria: Annotated[
        str, typer.Option(help="Criteria whose vectors to write, separated by commas.")
    ] = "",
    universal: Annotated[
        bool,
        typer.Option(help="Whether to write the universal embeddings too."),
    ] = True,
    password: PasswordOption = "",
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
    as_json: JsonOption = False,
) -> None:
    """Write stored embeddings to a vector store, with one vector for each criterion.

    A run that was stopped is repeated as it was, and goes on where it stopped. A criterion can be
    added later.
    """
    address = parse_address(to, password)
    names = parse_criteria(criteria)
    rows = StoredRows.open(stored)
    fingerprint = ModelBundle.open(bundle).fingerprint if bundle is not None else None
    model = rows.fingerprint or fingerprint
    loaded = [load_basis(bases, name, model, bundle) for name in names]
    if model is None and loaded:
        warn(
            f"{stored} does not say which model made it; assuming the model of the bases, "
            f"{short_fingerprint(loaded[0].fingerprint)}"
        )
    latest = LoadReport(total=rows.size)
    with open_store(address) as opened, progress_bar() as progress:
        task = progress.add_task("storing", total=rows.size)

        def show(report: LoadReport) -> None:
            nonlocal latest
            latest = report
            progress.update(task, completed=report.done)

        try:
            report = store_embeddings(
                rows, opened, loaded,
                universal=universal, fingerprint=fingerprint, progress=show,
            )  # fmt: skip
        except KeyboardInterrupt:
            note(f"stopped: {latest.progress()}; run the same command again to go on")
            raise typer.Exit(_INTERRUPTED) from None
        size = opened.count()
    facts: dict[str, Any] = {
        "store": str(address),
        "rows": size,
        "new": report.new,
        "completed": report.completed,
        "there_before": report.there,
        "failed_left_out": report.failed,
        "vectors": dict(report.fields),
        "seconds": round(report.seconds, 3),
    }
    if as_json:
        print_json(facts)
        return
    vectors = [f"{name} as {field}" if name != field else name for name, field in
               report.fields.items()]  # fmt: skip
    print_facts(
        str(address),
        {
            "rows in the store": f"{size:,}",
            "new": f"{report.new:,}",
            "completed": f"{report.completed:,} (were there and got further vectors)",
            "there before": f"{report.there:,}",
            "left out": f"{report.failed:,} (images that failed)",
            "vectors": ", ".join(vectors),
            "seconds": facts["seconds"],
        },
    )
