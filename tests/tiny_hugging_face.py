"""Writes small models with random weights in the format of Hugging Face.

The configurations are those of the published models, but for the sizes. Each has its own kinds of
tokenizer and of image processor.
"""

from __future__ import annotations

import json
from pathlib import Path

import tiny_tokenizers
import torch
import transformers

SIZE, DIM = 32, 16
_LAYERS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
VISION = {**_LAYERS, "num_attention_heads": 2, "image_size": SIZE, "patch_size": 8}
TEXT = {**_LAYERS, "num_attention_heads": 2}
_SQUARE = {"height": SIZE, "width": SIZE}

PROCESSORS = {
    "align": "EfficientNetImageProcessor",
    "altclip": "CLIPImageProcessor",
    "blip_2": "BlipImageProcessor",
    "chinese_clip": "ChineseCLIPImageProcessor",
    "clip": "CLIPImageProcessor",
    "metaclip_2": "CLIPImageProcessor",
    "siglip": "SiglipImageProcessor",
    "siglip_2": "SiglipImageProcessor",
}
"""Image processors of the models, by the function of this module that writes one."""

CONTEXT_LENGTHS = {"align": 64, "blip_2": 128, "chinese_clip": 128, "siglip": 64, "siglip_2": 64}
"""Context lengths of their bundles; 77 for the others."""


def randomise(model):
    """Give a model weights with which the embeddings of different inputs differ."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3 if parameter.ndim == 2 else 0.1)
    return model.eval()


def pillow(name: str):
    """The class of an image processor that uses Pillow."""
    return getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)


def _save(folder: Path, kind: str, processor: str, settings: dict, **parts):
    config = getattr(transformers, f"{kind}Config")(**parts)
    name = "Blip2ForImageTextRetrieval" if kind == "Blip2" else f"{kind}Model"
    model = randomise(getattr(transformers, name)(config))
    model.save_pretrained(folder)
    pillow(processor)(**settings).save_pretrained(folder)
    return model


def _cropped() -> dict:
    return {"size": {"shortest_edge": SIZE}, "crop_size": _SQUARE}


def clip(folder: Path, *, end: int = 49407):
    """CLIP of OpenAI. The configurations of 2022 have 2 as the id of the end token."""
    tiny_tokenizers.clip(folder)
    return _save(
        folder, "CLIP", "CLIPImageProcessor", _cropped(),
        text_config={**TEXT, "vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": end},
        vision_config=VISION, projection_dim=DIM,
    )  # fmt: skip


def clip_towers(folder: Path):
    """The two towers of CLIP as models of their own, in `image` and `text`."""
    for name in ("image", "text"):
        (folder / name).mkdir(parents=True)
    tiny_tokenizers.clip(folder / "text")
    text = {**TEXT, "vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407}
    made = []
    for kind, part, name in (("Vision", VISION, "image"), ("Text", text, "text")):
        config = getattr(transformers, f"CLIP{kind}Config")(**part, projection_dim=DIM)
        model = randomise(getattr(transformers, f"CLIP{kind}ModelWithProjection")(config))
        model.save_pretrained(folder / name)
        made.append(model)
    pillow("CLIPImageProcessor")(**_cropped()).save_pretrained(folder / "image")
    return made


def metaclip_2(folder: Path):
    """MetaCLIP 2 of Meta, with the tokenizer of XLM-V."""
    words = tiny_tokenizers.xlm_roberta(folder, 77)
    ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    return _save(
        folder, "MetaClip2", "CLIPImageProcessor", _cropped(),
        text_config={**TEXT, "vocab_size": words, **ids}, vision_config=VISION, projection_dim=DIM,
    )  # fmt: skip


def altclip(folder: Path):
    """AltCLIP of BAAI, whose text tower is XLM-R."""
    words = tiny_tokenizers.xlm_roberta(folder, 77)
    return _save(
        folder, "AltCLIP", "CLIPImageProcessor", _cropped(),
        text_config={**TEXT, "vocab_size": words, "project_dim": 24}, vision_config=VISION,
        projection_dim=DIM,
    )  # fmt: skip


def chinese_clip(folder: Path):
    """Chinese-CLIP of OFA, with `vocab.txt` alone as its tokenizer."""
    words = tiny_tokenizers.bert(folder)
    return _save(
        folder, "ChineseCLIP", "ChineseCLIPImageProcessor",
        {"size": _SQUARE, "do_center_crop": False}, text_config={**TEXT, "vocab_size": words},
        vision_config=VISION, projection_dim=DIM,
    )  # fmt: skip


def align(folder: Path):
    """ALIGN of Kakao Brain, whose images are scaled to 346 pixels and cropped to 289."""
    words = tiny_tokenizers.bert(folder)
    tiny_tokenizers.bert_configured(folder, 64)
    vision = {
        "image_size": 600, "width_coefficient": 1.0, "depth_coefficient": 1.0, "depth_divisor": 8,
        "kernel_sizes": [3, 5], "in_channels": [32, 16], "out_channels": [16, 24],
        "strides": [2, 2], "num_block_repeats": [1, 2], "expand_ratios": [1, 6],
        "depthwise_padding": [], "hidden_dim": 2560,
    }  # fmt: skip
    settings = {
        "size": {"height": 346, "width": 346}, "resample": 2, "do_center_crop": True,
        "crop_size": {"height": 289, "width": 289}, "do_rescale": True, "rescale_factor": 1 / 127.5,
        "rescale_offset": True, "do_normalize": False, "include_top": False,
    }  # fmt: skip
    return _save(
        folder, "Align", "EfficientNetImageProcessor", settings,
        text_config={**TEXT, "vocab_size": words}, vision_config=vision, projection_dim=24,
    )  # fmt: skip


def blip_2(folder: Path):
    """BLIP-2 of Salesforce with its image-text contrastive weights."""
    words = tiny_tokenizers.bert(folder, extra=("[DEC]",))
    tiny_tokenizers.bert_configured(folder, 512, bos_token="[DEC]", truncation_side="left")
    qformer = {**TEXT, "vocab_size": words, "use_qformer_text_input": True}
    return _save(
        folder, "Blip2", "BlipImageProcessor", {"size": _SQUARE},
        vision_config={**VISION, "hidden_act": "gelu", "qkv_bias": True},
        qformer_config={**qformer, "encoder_hidden_size": 32, "cross_attention_frequency": 1},
        text_config={"model_type": "opt", "max_position_embeddings": 2048}, num_query_tokens=4,
        image_text_hidden_size=DIM,
    )  # fmt: skip


def siglip(folder: Path):
    """SigLIP of Google, whose texts are 64 tokens with their padding."""
    words = tiny_tokenizers.siglip(folder)
    return _siglip(folder, words)


def siglip_2(folder: Path):
    """SigLIP 2 of a fixed size: the model is SigLIP, the tokenizer that of Gemma."""
    words = tiny_tokenizers.gemma(folder)
    return _siglip(folder, words)


def _siglip(folder: Path, words: int):
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
    model = _save(
        folder, "Siglip", "SiglipImageProcessor", {"size": _SQUARE, **half},
        text_config={**TEXT, "vocab_size": words}, vision_config=VISION,
    )  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    for part in ("text_config", "vision_config"):  # google's have what is not the default alone
        for key in ("max_position_embeddings", "num_channels", "hidden_act"):
            config[part].pop(key, None)
    (folder / "config.json").write_text(json.dumps(config))
    return model
