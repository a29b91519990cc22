"""Texts from a local language model, as `crl basis create` asks for and shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from crl_sdk._embedder import Embedder
from crl_sdk.basis._basis import Basis
from crl_sdk.basis._build import EmbedText
from crl_sdk.basis._generate import Form, GeneratedTexts, GenerationOptions, generate_texts
from crl_sdk.basis._language_model import LanguageModel
from crl_sdk.cli._console import note, out, print_json, spinner, warn
from crl_sdk.errors import InvalidInputError

ModelOption = Annotated[
    str | None,
    typer.Option(
        envvar="CRL_MODEL",
        help="Language model: a GGUF file or hf:OWNER/REPO/FILE.gguf; a small one by default.",
    ),
]
HintOption = Annotated[
    str, typer.Option(help="Said beside the criterion: `as a zoologist would say`.")
]
ExampleOption = Annotated[
    list[str] | None,
    typer.Option(help="A line that shows what you mean: `pattern: striped, dotted, plain`."),
]
IncludeOption = Annotated[list[str] | None, typer.Option(help="A text to take in any case.")]
ExcludeOption = Annotated[list[str] | None, typer.Option(help="A text to leave out.")]
CountOption = Annotated[int, typer.Option(min=1, max=1000, help="Texts at most.")]
AnswersOption = Annotated[
    int, typer.Option(min=1, max=1000, help="How often the model is asked at most.")
]
SeedOption = Annotated[int, typer.Option(min=0, help="Equal seeds give equal texts.")]
FormOption = Annotated[Form, typer.Option(help="How the model is asked.")]


def options(
    *,
    hint: str,
    example: Sequence[str] | None,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    count: int,
    answers: int,
    seed: int,
    form: Form,
) -> GenerationOptions:
    """Check the options and gather them.

    Raises:
        InvalidInputError: an option is out of range, or an example is not `name: text, text, …`.
    """
    return GenerationOptions(
        hint=hint, examples=dict(map(_example, example or ())), include=tuple(include or ()),
        exclude=tuple(exclude or ()), count=count,
        max_answers=answers, seed=seed, form=form,
    )  # fmt: skip


def draft(
    criterion: str,
    model: str | None,
    options: GenerationOptions,
    embed_text: EmbedText,
    prompts: Sequence[str],
) -> GeneratedTexts:
    """Load the language model, ask it and show how it goes."""
    with spinner("loading the language model …") as status, LanguageModel.open(model) as llm:

        def progress(answers: int, tokens: int, seconds: float) -> None:
            status.update(
                f"{llm.name}: answer {answers + 1} of at most {options.max_answers}, "
                f"{tokens / max(seconds, 1e-9):.0f} tokens/s"
            )

        made = generate_texts(
            criterion, llm, options, embed_text=embed_text, prompts=prompts, progress=progress
        )
        note(
            f"{llm.name}: {made.answers} answers, {llm.tokens} tokens in {llm.seconds:.1f} s, "
            f"{len(made.texts)} texts kept, {len(made.dropped)} dropped"
        )
    if made.unsure:
        warn(
            f"{llm.name} hardly knows {made.criterion!r}: no text is in a quarter of its answers. "
            "Look at them with --dry-run; a hint, an example or a larger model may help"
        )
    return made


def written_basis(criterion: str, model: str | None, embedder: Embedder, prompt: str) -> Basis:
    """Let the language model write a criterion's texts, and make a basis of them.

    Raises:
        GenerationError: the model gives nothing usable.
    """
    made = draft(criterion, model, GenerationOptions(), embedder.embed_text, [prompt])
    return embedder.create_basis(
        criterion, [text.text for text in made.texts], prompts=[prompt], provenance=made.provenance
    )


def print_draft(draft: GeneratedTexts, as_json: bool) -> None:
    """Print the ranked texts and what was dropped."""
    if as_json:
        document = asdict(draft)
        print_json(document)
        return
    table = Table("text", "votes", "", title=draft.criterion, title_justify="left")
    for kept in draft.texts:
        table.add_row(kept.text, str(kept.votes), "kept")
    for dropped in draft.dropped:
        table.add_row(dropped.text, str(dropped.votes), dropped.reason, style="dim")
    out.print(table)


def _example(line: str) -> tuple[str, tuple[str, ...]]:
    name, colon, rest = line.partition(":")
    texts = tuple(text.strip() for text in rest.split(",") if text.strip())
    if not colon or not name.strip() or len(texts) < 2:
        raise InvalidInputError(
            f"expected an example such as 'pattern: striped, dotted, plain', got {line[:80]!r}"
        )
    return name.strip(), texts
