"""`crl basis create`: make the basis of a criterion."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from crl_sdk._embedder import Embedder
from crl_sdk.basis._basis import Basis
from crl_sdk.basis._build import DEFAULT_MERGE_THRESHOLD, embed_with_prompts
from crl_sdk.basis._curated import require_curated
from crl_sdk.basis._directory import BasisDirectory
from crl_sdk.basis._generate import GeneratedTexts
from crl_sdk.basis._generation_options import DEFAULT_OPTIONS
from crl_sdk.basis._methods import DEFAULT_METHOD, Method
from crl_sdk.basis._picture_votes import describe, vote
from crl_sdk.basis._presets import find_preset
from crl_sdk.cli import _generation as generation
from crl_sdk.cli import _text_vectors as text_vectors
from crl_sdk.cli._basis import print_basis, read_texts, save, warn_without_background
from crl_sdk.cli._console import JsonOption, note
from crl_sdk.cli._options import (
    DEFAULT_BASES,
    AgainstOption,
    BasesOption,
    BundleOption,
    load_basis,
    open_bundle,
)
from crl_sdk.cli._sources import LazyEmbedder, require_fingerprint
from crl_sdk.errors import BasisError, InvalidInputError
from crl_sdk.projection._projection import Post

TextOption = Annotated[
    list[str] | None, typer.Option("--text", "-t", help="A text; may be repeated.")
]


def create(
    criterion: Annotated[str, typer.Argument(help="What matters, in words, such as `color`.")],
    texts: Annotated[
        Path | None, typer.Option(help="Your own texts: a UTF-8 file with one text per line.")
    ] = None,
    text: TextOption = None,
    curated: Annotated[
        bool,
        typer.Option(
            "--curated",
            help="Take the list of the criterion that was written by hand (crl basis curated). "
            "No language model is needed.",
        ),
    ] = False,
    images: Annotated[
        Path | None,
        typer.Option(
            help="Pictures of yours that vote on the texts: those that fit none of them best are "
            "dropped. A directory, or a file of embeddings from `crl embed`."
        ),
    ] = None,
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
    against: AgainstOption = None,
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
    preset: generation.PresetOption = None,
    max_words: generation.MaxWordsOption = DEFAULT_OPTIONS.max_words,
    any_script: generation.AnyScriptOption = False,
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

    Give your own texts with --texts or --text, or take a curated list with --curated. `crl embed
    --criteria` then knows the basis.
    """
    given = [*(text or []), *(read_texts(texts) if texts is not None else [])]
    _check_sources(
        given, vectors, model, prompt,
        asks_model=bool(hint or example or include or exclude or preset), curated=curated,
        images=images,
    )  # fmt: skip
    asking = find_preset(preset) if preset else None
    prompt = prompt or ([] if asking is None else [asking.prompt])
    provenance: dict[str, Any] = {"texts": "given by the user"}
    if curated:
        written = require_curated(criterion)
        given, provenance = list(written.texts), written.provenance
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
        given = _texts_to_ignore(basis_options.pop("ignore"))
    if vectors is not None:
        basis = text_vectors.make_basis(vectors, criterion, given, fingerprint, basis_options)
    else:
        warn_without_background(opened, method or DEFAULT_METHOD)
        options = generation.read_options(
            hint=hint, example=example, include=include, exclude=exclude, count=count,
            answers=answers, seed=seed, form=form, accept_unsure=accept_unsure or dry_run,
            max_words=max_words, any_script=any_script,
            subject="" if asking is None else asking.subject,
        )  # fmt: skip
        with LazyEmbedder(opened) as lazy:
            pictures = _read_pictures(lazy, images, fingerprint)
            source: list[str] | GeneratedTexts = given
            if given and pictures is not None:
                source, voted = _drop_unfit(lazy.embedder, given, pictures, prompt, dry_run)
                provenance["pictures"] = voted
            elif not given:
                source = generation.generate_texts(
                    lazy.embedder, criterion, llm, prompts=prompt or None, options=options,
                    pictures=pictures, threads=threads,
                )  # fmt: skip
                if dry_run or not as_json:
                    generation.print_texts(source, bundle, bases, as_json=as_json)
                if dry_run:
                    return
            basis = lazy.embedder.create_basis(
                criterion, source, prompts=prompt or None,
                provenance=provenance if given else None, **basis_options,
            )  # fmt: skip
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
    curated: bool,
    images: Path | None,
) -> None:
    """Refuse options that contradict each other.

    Args:
        given: The user's own texts.
        vectors: File of text embeddings, or None.
        model: Name of the model of that file, or None.
        prompt: Prompts, or None.
        asks_model: Whether there are options of the language model.
        curated: Whether a curated list is wanted.
        images: Pictures that vote, or None.
    """
    if given and curated:
        raise InvalidInputError(
            "--curated takes a list of its own: leave out --text and --texts, or write the list to "
            "a file and change it: crl basis curated NAME > FILE"
        )
    if (given or curated) and asks_model:
        raise InvalidInputError(
            "--hint, --example, --include, --exclude and --preset are for texts of the language "
            "model: leave them out with --text, --texts and --curated"
        )
    if model is not None and vectors is None:
        raise InvalidInputError("--model names the model of --vectors FILE: pass both or neither")
    if vectors is not None and (prompt or asks_model or curated or images is not None):
        raise InvalidInputError(
            "--vectors needs no model: leave out --prompt, --curated, --images and the options of "
            "the language model"
        )


def _texts_to_ignore(others: Sequence[Basis]) -> list[str]:
    """Return the texts of the criteria to disregard.

    Raises:
        InvalidInputError: If there are none.
    """
    texts = [text for other in others for text in other.texts]
    if not texts:
        raise InvalidInputError(
            "the method ignore needs the criterion to disregard: pass --ignore NAME, or its texts "
            "with --text or --texts"
        )
    return texts


def _read_pictures(
    lazy: LazyEmbedder, images: Path | None, fingerprint: str
) -> NDArray[Any] | None:
    """Return the universal embeddings of the pictures that vote; None if there are none."""
    if images is None:
        return None
    source = lazy.read([images])
    require_fingerprint(str(images), source, fingerprint)
    return source.universal


def _drop_unfit(
    embedder: Embedder,
    texts: Sequence[str],
    pictures: NDArray[Any],
    prompt: Sequence[str] | None,
    print_all: bool,
) -> tuple[list[str], dict[str, object]]:
    """Drop texts that fit none of the pictures best, and say which.

    Args:
        embedder: The model.
        texts: The texts.
        pictures: Universal embeddings of the pictures, shape (n, d).
        prompt: Prompts; None for the one that the bundle recommends.
        print_all: Whether to print what the pictures say about every text.

    Returns:
        The texts that are left, and what a basis records about the votes.
    """
    prompts = prompt or [embedder.bundle.prompt]
    rows = embed_with_prompts(list(texts), list(prompts), embedder.embed_text)
    votes = vote(rows, pictures, embedder.bundle.background)
    kept = [text for text, fires in zip(texts, votes.fires, strict=True) if fires]
    dropped = [text for text, fires in zip(texts, votes.fires, strict=True) if not fires]
    note(
        f"{votes.count} pictures: {len(kept)} texts kept, {len(dropped)} fit hardly any of them "
        f"best: {', '.join(dropped) or 'none'}"
    )
    if print_all:
        for i in np.argsort(-votes.spread):
            note(
                f"  {texts[i]}: spread {votes.spread[i]:.3f}, {votes.share[i]:.1%} of the pictures"
            )
    return kept, describe(votes, texts, kept)
