"""`crl basis`: make the basis of a criterion, edit its texts, and show it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from crl_sdk.basis._basis import Basis
from crl_sdk.basis._build import (
    DEFAULT_MERGE_THRESHOLD,
    edit_basis,
)
from crl_sdk.basis._directory import BasisDirectory
from crl_sdk.basis._generate import GeneratedTexts
from crl_sdk.basis._generation_options import DEFAULT_OPTIONS
from crl_sdk.basis._methods import DEFAULT_METHOD, Method, find_method
from crl_sdk.cli import _generation as generation
from crl_sdk.cli import _text_vectors as text_vectors
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
    texts: Annotated[
        Path | None, typer.Option(help="Your own texts: a UTF-8 file with one text per line.")
    ] = None,
    text: TextOption = None,
    vectors: Annotated[
        Path | None,
        typer.Option(
            help="File of text embeddings, .npz or .parquet, in place of a text tower: arrays "
            "text:CRITERION and words:CRITERION, or a bank of words (docs/EVAL.md). --text and "
            "--texts choose words of the bank."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="With --vectors: name of the model that made the embeddings, such as "
            "openai/clip-vit-base-patch32. Needed unless the file has a fingerprint."
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="Template with one {} for the text; may be repeated to average over several. "
            "Default: what the bundle recommends."
        ),
    ] = None,
    method: Annotated[
        Method | None,
        typer.Option(
            help="Projection method, see docs/PROJECTIONS.md. Default: contrastive, or cosine with "
            "two texts."
        ),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="Another criterion whose texts should count less: the name or file of its basis; "
            "may be repeated."
        ),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            help="A criterion to disregard, whose directions are removed: the name or file of its "
            "basis; may be repeated."
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
    threads: generation.ThreadsOption = None,
    accept_unsure: generation.AcceptUnsureOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the texts; write nothing.")
    ] = False,
    bundle: BundleOption = None,
    bases: BasesOption = DEFAULT_BASES,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing basis.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Make a basis. A local language model writes its texts, or you give them.

    Give your own texts with --texts or --text. `crl embed --criteria` then knows the basis.
    """
    given = [*(text or []), *(read_texts(texts) if texts is not None else [])]
    _check_sources(
        given, vectors, model, prompt, asks_model=bool(hint or example or include or exclude)
    )
    if vectors is None:
        opened = open_bundle(bundle)
        fingerprint = opened.fingerprint
    else:
        fingerprint = text_vectors.fingerprint(vectors, model)
    path = BasisDirectory(bases).path_of(criterion, fingerprint)
    if path.exists() and not (overwrite or dry_run):
        raise BasisError(f"{path}: exists already; pass --overwrite to replace it")
    basis_options: dict[str, Any] = {
        "method": method, "post": post, "merge_threshold": merge,
        "against": [load_basis(bases, name, fingerprint, bundle) for name in against or ()],
        "ignore": [load_basis(bases, name, fingerprint, bundle) for name in ignore or ()],
    }  # fmt: skip
    if method == "ignore" and not given:
        given = [text for other in basis_options.pop("ignore") for text in other.texts]
        if not given:
            raise InvalidInputError(
                "the method ignore needs the criterion to disregard: pass --ignore NAME, or its "
                "texts with --text or --texts"
            )
    if vectors is not None:
        basis = text_vectors.make_basis(vectors, criterion, given, fingerprint, basis_options)
    else:
        warn_without_background(opened, method or DEFAULT_METHOD)
        with open_embedder(opened) as embedder:
            source: list[str] | GeneratedTexts = given
            if not given:
                options = generation.read_options(
                    hint=hint, example=example, include=include, exclude=exclude, count=count,
                    answers=answers, seed=seed, form=form, accept_unsure=accept_unsure or dry_run,
                )  # fmt: skip
                source = generation.generate_texts(
                    embedder,
                    criterion,
                    llm,
                    prompts=prompt or None,
                    options=options,
                    threads=threads,
                )
                if dry_run or not as_json:
                    generation.print_texts(source, bundle, bases, as_json=as_json)
                if dry_run:
                    return
            provenance = {"texts": "given by the user"} if given else None
            basis = embedder.create_basis(
                criterion, source, prompts=prompt or None, provenance=provenance, **basis_options
            )
    if not dry_run:
        save(basis, path)
    print_basis(basis, path, as_json)


def _check_sources(
    given: Sequence[str],
    vectors: Path | None,
    model: str | None,
    prompt: Sequence[str] | None,
    *,
    asks_model: bool,
) -> None:
    """Refuse options that contradict each other.

    Args:
        given: The user's own texts.
        vectors: File of text embeddings, or None.
        model: Name of the model of that file, or None.
        prompt: Prompts, or None.
        asks_model: Whether there are options of the language model.
    """
    if given and asks_model:
        raise InvalidInputError(
            "--hint, --example, --include and --exclude are for texts of the language model: leave "
            "them out with --text and --texts"
        )
    if model is not None and vectors is None:
        raise InvalidInputError("--model names the model of --vectors FILE: pass both or neither")
    if vectors is not None and (prompt or asks_model):
        raise InvalidInputError(
            "--vectors needs no model: leave out --prompt and the options of the language model"
        )


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

    The basis is made again with the same prompts, method and other criteria, whose bases are read
    from --bases. What it learnt from images is lost: sharpen it again.
    """
    if not add and not remove:
        raise InvalidInputError("expected --add TEXT or --remove TEXT")
    opened = open_bundle(bundle)
    basis = load_basis(bases, criterion, opened.fingerprint, bundle)
    path = BasisDirectory(bases).path_of(criterion, opened.fingerprint)
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
