"""The type of open_clip's models.

open_clip has no type hints, and the attributes of a `torch.nn.Module` are untyped. This class
declares the few that are used here; it exists for the type checker only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:

    class ClipModel(torch.nn.Module):
        """A model with an image tower and a text tower, as `open_clip.create_model` returns it."""

        logit_scale: torch.Tensor
        logit_bias: torch.Tensor
        positional_embedding: torch.Tensor
        text_projection: torch.Tensor
        attn_mask: torch.Tensor
        token_embedding: torch.nn.Embedding
        transformer: torch.nn.Module
        ln_final: torch.nn.Module

        def encode_image(self, image: torch.Tensor, normalize: bool = False) -> torch.Tensor:
            """Return the image embeddings, shape (n, d)."""

        def encode_text(self, text: torch.Tensor, normalize: bool = False) -> torch.Tensor:
            """Return the text embeddings, shape (n, d)."""
else:
    ClipModel = torch.nn.Module
