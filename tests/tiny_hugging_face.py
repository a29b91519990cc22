"""Writes small models with random weights in the format of Hugging Face."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from open_clip.tokenizer import SimpleTokenizer

SIZE, DIM = 32, 16
_LAYERS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
VISION = {**_LAYERS, "num_attention_heads": 2, "image_size": SIZE, "patch_size": 8}
TEXT = {**_LAYERS, "num_attention_heads": 2}


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


def clip(folder: Path):
    """CLIP of OpenAI, with its tokenizer."""
    config = transformers.CLIPConfig(
        text_config={**TEXT, "vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407},
        vision_config=VISION,
        projection_dim=DIM,
    )
    model = randomise(transformers.CLIPModel(config))
    model.save_pretrained(folder)
    simple = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): at for token, at in simple.encoder.items()}
    merges = [" ".join(pair) for pair in simple.bpe_ranks]
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    tokenizer = transformers.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77
    )
    tokenizer.save_pretrained(folder)
    pillow("CLIPImageProcessor")(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
    ).save_pretrained(folder)
    return model
