"""The training losses.

In the main loss, every caption that is true of an image is a positive of it. A second loss, used
early in training, predicts the factors from the image embedding: with captions alone, an untrained
image tower takes many times as long to learn shapes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F


def truth_loss(logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Return the sigmoid loss of image-caption pairs, in which all captions have equal weight.

    The true images of a caption together weigh as much as its false ones, so that the model learns
    from a broad caption ("red") and from a narrow one ("three red striped stars").

    Args:
        logits: Logits of n images and m captions, shape (n, m), float32.
        truth: Whether a caption is true of an image, shape (n, m), bool.

    Returns:
        Scalar, float32. Logits of zero give log 2.
    """
    positive = _mean_where(F.softplus(-logits), truth)
    negative = _mean_where(F.softplus(logits), ~truth)
    sides = truth.any(dim=0).float() + (~truth).any(dim=0).float()
    return ((positive + negative) / sides).mean()


def readout_loss(scores: torch.Tensor, codes: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """Return the cross-entropy of predicting each factor, averaged over the factors.

    Args:
        scores: Scores of all values of all factors, shape (n, sum of sizes), float32.
        codes: True values, shape (n, number of factors), int64.
        sizes: Number of values of each factor.

    Returns:
        Scalar, float32.
    """
    parts = zip(scores.split(list(sizes), dim=1), codes.unbind(dim=1), strict=True)
    return torch.stack([F.cross_entropy(part, truth) for part, truth in parts]).mean()


def _mean_where(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return each column's mean over the rows where `mask` is true, or 0 without such rows."""
    return (values * mask).sum(dim=0) / mask.sum(dim=0).clamp(min=1)
