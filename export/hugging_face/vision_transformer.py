"""Turns the image towers of transformers into open_clip's module, which is rewritten for speed.

CLIP, MetaCLIP 2, AltCLIP and Chinese-CLIP have the same image tower under the same names.
"""

from __future__ import annotations

from typing import Any

import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from torch import nn

_ACTIVATIONS = {"quick_gelu": QuickGELU, "gelu": nn.GELU}


def as_open_clip(model: nn.Module) -> VisionTransformer | None:
    """Return the image tower of a model of transformers as a module of open_clip.

    Args:
        model: Model of transformers in float32.

    Returns:
        The same tower with copied weights, or None if it is built in another way.
    """
    config: Any = getattr(getattr(model, "config", None), "vision_config", None) or getattr(
        model, "config", None
    )
    towers = [part for part in model.modules() if hasattr(part, "pre_layrnorm")]
    projection = getattr(model, "visual_projection", None)
    if not isinstance(projection, nn.Linear):
        return None
    plain = (
        len(towers) == 1
        and projection.bias is None
        and getattr(config, "hidden_act", None) in _ACTIVATIONS
        and config.num_channels == 3
    )
    if not plain:
        return None
    tower: Any = towers[0]
    made: Any = VisionTransformer(
        image_size=config.image_size,
        patch_size=config.patch_size,
        width=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        mlp_ratio=config.intermediate_size / config.hidden_size,
        act_layer=_ACTIVATIONS[config.hidden_act],
        output_dim=projection.out_features,
    ).eval()
    embeddings = tower.embeddings
    _copy(made.conv1, embeddings.patch_embedding)
    made.class_embedding.data = embeddings.class_embedding.detach().clone()
    made.positional_embedding.data = embeddings.position_embedding.weight.detach().clone()
    made.ln_pre, made.ln_post = tower.pre_layrnorm, tower.post_layernorm
    made.proj.data = projection.weight.detach().t().clone()
    for block, layer in zip(made.transformer.resblocks, tower.encoder.layers, strict=True):
        block.ln_1, block.ln_2 = layer.layer_norm1, layer.layer_norm2
        attention = layer.self_attn
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        block.attn.in_proj_weight.data = torch.cat([part.weight.detach() for part in parts])
        block.attn.in_proj_bias.data = torch.cat([part.bias.detach() for part in parts])
        _copy(block.attn.out_proj, attention.out_proj)
        _copy(block.mlp.c_fc, layer.mlp.fc1)
        _copy(block.mlp.c_proj, layer.mlp.fc2)
    return made.requires_grad_(False)


def _copy(ours: nn.Module, theirs: nn.Module) -> None:
    ours.load_state_dict(theirs.state_dict())
