"""What open_clip's tags say of the models that weights from a file do not: activations, pixels."""

from __future__ import annotations

from typing import Any

import open_clip
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model
from open_clip.transform import PreprocessCfg

QUICK_GELU = "-quickgelu"
"""End of the names of open_clip's architectures with the activations of OpenAI's models."""

_PIXELS = ("mean", "std", "interpolation", "resize_mode")


def needs_quick_gelu(architecture: str, pretrained: str | None) -> bool:
    """Return whether a tag's weights were trained with QuickGELU activations.

    open_clip lists such tags, as those of OpenAI, MetaCLIP and DFN, under names with and without
    `-quickgelu`, and takes the activations of the name.
    """
    return bool((get_pretrained_cfg(architecture, pretrained or "") or {}).get("quick_gelu"))


def preprocess_of_file(architecture: str) -> dict[str, Any] | None:
    """Return the preprocessing of an architecture's tags, for weights from a file.

    None if the tags differ, or there are none: open_clip's default, which is OpenAI's.
    """
    preprocesses = _preprocesses(architecture)
    return preprocesses[0] if len(preprocesses) == 1 else None


def doubts_about_file(architecture: str) -> list[str]:
    """Return what weights from a file may need, and neither they nor the architecture show."""
    doubts = []
    twin = f"{architecture}{QUICK_GELU}"
    if twin in open_clip.list_models():
        doubts.append(
            f"{architecture} has GELU activations, and weights do not show what they were trained "
            "with: those of OpenAI, MetaCLIP and DFN, and models that were fine-tuned from them, "
            f"need the architecture {twin}"
        )
    if len(_preprocesses(architecture)) > 1:
        default = PreprocessCfg()
        doubts.append(
            f"models of {architecture} differ in preprocessing: taking OpenAI's, mean "
            f"{default.mean}, std {default.std}, {default.resize_mode}. If the model has another, "
            "write it into open_clip_config.json, and export the directory"
        )
    return doubts


def _preprocesses(architecture: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for tag in list_pretrained_tags_by_model(architecture):
        config = get_pretrained_cfg(architecture, tag)
        preprocess = {name: config[name] for name in _PIXELS if config.get(name) is not None}
        if preprocess not in found:
            found.append(preprocess)
    return found
