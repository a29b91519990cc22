"""The types of the modules that are exported.

The attributes of a `torch.nn.Module` are untyped, and open_clip has no type hints. These classes
declare the few that are used here; they exist for the type checker only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:

    class ImageEncoder(torch.nn.Module):
        """A module with an image tower."""

        def encode_image(self, image: torch.Tensor, normalize: bool = False) -> torch.Tensor:
            """Return the features, shape (b, d), of normalised images, shape (b, 3, H, W)."""

    class TextEncoder(torch.nn.Module):
        """A module with a text tower."""

        def encode_text(self, text: torch.Tensor, normalize: bool = False) -> torch.Tensor:
            """Return the features, shape (b, d), of token ids, shape (b, L), int64."""

    class ClipModel(ImageEncoder, TextEncoder):
        """A model as `open_clip.create_model` returns it."""

        logit_scale: torch.Tensor
        logit_bias: torch.Tensor
        positional_embedding: torch.Tensor
        text_projection: torch.Tensor
        attn_mask: torch.Tensor
        token_embedding: torch.nn.Embedding
        transformer: torch.nn.Module
        ln_final: torch.nn.Module
else:
    ImageEncoder = TextEncoder = ClipModel = torch.nn.Module
