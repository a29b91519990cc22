"""The training loss: every caption that is true of an image is a positive of it."""

from __future__ import annotations

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


def _mean_where(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return each column's mean over the rows where `mask` holds; 0 where it never does."""
    return (values * mask).sum(dim=0) / mask.sum(dim=0).clamp(min=1)
