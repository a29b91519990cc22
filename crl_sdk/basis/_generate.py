"""Criterion → ranked texts: a local language model is asked several times, and its answers vote.

A small model asked once gives a few good texts and much noise. The good ones come back under every
seed and the noise does not, so a text's votes tell how far to trust it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from crl_sdk._criterion import normalise_criterion
from crl_sdk.basis._build import DEFAULT_PROMPT, EmbedText, embed_with_prompts
from crl_sdk.basis._language_model import LanguageModel, Sampling
from crl_sdk.basis._votes import Poll, RankedText, text_key
from crl_sdk.errors import GenerationError, InvalidInputError

Progress: TypeAlias = Callable[[int, int, float], None]
Form: TypeAlias = Literal["auto", "completion", "chat"]

EXAMPLES: Mapping[str, tuple[str, ...]] = {
    "material": ("wood", "metal", "glass", "plastic", "fabric", "stone", "paper", "leather"),
    "weather": ("sunny", "rainy", "cloudy", "snowy", "foggy", "windy", "stormy", "clear"),
    "room": ("kitchen", "bedroom", "bathroom", "office", "garage", "hallway", "attic", "cellar"),
    "mood": ("happy", "sad", "angry", "calm", "afraid", "bored", "excited", "lonely"),
}
"""Few-shot lines. None is about a factor of the demo world, on which bases are measured."""

GRAMMAR = r"""root ::= " "? item (", " item){7,23} "\n"
item ::= word ([ -] word){0,2}
word ::= [a-z]{2,16} | [0-9]{1,4}
"""
"""What an answer may be: a line of 8 to 24 short phrases. Nothing a user types is part of it."""

MIN_TEXTS = 3
"""With fewer texts that more than one answer holds, the model does not know the criterion."""

SURE = 0.25
"""Share of the answers from which a text's votes outweigh its place in the embedding space."""

MIN_DISTANCE = 0.05
"""Cosine by which a stray lies below the median at least, however close together the others are."""

MAX_HINT = 200
_PLAIN = re.compile(r"[^\W_][\w ,.'()/&-]*")


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """How texts are drawn from a model; all of it goes into the basis' provenance.

    Attributes:
        count: how many texts at most.
        seed: of the first answer; the others follow it.
        max_answers: how often the model is asked at most.
        patience: answers in a row without a new trusted text after which it is enough.
        temperatures: taken in turn.
        min_share: share of the answers a text must be in, beside being in two.
        repeat_penalty: keeps small models from saying the same few texts over and over.
        max_tokens: of one answer.
        hint: added to the criterion, such as `as a zoologist would say`.
        examples: few-shot lines, criterion → texts, put before the built-in ones.
        include: texts to take in any case, before the model's.
        exclude: texts to leave out.
        form: `completion` continues few-shot lines, `chat` asks through the model's chat template,
            `auto` takes `chat` for instruct models of at least `llm.CHAT_PARAMETERS`.
        spread: a text with few votes is dropped if its similarity to the others lies this many
            robust standard deviations, and `MIN_DISTANCE`, below the median; 0 keeps all.
    """

    count: int = 40
    seed: int = 0
    max_answers: int = 24
    patience: int = 6
    temperatures: tuple[float, ...] = (0.5, 0.7, 0.9)
    min_share: float = 0.12
    repeat_penalty: float = 1.05
    max_tokens: int = 80
    hint: str = ""
    examples: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    form: Form = "auto"
    spread: float = 3.0

    def __post_init__(self) -> None:
        """Check all values.

        Raises:
            InvalidInputError: a value is out of range, or a hint or example holds more than plain
                words and punctuation.
        """
        for name, low, high in (
            ("count", 1, 1000), ("max_answers", 1, 1000), ("patience", 1, 1000),
            ("max_tokens", 8, 4096),
        ):  # fmt: skip
            if not low <= getattr(self, name) <= high:
                raise InvalidInputError(
                    f"expected {name} from {low} to {high}, got {getattr(self, name)}"
                )
        if not self.temperatures or not all(0 <= t <= 2 for t in self.temperatures):
            raise InvalidInputError(
                f"expected temperatures from 0 to 2, got {list(self.temperatures)}"
            )
        if self.hint:
            _check_plain("hint", self.hint)
        for name, texts in self.examples.items():
            for text in (name, *texts):
                _check_plain("example", text)


@dataclass(frozen=True, slots=True)
class DroppedText:
    """A text that was left out, and why."""

    text: str
    votes: int
    reason: str


@dataclass(frozen=True, slots=True)
class GeneratedTexts:
    """What a model gave for a criterion.

    Attributes:
        criterion: its normalised name.
        texts: kept, most votes first.
        dropped: left out, most votes first.
        answers: how often the model was asked.
        provenance: JSON values that say how all this was made.
    """

    criterion: str
    texts: tuple[RankedText, ...]
    dropped: tuple[DroppedText, ...]
    answers: int
    provenance: dict[str, Any]

    @property
    def unsure(self) -> bool:
        """Whether no text is in `SURE` of the answers: the model hardly knows the criterion."""
        return all(text.votes < SURE * self.answers for text in self.texts)


def generate_texts(
    criterion: str,
    model: LanguageModel,
    options: GenerationOptions = GenerationOptions(),
    *,
    embed_text: EmbedText | None = None,
    prompts: Sequence[str] = (DEFAULT_PROMPT,),
    progress: Progress | None = None,
) -> GeneratedTexts:
    """Ask a model for the texts of a criterion, and keep what its answers agree on.

    Args:
        criterion: in words.
        model: the language model.
        options: how often and how to ask.
        embed_text: texts to (n, d) float32 unit rows; without it nothing is dropped for being far
            from the rest in the space of the vision-language model.
        prompts: what the texts will be embedded under.
        progress: called at each token with the number of finished answers, and the tokens and
            seconds spent by the model.

    Raises:
        CriterionError: the criterion is malformed.
        GenerationError: the model fails, or it and `options.include` give fewer than `MIN_TEXTS`
            texts.
    """
    name = normalise_criterion(criterion)
    form = options.form
    if form == "auto":
        form = "chat" if model.follows_instructions else "completion"
    poll, seeds = _ask(name, model, options, form, progress)
    ranked = poll.ranking()
    texts, dropped = _screen(name, ranked, options, len(seeds))
    if len(texts) < MIN_TEXTS:
        said = ", ".join(f"{c.text} ({c.votes})" for c in ranked[:12]) or "nothing"
        raise GenerationError(
            f"{model.name} does not seem to know {name!r}: in {len(seeds)} answers it agreed on "
            f"{len(texts)} texts, {MIN_TEXTS} are needed. It said: {said}. Try a hint or an "
            "example line, a larger model, or texts of your own"
        )
    if embed_text is not None and options.spread > 0:
        texts, strays = _drop_strays(texts, embed_text, prompts, options, len(seeds))
        dropped = [*dropped, *strays]
    kept, rest = texts[: options.count], texts[options.count :]
    dropped = [*dropped, *(DroppedText(c.text, c.votes, "over the number asked for") for c in rest)]
    return GeneratedTexts(
        criterion=name,
        texts=tuple(kept),
        dropped=tuple(sorted(dropped, key=lambda d: -d.votes)),
        answers=len(seeds),
        provenance={
            "texts": "generated",
            "model": model.describe(),
            "form": form,
            "grammar": GRAMMAR,
            "options": {k: v for k, v in asdict(options).items() if k != "form"},
            "few_shot": {key: list(texts) for key, texts in _examples(name, options).items()},
            "seeds": seeds,
            "votes": {c.text: c.votes for c in kept},
            "dropped": [asdict(d) for d in dropped],
        },
    )


def _ask(
    criterion: str,
    model: LanguageModel,
    options: GenerationOptions,
    form: Form,
    progress: Progress | None,
) -> tuple[Poll, list[int]]:
    """Ask until answers add nothing any more; give their votes and their seeds."""
    ask = model.chat if form == "chat" else model.complete
    compose = compose_chat if form == "chat" else compose_completion
    poll, seeds = Poll(), list[int]()
    unchanged = trusted = 0

    def on_token(tokens: int, seconds: float) -> None:
        if progress is not None:
            progress(len(seeds), tokens, seconds)

    while len(seeds) < options.max_answers and unchanged < options.patience:
        seed = options.seed + len(seeds)
        sampling = Sampling(
            options.temperatures[len(seeds) % len(options.temperatures)],
            seed,
            options.repeat_penalty,
            options.max_tokens,
        )
        poll.count(ask(compose(criterion, options, seed), GRAMMAR, sampling, on_token))
        seeds.append(seed)
        now = sum(votes >= 2 for votes in poll.votes.values())
        unchanged, trusted = (0, now) if now > trusted else (unchanged + 1, trusted)
    return poll, seeds


def compose_completion(criterion: str, options: GenerationOptions, seed: int) -> str:
    """Write few-shot lines, in an order that the seed decides, and the line to be continued.

    The order changes because small models lean on the last line.
    """
    order = random.Random(seed)
    lines = []
    for name, texts in _examples(criterion, options).items():
        shown = list(texts)
        order.shuffle(shown)
        lines.append(f"{name}: {', '.join(shown)}\n")
    order.shuffle(lines)
    return "".join(lines) + f"{criterion}{f' ({options.hint})' if options.hint else ''}:"


def compose_chat(criterion: str, options: GenerationOptions, seed: int) -> str:
    """Write the request for a model that follows instructions."""
    hint = f" Answer {options.hint}." if options.hint else ""
    return (
        f"{compose_completion(criterion, options, seed)}\n\nContinue the last line: list up to 24 "
        f"different values that the {criterion} of what is in a picture can have, each of one to "
        f"three words, lower case, separated by commas.{hint} Answer with the list alone."
    )


def _screen(
    criterion: str, ranked: Sequence[RankedText], options: GenerationOptions, answers: int
) -> tuple[list[RankedText], list[DroppedText]]:
    """Drop echoes, what too few answers hold and what the user excludes; put theirs first."""
    own = set(text_key(criterion).split())
    shown = {text_key(t) for texts in _examples(criterion, options).values() for t in texts}
    shown |= {text_key(name) for name in _examples(criterion, options)}
    mine = {text_key(text) for texts in options.examples.values() for text in texts}
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
        elif key in shown - mine:
            reason = "echoes an example"
        elif candidate.votes < needed:
            reason = f"in fewer than {needed} of {answers} answers"
        if reason:
            dropped.append(DroppedText(candidate.text, candidate.votes, reason))
        else:
            kept.append(candidate)
    return kept, dropped


def _drop_strays(
    texts: Sequence[RankedText],
    embed_text: EmbedText,
    prompts: Sequence[str],
    options: GenerationOptions,
    answers: int,
) -> tuple[list[RankedText], list[DroppedText]]:
    """Drop texts that lie far from the others in the embedding space and have few votes.

    A text that many answers hold stays: a vision-language model may know it better than the rest.
    """
    rows = embed_with_prompts([c.text for c in texts], prompts, embed_text)
    near = similarity_to_others(rows, np.array([max(c.votes, 1) for c in texts], np.float32))
    median = float(np.median(near))
    deviation = 1.4826 * float(np.median(np.abs(near - median)))
    cut = median - max(options.spread * deviation, MIN_DISTANCE)
    kept, strays = [], []
    for candidate, value in zip(texts, near, strict=True):
        sure = candidate.votes >= SURE * answers or candidate.text in options.include
        if sure or value >= cut:
            kept.append(candidate)
        else:
            reason = f"far from the others: similarity {value:.3f}, cut {cut:.3f}"
            strays.append(DroppedText(candidate.text, candidate.votes, reason))
    return kept, strays


def similarity_to_others(
    rows: NDArray[np.float32], weights: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Give each row's mean cosine with the other rows, weighted.

    Args:
        rows: (n, d) float32, unit rows.
        weights: (n,) float32, positive.

    Returns:
        (n,) float32; zeros if there is one row.
    """
    total = (weights[:, None] * rows).sum(axis=0)
    others = total[None, :] - weights[:, None] * rows
    mass = np.maximum(weights.sum() - weights, 1e-12)
    return np.asarray((others * rows).sum(axis=1) / mass, np.float32)


def _examples(criterion: str, options: GenerationOptions) -> dict[str, tuple[str, ...]]:
    """Give the few-shot lines, the user's first, without one that is the criterion itself."""
    lines = {**options.examples, **{k: v for k, v in EXAMPLES.items() if k not in options.examples}}
    return {k: v for k, v in lines.items() if text_key(k) != text_key(criterion)}


def _check_plain(what: str, text: str) -> None:
    """Refuse text that could carry a model's markup or leave its line."""
    if len(text) > MAX_HINT or not _PLAIN.fullmatch(text) or not text.isprintable():
        raise InvalidInputError(
            f"expected {what}s of 1 to {MAX_HINT} letters, digits, spaces and ,.'()/&- on one "
            f"line, got {text[:60]!r}"
        )
