"""Options and output of the commands that let a language model write texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.table import Table

from crl_sdk._embedder import Embedder
from crl_sdk._progress import GenerationProgress
from crl_sdk.basis._basis import Basis
from crl_sdk.basis._generate import GeneratedTexts, ReportProgress, model_is_unsure
from crl_sdk.basis._generation_options import DEFAULT_OPTIONS, Form, GenerationOptions
from crl_sdk.cli._console import note, out, print_json, spinner, warn
from crl_sdk.errors import InvalidInputError

LlmOption = Annotated[
    str | None,
    typer.Option(
        "--llm",
        envvar="CRL_LLM",
        help="Language model: a GGUF file or hf:OWNER/REPO/FILE.gguf. Default: a small model.",
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
FormOption = Annotated[
    Form, typer.Option(help="Whether the language model continues a list or answers in a chat.")
]


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
) -> GenerationOptions:
    """Return the options of the command line as `GenerationOptions`.

    Raises:
        InvalidInputError: If an option is out of range, or an example is not `name: text, text`.
    """
    return GenerationOptions(
        hint=hint, examples=dict(map(_example, example or ())), include=tuple(include or ()),
        exclude=tuple(exclude or ()), count=count,
        max_answers=answers, seed=seed, form=form,
    )  # fmt: skip


def generate_texts(
    embedder: Embedder,
    criterion: str,
    llm: str | None,
    *,
    prompts: Sequence[str],
    options: GenerationOptions = DEFAULT_OPTIONS,
) -> GeneratedTexts:
    """Let the language model write texts, and show its progress and a summary on stderr.

    The arguments are those of `Embedder.generate_texts`, which also lists the errors.
    """
    with _shown_progress() as progress:
        texts = embedder.generate_texts(
            criterion, llm=llm, options=options, prompts=prompts, progress=progress
        )
    _print_summary(criterion, texts.provenance)
    return texts


def generate_basis(
    embedder: Embedder,
    criterion: str,
    llm: str | None,
    *,
    prompts: Sequence[str],
    options: GenerationOptions = DEFAULT_OPTIONS,
    **basis_options: Any,
) -> Basis:
    """Make a basis with the language model, and show its progress and a summary on stderr.

    The arguments are those of `Embedder.generate_basis`, which also lists the errors.
    """
    with _shown_progress() as progress:
        basis = embedder.generate_basis(
            criterion, llm=llm, options=options, prompts=prompts, progress=progress,
            **basis_options,
        )  # fmt: skip
    _print_summary(criterion, basis.provenance)
    return basis


def print_texts(texts: GeneratedTexts, as_json: bool) -> None:
    """Print the kept and the dropped texts."""
    if as_json:
        print_json(asdict(texts))
        return
    table = Table("text", "votes", "decision", title=texts.criterion, title_justify="left")
    for kept in texts.texts:
        table.add_row(kept.text, str(kept.votes), "kept")
    for dropped in texts.dropped:
        table.add_row(dropped.text, str(dropped.votes), dropped.reason, style="dim")
    out.print(table)


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


def _print_summary(criterion: str, provenance: Mapping[str, Any]) -> None:
    name = provenance["model"]["name"]
    note(
        f"{name}: {len(provenance['seeds'])} answers, {len(provenance['votes'])} texts kept, "
        f"{len(provenance['dropped'])} dropped"
    )
    if model_is_unsure(provenance):
        warn(
            f"{name} hardly knows {criterion!r}: no text is in a quarter of its answers. Check "
            "the texts with crl basis create --dry-run; a hint, an example or a larger model may "
            "help"
        )


def _example(line: str) -> tuple[str, tuple[str, ...]]:
    name, colon, rest = line.partition(":")
    texts = tuple(text.strip() for text in rest.split(",") if text.strip())
    if not colon or not name.strip() or len(texts) < 2:
        raise InvalidInputError(
            f"expected an example such as 'pattern: striped, dotted, plain', got {line[:80]!r}"
        )
    return name.strip(), texts
