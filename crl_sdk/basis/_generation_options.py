"""Options of text generation."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

from crl_sdk.errors import InvalidInputError

Form: TypeAlias = Literal["auto", "completion", "chat"]

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
        min_share: Smallest share of the answers that must contain a text. At least two answers
            must contain it in any case.
        repeat_penalty: Penalty that keeps small models from repeating the same few texts.
        max_tokens: Largest number of tokens in an answer.
        hint: Words added to the criterion, such as `as a zoologist would say`.
        examples: Few-shot lines, texts by criterion, that come before the built-in ones.
        include: Texts that are always kept, before the model's.
        exclude: Texts that are left out.
        form: `completion` lets the model continue few-shot lines, `chat` asks through its chat
            template. `auto` uses `chat` for instruct models of at least 1e9 parameters.
        spread: A text with few votes is dropped as an outlier if its mean similarity to the others
            is this many robust standard deviations, and at least `MIN_DISTANCE`, below the median.
            0 keeps all texts.
        accept_unsure: Whether to return texts that the model is unsure of, instead of an error.
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
    spread: float = 2.0
    accept_unsure: bool = False

    def __post_init__(self) -> None:
        """Check all values.

        Raises:
            InvalidInputError: If a value is out of range, a list of texts is a single string, or a
                hint or example contains more than plain words and punctuation.
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
        if not 0 <= self.min_share <= 1:
            raise InvalidInputError(f"expected min_share from 0 to 1, got {self.min_share}")
        if not self.spread >= 0:  # NaN is refused too
            raise InvalidInputError(f"expected spread >= 0, got {self.spread}")
        if self.form not in get_args(Form):
            raise InvalidInputError(f"expected form in {get_args(Form)}, got {self.form!r}")
        lists = {"include": self.include, "exclude": self.exclude}
        lists |= {f"examples[{name!r}]": texts for name, texts in self.examples.items()}
        for name, texts in lists.items():
            if isinstance(texts, str):
                raise InvalidInputError(f"expected {name} to be a tuple of texts, got {texts!r}")
            if blank := [text for text in texts if not text.strip()]:
                raise InvalidInputError(
                    f"expected {name} of texts with visible characters, got {blank[0]!r}"
                )
        if self.hint:
            _check_plain("hint", self.hint)
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
