"""Count in how many answers of a language model each text occurs, in any spelling."""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_ARTICLES = ("a ", "an ", "the ", "some ")


@dataclass(frozen=True, slots=True)
class RankedText:
    """A text and its votes.

    Attributes:
        text: The text, in its most frequent spelling.
        votes: Number of answers that contain it.
    """

    text: str
    votes: int


def text_key(text: str) -> str:
    """Return a key that ignores case, width, articles, hyphens and plurals.

    Example:
        >>> text_key("The Half-Moons") == text_key("half moon")
        True
    """
    plain = unicodedata.normalize("NFKC", text).casefold().replace("-", " ")
    plain = " ".join(plain.split())
    for article in _ARTICLES:
        plain = plain.removeprefix(article)
    return " ".join(_strip_plural(word) for word in plain.split())


def _strip_plural(word: str) -> str:
    """Remove a plural ending. The result need not be a word, only equal for both numbers."""
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("ses", "xes", "zes", "ches", "shes")):
        return word[:-2]
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


class VoteCounter:
    """Counts in how many answers each text occurs.

    Attributes:
        votes: Number of answers by text key.
        answers: Number of answers.

    Example:
        >>> counter = VoteCounter()
        >>> counter.add(["red", "blue", "green"])
        >>> counter.add(["reds", "blue"], shown=["green"])
        >>> [(each.text, each.votes) for each in counter.ranking()]
        [('red', 2), ('blue', 2), ('green', 1)]
        >>> counter.chances("green")
        1
    """

    def __init__(self) -> None:
        """Start with no answers."""
        self.votes: Counter[str] = Counter()
        self.answers = 0
        self._shown: Counter[str] = Counter()
        self._spellings: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._positions: defaultdict[str, list[int]] = defaultdict(list)

    def add(
        self, texts: Sequence[str], *, shown: Sequence[str] = (), first_position: int = 0
    ) -> None:
        """Count each text of an answer once.

        Args:
            texts: Texts of the answer.
            shown: Texts that the request had shown. The answer has no vote on them, because it may
                have copied them.
            first_position: Position of the first text. Of texts with equal votes, those of the
                smallest mean position come first.
        """
        self.answers += 1
        seen = {text_key(text) for text in shown}
        self._shown.update(seen)
        for position, text in enumerate(texts, first_position):
            key = text_key(text)
            if key and key not in seen:
                seen.add(key)
                self.votes[key] += 1
                self._positions[key].append(position)
                self._spellings[key][text] += 1

    def chances(self, text: str) -> int:
        """Return the number of answers that had a vote on a text."""
        return self.answers - self._shown[text_key(text)]

    def ranking(self) -> list[RankedText]:
        """Return the texts by descending votes, then by mean position in the answers."""

        def order(key: str) -> tuple[float, float, str]:
            return -self.votes[key], float(np.mean(self._positions[key])), key

        return [
            RankedText(self._spelling(key), self.votes[key])
            for key in sorted(self.votes, key=order)
        ]

    def _spelling(self, key: str) -> str:
        """Return the most frequent spelling, and the shortest of several."""
        spellings = self._spellings[key]
        return min(spellings, key=lambda text: (-spellings[text], len(text), text))
