"""The requests to the language model: few-shot lines, or a chat message, and the grammar."""

from __future__ import annotations

import random
from collections.abc import Mapping

from crl_sdk.basis._generation_options import GenerationOptions
from crl_sdk.basis._votes import text_key

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
"""Grammar of an answer: one line of 8 to 24 short phrases. It contains no user input."""


def compose_completion(criterion: str, options: GenerationOptions, seed: int) -> str:
    """Return few-shot lines and the beginning of the line that the model should continue.

    The seed shuffles the lines and their texts, because small models copy from the last line.
    """
    order = random.Random(seed)
    lines = []
    for name, texts in few_shot_lines(criterion, options).items():
        shown = list(texts)
        order.shuffle(shown)
        lines.append(f"{name}: {', '.join(shown)}\n")
    order.shuffle(lines)
    return "".join(lines) + f"{criterion}{f' ({options.hint})' if options.hint else ''}:"


def compose_chat(criterion: str, options: GenerationOptions, seed: int) -> str:
    """Return the request for a model that follows instructions."""
    hint = f" Answer {options.hint}." if options.hint else ""
    return (
        f"{compose_completion(criterion, options, seed)}\n\nContinue the last line: list up to 24 "
        f"different values that the {criterion} of what is in a picture can have, each of one to "
        f"three words, lower case, separated by commas.{hint} Answer with the list alone."
    )


def few_shot_lines(criterion: str, options: GenerationOptions) -> dict[str, tuple[str, ...]]:
    """Return the few-shot lines, the user's first, without a line about the criterion itself."""
    lines = {**options.examples, **{k: v for k, v in EXAMPLES.items() if k not in options.examples}}
    return {k: v for k, v in lines.items() if text_key(k) != text_key(criterion)}
