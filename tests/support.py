"""Helpers for tests of the server: wait for a condition, make images that no cache has seen."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import count

import numpy as np
from numpy.typing import NDArray

from crl_sdk.basis import GeneratedTexts, RankedText

_numbers = count()


def unseen_image() -> NDArray[np.uint8]:
    """Return pixels, shape (96, 96, 3), uint8, that differ from those of every call before."""
    number = next(_numbers)
    pixels = np.full((96, 96, 3), 100, np.uint8)
    pixels[0, :2] = [[number % 256, number // 256 % 256, 0], [number // 65536, 1, 2]]
    return pixels


def wait_until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Wait until the condition holds; fail if it does not within so many seconds."""
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "it did not happen in time"
        time.sleep(0.01)


def generated_texts(criterion: str, texts: Sequence[str]) -> GeneratedTexts:
    """What a language model gives that names the same texts in both of its answers."""
    return GeneratedTexts(
        criterion,
        tuple(RankedText(text, 2) for text in texts),
        (),
        2,
        {
            "texts": "generated",
            "model": {"name": "scripted"},
            "seeds": [0, 1],
            "votes": dict.fromkeys(texts, 2),
            "dropped": [],
        },
    )


class Scripted:
    """A model that repeats the given answers in a cycle."""

    name, follows_instructions = "scripted", False
    tokens, seconds = 0, 0.0

    def __init__(self, *answers: str) -> None:
        self.answers, self.asked = answers, []

    def complete(self, prompt, grammar, sampling, on_token=None):
        self.asked.append((prompt, sampling))
        if on_token is not None:
            on_token(len(self.asked), 0.5)
        return self.answers[(len(self.asked) - 1) % len(self.answers)]

    chat = complete

    def describe(self):
        return {"name": self.name}
