"""Generate the texts of a criterion: ask a local language model several times and count votes.

A small model that is asked once gives a few good texts and much noise. The good texts come back
under every seed and the noise does not, so the votes of a text say how far to trust it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from crl_sdk._criterion import normalise_criterion
from crl_sdk._progress import GenerationProgress
from crl_sdk.basis._build import DEFAULT_PROMPT, EmbedText, check_prompts, embed_with_prompts
from crl_sdk.basis._generation_options import DEFAULT_OPTIONS, Form, GenerationOptions
from crl_sdk.basis._language_model import LanguageModel
from crl_sdk.basis._llm_backend import Sampling
from crl_sdk.basis._llm_requests import (
    GRAMMAR,
    compose_chat,
    compose_completion,
    few_shot_lines,
)
from crl_sdk.basis._relevance import MIN_RELEVANCE, relevance
from crl_sdk.basis._votes import RankedText, VoteCounter, text_key
from crl_sdk.errors import GenerationError
from crl_sdk.projection._projection import normalise_rows

ReportProgress: TypeAlias = Callable[[GenerationProgress], None]
MIN_TEXTS = 3
"""Smallest number of trusted texts. With fewer, the model does not know the criterion."""

SURE = 0.25
"""Share of the answers from which a text is kept wherever it lies in the embedding space."""

MIN_DISTANCE = 0.07
"""A text is an outlier only if its mean similarity is at least this far below the median."""

MIN_CENTRED_DISTANCE = 0.1
"""The same, for similarities after the mean of the background is subtracted. `make eval-real` shows
how many strays and how many good texts both rules find."""


@dataclass(frozen=True, slots=True)
class DroppedText:
    """A text that was left out.

    Attributes:
        text: The text.
        votes: Number of answers that contain it.
        reason: Why it was left out.
    """

    text: str
    votes: int
    reason: str


@dataclass(frozen=True, slots=True)
class GeneratedTexts:
    """The texts that a language model gave for a criterion.

    Attributes:
        criterion: Normalised name of the criterion.
        texts: Kept texts by descending votes; texts of `GenerationOptions.include` come first.
        dropped: Texts that were left out, by descending votes.
        answers: Number of answers that the model gave.
        provenance: JSON values that say how the texts were made.
    """

    criterion: str
    texts: tuple[RankedText, ...]
    dropped: tuple[DroppedText, ...]
    answers: int
    provenance: dict[str, Any]

    @property
    def unsure(self) -> bool:
        """Whether the language model hardly knows the criterion, see `reasons`."""
        return bool(self.reasons)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Reasons why the model hardly knows the criterion; empty if it does."""
        found = []
        if all(each.votes < SURE * self.answers for each in self.texts):
            found.append("no text is in a quarter of its answers")
        if self.provenance.get("mean_relevance", MIN_RELEVANCE) < MIN_RELEVANCE:
            found.append("it does not find its own texts likely for this criterion")
        return tuple(found)

    def doubts(self) -> str:
        """Return what the model is unsure of and what it said, with advice."""
        said = ", ".join(f"{each.text} ({each.votes})" for each in self.texts[:12])
        return (
            f"{self.provenance['model']['name']} does not seem to know {self.criterion!r}: "
            f"{', and '.join(self.reasons)}. In {self.answers} answers it said: {said}. Try other "
            "words, a hint or an example line, a larger model, or texts of your own"
        )


def generate_texts(
    criterion: str,
    llm: LanguageModel | str | os.PathLike[str] | None = None,
    options: GenerationOptions = DEFAULT_OPTIONS,
    *,
    embed_text: EmbedText | None = None,
    background: NDArray[np.floating] | None = None,
    prompts: Sequence[str] = (DEFAULT_PROMPT,),
    progress: ReportProgress | None = None,
) -> GeneratedTexts:
    """Ask a language model for the texts of a criterion, and keep those its answers agree on.

    Args:
        criterion: The criterion in words.
        llm: An open language model, a GGUF file, `hf:OWNER/REPO/FILE.gguf`, or None for the
            default model.
        options: How often and how to ask.
        embed_text: Text tower of the vision-language model, used to drop outliers. None keeps
            them.
        background: Embeddings of generic texts, shape (n, d), such as `ModelBundle.background`.
            With them, outliers are found far more reliably.
        prompts: Prompts that the texts will be embedded with.
        progress: Called after each token.

    Returns:
        The texts, with their votes.

    Raises:
        CriterionError: If the criterion is malformed.
        InvalidInputError: If a prompt is malformed.
        GenerationError: If the model cannot be loaded or fails, or if it does not know the
            criterion: fewer than `MIN_TEXTS` texts are left, no text is in a quarter of the
            answers, or the criterion does not make the texts likely.
        MissingDependencyError: If neither llama-cpp-python nor xllamacpp is installed.
    """
    name, prompts = normalise_criterion(criterion), check_prompts(prompts)
    with _open_llm(llm) as opened:
        form = options.form
        if form == "auto":
            form = "chat" if opened.follows_instructions else "completion"
        votes, seeds = _collect_votes(name, opened, options, form, progress)
        model_name, description = opened.name, opened.describe()
        ranked = votes.ranking()
        texts, dropped = _filter_texts(name, ranked, options, len(seeds))
        relevant = relevance(opened, name, [each.text for each in texts])
    if len(texts) < MIN_TEXTS:
        said = ", ".join(f"{c.text} ({c.votes})" for c in ranked[:12]) or "nothing"
        raise GenerationError(
            f"{model_name} does not seem to know {name!r}: its {len(seeds)} answers agree on "
            f"{len(texts)} texts, {MIN_TEXTS} are needed. It said: {said}. Try a hint or an "
            "example line, a larger model, or texts of your own"
        )
    by_text = {c.text: round(float(r), 2) for c, r in zip(texts, relevant, strict=True)}
    mean = float(np.average(relevant, weights=[max(c.votes, 1) for c in texts]))
    texts, irrelevant = _drop_irrelevant(texts, by_text, options, len(seeds))
    dropped = [*dropped, *irrelevant]
    if embed_text is not None and options.spread > 0 and texts:
        rows = embed_with_prompts([c.text for c in texts], prompts, embed_text)
        texts, outliers = _drop_outliers(texts, rows, background, options, len(seeds))
        dropped = [*dropped, *outliers]
    kept, rest = texts[: options.count], texts[options.count :]
    dropped = [*dropped, *(DroppedText(c.text, c.votes, "over the number asked for") for c in rest)]
    found = GeneratedTexts(
        criterion=name,
        texts=tuple(kept),
        dropped=tuple(sorted(dropped, key=lambda d: -d.votes)),
        answers=len(seeds),
        provenance={
            "texts": "generated",
            "model": description,
            "form": form,
            "grammar": GRAMMAR,
            "options": {k: v for k, v in asdict(options).items() if k != "form"},
            "few_shot": {key: list(texts) for key, texts in few_shot_lines(name, options).items()},
            "seeds": seeds,
            "votes": {c.text: c.votes for c in kept},
            "relevance": {c.text: by_text[c.text] for c in kept},
            "mean_relevance": round(mean, 2),
            "dropped": [asdict(d) for d in dropped],
        },
    )
    if found.unsure and not options.accept_unsure:
        raise GenerationError(found.doubts())
    return found


def _drop_irrelevant(
    texts: Sequence[RankedText],
    relevant: Mapping[str, float],
    options: GenerationOptions,
    answers: int,
) -> tuple[list[RankedText], list[DroppedText]]:
    """Drop texts with few votes that the criterion makes less likely."""
    kept, irrelevant = [], []
    for candidate in texts:
        value = relevant[candidate.text]
        if value >= 0 or _is_sure(candidate, options, answers):
            kept.append(candidate)
        else:
            reason = f"the model finds it less likely for this criterion: log ratio {value:.1f}"
            irrelevant.append(DroppedText(candidate.text, candidate.votes, reason))
    return kept, irrelevant


def _is_sure(candidate: RankedText, options: GenerationOptions, answers: int) -> bool:
    return candidate.votes >= SURE * answers or candidate.text in options.include


@contextmanager
def _open_llm(llm: LanguageModel | str | os.PathLike[str] | None) -> Iterator[LanguageModel]:
    """Yield an open language model; a model that is opened here is also closed here."""
    if llm is None or isinstance(llm, str | os.PathLike):
        with LanguageModel.open(llm) as opened:
            yield opened
    else:
        yield llm


def _collect_votes(
    criterion: str,
    llm: LanguageModel,
    options: GenerationOptions,
    form: Form,
    progress: ReportProgress | None,
) -> tuple[VoteCounter, list[int]]:
    """Ask until further answers add nothing. Returns the votes and the seeds of the answers."""
    ask = llm.chat if form == "chat" else llm.complete
    compose = compose_chat if form == "chat" else compose_completion
    votes, seeds = VoteCounter(), list[int]()
    unchanged = trusted = 0
    tokens_before, seconds_before = llm.tokens, llm.seconds

    def on_token(tokens: int, seconds: float) -> None:
        if progress is not None:
            progress(
                GenerationProgress(
                    len(seeds), options.max_answers,
                    tokens - tokens_before, seconds - seconds_before,
                )
            )  # fmt: skip

    while len(seeds) < options.max_answers and unchanged < options.patience:
        seed = options.seed + len(seeds)
        sampling = Sampling(
            options.temperatures[len(seeds) % len(options.temperatures)],
            seed,
            options.repeat_penalty,
            options.max_tokens,
        )
        votes.add(ask(compose(criterion, options, seed), GRAMMAR, sampling, on_token))
        seeds.append(seed)
        now = sum(count >= 2 for count in votes.votes.values())
        unchanged, trusted = (0, now) if now > trusted else (unchanged + 1, trusted)
    return votes, seeds


def _filter_texts(
    criterion: str, ranked: Sequence[RankedText], options: GenerationOptions, answers: int
) -> tuple[list[RankedText], list[DroppedText]]:
    """Drop echoes, texts with few votes and excluded texts; put included texts first."""
    own = set(text_key(criterion).split())
    shown = {text_key(t) for texts in few_shot_lines(criterion, options).values() for t in texts}
    shown |= {text_key(name) for name in few_shot_lines(criterion, options)}
    from_user = {text_key(text) for texts in options.examples.values() for text in texts}
    needed = max(2, round(options.min_share * answers))
    included, excluded = ({text_key(t) for t in ts} for ts in (options.include, options.exclude))
    votes = {text_key(candidate.text): candidate.votes for candidate in ranked}
    kept = [RankedText(text, votes.get(text_key(text), 0)) for text in options.include]
    dropped = []
    for candidate in ranked:
        key = text_key(candidate.text)
        reason = ""
        if key in included:
            continue
        if key in excluded:
            reason = "excluded by the user"
        elif set(key.split()) <= own:
            reason = "echoes the criterion"
        elif key in shown - from_user:
            reason = "echoes an example"
        elif candidate.votes < needed:
            reason = f"in fewer than {needed} of {answers} answers"
        if reason:
            dropped.append(DroppedText(candidate.text, candidate.votes, reason))
        else:
            kept.append(candidate)
    return kept, dropped


def _drop_outliers(
    texts: Sequence[RankedText],
    rows: NDArray[np.float32],
    background: NDArray[np.floating] | None,
    options: GenerationOptions,
    answers: int,
) -> tuple[list[RankedText], list[DroppedText]]:
    """Drop texts with few votes that are far from the others in the embedding space.

    A text with many votes stays, because the vision-language model may know it better than the
    others.
    """
    weights = np.array([max(c.votes, 1) for c in texts], np.float32)
    near = similarity_to_others(rows, weights, background)
    distance = MIN_DISTANCE if background is None else MIN_CENTRED_DISTANCE
    cut = outlier_cut(near, options.spread, distance)
    kept, outliers = [], []
    for candidate, value in zip(texts, near, strict=True):
        if value >= cut or _is_sure(candidate, options, answers):
            kept.append(candidate)
        else:
            reason = f"far from the others: similarity {value:.3f}, cut {cut:.3f}"
            outliers.append(DroppedText(candidate.text, candidate.votes, reason))
    return kept, outliers


def outlier_cut(near: NDArray[np.floating], spread: float, distance: float) -> float:
    """Return the similarity below which a text is an outlier.

    Args:
        near: Result of `similarity_to_others`, shape (n,).
        spread: Number of robust standard deviations that an outlier is below the median.
        distance: Smallest distance of an outlier from the median.
    """
    median = float(np.median(near))
    deviation = 1.4826 * float(np.median(np.abs(near - median)))
    return median - max(spread * deviation, distance)


def similarity_to_others(
    rows: NDArray[np.float32],
    weights: NDArray[np.float32],
    background: NDArray[np.floating] | None = None,
) -> NDArray[np.float32]:
    """Return the weighted mean cosine of each row with all other rows.

    All texts share a direction, which makes even unrelated ones similar. It is the mean of the
    background, and is subtracted first.

    Args:
        rows: Unit rows, shape (n, d), float32.
        weights: Positive weights of the rows, shape (n,), float32.
        background: Embeddings of generic texts, shape (b, d), unit rows.

    Returns:
        Mean cosines, shape (n,), float32; zeros if there is one row.
    """
    if background is not None:
        rows = normalise_rows(rows - background.mean(axis=0, dtype=np.float32), "l2")
    total = (weights[:, None] * rows).sum(axis=0)
    others = total[None, :] - weights[:, None] * rows
    mass = np.maximum(weights.sum() - weights, 1e-12)
    return np.asarray((others * rows).sum(axis=1) / mass, np.float32)
