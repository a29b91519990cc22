"""Read the list of texts in an answer of a language model, whatever its form."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from crl_sdk.basis._chat_template import REASONING_MARKS

_MAX_CHARACTERS = 80
_NO_TEXTS = frozenset({"sorry", "etc", "n/a", "no more", "and so on", "and more"})
_BULLET = re.compile(r"^\s*(?:[-*•–+]|\(?\d{1,3}[.):]|#{1,6})\s+")
_HEADING = re.compile(r"^[^,;:]{0,80}:\s*")
_SEPARATORS = re.compile("[,;\u3001\uff0c\uff1b]")  # also those of Chinese and Japanese
_MARKUP = re.compile(r"[*_`\"“”„«»\[\]{}]+")
_FORBIDDEN = re.compile(r"[^\w\s'&/+().-]")


def read_answer(answer: str, max_words: int) -> list[str]:
    r"""Return the texts of an answer, in lower case.

    Reasoning is left out. A JSON list, bullets, numbers, headings, quotation marks and emphasis are
    read as such. Without a line end, the last text is taken as cut off and left out.

    Args:
        answer: What the language model said.
        max_words: Largest number of words of a text. Longer ones are sentences, and are left out.

    Example:
        >>> read_answer("Here are colors:\n1. **Red** (warm)\n2. Sky blue\n", 3)
        ['red', 'sky blue']
    """
    answer = _without_reasoning(answer)
    listed = _json_texts(answer)
    texts = _line_texts(answer) if listed is None else listed
    found = (_clean(text) for text in texts)
    return [
        text for text in found if text and text not in _NO_TEXTS and len(text.split()) <= max_words
    ]


def _without_reasoning(answer: str) -> str:
    for begin, end in REASONING_MARKS:
        if end in answer:
            answer = answer.rpartition(end)[2]
        elif begin in answer:
            answer = ""
    return answer


def _json_texts(answer: str) -> list[str] | None:
    """Return the strings of the JSON list in an answer, or None if there is none."""
    start, end = answer.find("["), answer.rfind("]")
    if not 0 <= start < end:
        return None
    try:
        found = json.loads(answer[start : end + 1])
    except (ValueError, RecursionError):
        return None
    texts = list(_strings(found))
    return texts or None


def _strings(values: list[Any]) -> Iterable[str]:
    """Yield the strings of a list, and the first value of each object in it."""
    for each in values:
        text = next(iter(each.values()), None) if isinstance(each, dict) else each
        if isinstance(text, str):
            yield text


def _line_texts(answer: str) -> list[str]:
    lines = answer.split("\n")
    texts: list[str] = []
    for number, line in enumerate(lines):
        item = _BULLET.sub("", line)
        if ":" in item:  # a heading, or an explanation behind a text
            before, _, after = item.partition(":")
            item = before if item != line and after.strip() else _HEADING.sub("", item)
        parts = _SEPARATORS.split(item)
        if number == len(lines) - 1:
            parts = parts[:-1]  # cut off
        texts += parts
    return texts


def _clean(text: str) -> str:
    text = _MARKUP.sub("", text).replace("\u2019", "'")
    text = re.split(r"\s+[–—-]\s+|\s\(", text)[0]
    text = " ".join(text.split()).strip(" .'!-").lower().removeprefix("and ")
    if len(text) > _MAX_CHARACTERS or _FORBIDDEN.search(text) or not re.search(r"\w", text):
        return ""
    return text
