"""Lists of texts with others mixed in, as a language model or a hurried user would write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from crl_sdk.errors import InvalidInputError

Rows: TypeAlias = NDArray[np.float32]

CLEAN, OFF_TOPIC, OTHER_CRITERIA = "clean", "off-topic", "other-criteria"
NOISES = (CLEAN, OFF_TOPIC, OTHER_CRITERIA)
"""What is mixed into the texts: nothing, generic texts, or texts of other criteria."""


def mix_in(
    own: Rows, noise: str, others: Sequence[Rows], background: Rows | None, seed: int = 0
) -> tuple[Rows, Rows | None]:
    """Add half as many texts of another kind, and at least two, to the texts of a criterion.

    Args:
        own: Texts of the criterion, shape (k, d), float32, unit rows.
        noise: One of `NOISES`.
        others: Texts of each other criterion, shape (j, d), float32, unit rows.
        background: Generic texts, shape (b, d), float32, unit rows.
        seed: Seed of the choice.

    Returns:
        The texts, shape (k + max(2, k // 2), d); and the background without the texts that were
        taken from it.

    Raises:
        InvalidInputError: If there are too few texts to take.
    """
    if noise == CLEAN:
        return own, background
    pool = background if noise == OFF_TOPIC else np.concatenate([own[:0], *others])
    count = max(2, len(own) // 2)
    needed = count + (noise == OFF_TOPIC)  # some of the background must be left
    available = 0 if pool is None else len(pool)
    if pool is None or available < needed:
        remedy = {
            OFF_TOPIC: "generic texts: pass --background, or an array background",
            OTHER_CRITERIA: "texts of other criteria: pass more with --texts or --criteria",
        }[noise]
        raise InvalidInputError(
            f"--noise {noise}: expected at least {needed} {remedy}; there are {available}"
        )
    order = np.random.default_rng(seed).permutation(available)
    texts = np.concatenate([own, pool[order[:count]]])
    return texts, pool[np.sort(order[count:])] if noise == OFF_TOPIC else background
