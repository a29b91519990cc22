"""The training losses: every caption that is true of an image is a positive of it.

A second one, early in training, reads the factors straight off the image embedding: captions
alone take many times as long to teach an untrained image tower about shapes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F


def truth_loss(logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Sigmoid loss of image-caption pairs in which each caption counts alike.

    A caption's true images together weigh as much as its false ones, so that a broad caption
    ("red") and a narrow one ("three red striped stars") both teach.

    Args:
        logits: (n images, m captions) float32.
        truth: (n, m) bool, whether the caption is true of the image.

    Returns:
        Scalar float32; a constant guess of zero gives log 2.
    """
    positive = _mean_where(F.softplus(-logits), truth)
    negative = _mean_where(F.softplus(logits), ~truth)
    sides = truth.any(dim=0).float() + (~truth).any(dim=0).float()
    return ((positive + negative) / sides).mean()


def readout_loss(scores: torch.Tensor, codes: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """Cross-entropy of reading each factor off an embedding, averaged over the factors.

    Args:
        scores: (n, sum of sizes) float32, the factors' values side by side.
        codes: (n, number of factors) int64, the true value of each.
        sizes: number of values of each factor.

    Returns:
        Scalar float32.
    """
    parts = zip(scores.split(list(sizes), dim=1), codes.unbind(dim=1), strict=True)
    return torch.stack([F.cross_entropy(part, truth) for part, truth in parts]).mean()


def _mean_where(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return each column's mean over the rows where `mask` holds; 0 where it never does."""
    return (values * mask).sum(dim=0) / mask.sum(dim=0).clamp(min=1)
