"""`crl basis`: make the basis of a criterion, edit its texts, and show it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from crl_sdk.basis._basis import Basis, basis_path
from crl_sdk.basis._build import (
    DEFAULT_MERGE_THRESHOLD,
    DEFAULT_PROMPT,
    edit_basis,
)
from crl_sdk.basis._generation_options import DEFAULT_OPTIONS
from crl_sdk.basis._methods import DEFAULT_METHOD, Method, find_method
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
    text_file: Annotated[
        Path | None,
        typer.Option(
            "--from-texts", "--texts", help="Your own texts: a UTF-8 file with one text per line."
        ),
    ] = None,
    text: TextOption = None,
    vectors: Annotated[
        Path | None,
        typer.Option(
            help="File of text embeddings, .npz or .parquet, in place of a text tower: arrays "
            "text:CRITERION and words:CRITERION, or a bank of words (docs/EVAL.md). --text and "
            "--from-texts choose words of the bank."
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
            help="Template with one {} for the text; may be repeated to average over several."
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
    basis_options: dict[str, Any] = {
        "prompts": prompts, "method": method, "post": post, "merge_threshold": merge,
        "against": [_other_basis(name, bases) for name in against or ()],
        "ignore": [_other_basis(name, bases) for name in ignore or ()],
    }  # fmt: skip
    if method == "ignore" and not given:
        given = [text for other in basis_options.pop("ignore") for text in other.texts]
        if not given:
            raise InvalidInputError(
                "the method ignore needs the criterion to disregard: pass --ignore NAME, or its "
                "texts with --text or --from-texts"
            )
    if model is not None and vectors is None:
        raise InvalidInputError("--model names the model of --vectors FILE: pass both or neither")
    if vectors is not None:
        if prompt or hint or example or include or exclude:
            raise InvalidInputError(
                "--vectors needs no model: leave out --prompt and the options of the language model"
            )
        basis_options.pop("prompts")
        from crl_sdk.cli._text_vectors import basis_from_file

        basis = basis_from_file(vectors, criterion, given, model, basis_options)
        if not dry_run:
            save(basis, path)
        print_basis(basis, path, as_json)
        return
    with open_embedder(bundle) as embedder:
        warn_without_background(embedder.bundle, method or DEFAULT_METHOD)
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
    print_basis(basis, path, as_json)


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
    path = basis_path(bases, criterion)
    basis = load_basis(bases, criterion)
    if not add and not remove:
        raise InvalidInputError("expected --add TEXT or --remove TEXT")
    roles = {
        role: [load_basis(bases, name) for name in basis.provenance.get(role, ())]
        for role in ("against", "ignore")
    }
    with open_embedder(bundle) as embedder:
        warn_without_background(embedder.bundle, basis.method)
        changed = edit_basis(
            basis, embedder.embed_text, fingerprint=embedder.bundle.fingerprint,
            add=add or (), remove=remove or (), background=embedder.bundle.background, **roles,
        )  # fmt: skip
    save(changed, path)
    if "sharpened" in basis.provenance:
        warn(
            "the basis had been sharpened with images, which it no longer is: run crl basis "
            f"sharpen {criterion!r} --images DIR again"
        )
    print_basis(changed, path, as_json)


@app.command("show")
def show(
    file: Annotated[Path, typer.Argument(help="A basis file.")], as_json: JsonOption = False
) -> None:
    """Verify a basis file and print its content."""
    print_basis(Basis.load(file), file, as_json)


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
    weights = basis.provenance.get("weights", [])
    table = Table("text", "represents", *(["weight"] if weights else []), "texts merged into it")
    for i, (text, count) in enumerate(zip(basis.texts, basis.counts, strict=True)):
        merged = ", ".join(m.text for m in basis.merged if m.into == text)
        table.add_row(text, str(count), *(f"{each:.2f}" for each in weights[i : i + 1]), merged)
    out.print(table)


def warn_without_background(bundle: ModelBundle, method: str) -> None:
    """Warn if the method uses generic texts and the bundle has none."""
    if find_method(method).takes_background and bundle.background is None:
        warn(
            f"the bundle has no background texts, so that the method {method} works less well: add "
            f"them with crl background {bundle.path}"
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
