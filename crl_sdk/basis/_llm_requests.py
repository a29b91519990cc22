"""The requests to the language model: few-shot lines, or a message, and the grammar."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from crl_sdk.basis._curated import curated_lists
from crl_sdk.basis._generation_options import GenerationOptions
from crl_sdk.basis._votes import text_key

FEW_SHOT = (
    "animal", "clothing", "color", "food", "furniture", "job", "material", "mood", "scene",
    "season", "vehicle", "weather",
)  # fmt: skip
"""Curated lists of which every other answer is shown `LINES`. Lists of things that everybody can
name teach a small model most about things (docs/BASES.md)."""

MIXED = ("material", "mood", "scene", "weather")
"""Curated lists that the remaining answers are shown. They are better for qualities."""

LINES, LINE_TEXTS = 3, 8
"""Number of lists that are drawn from `FEW_SHOT`, and of texts that are shown of any list. Each
answer sees others, so that what a text owes to them does not decide."""

COMMON_TEXTS = 24
"""Number of texts at the beginning of a curated list of which the shown ones are drawn."""

NAMED = 150
"""Largest number of earlier texts that a request for further ones names."""

_LINE, _LONG_LINE = (8, 24), (1, 60)
"""Smallest and largest number of texts in an answer, as a vote and as a list."""

_WORD_TOKENS = 3
"""Tokens of a word and what follows it, at most on average."""

_NARROW_WORDS = 3
_NARROW = "word ::= [A-Za-z]{2,16} | [0-9]{1,4}\n"
_WIDE = "word ::= [A-Za-z0-9] [A-Za-z0-9']{0,19}\n"
_ANY_SCRIPT = r"""word ::= [^ \t\r\n,;:.!?<>|{}\[\]()"`#*_\\/-]{1,24}
"""


def make_grammar(options: GenerationOptions, *, long: bool) -> str:
    """Return the grammar of an answer: one line of short phrases. It contains no user input.

    Args:
        options: Its `max_words` and `any_script` say what a phrase is.
        long: Whether the line is a whole list, and not a vote.
    """
    least, most = _LONG_LINE if long else _LINE
    words = options.max_words
    narrow = words <= _NARROW_WORDS and not long
    word = _ANY_SCRIPT if options.any_script else _NARROW if narrow else _WIDE
    return (
        f'root ::= " "? item (", " item){{{least - 1},{most - 1}}} "\\n"\n'
        f"item ::= word ([ -] word){{0,{words - 1}}}\n{word}"
    )


def max_tokens(options: GenerationOptions, *, long: bool) -> int:
    """Return the largest number of tokens of an answer, enough for nearly all of them."""
    if options.max_tokens is not None:
        return options.max_tokens
    most = (_LONG_LINE if long else _LINE)[1]
    return most * (_WORD_TOKENS + options.max_words - 3) + 8


def few_shot_lines(
    criterion: str, options: GenerationOptions, seed: int
) -> Mapping[str, Sequence[str]]:
    """Return the few-shot lines of an answer: all of the user's, and some curated lists.

    Lists of the criterion itself are left out.
    """
    order = random.Random(seed)
    own = text_key(criterion)
    theirs = {name: list(texts) for name, texts in options.examples.items()}
    taken = {own, *map(text_key, theirs)}
    usable = [
        each
        for each in map(curated_lists().__getitem__, MIXED if seed % 2 else FEW_SHOT)
        if not taken & {text_key(name) for name in (each.name, *each.aliases)}
    ]
    shown = usable if seed % 2 else order.sample(usable, min(LINES, len(usable)))
    lines = {each.name: order.sample(each.texts[:COMMON_TEXTS], LINE_TEXTS) for each in shown}
    for name, texts in theirs.items():
        if text_key(name) != own:
            lines[name] = order.sample(texts, len(texts))
    names = order.sample(list(lines), len(lines))
    return {name: lines[name] for name in names}


def compose_completion(
    criterion: str, options: GenerationOptions, lines: Mapping[str, Sequence[str]]
) -> str:
    """Return few-shot lines and the beginning of the line that the model should continue."""
    shown = "".join(f"{name}: {', '.join(texts)}\n" for name, texts in lines.items())
    return f"{shown}{criterion}{f' ({options.hint})' if options.hint else ''}:"


def compose_chat(
    criterion: str, options: GenerationOptions, lines: Mapping[str, Sequence[str]]
) -> str:
    """Return the request of a vote to a model that answers messages."""
    return (
        f"{compose_completion(criterion, options, lines)}\n\nContinue the last line: list up to "
        f"{_LINE[1]} different values that {_subject(criterion, options)} can have, each of one to "
        f"{options.max_words} words, lower case, separated by commas.{_hint(options)} Answer with "
        "the list alone."
    )


def compose_list(criterion: str, options: GenerationOptions, found: Sequence[str]) -> str:
    """Return the paper's request for a long list, or for what comes beside the texts so far."""
    more = ""
    if found:
        more = f" Name other ones, none of these: {', '.join(found[-NAMED:])}."
    return (
        f"Generate common expressions to describe {_subject(criterion, options)}, as many as "
        f"possible.{more}{_hint(options)} Answer with the expressions alone, each of one to "
        f"{options.max_words} words, in lower case, on one line, separated by commas."
    )


def _subject(criterion: str, options: GenerationOptions) -> str:
    return options.subject or f"the {criterion} of what is in a picture"


def _hint(options: GenerationOptions) -> str:
    return f" Answer {options.hint}." if options.hint else ""
