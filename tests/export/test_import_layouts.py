"""The files of real repositories: which of them `crl import` takes, and what it says otherwise.

The lists of files are those of the repositories named, as they were published.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto
from onnx.helper import make_node, make_tensor_value_info
from typer.testing import CliRunner

import tiny_exports as tiny
from crl_export.imported.importer import import_model
from crl_export.imported.layouts import find_layout
from crl_sdk import Embedder
from crl_sdk.cli import app
from crl_sdk.errors import ExportError
from crl_sdk.model import load_pixels

_CONFIGS = ("config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json")
_SUFFIXES = ("", "_bnb4", "_fp16", "_int8", "_q4", "_q4f16", "_quantized", "_uint8")

REPOSITORIES = {
    "Xenova/clip-vit-large-patch14": (
        [*_CONFIGS, "onnx/model.onnx", "onnx/model_fp16.onnx", "onnx/model_quantized.onnx",
         "onnx/text_model.onnx", "onnx/text_model_fp16.onnx", "onnx/text_model_quantized.onnx",
         "onnx/vision_model.onnx", "onnx/vision_model_fp16.onnx",
         "onnx/vision_model_quantized.onnx", "merges.txt", "vocab.json", "quantize_config.json"],
        "transformers.js", "onnx/vision_model.onnx", "onnx/text_model.onnx",
    ),
    "jinaai/jina-clip-v1": (
        [*_CONFIGS, "vocab.txt", "model.safetensors", "pytorch_model.bin",
         *(f"onnx/{tower}_model{each}.onnx" for tower in ("text", "vision") for each in _SUFFIXES)],
        "transformers.js", "onnx/vision_model.onnx", "onnx/text_model.onnx",
    ),
    "jinaai/jina-clip-v2": (
        [*_CONFIGS, "model.safetensors", "onnx/model.onnx", "onnx/model.onnx_data",
         "onnx/model_fp16.onnx"],
        "optimum or fastembed", "onnx/model.onnx", "onnx/model.onnx",
    ),
    "Xenova/siglip-large-patch16-384": (
        [*_CONFIGS, "onnx/model.onnx", "onnx/model.onnx_data", "onnx/model_quantized.onnx",
         "onnx/text_model.onnx", "onnx/vision_model.onnx", "spiece.model"],
        "transformers.js", "onnx/vision_model.onnx", "onnx/text_model.onnx",
    ),
    "Marqo/marqo-fashionSigLIP": (
        [*_CONFIGS, "open_clip_config.json", "open_clip_model.safetensors",
         "open_clip_pytorch_model.bin", "marqo_fashionSigLIP.py",
         *(f"onnx/{tower}_model{each}.onnx" for tower in ("text", "vision") for each in _SUFFIXES)],
        "transformers.js", "onnx/vision_model.onnx", "onnx/text_model.onnx",
    ),
    "Qdrant/clip-ViT-B-32-vision": (
        ["config.json", "model.onnx", "preprocessor_config.json", "README.md"],
        "optimum or fastembed", "model.onnx", None,
    ),
    "nomic-ai/nomic-embed-vision-v1.5": (
        ["config.json", "preprocessor_config.json", "model.safetensors",
         *(f"onnx/model{each}.onnx" for each in _SUFFIXES)],
        "optimum or fastembed", "onnx/model.onnx", None,
    ),
    "immich-app/ViT-L-14__laion2b-s32b-b82k": (
        ["config.json", "visual/model.onnx", "visual/model.armnn", "visual/fp16/model.armnn",
         "visual/rknpu/rk3588/model.rknn", "visual/preprocess_cfg.json", "textual/model.onnx",
         "textual/fp16/model.armnn", "textual/tokenizer.json", "textual/tokenizer_config.json"],
        "immich", "visual/model.onnx", "textual/model.onnx",
    ),
    "immich-app/XLM-Roberta-Large-Vit-B-32": (  # one file of external data for each tensor
        ["config.json", "visual/model.onnx", "visual/preprocess_cfg.json", "textual/model.onnx",
         "textual/transformer.encoder.layer.20.intermediate.dense.bias", "textual/tokenizer.json"],
        "immich", "visual/model.onnx", "textual/model.onnx",
    ),
}  # fmt: skip


def write_names(folder: Path, names: list[str]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize("repository", REPOSITORIES)
def test_files_of_real_repositories(tmp_path, repository):
    names, layout, image, text = REPOSITORIES[repository]
    found = find_layout(write_names(tmp_path / "r", names))
    assert (found.name, found.image) == (layout, tmp_path / "r" / image)
    assert found.text == (None if text is None else tmp_path / "r" / text)


def test_pairs_of_files_as_jina_publishes_them(tmp_path):
    """jinaai/clip-models has the towers of many models in one directory."""
    for model in ("ViT-B-32-openai", "ViT-L-14-openai"):
        onnx.save(tiny.image_model(output="output"), tmp_path / f"{model}-visual.onnx")
        text = tiny.text_model(output="output", length=tiny.LENGTH)
        onnx.save(text, tmp_path / f"{model}-textual.onnx")
    tiny.write_tokenizer(tmp_path)
    bundle = import_model(tmp_path / "ViT-L-14-openai-visual.onnx", out=tmp_path / "b")
    assert bundle.manifest.origin.layout == "clip-as-service"
    assert set(bundle.manifest.origin.files) == {
        "image ViT-L-14-openai-visual.onnx", "text ViT-L-14-openai-textual.onnx", "tokenizer.json",
    }  # fmt: skip


def with_variants(folder: Path) -> Path:
    """transformers.js with an image tower in fp16 and a text tower that is quantised alone."""
    source = tiny.transformers_js(folder)
    onnx.save(tiny.image_model(), source / "onnx" / "vision_model_fp16.onnx")
    (source / "onnx" / "text_model.onnx").rename(source / "onnx" / "text_model_quantized.onnx")
    return source


def test_another_variant_of_the_text_tower(tmp_path):
    source = with_variants(tmp_path / "xenova")
    for options, message in (
        ({}, "text_model.onnx: no such file; choose another with --text-variant quantized"),
        ({"variant": "fp16"}, "text_model_fp16.onnx: .* --text-variant quantized"),
        ({"variant": "int8"}, "vision_model_int8.onnx: .* --variant fp32 or fp16"),
        ({"text_variant": "q4"}, "expected a variant among"),
    ):
        with pytest.raises(ExportError, match=message):
            import_model(source, out=tmp_path / "b", **options)
    bundle = import_model(source, out=tmp_path / "b", variant="fp16", text_variant="quantized")
    assert set(bundle.manifest.origin.files) == {
        "image vision_model_fp16.onnx", "text text_model_quantized.onnx", "tokenizer.json",
    }  # fmt: skip


def test_the_command_takes_another_variant_of_the_text_tower(tmp_path):
    source = with_variants(tmp_path / "xenova")
    words = ["import", str(source), "--out", str(tmp_path / "b"), "--text-variant", "quantized"]
    assert CliRunner().invoke(app, words).exit_code == 0


def test_a_layout_without_variants(tmp_path):
    source = tiny.immich(tmp_path / "immich")
    with pytest.raises(ExportError, match=r"'immich' has one file for each tower.*--variant"):
        import_model(source, out=tmp_path / "b", variant="fp16")


def test_a_cache_and_a_checkpoint_are_named(tmp_path):
    cache = tmp_path / "models--a--b"
    tiny.transformers_js(cache / "snapshots" / "c0ffee")
    with pytest.raises(ExportError, match=r"the cache of a repository, pass .*snapshots/c0ffee"):
        import_model(cache, out=tmp_path / "b")
    write_names(tmp_path / "mlx", ["config.json", "model.safetensors", "tokenizer.json"])
    with pytest.raises(ExportError, match=r"model\.safetensors, a checkpoint and no ONNX export"):
        import_model(tmp_path / "mlx", out=tmp_path / "b")


def jina_clip(folder: Path, *, names: tuple[str, str]) -> Path:
    """jina-clip-v2: one graph, four outputs, weights beside it, and a processor of its own."""
    model = tiny.both_towers()
    del model.graph.output[:]
    shape = ["batch", tiny.DIM]
    for kind in names:
        model.graph.node.append(
            make_node("LpNormalization", [f"{kind}_embeds"], [f"l2norm_{kind}_embeddings"], p=2)
        )
        model.graph.node.append(make_node("Identity", [f"{kind}_embeds"], [f"{kind}_embeddings"]))
        for name in (f"{kind}_embeddings", f"l2norm_{kind}_embeddings"):
            model.graph.output.append(make_tensor_value_info(name, TensorProto.FLOAT, shape))
    (folder / "onnx").mkdir(parents=True)
    onnx.save(
        model, folder / "onnx" / "model.onnx", save_as_external_data=True,
        location="model.onnx_data", size_threshold=100,
    )  # fmt: skip
    config = {
        "model_type": "jina_clip", "projection_dim": tiny.DIM,
        "text_config": {"hf_model_name_or_path": "jinaai/jina-embeddings-v3"},
    }  # fmt: skip
    tiny.write_json(folder / "config.json", config)
    processor = {
        "image_processor_type": "JinaCLIPImageProcessor", "processor_class": "JinaCLIPProcessor",
        "fill_color": 0, "interpolation": "bicubic", "resize_mode": "shortest",
        "size": tiny.SIZE, "mean": list(tiny.MEAN), "std": list(tiny.STD),
    }  # fmt: skip
    tiny.write_json(folder / "preprocessor_config.json", processor)
    tiny.write_tokenizer(folder, limit=8192)
    return folder


def test_jina_clip(tmp_path):
    source = jina_clip(tmp_path / "jina", names=("text", "image"))
    bundle = import_model(source, out=tmp_path / "b")
    assert bundle.preprocess.resize_mode == "shortest"
    assert bundle.manifest.text.context_length == 128
    pixels = np.random.default_rng(0).integers(0, 256, (3, 40, 24, 3), dtype=np.uint8)
    session = ort.InferenceSession(source / "onnx" / "model.onnx")
    expected = []
    for each in pixels:
        fitted = load_pixels(each, bundle.preprocess) / np.float32(255)
        scaled = (fitted - np.float32(tiny.MEAN)) / np.float32(tiny.STD)
        feeds = {
            "pixel_values": scaled.transpose(2, 0, 1)[None].astype(np.float32),
            "input_ids": np.ones((1, 1), np.int64), "attention_mask": np.ones((1, 1), np.int64),
        }  # fmt: skip
        expected.append(session.run(["l2norm_image_embeddings"], feeds)[0][0])
    with Embedder.open(bundle, threads=1) as embedder:
        found = embedder.embed(list(pixels)).universal
        assert np.isfinite(embedder.embed_text(["red", "water"])).all()
    assert np.abs(found - np.array(expected)).max() < 1e-5
    assert json.loads((bundle.path / "manifest.json").read_text())["origin"]["files"].keys() == {
        "image model.onnx", "text model.onnx", "tokenizer.json",
    }  # fmt: skip


def test_one_file_of_external_data_for_each_tensor(tmp_path):
    """As immich has those of models over 2 GB."""
    source = tiny.immich(tmp_path / "immich")
    inline = import_model(source, out=tmp_path / "inline")
    text = source / "textual" / "model.onnx"
    onnx.save(
        onnx.load(text), text, save_as_external_data=True, all_tensors_to_one_file=False,
        size_threshold=0,
    )  # fmt: skip
    assert len(list((source / "textual").iterdir())) > 5
    bundle = import_model(source, out=tmp_path / "b")
    assert np.array_equal(bundle.background, inline.background)


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({"model_type": "clip"}, 77),
        ({"model_type": "siglip", "text_config": {"model_type": "siglip_text_model"}}, 64),
        ({"model_type": "clip", "text_config": {"max_position_embeddings": 32}}, 32),
    ],
)
def test_context_lengths_that_transformers_leaves_out(tmp_path, config, length):
    """transformers writes what differs from its defaults alone; 1e30 means no limit."""
    source = tiny.transformers_js(tmp_path / "xenova")
    tiny.write_json(source / "config.json", config)
    bundle = import_model(source, out=tmp_path / "b")
    assert bundle.manifest.text.context_length == length
