"""Ask a language model for the texts of a criterion: in votes, or in one long list.

A small model that is asked once gives a few good texts and much noise. The good texts come back
under every seed and the noise does not, so the votes of a text say how far to trust it. A model
that follows instructions gives a long list at once, and more when it is asked for more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from crl_sdk._progress import GenerationProgress
from crl_sdk.basis._answers import read_answer
from crl_sdk.basis._curated import curated_lists
from crl_sdk.basis._generation_options import DEFAULT_OPTIONS, Form, GenerationOptions
from crl_sdk.basis._language_model import LanguageModel, OnToken
from crl_sdk.basis._llm_backend import Sampling
from crl_sdk.basis._llm_requests import (
    COMMON_TEXTS,
    compose_chat,
    compose_completion,
    compose_list,
    few_shot_lines,
    make_grammar,
    max_tokens,
)
from crl_sdk.basis._votes import VoteCounter, text_key
from crl_sdk.errors import GenerationError

ReportProgress: TypeAlias = Callable[[GenerationProgress], None]

PROBE = "animal"
"""Curated list with which the forms are tried. Its values have one common name each."""

PASSED = 5
"""Number of its values that a model must list to be asked for lists."""

FEW_NEW = 2
"""A list is finished when a request for more brings fewer new texts than this."""


@dataclass(frozen=True, slots=True)
class Answers:
    """What a model said.

    Attributes:
        form: How it was asked.
        votes: Votes of the texts.
        seeds: Seed of each answer.
        grammar: Grammar of the answers.
        probe: How many values of the criterion `PROBE` each form gave, if they were tried.
    """

    form: Form
    votes: VoteCounter
    seeds: list[int]
    grammar: str
    probe: dict[str, int]


def ask(
    criterion: str,
    llm: LanguageModel,
    options: GenerationOptions,
    progress: ReportProgress | None = None,
) -> Answers:
    """Ask a model until further answers add nothing.

    Args:
        criterion: Normalised name of the criterion.
        llm: The model.
        options: How often and how to ask.
        progress: Called after each token.

    Raises:
        GenerationError: If the model fails.
    """
    form, probe = options.form, dict[str, int]()
    if form == "auto":
        form, probe = choose_form(llm)
    asking = _Asking(criterion, llm, options, form, progress)
    asking.run()
    return Answers(form, asking.votes, asking.seeds, asking.grammar, probe)


def choose_form(llm: LanguageModel) -> tuple[Form, dict[str, int]]:
    """Return the form that suits a model, and how many known values each form gave.

    A model that can be asked in both is tried, because neither its size nor its template tells.
    """
    if not llm.chats:
        return "completion", {}
    scores = {"list": _try(llm, "list")}
    try:
        scores["completion"] = _try(llm, "completion")
    except GenerationError:  # some endpoints answer messages only
        return "list", scores
    return ("list" if scores["list"] >= max(scores["completion"], PASSED) else "completion"), scores


def _try(llm: LanguageModel, form: Form) -> int:
    """Return how many of the common values of `PROBE` one answer names."""
    asking = _Asking(PROBE, llm, replace(DEFAULT_OPTIONS, max_answers=1), form, None)
    asking.run()
    known = {text_key(text) for text in curated_lists()[PROBE].texts[:COMMON_TEXTS]}
    return len(known & set(asking.votes.votes))


class _Asking:
    """One criterion that a model is asked about."""

    def __init__(
        self,
        criterion: str,
        llm: LanguageModel,
        options: GenerationOptions,
        form: Form,
        progress: ReportProgress | None,
    ) -> None:
        self._criterion, self._options, self._form = criterion, options, form
        self._ask = llm.complete if form == "completion" else llm.chat
        long = form == "list"
        self.grammar = make_grammar(options, long=long)
        self._max_tokens = max_tokens(options, long=long)
        self.votes = VoteCounter()
        self.seeds: list[int] = []
        self._on_token = self._report_to(progress, llm)

    def _report_to(self, progress: ReportProgress | None, llm: LanguageModel) -> OnToken | None:
        if progress is None:
            return None
        tokens_before, seconds_before = llm.tokens, llm.seconds

        def on_token(tokens: int, seconds: float) -> None:
            progress(
                GenerationProgress(
                    len(self.seeds), self._options.max_answers,
                    tokens - tokens_before, seconds - seconds_before,
                )
            )  # fmt: skip

        return on_token

    def run(self) -> None:
        """Ask in the form until further answers add nothing."""
        if self._form == "list":
            self._ask_for_lists()
        else:
            self._ask_for_votes()

    def _ask_for_votes(self) -> None:
        """Ask for short lists until answers add no text that two of them name."""
        options = self._options
        compose = compose_chat if self._form == "chat" else compose_completion
        unchanged = trusted = 0
        while len(self.seeds) < options.max_answers and unchanged < options.patience:
            seed = options.seed + len(self.seeds)
            lines = few_shot_lines(self._criterion, options, seed)
            ours = {name: texts for name, texts in lines.items() if name not in options.examples}
            shown = [*ours, *(text for texts in ours.values() for text in texts)]
            self.votes.add(self._answer(compose(self._criterion, options, lines)), shown=shown)
            now = sum(count >= 2 for count in self.votes.votes.values())
            unchanged, trusted = (0, now) if now > trusted else (unchanged + 1, trusted)

    def _ask_for_lists(self) -> None:
        """Ask for a long list, and for more until hardly anything new comes."""
        options = self._options
        while len(self.seeds) < options.max_answers and len(self.votes.votes) < options.count:
            found = [each.text for each in self.votes.ranking()]
            texts = self._answer(compose_list(self._criterion, options, found))
            self.votes.add(texts, first_position=len(found))
            if len(self.votes.votes) - len(found) < FEW_NEW:
                break

    def _answer(self, request: str) -> list[str]:
        options = self._options
        asked = len(self.seeds)
        seed = options.seed + asked
        sampling = Sampling(
            options.temperatures[asked % len(options.temperatures)],
            seed, options.repeat_penalty, self._max_tokens,
        )  # fmt: skip
        said = self._ask(request, self.grammar, sampling, self._on_token)
        self.seeds.append(seed)
        return read_answer(said, options.max_words)


def describe(answers: Answers) -> dict[str, Any]:
    """Return what a basis records about the asking, as JSON values."""
    found: dict[str, Any] = {
        "form": answers.form, "grammar": answers.grammar, "seeds": answers.seeds,
    }  # fmt: skip
    return {**found, "probe": answers.probe} if answers.probe else found
