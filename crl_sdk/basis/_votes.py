"""Votes: in how many answers of a language model each text occurs, under all its spellings."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np

_ARTICLES = ("a ", "an ", "the ", "some ")


@dataclass(frozen=True, slots=True)
class RankedText:
    """A text, and how many of the model's answers hold it."""

    text: str
    votes: int


def text_key(text: str) -> str:
    """Give what two texts share that differ in case, article, hyphen or plural alone."""
    plain = " ".join(text.casefold().replace("-", " ").split())
    for article in _ARTICLES:
        plain = plain.removeprefix(article)
    return " ".join(_singular(word) for word in plain.split())


def _singular(word: str) -> str:
    """Cut a plural ending; a key need not be a word, only the same for both numbers."""
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("ses", "xes", "zes", "ches", "shes")):
        return word[:-2]
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


class Poll:
    """Counts in how many answers each text occurs.

    Attributes:
        votes: text key → number of answers.
    """

    def __init__(self) -> None:
        """Start with no answers."""
        self.votes: Counter[str] = Counter()
        self._spellings: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._positions: defaultdict[str, list[int]] = defaultdict(list)

    def count(self, answer: str) -> None:
        """Count the texts of an answer, each once; the last may be cut off and is left out."""
        texts = answer.split(",") if answer.endswith("\n") else answer.split(",")[:-1]
        seen: set[str] = set()
        for position, raw in enumerate(texts):
            text = " ".join(raw.split())
            key = text_key(text)
            if not key:
                continue
            self._spellings[key][text] += 1
            if key not in seen:
                seen.add(key)
                self.votes[key] += 1
                self._positions[key].append(position)

    def ranking(self) -> list[RankedText]:
        """Give the texts, most votes first, then earliest named; each in its commonest spelling."""

        def order(key: str) -> tuple[float, float, str]:
            return -self.votes[key], float(np.mean(self._positions[key])), key

        return [
            RankedText(self._spelling(key), self.votes[key])
            for key in sorted(self.votes, key=order)
        ]

    def _spelling(self, key: str) -> str:
        """Give the commonest spelling; of several, the shortest."""
        spellings = self._spellings[key]
        return min(spellings, key=lambda text: (-spellings[text], len(text), text))
