"""Mean and standard deviation of a measure over several runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class MeanStd:
    """Mean and standard deviation of a measure over seeds, splits or queries.

    Attributes:
        mean: Mean over all runs.
        std: Population standard deviation over all runs. None for a single run.
    """

    mean: float
    std: float | None = None

    @classmethod
    def of(cls, runs: Sequence[float]) -> MeanStd:
        """Return the mean and the standard deviation of some runs."""
        return cls(float(np.mean(runs)), float(np.std(runs)))
