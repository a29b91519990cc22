"""How far a language model is with the texts of a criterion, in process or on a server."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GenerationProgress:
    """State of a running generation of texts.

    Attributes:
        answers: Number of answers that the language model has finished.
        max_answers: Number of answers after which it stops at the latest.
        tokens: Number of tokens that it has written so far.
        seconds: Time that it has spent on them.
    """

    answers: int
    max_answers: int
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Mean speed so far; 0 before the first token."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0
