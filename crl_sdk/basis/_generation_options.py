"""Options of text generation."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

from crl_sdk.errors import InvalidInputError

Form: TypeAlias = Literal["auto", "completion", "chat", "list"]

MAX_HINT = 200
_PLAIN = re.compile(r"[^\W_][\w ,.'()/&-]*")


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """Options of text generation. All of them are recorded in the provenance of the basis.

    Attributes:
        count: Largest number of texts.
        seed: Seed of the first answer. Each further answer uses the next number.
        max_answers: Largest number of answers that the model is asked for.
        patience: Number of answers in a row without a new trusted text after which to stop.
        temperatures: Sampling temperatures, used in turn.
        repeat_penalty: Penalty that keeps small models from repeating the same few texts.
        max_tokens: Largest number of tokens in an answer; None for enough for a full one.
        max_words: Largest number of words in a text. From 4 on, articles, apostrophes and digits
            within words are allowed too.
        any_script: Whether texts may have letters beyond a to z.
        hint: Words added to the criterion, such as `as a zoologist would say`.
        subject: What the values describe, such as `the color of objects`, for models that answer
            messages. Empty for `the CRITERION of what is in a picture`.
        examples: Few-shot lines, texts by criterion, that every answer is shown.
        include: Texts that are always kept, before the model's.
        exclude: Texts that are left out.
        form: How to ask. `completion` lets the model continue few-shot lines and counts votes,
            `chat` does so through its chat template, and `list` asks for one long list, as the
            paper does, and for more until nothing new comes. `auto` tries `completion` and `list`
            once, on a criterion of known values, and takes the better.
        spread: A text with few votes is dropped as an outlier if its mean similarity to the others
            is this many robust standard deviations, and at least `MIN_DISTANCE`, below the median.
            0 keeps all texts.
        accept_unsure: Whether to return texts that the model is unsure of, instead of an error.
    """

    count: int = 40
    seed: int = 0
    max_answers: int = 24
    patience: int = 12
    temperatures: tuple[float, ...] = (0.5, 0.7, 0.9)
    repeat_penalty: float = 1.05
    max_tokens: int | None = None
    max_words: int = 3
    any_script: bool = False
    hint: str = ""
    subject: str = ""
    examples: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    form: Form = "auto"
    spread: float = 2.0
    accept_unsure: bool = False

    def __post_init__(self) -> None:
        """Check all values.

        Raises:
            InvalidInputError: If a value is out of range, a list of texts is a single string, or a
                hint or example contains more than plain words and punctuation.
        """
        tokens = 8 if self.max_tokens is None else self.max_tokens
        for name, value, low, high in (
            ("count", self.count, 1, 1000), ("max_answers", self.max_answers, 1, 1000),
            ("patience", self.patience, 1, 1000), ("max_words", self.max_words, 1, 12),
            ("max_tokens", tokens, 8, 4096),
        ):  # fmt: skip
            if not low <= value <= high:
                raise InvalidInputError(f"expected {name} from {low} to {high}, got {value}")
        if not self.temperatures or not all(0 <= t <= 2 for t in self.temperatures):
            raise InvalidInputError(
                f"expected temperatures from 0 to 2, got {list(self.temperatures)}"
            )
        if not self.spread >= 0:  # NaN is refused too
            raise InvalidInputError(f"expected spread >= 0, got {self.spread}")
        if self.form not in get_args(Form):
            raise InvalidInputError(f"expected form in {get_args(Form)}, got {self.form!r}")
        self._check_texts()

    def _check_texts(self) -> None:
        lists = {"include": self.include, "exclude": self.exclude}
        lists |= {f"examples[{name!r}]": texts for name, texts in self.examples.items()}
        for name, texts in lists.items():
            if isinstance(texts, str):
                raise InvalidInputError(f"expected {name} to be a tuple of texts, got {texts!r}")
            if blank := [text for text in texts if not text.strip()]:
                raise InvalidInputError(
                    f"expected {name} of texts with visible characters, got {blank[0]!r}"
                )
        for what, words in (("hint", self.hint), ("subject", self.subject)):
            if words:
                _check_plain(what, words)
        for name, texts in self.examples.items():
            for text in (name, *texts):
                _check_plain("example", text)


DEFAULT_OPTIONS = GenerationOptions()


def _check_plain(what: str, text: str) -> None:
    """Refuse text that could contain a model's markup or end its line."""
    if len(text) > MAX_HINT or not _PLAIN.fullmatch(text) or not text.isprintable():
        raise InvalidInputError(
            f"expected {what}s of 1 to {MAX_HINT} letters, digits, spaces and ,.'()/&- on one "
            f"line, got {text[:60]!r}"
        )
