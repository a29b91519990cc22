"""The vision transformer of CLIP rewritten for inference: the same embeddings from less work.

Compared with open_clip's module:

- The last block computes queries, output and MLP for the pooled token only.
- Activations are moved into the order of heads and back by one transpose each.
- A matrix product embeds the patches instead of a convolution; they do not overlap.
- Layer scales and the attention's scale are folded into the adjacent weights.
"""

from __future__ import annotations

from typing import Any

import torch
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import nn

from crl_export.hugging_face.models import ImageTower as HuggingFaceImageTower
from crl_export.hugging_face.vision_transformer import as_open_clip


def lean_tower(model: nn.Module) -> LeanTower | None:
    """Return the rewritten image tower of a model.

    Args:
        model: Model of open_clip or transformers in eval mode.

    Returns:
        The rewritten tower, or None if the tower is not a plain vision transformer.
    """
    tower: Any
    if isinstance(model, HuggingFaceImageTower):
        tower = as_open_clip(model.model)
    else:
        tower = model.visual if type(model) in (CLIP, CustomTextCLIP) else None
    if type(tower) is not VisionTransformer:
        return None
    sides = zip(tower.image_size, tower.grid_size, tower.patch_size, strict=True)
    plain = (
        tower.attn_pool is None
        and tower.pool_type in ("tok", "avg")
        and not tower.output_tokens
        and tower.proj is not None
        and all(size == grid * patch for size, grid, patch in sides)
        and all(_plain(block) for block in tower.transformer.resblocks)
    )
    return LeanTower(tower) if plain else None


def _plain(block: nn.Module) -> bool:
    attention = getattr(block, "attn", None)
    return (
        type(block) is ResidualAttentionBlock
        and type(attention) is nn.MultiheadAttention
        and attention.in_proj_bias is not None
        and attention.bias_k is None
        and not attention.add_zero_attn
        and not hasattr(block, "ln_1_kv")
    )


class LeanTower(nn.Module):
    """Rewritten `VisionTransformer`, for pixels with channels last."""

    def __init__(self, tower: VisionTransformer) -> None:
        """Copy the weights of a tower that `lean_tower` accepts."""
        super().__init__()
        self.grid, self.patch = tower.grid_size, tower.patch_size
        width = tower.conv1.out_channels
        # (width, 3, p, p) to (width, p, p, 3), the order of values in a patch with channels last
        kernel = tower.conv1.weight.permute(0, 2, 3, 1).reshape(width, -1)
        self.embed = _linear(kernel, None)
        positions = tower.positional_embedding
        self.first = _fixed((tower.class_embedding + positions[0]).reshape(1, 1, width))
        self.positions = _fixed(positions[1:])
        self.ln_pre, self.ln_post = tower.ln_pre, tower.ln_post
        self.pooled_first = tower.pool_type == "tok"
        self.norm_first = not tower.final_ln_after_pool
        blocks = [_Block(block) for block in tower.transformer.resblocks]
        self.blocks, self.last = nn.ModuleList(blocks[:-1]), blocks[-1]
        self.project = _linear(tower.proj.t(), None)

    def fold(self, mean: torch.Tensor, scale: torch.Tensor) -> None:
        """Fold the normalisation `(pixels - mean) * scale` into the weights.

        Args:
            mean: Mean of each channel in the range of the pixels, shape (3,).
            scale: Factor of each channel, shape (3,).
        """
        times = self.patch[0] * self.patch[1]
        scales, shifts = scale.double().repeat(times), (mean * scale).double().repeat(times)
        kernel = self.embed.weight.double()
        self.positions = _fixed((self.positions.double() - kernel @ shifts).float())
        self.embed = _linear((kernel * scales).float(), None)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the features of images.

        Args:
            pixels: Pixels in the dtype of the weights, shape (b, H, W, 3), normalised unless
                `fold` was called.

        Returns:
            Features, shape (b, d), not normalised.
        """
        (rows, columns), (height, width) = self.grid, self.patch
        patches = pixels.reshape(-1, rows, height, columns, width, 3).permute(0, 1, 3, 2, 4, 5)
        tokens = self.embed(patches.reshape(-1, rows * columns, height * width * 3))
        first = self.first.expand(tokens.shape[0], -1, -1)
        x = self.ln_pre(torch.cat([first, tokens + self.positions], dim=1))
        for block in self.blocks:
            x = block(x, x)
        if self.pooled_first:
            x = self.last(x[:, :1], x)
            return self.project(self.ln_post(x[:, 0]))
        x = self.last(x, x)
        if self.norm_first:
            x = self.ln_post(x)
        pooled = x[:, 1:].mean(dim=1)
        return self.project(pooled if self.norm_first else self.ln_post(pooled))


class _Block(nn.Module):
    """Residual block that computes only the requested tokens."""

    def __init__(self, block: ResidualAttentionBlock) -> None:
        super().__init__()
        attention = block.attn
        self.heads, self.head_dim = attention.num_heads, attention.head_dim
        weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
        scale = self.head_dim**-0.5
        self.query = _linear(weights[0] * scale, biases[0] * scale)
        self.key = _linear(weights[1], biases[1])
        self.value = _linear(weights[2], biases[2])
        self.out = _scaled(attention.out_proj, block.ls_1)
        self.ln_1, self.ln_2 = block.ln_1, block.ln_2
        self.up, self.activation = block.mlp.c_fc, block.mlp.gelu
        self.down = _scaled(block.mlp.c_proj, block.ls_2)

    def forward(self, wanted: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Return the n requested tokens, shape (b, n, width). They attend to all tokens."""
        normed = self.ln_1(tokens)
        asking = normed if wanted is tokens else self.ln_1(wanted)
        query = self._heads(self.query(asking)).transpose(1, 2)
        key = self._heads(self.key(normed)).transpose(1, 2).transpose(2, 3)
        value = self._heads(self.value(normed)).transpose(1, 2)
        mixed = torch.matmul(torch.softmax(torch.matmul(query, key), dim=-1), value)
        joined = mixed.transpose(1, 2).reshape(-1, wanted.shape[1], self.heads * self.head_dim)
        x = wanted + self.out(joined)
        return x + self.down(self.activation(self.up(self.ln_2(x))))

    def _heads(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.reshape(-1, rows.shape[1], self.heads, self.head_dim)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    made.weight = _fixed(weight)
    if bias is not None:
        made.bias = _fixed(bias)
    return made


def _fixed(values: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach().clone(), requires_grad=False)


def _scaled(linear: nn.Linear, layer_scale: nn.Module) -> nn.Linear:
    """Fold a LayerScale, if there is one, into the linear layer before it."""
    gamma = getattr(layer_scale, "gamma", None)
    if gamma is None:
        return linear
    return _linear(linear.weight * gamma[:, None], linear.bias * gamma)
