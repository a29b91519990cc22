"""One set of random weights in the formats of all peers, created once in `build/peers/weights`.

The model is OpenAI's ViT-B/32 with `quick_gelu`, the only one that faster-clip supports. Random
weights change neither speed nor memory. The embeddings of different images still differ: their
cosine is about 0.5.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from crl_sdk.model._manifest import Precision
from crl_sdk.model._preprocess import PreprocessSpec

if TYPE_CHECKING:
    from torch import Tensor

ARCHITECTURE = "ViT-B-32-quickgelu"

SEED = 0

PRECISIONS: tuple[Precision, ...] = ("fp32", "int8")
"""Precisions of the bundle. `auto` chooses among them; the peers run the fp32 graph."""

WIDTH, LAYERS, HEADS, PATCH, SIDE = 768, 12, 12, 32, 224
TEXT_WIDTH, TEXT_HEADS, CONTEXT, VOCABULARY, DIM = 512, 8, 77, 49408, 512

FASTER_CLIP = Path("sentence-transformers__clip-ViT-B-32/0_CLIPModel/model.safetensors")
"""Path of the weights in faster-clip's cache, which depends on its fixed model id."""

_EXACT = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
}

_TRANSPOSED = {
    "text_projection": "text_projection.weight",
    "visual.proj": "visual_projection.weight",
}

_PREFIXES = {
    "ln_final.": "text_model.final_layer_norm.",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",  # as transformers spells it
    "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "transformer.resblocks.": "text_model.encoder.layers.",
}

_WITHIN_A_LAYER = {
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".attn.out_proj.": ".self_attn.out_proj.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}


@dataclass(frozen=True, slots=True)
class Weights:
    """Paths of the weights in all formats.

    Attributes:
        root: Directory that holds them.
    """

    root: Path

    @property
    def open_clip(self) -> Path:
        """State dict of open_clip as safetensors."""
        return self.root / "open_clip.safetensors"

    @property
    def open_clip_pickle(self) -> Path:
        """State dict of open_clip as clip-server reads it, pickled."""
        return self.root / "open_clip.pt"

    @property
    def bundle(self) -> Path:
        """Bundle of crl."""
        return self.root / "bundle"

    @property
    def onnx(self) -> Path:
        """The bundle's fp32 graph, which ONNX Runtime, OpenVINO and PyTriton run."""
        return self.bundle / "image.fp32.onnx"

    @property
    def hugging_face(self) -> Path:
        """Directory as transformers' `CLIPModel.save_pretrained` writes it, with a processor."""
        return self.root / "clip-vit-base-patch32"

    @property
    def faster_clip(self) -> Path:
        """Cache directory that faster-clip would otherwise fill from the hub."""
        return self.root / "faster-clip"


def hugging_face_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename open_clip's weights to those of transformers' `CLIPModel`.

    Args:
        state: State dict of an open_clip model with a vision transformer.

    Returns:
        The same weights under transformers' names.

    Raises:
        KeyError: If such a model does not have a weight of this name.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name in _EXACT:
            renamed[_EXACT[name]] = tensor
        elif name in _TRANSPOSED:
            renamed[_TRANSPOSED[name]] = tensor.t().contiguous()
        elif name.endswith((".in_proj_weight", ".in_proj_bias")):
            before, kind = name.rsplit(".attn.in_proj_", 1)
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{_prefixed(before + '.')}self_attn.{part}_proj.{kind}"] = (
                    third.contiguous()
                )
        else:
            renamed[_prefixed(name)] = tensor
    return renamed


def make_weights(root: Path) -> Weights:
    """Create the weights, unless they exist. The directory is put in place when it is complete.

    Args:
        root: Parent directory. The name below it is a digest of this module and the exporter, so
            that a change of either creates the weights anew.
    """
    import crl_export

    sources = [Path(__file__), *sorted(Path(crl_export.__file__).parent.glob("*.py"))]
    digest = hashlib.sha256(b"".join(each.read_bytes() for each in sources)).hexdigest()
    made = Weights(root / digest[:12])
    if made.root.exists():
        return made
    root.mkdir(parents=True, exist_ok=True)
    work = Weights(Path(tempfile.mkdtemp(prefix=".making.", dir=root)))
    try:
        _make(work)
        work.root.rename(made.root)
    finally:
        shutil.rmtree(work.root, ignore_errors=True)
    return made


def _prefixed(name: str) -> str:
    for old, new in _PREFIXES.items():
        if name.startswith(old):
            name = new + name.removeprefix(old)
            for inner, outer in _WITHIN_A_LAYER.items():
                name = name.replace(inner, outer)
            return name
    raise KeyError(name)


def _make(work: Weights) -> None:
    import torch
    from safetensors.torch import save_file

    from crl_export.exporter import export_model
    from crl_export.loading import load_checkpoint

    checkpoint = load_checkpoint(ARCHITECTURE, "none", seed=SEED)
    assert checkpoint.image is not None
    state = {n: value.contiguous() for n, value in checkpoint.image.model.state_dict().items()}
    save_file(state, work.open_clip)
    torch.save(state, work.open_clip_pickle)
    export_model(
        ARCHITECTURE, out=work.bundle, pretrained=str(work.open_clip), precisions=PRECISIONS
    )

    work.hugging_face.mkdir()
    renamed = hugging_face_names(state)
    save_file(renamed, work.hugging_face / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(work.bundle / "tokenizer.json", work.hugging_face)
    for name, content in hugging_face_files(checkpoint.image.preprocess).items():
        (work.hugging_face / name).write_text(json.dumps(content, indent=1) + "\n")

    target = work.faster_clip / FASTER_CLIP
    target.parent.mkdir(parents=True)
    # the file on the hub has names without a prefix too
    shutil.copy(work.hugging_face / "model.safetensors", target)


def hugging_face_files(spec: PreprocessSpec) -> dict[str, object]:
    """Return the JSON files that transformers needs beside the weights.

    Args:
        spec: Preprocessing of the image tower.

    Returns:
        Content by file name.
    """
    text = {
        "model_type": "clip_text_model", "hidden_act": "quick_gelu", "hidden_size": TEXT_WIDTH,
        "intermediate_size": 4 * TEXT_WIDTH, "max_position_embeddings": CONTEXT,
        "num_attention_heads": TEXT_HEADS, "num_hidden_layers": LAYERS, "projection_dim": DIM,
        "vocab_size": VOCABULARY, "bos_token_id": 49406, "eos_token_id": 49407,
        "pad_token_id": 1,
    }  # fmt: skip
    vision = {
        "model_type": "clip_vision_model", "hidden_act": "quick_gelu", "hidden_size": WIDTH,
        "image_size": SIDE, "intermediate_size": 4 * WIDTH, "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS, "patch_size": PATCH, "projection_dim": DIM,
    }  # fmt: skip
    return {
        "config.json": {
            "architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": DIM,
            "text_config": text, "vision_config": vision, "torch_dtype": "float32",
        },
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True,
            "do_resize": True, "size": {"shortest_edge": SIDE}, "resample": 3,
            "do_center_crop": True, "crop_size": {"height": SIDE, "width": SIDE},
            "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
            "image_mean": list(spec.mean), "image_std": list(spec.std),
        },
        "tokenizer_config.json": {
            "tokenizer_class": "CLIPTokenizerFast", "model_max_length": CONTEXT,
            "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>",
        },
        "special_tokens_map.json": {
            "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>",
        },
    }  # fmt: skip
