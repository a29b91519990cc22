"""Writes the directories of each layout with the tools that make them, from random weights.

transformers and optimum-onnx write transformers.js, optimum and fastembed; open_clip and
torch.onnx write immich and clip-as-service, as those projects do. `make test-import` runs this.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import open_clip
import torch
from open_clip.tokenizer import SimpleTokenizer
from optimum.exporters.onnx import export_models, main_export
from optimum.exporters.onnx.model_configs import (
    CLIPTextOnnxConfig,
    SiglipTextOnnxConfig,
    ViTOnnxConfig,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextModelWithProjection,
    CLIPTokenizerFast,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipTextModel,
    SiglipVisionModel,
)

SIZE, DIM = 32, 16
_LAYERS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
_VISION = {**_LAYERS, "num_attention_heads": 2, "image_size": SIZE, "patch_size": 8}
OPEN_CLIP = {
    "embed_dim": DIM,
    "vision_cfg": {"image_size": SIZE, "layers": 2, "width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
WORDS = (
    "a", "photo", "of", "cat", "dog", "red", "blue", "circle", "square", "small", "large", "the",
    "on", "it", "is",
)  # fmt: skip


def clip_tokenizer() -> CLIPTokenizerFast:
    """OpenAI's tokenizer of CLIP, in the form of transformers, from open_clip's merges."""
    simple = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): at for token, at in simple.encoder.items()}
    folder = Path(_temporary())
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    merges = [" ".join(pair) for pair in simple.bpe_ranks]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    made = CLIPTokenizerFast(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77
    )
    shutil.rmtree(folder)
    return made


def hugging_face_clip(folder: Path) -> CLIPModel:
    """A checkpoint of transformers with everything beside it."""
    torch.manual_seed(0)
    text = {**_LAYERS, "num_attention_heads": 2, "vocab_size": 49408, "eos_token_id": 49407}
    config = CLIPConfig(
        text_config={**text, "bos_token_id": 49406, "pad_token_id": 1, "projection_dim": DIM},
        vision_config={**_VISION, "projection_dim": DIM},
        projection_dim=DIM,
    )
    model = CLIPModel(config).eval()
    with torch.no_grad():  # else all embeddings of a random model are nearly the same
        for projection in (model.visual_projection, model.text_projection):
            projection.weight.mul_(20)
    model.save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
    ).save_pretrained(folder)
    return model


class _ImageEmbeds(ViTOnnxConfig):
    outputs = {"image_embeds": {0: "batch_size"}}  # noqa: RUF012 - a property of optimum


class _TextEmbeds(CLIPTextOnnxConfig):
    outputs = {"text_embeds": {0: "batch_size"}}  # noqa: RUF012


class _HiddenImages(ViTOnnxConfig):
    outputs = {  # noqa: RUF012
        "last_hidden_state": {0: "batch_size"},
        "pooler_output": {0: "batch_size"},
    }


class _HiddenTexts(SiglipTextOnnxConfig):
    outputs = {  # noqa: RUF012
        "last_hidden_state": {0: "batch_size", 1: "sequence_length"},
        "pooler_output": {0: "batch_size"},
    }


def _export_towers(checkpoint: Path, out: Path, towers: dict[str, tuple]) -> None:
    """Do what transformers.js's converter does with --split_modalities."""
    (out / "onnx").mkdir(parents=True)
    made = {}
    for name, (kind, config) in towers.items():
        model = kind.from_pretrained(checkpoint)
        made[name] = (model, config(model.config))
    export_models(models_and_onnx_configs=made, output_dir=out / "onnx")
    for each in checkpoint.iterdir():
        if each.suffix in (".json", ".txt"):
            shutil.copy(each, out)


def transformers_js(checkpoint: Path, out: Path) -> None:
    """`onnx/vision_model.onnx` and `onnx/text_model.onnx` of CLIP, and their int8 files."""
    towers = {
        "vision_model": (CLIPVisionModelWithProjection, _ImageEmbeds),
        "text_model": (CLIPTextModelWithProjection, _TextEmbeds),
    }
    _export_towers(checkpoint, out, towers)
    from onnxruntime.quantization import QuantType, quantize_dynamic

    for name in towers:
        quantize_dynamic(
            out / "onnx" / f"{name}.onnx",
            out / "onnx" / f"{name}_quantized.onnx",
            weight_type=QuantType.QUInt8,
        )


def without_projection(checkpoint: Path, out: Path) -> None:
    """An image tower that lacks CLIP's projection."""
    _export_towers(checkpoint, out, {"vision_model": (CLIPVisionModel, _HiddenImages)})


def siglip(checkpoint: Path, out: Path) -> SiglipModel:
    """`onnx/vision_model.onnx` and `onnx/text_model.onnx` of SigLIP."""
    torch.manual_seed(1)
    text = {**_LAYERS, "num_attention_heads": 2, "vocab_size": 64, "max_position_embeddings": 16}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=_VISION)).eval()
    model.save_pretrained(checkpoint)
    word_tokenizer().save_pretrained(checkpoint)
    SiglipImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(checkpoint)
    towers = {
        "vision_model": (SiglipVisionModel, _HiddenImages),
        "text_model": (SiglipTextModel, _HiddenTexts),
    }
    _export_towers(checkpoint, out, towers)
    return model


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word, which fills texts with the token that ends them."""
    vocabulary = {word: at for at, word in enumerate(["<unk>", "</s>", *WORDS])}
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    fast.normalizer = normalizers.Lowercase()
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        unk_token="<unk>",
        eos_token="</s>",
        pad_token="</s>",
        model_max_length=10**30,
    )


def optimum(checkpoint: Path, out: Path) -> None:
    """One `model.onnx` with both towers."""
    main_export(str(checkpoint), output=out, task="zero-shot-image-classification")


def fastembed(towers: Path, vision: Path, text: Path) -> None:
    """The repositories of fastembed: one for images, one for texts."""
    for folder, name in ((vision, "vision_model"), (text, "text_model")):
        folder.mkdir()
        shutil.copy(towers / "onnx" / f"{name}.onnx", folder / "model.onnx")
        shutil.copy(towers / "config.json", folder)
    shutil.copy(towers / "preprocessor_config.json", vision)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(towers / name, text)


def open_clip_model() -> torch.nn.Module:
    """A model of open_clip with random weights."""
    torch.manual_seed(2)
    return open_clip.CLIP(**OPEN_CLIP).eval()


def immich(model: torch.nn.Module, out: Path) -> None:
    """`visual/model.onnx` and `textual/model.onnx` with a batch of one, normalised."""
    (out / "visual").mkdir(parents=True)
    (out / "textual").mkdir()
    (out / "config.json").write_text(json.dumps(OPEN_CLIP))
    (out / "visual" / "preprocess_cfg.json").write_text(
        json.dumps(
            {
                "size": [SIZE, SIZE],
                "mode": "RGB",
                "mean": open_clip.OPENAI_DATASET_MEAN,
                "std": open_clip.OPENAI_DATASET_STD,
                "interpolation": "bicubic",
                "resize_mode": "shortest",
                "fill_color": 0,
            }
        )
    )
    clip_tokenizer().save_pretrained(out / "textual")
    _trace(model, "image", out / "visual" / "model.onnx", "image", dynamic=False, opset=17)
    _trace(model, "text", out / "textual" / "model.onnx", "text", dynamic=False, opset=17)


def clip_as_service(model: torch.nn.Module, out: Path) -> None:
    """`visual.onnx` and `textual.onnx` not normalised, without a tokenizer."""
    out.mkdir()
    names = ("pixel_values", "input_ids")
    _trace(model, "image", out / "visual.onnx", names[0], dynamic=True, opset=14)
    _trace(model, "text", out / "textual.onnx", names[1], dynamic=True, opset=14)


def _trace(
    model: torch.nn.Module, kind: str, path: Path, name: str, *, dynamic: bool, opset: int
) -> None:
    class Tower(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, value: torch.Tensor) -> torch.Tensor:
            encode = self.model.encode_image if kind == "image" else self.model.encode_text
            return encode(value, normalize=not dynamic)

    sample = torch.randn(1, 3, SIZE, SIZE)
    if kind == "text":
        sample = torch.ones(1, 77, dtype=torch.int32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.backends.mha.set_fastpath_enabled(False)
        torch.onnx.export(
            Tower(),
            (sample,),
            str(path),
            input_names=[name],
            output_names=["embedding" if not dynamic else "output"],
            dynamic_axes={name: {0: "batch"}} if dynamic else None,
            opset_version=opset,
            dynamo=False,
        )
        torch.backends.mha.set_fastpath_enabled(True)


def _temporary() -> str:
    import tempfile

    return tempfile.mkdtemp()
