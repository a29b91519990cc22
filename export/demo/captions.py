"""Captions of scenes that name any subset of the factors, in many wordings.

A caption is built from *parts*: one synonym per factor that it names, and words that say nothing
about the image. Wordings that join and frame the parts are drawn independently of the named
factors. Therefore only a synonym can tell which criterion is meant, never the prompt around it.

Singular and plural carry no meaning here: only a counting word says how many there are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from crl_export.demo.lexicon import SYNONYMS
from crl_export.demo.world import CRITERIA, FACTORS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

NEUTRAL_PROMPT = "a photo of {}"
"""Prompt with which every criterion is measured."""

FRAMES = (
    *(["{}"] * 5),
    *(["a photo of {}"] * 4),
    "a photo of the {}", "a photo of a {}", "a picture of {}", "a picture of a {}",
    "an image of {}", "an image with {}", "a picture with {}", "a scene with {}",
    "a drawing of {}", "{} here", "this shows {}", "something {}", "everything is {}",
    "all of it is {}", "we see {}", "it is {}",
    "there is {}", "here are {}", "they are {}", "the {} ones", "a {} thing", "{} things",
    "{} objects", "{} items", "{} pieces", "a photo of {} objects", "a picture with {} things",
    "a picture of {} items", "an image with {} objects", "objects that are {}", "things, {}",
    "some {} objects", "a collection of {} things", "look: {}", "a photo with objects of {}",
)  # fmt: skip

CRITERION_FRAMES = (
    "objects with the {criterion} of {}", "objects with the {criterion} {}", "{criterion}: {}",
    "the {criterion} is {}", "{} {criterion}", "a photo with the {criterion} of {}",
    "items whose {criterion} is {}", "{} in {criterion}",
)  # fmt: skip
"""Frames that name a criterion. It is drawn at random, so that the frame carries no information."""

CRITERION_WORDS = (
    "color", "colour", "shape", "form", "outline", "texture", "pattern", "surface", "material",
    "count", "number", "quantity", "amount", "size", "background", "scene", "style", "kind",
)  # fmt: skip

_JOINERS = (" ", ", ", " and ", " with ", " in ", ", also ", " of ")
_SUBSET_SIZES = (0, 1, 2, 3, 4)
_SUBSET_SHARES = (0.04, 0.46, 0.26, 0.14, 0.10)
_ASIDE_CHANCE = 0.06  # chance that a caption mentions the background, and the size
_FILLER_CHANCE = 0.35
_CRITERION_FRAME_CHANCE = 0.2
_BACKGROUND_SEED = 19
_WORD = re.compile(r"[a-z]{3,14}")

CODES: Mapping[str, int] = MappingProxyType({name: i for i, name in enumerate(FACTORS)})
"""Column of each factor in the arrays of codes."""


@dataclass(frozen=True, slots=True)
class Caption:
    """A caption and its meaning.

    Attributes:
        text: The caption.
        claims: Index of the named value of each factor, or -1 for a factor that it does not name.
    """

    text: str
    claims: tuple[int, ...]


def true_of(claims: NDArray[np.int64], codes: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which captions are true of which scenes.

    Args:
        claims: `Caption.claims` of m captions, shape (m, f), int64.
        codes: `Scene.codes()` of n scenes, shape (n, f), int64.

    Returns:
        Array of shape (n, m), bool. A caption that claims nothing is true of every scene.
    """
    claimed = claims[None, :, :]
    return np.asarray(((claimed == -1) | (claimed == codes[:, None, :])).all(axis=2))


def known_words() -> frozenset[str]:
    """Return all words that occur in a synonym or in the name of a criterion."""
    phrases = [p for values in SYNONYMS.values() for forms in values.values() for p in forms]
    return frozenset(w for p in (*phrases, *CRITERION_WORDS) for w in re.findall(r"[a-z]+", p))


def filler_words(words: Sequence[str], held_out: Sequence[str]) -> tuple[str, ...]:
    """Return words that captions may contain without meaning.

    Args:
        words: General vocabulary in lower case.
        held_out: Words to leave out, with all words that contain them (`piano` also removes
            `pianos`), so that an evaluation can use them as unseen words.

    Returns:
        `words` without the known words, their inflections and the held-out words, in the same
            order.
    """
    known = known_words()
    stems = {w for w in known if len(w) > 3}
    kept = []
    for word in dict.fromkeys(words):
        if not _WORD.fullmatch(word) or word in known:
            continue
        if any(word.startswith(stem) for stem in stems) or any(w in word for w in held_out):
            continue
        kept.append(word)
    return tuple(kept)


def background_captions() -> tuple[str, ...]:
    """Return 400 captions of random scenes, the background of the demo model.

    The demo model does not know generic English words.
    """
    rng = np.random.default_rng(_BACKGROUND_SEED)
    captioner = Captioner(())
    found: dict[str, None] = {}
    while len(found) < 400:
        codes = [int(rng.integers(len(values))) for values in FACTORS.values()]
        text = " ".join(captioner.caption(codes, rng).text.split())
        if text:
            found.setdefault(text)
    return tuple(found)


class Captioner:
    """Writes captions. All randomness comes from the given generator."""

    def __init__(self, fillers: Sequence[str]) -> None:
        """Take the words that captions may contain without meaning, possibly none."""
        self.fillers = tuple(fillers)

    def caption(self, codes: Sequence[int], rng: np.random.Generator) -> Caption:
        """Write a caption that is true of a scene.

        Args:
            codes: `Scene.codes()` of the scene.
            rng: Source of all random choices.
        """
        size = int(rng.choice(_SUBSET_SIZES, p=_SUBSET_SHARES))
        named = {CRITERIA[i] for i in rng.permutation(len(CRITERIA))[:size]}
        named |= {name for name in ("background", "size") if rng.random() < _ASIDE_CHANCE}
        claims = tuple(
            code if name in named else -1 for name, code in zip(FACTORS, codes, strict=True)
        )
        parts = []
        for name, claim in zip(FACTORS, claims, strict=True):
            if claim >= 0:
                forms = SYNONYMS[name][FACTORS[name][claim]]
                # often the plainest word, so that it is learnt best
                parts.append(forms[0] if rng.random() < 0.4 else forms[rng.integers(len(forms))])
        if self.fillers and (not parts or rng.random() < _FILLER_CHANCE):
            for _ in range(1 + int(rng.random() < 0.3)):
                parts.append(self.fillers[rng.integers(len(self.fillers))])
        return Caption(self._frame(self._join(parts, rng), rng), claims)

    def _join(self, parts: list[str], rng: np.random.Generator) -> str:
        """Join the parts in random order with random joiners."""
        order = [parts[i] for i in rng.permutation(len(parts))]
        text = order[0] if order else ""
        for part in order[1:]:
            joiner = " " if rng.random() < 0.4 else _JOINERS[rng.integers(len(_JOINERS))]
            text += joiner + part
        return text

    def _frame(self, text: str, rng: np.random.Generator) -> str:
        """Put the joined parts into a frame that is drawn independently of the parts."""
        if rng.random() < _CRITERION_FRAME_CHANCE:
            frame = CRITERION_FRAMES[rng.integers(len(CRITERION_FRAMES))]
            return frame.format(text, criterion=CRITERION_WORDS[rng.integers(len(CRITERION_WORDS))])
        return FRAMES[rng.integers(len(FRAMES))].format(text)
