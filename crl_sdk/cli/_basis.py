"""`crl basis`: make the basis of a criterion, edit its texts, and show it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from rich.markup import escape
from rich.table import Table

from crl_sdk.basis._basis import Basis
from crl_sdk.basis._build import edit_basis
from crl_sdk.basis._curated import curated_lists, require_curated
from crl_sdk.basis._directory import BasisDirectory
from crl_sdk.basis._methods import find_method
from crl_sdk.cli._console import JsonOption, note, out, print_facts, print_json, warn
from crl_sdk.cli._options import (
    DEFAULT_BASES,
    BasesOption,
    BundleOption,
    command,
    load_basis,
    open_bundle,
    open_embedder,
)
from crl_sdk.errors import BasisError, CrlError, InvalidInputError
from crl_sdk.model._bundle import ModelBundle
from crl_sdk.serving._shared_bases import SharedBasisStore
from crl_sdk.storage._atomic_files import make_directory
from crl_sdk.storage._checksummed_safetensors import SUFFIX

app = typer.Typer(help="Make, edit and show bases.", no_args_is_help=True)


@app.command("edit")
def edit(
    criterion: Annotated[str, typer.Argument(help="Name of the basis.")],
    add: Annotated[list[str] | None, typer.Option(help="A text to add; may be repeated.")] = None,
    remove: Annotated[
        list[str] | None, typer.Option(help="A text to remove; may be repeated.")
    ] = None,
    in_editor: Annotated[
        bool,
        typer.Option("--edit", help="Change the texts in your editor ($EDITOR), one on each line."),
    ] = False,
    bundle: BundleOption = None,
    bases: BasesOption = DEFAULT_BASES,
    as_json: JsonOption = False,
) -> None:
    """Add texts to a basis, or remove some.

    The basis is made again with the same prompts, method and other criteria, whose bases are read
    from --bases. What it learnt from images is lost: sharpen it again.
    """
    if not (add or remove or in_editor):
        raise InvalidInputError("expected --add TEXT, --remove TEXT or --edit")
    opened = open_bundle(bundle)
    basis = load_basis(bases, criterion, opened.fingerprint, bundle)
    path = BasisDirectory(bases).path_of(criterion, opened.fingerprint)
    if in_editor:
        add, remove = _edit_texts(basis, add or (), remove or ())
    if not add and not remove:
        note("the texts are as they were: nothing was changed")
        return
    roles = {
        role: [
            load_basis(bases, name, opened.fingerprint, bundle)
            for name in basis.provenance.get(role, ())
        ]
        for role in ("against", "ignore")
    }
    with open_embedder(opened) as embedder:
        warn_without_background(opened, basis.method)
        changed = edit_basis(
            basis, embedder.embed_text, fingerprint=embedder.bundle.fingerprint,
            add=add or (), remove=remove or (), background=embedder.bundle.background, **roles,
        )  # fmt: skip
    save(changed, path)
    if "sharpened" in basis.provenance:
        again = command(
            "basis", "sharpen", basis.criterion, "--images", "DIR", bundle=bundle, bases=bases
        )
        warn(f"the basis had been sharpened with images, which it no longer is: run {again}")
    print_basis(changed, path, as_json)


def _edit_texts(
    basis: Basis, add: Sequence[str], remove: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Let the user change the texts in an editor. Returns the texts to add and to remove.

    Raises:
        InvalidInputError: If the editor cannot be run.
    """
    before = [*basis.texts, *(text for text in add if text not in basis.texts)]
    offered = "".join(f"{text}\n" for text in before if text not in remove)
    try:
        changed = click.edit(offered, extension=".txt", require_save=False)
    except click.ClickException as error:
        raise InvalidInputError(
            f"the editor cannot be run ({error.message}): set $EDITOR, or use --add and --remove"
        ) from error
    lines = offered if changed is None else changed
    after = [line.strip() for line in lines.splitlines() if line.strip()]
    return (
        [text for text in after if text not in basis.texts],
        [text for text in basis.texts if text not in after],
    )


@app.command("show")
def show(
    name: Annotated[str, typer.Argument(help="Name of a basis, or a basis file.")],
    bundle: Annotated[
        Path | None,
        typer.Option(
            "--bundle", "-b", envvar="CRL_BUNDLE", help="Model, if several have such a basis."
        ),
    ] = None,
    bases: BasesOption = DEFAULT_BASES,
    as_json: JsonOption = False,
) -> None:
    """Verify a basis and print its content."""
    fingerprint = None if bundle is None else ModelBundle.open(bundle).fingerprint
    basis = load_basis(bases, name, fingerprint, bundle)
    is_file = name.endswith(SUFFIX)
    path = Path(name) if is_file else BasisDirectory(bases).path_of(name, basis.fingerprint)
    print_basis(basis, path, as_json)


@app.command("curated")
def curated(
    name: Annotated[
        str, typer.Argument(help="Criterion of a list. Without it, all lists are named.")
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """Show the lists of texts that were written by hand.

    `crl basis create NAME --curated` makes a basis of one. To change it first, write it to a file:
    `crl basis curated color > color.txt`, and then `crl basis create color --texts color.txt`.
    """
    lists = [require_curated(name)] if name else list(curated_lists().values())
    if as_json:
        print_json({each.name: asdict(each) for each in lists})
    elif name:
        typer.echo("\n".join(lists[0].texts))
    else:
        table = Table("list", "texts", "other names", "begins with")
        for each in lists:
            names, texts = ", ".join(each.aliases), ", ".join(each.texts[:4])
            table.add_row(each.name, str(len(each.texts)), names, texts)
        out.print(table)


@app.command("list")
def list_bases(bases: BasesOption = DEFAULT_BASES, as_json: JsonOption = False) -> None:
    """List the bases of all models."""
    found, broken = [], []
    for path in BasisDirectory(bases).files():
        try:
            found.append((path, Basis.load(path)))
        except CrlError as error:
            broken.append({"path": str(path), "reason": str(error)})
            warn(str(error))
    if as_json:
        listed = [
            {"path": str(path), "criterion": basis.criterion, "fingerprint": basis.fingerprint,
             "method": basis.method, "texts": len(basis.texts),
             "columns": basis.projection.output_dim}
            for path, basis in found
        ]  # fmt: skip
        print_json({"bases": listed, "broken": broken})
    elif found:
        table = Table("model", "criterion", "method", "texts", "columns")
        for path, basis in found:
            table.add_row(
                path.parent.name, basis.criterion, basis.method, str(len(basis.texts)),
                str(basis.projection.output_dim),
            )  # fmt: skip
        out.print(table)
    else:
        note(
            f"no bases in {bases}. To make one: {command('basis', 'create', 'color', bases=bases)}"
        )
    if broken:
        raise typer.Exit(1)


@app.command("publish")
def publish(
    names: Annotated[
        list[str] | None, typer.Argument(help="Bases, or basis files. Default: all of --bases.")
    ] = None,
    to: Annotated[
        str,
        typer.Option(
            help="Directory or URL, such as s3://bucket/bases, of `crl serve --shared-bases`."
        ),
    ] = "",
    bundle: Annotated[
        Path | None,
        typer.Option(
            "--bundle", "-b", envvar="CRL_BUNDLE", help="Publish bases of this model only."
        ),
    ] = None,
    bases: BasesOption = DEFAULT_BASES,
    as_json: JsonOption = False,
) -> None:
    """Put bases where servers share them. Running servers see them within seconds."""
    if not to:
        raise InvalidInputError("expected --to DIRECTORY or --to URL, the place of shared bases")
    fingerprint = None if bundle is None else ModelBundle.open(bundle).fingerprint
    if names:
        found = [load_basis(bases, name, fingerprint, bundle) for name in names]
    else:
        found = [Basis.load(path) for path in BasisDirectory(bases).files()]
        found = [each for each in found if fingerprint in (None, each.fingerprint)]
    if not found:
        raise InvalidInputError(
            f"expected bases in {bases}, found none; run {command('basis', 'list', bases=bases)}"
        )
    stores = {each.fingerprint: SharedBasisStore(to, each.fingerprint) for each in found}
    published = []
    for basis in found:  # all have been read, so that a damaged one stops the command before
        stored, replaced = stores[basis.fingerprint].put(basis)
        published.append(
            {"criterion": basis.criterion, "fingerprint": basis.fingerprint,
             "sha256": stored.sha256, "replaced": replaced}
        )  # fmt: skip
    if as_json:
        print_json({"to": to, "bases": published})
        return
    note(f"{to}: published {', '.join(sorted(basis.criterion for basis in found))}")


def save(basis: Basis, path: Path) -> None:
    """Write a basis, create its directory if necessary, and report merged texts.

    Raises:
        BasisError: If the directory or the file cannot be written.
    """
    make_directory(path.parent, BasisError)
    basis.save(path)
    if basis.merged:
        pairs = ", ".join(f"{m.text} → {m.into}" for m in basis.merged)
        warn(f"texts merged into others: {pairs}")
    note(f"wrote {path}")


def read_texts(path: Path) -> list[str]:
    """Read texts from a UTF-8 file with one text per line.

    Raises:
        InvalidInputError: If the file cannot be read, is not UTF-8, or has no text.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise InvalidInputError(
            f"{path}: cannot be read ({error.strerror}); check the path"
        ) from error
    except UnicodeDecodeError as error:
        raise InvalidInputError(
            f"{path}: expected UTF-8 with one text per line ({error.reason} at byte "
            f"{error.start}); save it as UTF-8"
        ) from error
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise InvalidInputError(f"{path}: expected one text per line, the file has none")
    return texts


def print_basis(basis: Basis, path: Path, as_json: bool) -> None:
    """Print what a basis holds."""
    if as_json:
        print_json(_document(basis, path))
        return
    print_facts(
        str(path),
        {
            "criterion": basis.criterion,
            "model": basis.fingerprint,
            "projection": f"{basis.method}, {basis.projection.input_dim} → "
            f"{basis.projection.output_dim}, post {basis.projection.post}",
            "prompts": " | ".join(basis.prompts),
            "merged from cosine": f"{basis.merge_threshold:g}",
            **_made_with(basis),
        },
    )
    columns: dict[str, list[str]] = {"text": list(basis.texts)}
    if votes := basis.provenance.get("votes"):
        columns["votes"] = [str(votes.get(text, "")) for text in basis.texts]
    if weights := basis.provenance.get("weights"):
        columns["weight"] = [f"{each:.2f}" for each in weights]
    if basis.merged or max(basis.counts) > 1:
        columns["represents"] = [str(count) for count in basis.counts]
        columns["texts merged into it"] = [
            ", ".join(m.text for m in basis.merged if m.into == text) for text in basis.texts
        ]
    table = Table(*columns)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*map(escape, row))
    out.print(table)


def warn_without_background(bundle: ModelBundle, method: str) -> None:
    """Warn if the method uses generic texts and the bundle has none."""
    if find_method(method).takes_background and bundle.background is None:
        warn(
            f"the bundle has no background texts, so that the method {method} works less well: add "
            f"them with {command('background', str(bundle.path))}"
        )


def _made_with(basis: Basis) -> dict[str, str]:
    """Return what else the projection was made with."""
    facts = {}
    for role in ("against", "ignore"):
        if others := basis.provenance.get(role):
            facts[role] = ", ".join(others)
    if count := basis.provenance.get("background"):
        facts["background"] = f"{count} generic texts"
    if sharpened := basis.provenance.get("sharpened"):
        kind = "labelled classes" if sharpened["labelled"] else "clusters"
        source = f" of {sharpened['source']}" if "source" in sharpened else ""
        facts["sharpened with"] = (
            f"{sharpened['images']} images{source} in {sharpened['clusters']} {kind}"
        )
    return facts


def _document(basis: Basis, path: Path) -> dict[str, Any]:
    return {
        "path": str(path),
        "criterion": basis.criterion,
        "fingerprint": basis.fingerprint,
        "method": basis.method,
        "post": basis.projection.post,
        "input_dim": basis.projection.input_dim,
        "output_dim": basis.projection.output_dim,
        "prompts": list(basis.prompts),
        "texts": list(basis.texts),
        "counts": list(basis.counts),
        "weights": basis.provenance.get("weights", []),
        "merge_threshold": basis.merge_threshold,
        "merged": [{"text": m.text, "into": m.into, "cosine": m.cosine} for m in basis.merged],
        "provenance": dict(basis.provenance),
    }
