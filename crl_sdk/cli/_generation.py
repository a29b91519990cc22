"""Options and output of the commands that let a language model write texts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from rich.table import Table

from crl_sdk._embedder import Embedder
from crl_sdk._progress import GenerationProgress
from crl_sdk.basis._asking import ReportProgress
from crl_sdk.basis._basis import Basis
from crl_sdk.basis._curated import find_curated
from crl_sdk.basis._generate import GeneratedTexts
from crl_sdk.basis._generation_options import DEFAULT_OPTIONS, Form, GenerationOptions
from crl_sdk.basis._language_model import LanguageModel
from crl_sdk.cli._console import note, out, print_json, spinner, warn
from crl_sdk.cli._options import command
from crl_sdk.errors import InvalidInputError

LlmOption = Annotated[
    str | None,
    typer.Option(
        "--llm",
        envvar="CRL_LLM",
        help="Language model: a GGUF file, hf:OWNER/REPO/FILE.gguf, or the URL of an endpoint with "
        "OpenAI's API, such as http://127.0.0.1:8080/v1. Default: a small model.",
    ),
]
HintOption = Annotated[
    str, typer.Option(help="Words added to the criterion, such as `as a zoologist would say`.")
]
ExampleOption = Annotated[
    list[str] | None,
    typer.Option(help="Example line, such as `pattern: striped, dotted, plain`; may be repeated."),
]
IncludeOption = Annotated[
    list[str] | None, typer.Option(help="Text that is always kept; may be repeated.")
]
ExcludeOption = Annotated[
    list[str] | None, typer.Option(help="Text that is left out; may be repeated.")
]
CountOption = Annotated[int, typer.Option(min=1, max=1000, help="Largest number of texts.")]
AnswersOption = Annotated[
    int, typer.Option(min=1, max=1000, help="Largest number of answers of the language model.")
]
SeedOption = Annotated[int, typer.Option(min=0, help="Random seed; equal seeds give equal texts.")]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        help="Threads of the language model. Default: one for a small model, otherwise one per "
        "core.",
    ),
]
AcceptUnsureOption = Annotated[
    bool,
    typer.Option(
        "--accept-unsure",
        help="Make the basis even if the language model hardly knows the criterion.",
    ),
]
FormOption = Annotated[
    Form,
    typer.Option(
        help="How the language model is asked: completion continues example lines and counts "
        "votes, chat does so in messages, list asks for one long list. Default: what suits it."
    ),
]
MaxWordsOption = Annotated[
    int,
    typer.Option(
        min=1,
        max=12,
        help="Largest number of words in a text. From 4 on, articles and apostrophes are allowed.",
    ),
]
AnyScriptOption = Annotated[
    bool, typer.Option("--any-script", help="Allow letters beyond a to z in texts.")
]
PresetOption = Annotated[
    str | None,
    typer.Option(help="Ask as the paper does for one of its data sets, such as clevr4-color."),
]

_SHOWN_DROPPED = 12
"""Number of dropped texts that are printed."""


def open_llm(llm: str | None, threads: int | None = None) -> LanguageModel:
    """Load a language model, with the token of an endpoint from the environment.

    The arguments and the errors are those of `LanguageModel.open`.
    """
    return LanguageModel.open(llm, threads=threads, token=os.environ.get("CRL_LLM_TOKEN"))


def read_options(
    *,
    hint: str,
    example: Sequence[str] | None,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    count: int,
    answers: int,
    seed: int,
    form: Form,
    accept_unsure: bool,
    max_words: int,
    any_script: bool,
    subject: str,
) -> GenerationOptions:
    """Return the options of the command line as `GenerationOptions`.

    Raises:
        InvalidInputError: If an option is out of range, or an example is not `name: text, text`.
    """
    return GenerationOptions(
        hint=hint, examples=dict(map(_example, example or ())), include=tuple(include or ()),
        exclude=tuple(exclude or ()), count=count,
        max_answers=answers, seed=seed, form=form, accept_unsure=accept_unsure,
        max_words=max_words, any_script=any_script, subject=subject,
    )  # fmt: skip


def generate_texts(
    embedder: Embedder,
    criterion: str,
    llm: str | None,
    *,
    prompts: Sequence[str] | None,
    options: GenerationOptions = DEFAULT_OPTIONS,
    pictures: NDArray[np.floating] | None = None,
    threads: int | None = None,
) -> GeneratedTexts:
    """Let the language model write texts, and show its progress and a summary on stderr.

    The arguments are those of `Embedder.generate_texts`, which also lists the errors, and the
    threads of `LanguageModel.open`.
    """
    embedder.check_generation(criterion, options, prompts=prompts)  # before the model is loaded
    if curated := find_curated(criterion):
        note(f"there is also a list written by hand: crl basis curated {curated.name!r}")
    with _shown_progress() as progress, open_llm(llm, threads=threads) as opened:
        texts = embedder.generate_texts(
            criterion, llm=opened, options=options, prompts=prompts, pictures=pictures,
            progress=progress,
        )  # fmt: skip
    name = texts.provenance["model"]["name"]
    note(
        f"{name}: {texts.answers} answers, {len(texts.texts)} texts kept, {len(texts.dropped)} "
        "dropped"
    )
    if texts.unsure:
        warn(texts.doubts())
    return texts


def generate_basis(
    embedder: Embedder,
    criterion: str,
    llm: str | None,
    *,
    prompts: Sequence[str] | None,
    bundle: Path | None,
    bases: Path,
    against: Sequence[Basis] = (),
) -> Basis:
    """Make a basis with the language model. Show its progress, the texts and what to do next.

    Args:
        embedder: The opened model.
        criterion: Criterion in words.
        llm: Language model, see `crl_sdk.basis.LanguageModel.open`.
        prompts: Prompts for the texts; None for the one that the bundle recommends.
        bundle: Bundle on the command line, for the suggested commands.
        bases: Directory of bases, for the suggested commands.
        against: Bases of other criteria, whose texts count less.

    Raises:
        GenerationError: If the language model does not know the criterion.
    """
    texts = generate_texts(embedder, criterion, llm, prompts=prompts)
    kept = ", ".join(f"{each.text} {each.votes}" for each in texts.texts)
    note(f"{criterion}, with votes: {kept}")
    print_next_steps(criterion, bundle, bases)
    return embedder.create_basis(criterion, texts, prompts=prompts, against=list(against))


def print_texts(texts: GeneratedTexts, bundle: Path | None, bases: Path, *, as_json: bool) -> None:
    """Print the kept and the dropped texts, and how to change them.

    Args:
        texts: The texts.
        bundle: Bundle on the command line, for the suggested commands.
        bases: Directory of bases, for the suggested commands.
        as_json: Whether to print JSON on stdout in place of a table.
    """
    if as_json:
        print_json(asdict(texts))
        return
    columns = _columns(texts)
    table = Table("text", "votes", *columns, "decision", title=texts.criterion,
                  title_justify="left")  # fmt: skip
    for kept in texts.texts:
        facts = [columns[name].get(kept.text, "") for name in columns]
        table.add_row(kept.text, str(kept.votes), *facts, "kept")
    for dropped in texts.dropped[:_SHOWN_DROPPED]:
        facts = [""] * len(columns)
        table.add_row(dropped.text, str(dropped.votes), *facts, dropped.reason, style="dim")
    out.print(table)
    if len(texts.dropped) > _SHOWN_DROPPED:
        note(f"and {len(texts.dropped) - _SHOWN_DROPPED} more dropped texts with fewer votes")
    print_next_steps(texts.criterion, bundle, bases)


def _columns(texts: GeneratedTexts) -> dict[str, dict[str, str]]:
    """Return what else is known about the kept texts: values by text, by the name of a column."""
    found = {}
    if relevance := texts.provenance.get("relevance"):
        found["relevance"] = {text: f"{value:.1f}" for text, value in relevance.items()}
    if similarity := texts.provenance.get("similarity"):
        found["similarity"] = {text: f"{value:.2f}" for text, value in similarity.items()}
    if pictures := texts.provenance.get("pictures"):
        found["spread"] = {text: f"{value:.3f}" for text, value in pictures["spread"].items()}
        found["pictures"] = {text: f"{value:.1%}" for text, value in pictures["share"].items()}
    return found


def print_next_steps(criterion: str, bundle: Path | None, bases: Path) -> None:
    """Say how to change the texts of a criterion."""
    edit = command("basis", "edit", criterion, "--add", "TEXT", "--remove", "TEXT",
                   bundle=bundle, bases=bases)  # fmt: skip
    own = command("basis", "create", criterion, "--texts", "FILE", "--overwrite",
                  bundle=bundle, bases=bases)  # fmt: skip
    note(
        f"is a text missing or wrong? {edit}\nyour own list: {own}\nanother language model: "
        "--llm FILE.gguf; larger ones know more"
    )


@contextmanager
def _shown_progress() -> Iterator[ReportProgress]:
    """Yield a function that shows the progress in a spinner."""
    last: GenerationProgress | None = None
    with spinner("loading the language model …") as status:

        def report(progress: GenerationProgress) -> None:
            nonlocal last
            last = progress
            status.update(
                f"language model: answer {progress.answers + 1} of at most "
                f"{progress.max_answers}, {progress.tokens_per_second:.0f} tokens/s"
            )

        yield report
    if last is not None:
        note(f"language model: {last.tokens} tokens in {last.seconds:.1f} s")


def _example(line: str) -> tuple[str, tuple[str, ...]]:
    name, colon, rest = line.partition(":")
    texts = tuple(text.strip() for text in rest.split(",") if text.strip())
    if not colon or not name.strip() or len(texts) < 2:
        raise InvalidInputError(
            f"expected an example such as 'pattern: striped, dotted, plain', got {line[:80]!r}"
        )
    return name.strip(), texts
