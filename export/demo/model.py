"""The demo CLIP: its open_clip configuration, its trimmed tokenizer, and its checkpoint.

A checkpoint directory contains `open_clip_config.json`, `open_clip_model.safetensors` and
`bpe_merges.txt.gz`. open_clip reads the first two through its `local-dir:` schema; the tokenizer
is open_clip's `SimpleTokenizer` on the third, which open_clip does not load by itself.
"""

from __future__ import annotations

import copy
import gzip
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import open_clip
import torch
from open_clip.tokenizer import SimpleTokenizer, default_bpe
from safetensors.torch import save_file

from crl_export.encoders import ClipModel

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
BPE_FILE = "bpe_merges.txt.gz"

IMAGE_SIZE = 96
CONTEXT_LENGTH = 32
BPE_MERGES = 2000
"""Number of CLIP's 48,894 merges that are kept. A prefix of a BPE's merges is a valid BPE."""

_BYTE_TOKENS = 2 * 256
_SPECIAL_TOKENS = 2

MODEL_CONFIG: dict[str, Any] = {
    "embed_dim": 128,
    "init_logit_bias": 0.0,
    "vision_cfg": {"image_size": IMAGE_SIZE, "layers": [1, 2, 2, 1], "width": 16, "head_width": 64},
    "text_cfg": {
        "context_length": CONTEXT_LENGTH,
        "vocab_size": _BYTE_TOKENS + BPE_MERGES + _SPECIAL_TOKENS,
        "width": 128,
        "heads": 4,
        "layers": 2,
    },
}
PREPROCESS_CONFIG: dict[str, Any] = {
    "size": IMAGE_SIZE,
    "mode": "RGB",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}


def clip_merges() -> list[str]:
    """Return CLIP's BPE merges in order, one `left right` pair per entry."""
    lines = gzip.decompress(Path(default_bpe()).read_bytes()).decode().split("\n")
    return lines[1 : 49152 - 256 - 2 + 1]


def general_words() -> list[str]:
    """Return the whole words among CLIP's tokens, most frequent first: a general vocabulary."""
    tokens = (merge.replace(" ", "") for merge in clip_merges())
    return [token.removesuffix("</w>") for token in tokens if token.endswith("</w>")]


def write_tokenizer(directory: Path) -> SimpleTokenizer:
    """Write the trimmed merges to `directory` and return the tokenizer they make."""
    text = "\n".join(['"bpe_simple_vocab_16e6.txt#version: 0.2', *clip_merges()[:BPE_MERGES]])
    path = directory / BPE_FILE
    path.write_bytes(gzip.compress(text.encode(), mtime=0))
    return SimpleTokenizer(str(path), context_length=CONTEXT_LENGTH)


def write_config(directory: Path) -> None:
    """Write `open_clip_config.json` to `directory`."""
    config = {"model_cfg": MODEL_CONFIG, "preprocess_cfg": PREPROCESS_CONFIG}
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def create_model() -> ClipModel:
    """Return the untrained model. Its weights depend on torch's global seed."""
    model: ClipModel = open_clip.CLIP(**copy.deepcopy(MODEL_CONFIG))
    return model


def save_weights(model: torch.nn.Module, directory: Path) -> None:
    """Write the model's weights to `directory` as safetensors."""
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, directory / WEIGHTS_FILE)


def load_checkpoint(directory: Path) -> tuple[ClipModel, SimpleTokenizer]:
    """Return the model of a checkpoint directory, in eval mode, and its tokenizer.

    Raises:
        FileNotFoundError: If one of the three files is missing; the message names it.
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE, BPE_FILE):
        if not (directory / name).is_file():
            raise FileNotFoundError(
                f"expected {name} in {directory}; train it with: "
                f"python -m crl_export.demo.train {directory}"
            )
    model = open_clip.create_model(f"local-dir:{directory}")
    return model.eval(), SimpleTokenizer(str(directory / BPE_FILE), context_length=CONTEXT_LENGTH)


def normalise(pixels: NDArray[np.uint8]) -> torch.Tensor:
    """Turn pixels (n, side, side, 3) uint8 into the image tower's input (n, 3, side, side)."""
    mean = torch.tensor(PREPROCESS_CONFIG["mean"]) * 255
    std = torch.tensor(PREPROCESS_CONFIG["std"]) * 255
    return ((torch.from_numpy(pixels) - mean) / std).permute(0, 3, 1, 2)


def encode_trimmed(model: ClipModel, tokens: torch.Tensor) -> torch.Tensor:
    """Encode texts like `model.encode_text`, without the columns that are padding in all rows.

    The text tower is causal and reads the last real token, so padding behind it changes nothing.

    Args:
        model: Model from `create_model`.
        tokens: Token ids, shape (n, CONTEXT_LENGTH), int64.

    Returns:
        Unit embeddings, shape (n, d), float32.
    """
    length = int((tokens != 0).sum(dim=1).max())
    tokens = tokens[:, :length]
    x = model.token_embedding(tokens) + model.positional_embedding[:length]
    x = model.transformer(x, attn_mask=model.attn_mask[:length, :length])
    last = model.ln_final(x[torch.arange(len(x)), tokens.argmax(dim=-1)])
    return torch.nn.functional.normalize(last @ model.text_projection, dim=-1)


def embed_images(
    model: ClipModel, pixels: NDArray[np.uint8], batch: int = 256
) -> NDArray[np.float32]:
    """Return the unit image embeddings (n, d) of pixels (n, side, side, 3) uint8."""
    with torch.inference_mode():
        parts = [
            model.encode_image(normalise(pixels[start : start + batch]), normalize=True)
            for start in range(0, len(pixels), batch)
        ]
    rows: NDArray[np.float32] = torch.cat(parts).numpy()
    return rows


def text_embedder(
    model: ClipModel, tokenizer: SimpleTokenizer
) -> Callable[[Sequence[str]], NDArray[np.float32]]:
    """Return a function from k texts to their unit embeddings (k, d)."""

    def embed(texts: Sequence[str]) -> NDArray[np.float32]:
        with torch.inference_mode():
            rows = model.encode_text(tokenizer(list(texts)), normalize=True)
        embeddings: NDArray[np.float32] = rows.numpy()
        return embeddings

    return embed
