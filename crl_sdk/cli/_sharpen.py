"""`crl basis sharpen`: make the map of a basis again with images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from crl_sdk.basis._directory import BasisDirectory
from crl_sdk.cli._basis import print_basis, save
from crl_sdk.cli._console import JsonOption, warn
from crl_sdk.cli._options import (
    DEFAULT_BASES,
    BasesOption,
    BundleOption,
    DecodeOption,
    EngineOption,
    FormatsOption,
    ThreadsOption,
    command,
    load_basis,
)
from crl_sdk.cli._sources import (
    LazyEmbedder,
    read_label_table,
    require_same_model,
    require_tasks,
)
from crl_sdk.errors import InvalidInputError
from crl_sdk.tasks._sharpen import SHARPENED_METHOD
from crl_sdk.tasks._sharpen import sharpen as sharpen_basis


def sharpen(
    criterion: Annotated[str, typer.Argument(help="Name of the basis.")],
    images: Annotated[
        Path,
        typer.Option(
            help="Images of the kind the basis is used for, better 300 or more: a directory, or a "
            "file of embeddings from `crl embed`."
        ),
    ],
    labels: Annotated[
        Path | None,
        typer.Option(
            help="CSV file with a header and the columns `file`, relative to the directory, and "
            "`label`, for some or all of the images. Ten images of a class are enough."
        ),
    ] = None,
    column: Annotated[
        str, typer.Option(help="With --labels: name of the column with the labels.")
    ] = "label",
    bundle: BundleOption = None,
    bases: BasesOption = DEFAULT_BASES,
    engine: EngineOption = "auto",
    threads: ThreadsOption = None,
    decode: DecodeOption = "exact",
    formats: FormatsOption = "",
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds give equal bases.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Sharpen a basis with images of the kind it is used for.

    The images need no labels. What varies within their clusters counts less from then on. The
    basis is replaced, and what it was sharpened with is recorded in it. Make it again with `crl
    basis create --overwrite` to undo this.
    """
    require_tasks("crl basis sharpen")
    with LazyEmbedder(bundle, engine, threads, decode, formats) as model:
        found = model.read([images])
    basis = load_basis(bases, criterion, found.fingerprint, bundle)
    require_same_model(found, [basis])
    given = None
    if labels is not None:
        directory = Path() if found.files is None else images
        table = read_label_table(directory, labels, column)
        given = [table.get(Path(name), "") for name in found.names]
        if missing := len(table) - sum(label != "" for label in given):
            warn(f"{labels}: {missing} of {len(table)} files are not among the images")
    if basis.method != SHARPENED_METHOD:
        texts = [word for text in basis.texts for word in ("--text", text)]
        again = command(
            "basis", "create", basis.criterion, *texts, "--method", SHARPENED_METHOD, "--overwrite",
            bundle=bundle, bases=bases,
        )  # fmt: skip
        raise InvalidInputError(
            f"basis {basis.criterion!r} has the method {basis.method!r}; only {SHARPENED_METHOD!r} "
            f"can be sharpened: make it again with {again}"
        )
    result = sharpen_basis(basis, found.universal, given, source=str(images), seed=seed)
    for reason in result.reasons:
        warn(reason)
    path = BasisDirectory(bases).path_of(criterion, basis.fingerprint)
    save(result.basis, path)
    print_basis(result.basis, path, as_json)
    if found.failed:
        raise typer.Exit(1)
