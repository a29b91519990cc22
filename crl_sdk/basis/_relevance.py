"""Whether texts belong to a criterion, as the language model itself sees it.

A small model cannot answer "Is a cat a dog breed?", but it knows what follows "Examples of dog
breed:". `make eval-relevance` measures both.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from crl_sdk.basis._language_model import LanguageModel

MIN_RELEVANCE = 1.0
"""Mean relevance, weighted by votes, below which the model is unsure of its texts, in nats."""

_QUESTION, _NEUTRAL = "Examples of {}:", "Examples of things:"


def relevance(llm: LanguageModel, criterion: str, texts: Sequence[str]) -> NDArray[np.float64]:
    """Return how much more likely each text becomes by the criterion.

    Args:
        llm: The language model.
        criterion: Name of the criterion.
        texts: The n texts.

    Returns:
        Log likelihood ratios in nats, shape (n,): after "Examples of color:" and after "Examples of
        things:". Below 0 the criterion makes the text less likely.

    Raises:
        GenerationError: If llama.cpp fails.
    """
    asked = np.array(llm.log_likelihoods(_QUESTION.format(criterion), texts), np.float64)
    neutral = np.array(llm.log_likelihoods(_NEUTRAL, texts), np.float64)
    return np.asarray(asked - neutral)
