"""`crl basis`: make the basis of a criterion, edit its texts, and show it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from crl_sdk.basis._basis import Basis, basis_path
from crl_sdk.basis._build import DEFAULT_MERGE_THRESHOLD, DEFAULT_PROMPT, edit_basis
from crl_sdk.basis._generation_options import DEFAULT_OPTIONS
from crl_sdk.basis._methods import Method, default_method, find_method
from crl_sdk.cli import _generation as generation
from crl_sdk.cli._console import JsonOption, note, out, print_facts, print_json, warn
from crl_sdk.cli._options import (
    DEFAULT_BASES,
    BasesOption,
    BundleOption,
    load_basis,
    open_embedder,
)
from crl_sdk.errors import BasisError, InvalidInputError
from crl_sdk.projection._projection import Post
from crl_sdk.storage._atomic_files import make_directory
from crl_sdk.storage._checksummed_safetensors import SUFFIX

app = typer.Typer(help="Make, edit and show bases.", no_args_is_help=True)


TextOption = Annotated[
    list[str] | None, typer.Option("--text", "-t", help="A text; may be repeated.")
]


@app.command("create")
def create(
    criterion: Annotated[str, typer.Argument(help="What matters, in words, such as `color`.")],
    text_file: Annotated[
        Path | None,
        typer.Option(
            "--from-texts", "--texts", help="Your own texts: a UTF-8 file with one text per line."
        ),
    ] = None,
    text: TextOption = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="Template with one {} for the text; may be repeated to average over several."
        ),
    ] = None,
    method: Annotated[
        Method | None,
        typer.Option(
            help="Projection method, see docs/PROJECTIONS.md. Default: "
            f"{default_method(against=False)}, or {default_method(against=True)} with --against."
        ),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="Another criterion whose texts should count less: the name or file of its basis; "
            "may be repeated."
        ),
    ] = None,
    post: Annotated[
        Post, typer.Option(help="Row normalisation of the conditional embedding.")
    ] = "l2",
    merge: Annotated[
        float,
        typer.Option(help="Cosine from which two texts are merged; 1 merges equal texts only."),
    ] = DEFAULT_MERGE_THRESHOLD,
    llm: generation.LlmOption = None,
    hint: generation.HintOption = "",
    example: generation.ExampleOption = None,
    include: generation.IncludeOption = None,
    exclude: generation.ExcludeOption = None,
    count: generation.CountOption = DEFAULT_OPTIONS.count,
    answers: generation.AnswersOption = DEFAULT_OPTIONS.max_answers,
    seed: generation.SeedOption = 0,
    form: generation.FormOption = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the texts; write nothing.")
    ] = False,
    bundle: BundleOption = None,
    bases: BasesOption = DEFAULT_BASES,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing basis.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Make a basis. A local language model writes its texts, or you give them.

    Give your own texts with --from-texts or --text. `crl embed --criteria` then knows the basis.
    """
    given = [*(text or []), *(read_texts(text_file) if text_file is not None else [])]
    if given and (hint or example or include or exclude):
        raise InvalidInputError(
            "--hint, --example, --include and --exclude are for texts of the language model: leave "
            "them out with --text and --from-texts"
        )
    path = basis_path(bases, criterion)
    if path.exists() and not (overwrite or dry_run):
        raise BasisError(f"{path}: exists already; pass --overwrite to replace it")
    prompts = tuple(prompt or (DEFAULT_PROMPT,))
    others = [_other_basis(name, bases) for name in against or ()]
    basis_options: dict[str, Any] = {
        "prompts": prompts, "method": method, "post": post, "merge_threshold": merge,
        "against": others,
    }  # fmt: skip
    with open_embedder(bundle) as embedder:
        if given:
            basis = embedder.create_basis(
                criterion, given, provenance={"texts": "given by the user"}, **basis_options
            )
        else:
            options = generation.read_options(
                hint=hint, example=example, include=include, exclude=exclude, count=count,
                answers=answers, seed=seed, form=form,
            )  # fmt: skip
            if dry_run:
                texts = generation.generate_texts(
                    embedder, criterion, llm, prompts=prompts, options=options
                )
                generation.print_texts(texts, as_json)
                return
            basis = generation.generate_basis(
                embedder, criterion, llm, options=options, **basis_options
            )
    if not dry_run:
        save(basis, path)
    _print_basis(basis, path, as_json)


@app.command("edit")
def edit(
    criterion: Annotated[str, typer.Argument(help="Name of the basis.")],
    add: Annotated[list[str] | None, typer.Option(help="A text to add; may be repeated.")] = None,
    remove: Annotated[
        list[str] | None, typer.Option(help="A text to remove; may be repeated.")
    ] = None,
    bundle: BundleOption = None,
    bases: BasesOption = DEFAULT_BASES,
    as_json: JsonOption = False,
) -> None:
    """Add texts to a basis, or remove some.

    The basis is made again with the same prompts and method.
    """
    path = basis_path(bases, criterion)
    basis = load_basis(bases, criterion)
    if not add and not remove:
        raise InvalidInputError("expected --add TEXT or --remove TEXT")
    with open_embedder(bundle) as embedder:
        changed = edit_basis(
            basis, embedder.embed_text, fingerprint=embedder.bundle.fingerprint,
            add=add or (), remove=remove or (),
        )  # fmt: skip
    save(changed, path)
    _print_basis(changed, path, as_json)


@app.command("show")
def show(
    file: Annotated[Path, typer.Argument(help="A basis file.")], as_json: JsonOption = False
) -> None:
    """Verify a basis file and print its content."""
    _print_basis(Basis.load(file), file, as_json)


def _other_basis(name: str, bases: Path) -> Basis:
    return Basis.load(Path(name)) if name.endswith(SUFFIX) else load_basis(bases, name)


def save(basis: Basis, path: Path) -> None:
    """Write a basis, create its directory if necessary, and report merged texts.

    Raises:
        BasisError: If the directory or the file cannot be written.
    """
    make_directory(path.parent, BasisError)
    basis.save(path)
    if basis.merged:
        pairs = ", ".join(f"{m.text} → {m.into}" for m in basis.merged)
        warn(f"{len(basis.merged)} texts merged into others: {pairs}")
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


def _print_basis(basis: Basis, path: Path, as_json: bool) -> None:
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
    weights = _weights(basis)
    table = Table("text", "represents", *(["weight"] if weights else []), "texts merged into it")
    for i, (text, count) in enumerate(zip(basis.texts, basis.counts, strict=True)):
        merged = ", ".join(m.text for m in basis.merged if m.into == text)
        table.add_row(text, str(count), *(f"{each:.2f}" for each in weights[i : i + 1]), merged)
    out.print(table)


def _weights(basis: Basis) -> list[float]:
    """Return the weight of each text, or nothing if all texts have the same weight."""
    if not find_method(basis.method).weights_texts:
        return []
    return [float(norm) for norm in np.linalg.norm(basis.projection.weight, axis=0)]


def _made_with(basis: Basis) -> dict[str, str]:
    """Return the reference images and other criteria that the projection used."""
    facts = {}
    if count := basis.provenance.get("references"):
        facts["references"] = f"{count} images"
    if against := basis.provenance.get("against"):
        facts["against"] = ", ".join(against)
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
        "weights": _weights(basis),
        "merge_threshold": basis.merge_threshold,
        "merged": [{"text": m.text, "into": m.into, "cosine": m.cosine} for m in basis.merged],
        "provenance": dict(basis.provenance),
    }
