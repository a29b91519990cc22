"""`crl basis`: make a criterion's basis, change its texts, and look into one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from crl_sdk.basis._basis import Basis, Method, basis_path
from crl_sdk.basis._build import DEFAULT_MERGE_THRESHOLD, DEFAULT_PROMPT, edit_basis
from crl_sdk.cli import _generation as generation
from crl_sdk.cli._console import JsonOption, note, out, print_facts, print_json, warn
from crl_sdk.cli._options import DEFAULT_BASES, BasesOption, BundleOption, open_embedder
from crl_sdk.errors import BasisError, InvalidInputError
from crl_sdk.projection._projection import Post
from crl_sdk.storage._atomic_files import make_directory
from crl_sdk.storage._checksummed_safetensors import SUFFIX

app = typer.Typer(help="Make, change and inspect bases.", no_args_is_help=True)


TextOption = Annotated[
    list[str] | None, typer.Option("--text", "-t", help="One text; repeat for more.")
]


@app.command("create")
def create(
    criterion: Annotated[str, typer.Argument(help="What matters, in words, such as `color`.")],
    texts: Annotated[
        Path | None,
        typer.Option("--from-texts", "--texts", help="Your own texts: UTF-8, one a line."),
    ] = None,
    text: TextOption = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Template with one {} for the text; repeat to average several."),
    ] = None,
    method: Annotated[
        Method | None,
        typer.Option(
            help="How the projection is made, see docs/PROJECTIONS.md. By default centred, or "
            "exclusive-weighted with --against."
        ),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="Another criterion, whose texts are to count less: a basis' name or file; repeat "
            "for more."
        ),
    ] = None,
    post: Annotated[Post, typer.Option(help="Normalisation of each conditional row.")] = "l2",
    merge: Annotated[
        float, typer.Option(help="Cosine from which two texts count as one; 1 merges equals only.")
    ] = DEFAULT_MERGE_THRESHOLD,
    model: generation.ModelOption = None,
    hint: generation.HintOption = "",
    example: generation.ExampleOption = None,
    include: generation.IncludeOption = None,
    exclude: generation.ExcludeOption = None,
    count: generation.CountOption = 40,
    answers: generation.AnswersOption = 24,
    seed: generation.SeedOption = 0,
    form: generation.FormOption = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the ranked texts; write nothing.")
    ] = False,
    bundle: BundleOption = None,
    bases: BasesOption = DEFAULT_BASES,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing basis.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Make a basis: a local language model gives its texts, or you do with --from-texts or --text.

    `crl embed --criteria` then knows its name.
    """
    given = [*(text or []), *(read_texts(texts) if texts is not None else [])]
    path = basis_path(bases, criterion)
    if path.exists() and not (overwrite or dry_run):
        raise BasisError(f"{path}: exists already; pass --overwrite to replace it")
    prompts = tuple(prompt or (DEFAULT_PROMPT,))
    others = [Basis.load(_other_basis(name, bases)) for name in against or ()]
    with open_embedder(bundle) as embedder:
        provenance: Mapping[str, Any] = {"texts": "given by the user"}
        if not given:
            options = generation.options(
                hint=hint, example=example, include=include, exclude=exclude, count=count,
                answers=answers, seed=seed, form=form,
            )  # fmt: skip
            draft = generation.draft(criterion, model, options, embedder.embed_text, prompts)
            if dry_run:
                generation.print_draft(draft, as_json)
                return
            given, provenance = [c.text for c in draft.texts], draft.provenance
        basis = embedder.create_basis(
            criterion, given, prompts=prompts, method=method, post=post, merge_threshold=merge,
            against=others, provenance=provenance,
        )  # fmt: skip
    if not dry_run:
        save(basis, path)
    _print_basis(basis, path, as_json)


@app.command("edit")
def edit(
    criterion: Annotated[str, typer.Argument(help="Name of the basis.")],
    add: Annotated[list[str] | None, typer.Option(help="A text to add; repeat for more.")] = None,
    remove: Annotated[
        list[str] | None, typer.Option(help="A text to remove; repeat for more.")
    ] = None,
    bundle: BundleOption = None,
    bases: BasesOption = DEFAULT_BASES,
    as_json: JsonOption = False,
) -> None:
    """Add texts to a basis, or remove some, and make it again with its own prompts and method."""
    path = basis_path(bases, criterion)
    basis = Basis.load(path)
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
    """Check a basis file and print what it holds."""
    _print_basis(Basis.load(file), file, as_json)


def _other_basis(name: str, bases: Path) -> Path:
    return Path(name) if name.endswith(SUFFIX) else basis_path(bases, name)


def save(basis: Basis, path: Path) -> None:
    """Write a basis, make its directory, and tell of merged texts.

    Raises:
        BasisError: one of them cannot be written.
    """
    make_directory(path.parent, BasisError)
    basis.save(path)
    if basis.merged:
        pairs = ", ".join(f"{m.text} → {m.into}" for m in basis.merged)
        warn(f"{len(basis.merged)} texts merged into others: {pairs}")
    note(f"wrote {path}")


def read_texts(path: Path) -> list[str]:
    """Read texts from a UTF-8 file, one a line.

    Raises:
        InvalidInputError: it cannot be read, is not UTF-8, or has none.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InvalidInputError(
            f"{path}: expected UTF-8 text, one text a line ({error.reason} at byte {error.start})"
        ) from error
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise InvalidInputError(f"{path}: expected one text a line, the file has none")
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
    table = Table("text", "stands for", *(["weight"] if weights else []), "texts merged into it")
    for i, (text, count) in enumerate(zip(basis.texts, basis.counts, strict=True)):
        merged = ", ".join(m.text for m in basis.merged if m.into == text)
        table.add_row(text, str(count), *(f"{each:.2f}" for each in weights[i : i + 1]), merged)
    out.print(table)


def _weights(basis: Basis) -> list[float]:
    """Give what each text counts where that differs, by how little against explain of it."""
    if basis.method != "exclusive-weighted":
        return []
    return [float(norm) for norm in np.linalg.norm(basis.projection.weight, axis=0)]


def _made_with(basis: Basis) -> dict[str, str]:
    """Tell of reference images and against, if there were any."""
    told = {}
    if count := basis.provenance.get("references"):
        told["references"] = f"{count} images"
    if against := basis.provenance.get("against"):
        told["against"] = ", ".join(against)
    return told


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
