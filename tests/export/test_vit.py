"""The rewritten vision transformer agrees with open_clip's module to 1e-5 in float32."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import open_clip
import pytest
import torch
from open_clip.transformer import VisionTransformer

from crl_export.demo.scenes import render_scene, sample_scene
from crl_export.graphs import ImageGraph, export_image_graph
from crl_export.precision import quantise
from crl_export.vit import lean_tower
from crl_sdk.engines._onnx_sessions import open_session
from crl_sdk.model import _parity as parity
from crl_sdk.model._bundle import ModelBundle, demo_bundle
from crl_sdk.model._preprocess import PreprocessSpec

SPEC = PreprocessSpec(32, 32, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
TEXT = {"context_length": 12, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1}


def model(quick_gelu: bool = False, **vision) -> torch.nn.Module:
    """A tiny CLIP whose layers matter: biases and scales are drawn, not zeros and ones."""
    torch.manual_seed(0)
    config = {"image_size": 32, "layers": 3, "width": 96, "head_width": 32, "patch_size": 8}
    made = open_clip.CLIP(24, {**config, **vision}, TEXT, quick_gelu=quick_gelu).eval()
    with torch.no_grad():
        for parameter in made.visual.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return made.requires_grad_(False)


def features(made: torch.nn.Module, pixels: np.ndarray) -> np.ndarray:
    """open_clip's own way: normalised, channels first, its own tower."""
    mean, std = torch.tensor(SPEC.mean), torch.tensor(SPEC.std)
    normalised = ((torch.from_numpy(pixels) / 255 - mean) / std).permute(0, 3, 1, 2)
    return made.encode_image(normalised, normalize=True).numpy()


@pytest.mark.parametrize(
    "vision",
    [
        {},
        {"pool_type": "avg"},
        {"pool_type": "avg", "final_ln_after_pool": True},
        {"final_ln_after_pool": True},
        {"no_ln_pre": True},
        {"ls_init_value": 0.3},
        {"patch_dropout": 0.5},
        {"pos_embed_type": "sin_cos_2d"},
        {"layers": 1},
        {"patch_size": 16, "image_size": (32, 64)},
    ],
    ids=str,
)
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_it_gives_what_open_clip_gives(vision, quick_gelu):
    made = model(quick_gelu, **vision)
    height, width = made.visual.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (5, height, width, 3), np.uint8)
    expected = features(made, pixels)
    assert np.ptp(expected, axis=0).max() > 0.01  # the images differ
    graph = ImageGraph(made, SPEC)
    assert graph.folded
    measured, _ = graph(torch.from_numpy(pixels), torch.zeros(24, 1), torch.zeros(1))
    np.testing.assert_allclose(measured.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(
    "vision",
    [
        {"attentional_pool": True, "attn_pooler_queries": 1},
        {"qk_norm": True},
        {"patch_size": 7},  # 32 is no multiple: the convolution leaves pixels out
    ],
    ids=str,
)
def test_other_towers_are_left_as_they_are(vision):
    made = model(**vision)
    assert isinstance(made.visual, VisionTransformer)
    assert lean_tower(made) is None
    resnet = {"layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "image_size": 32}
    assert lean_tower(open_clip.CLIP(24, resnet, TEXT)) is None


@pytest.mark.parametrize("vision", [{"ls_init_value": 0.3}, {"attentional_pool": True}], ids=str)
def test_the_model_is_left_as_it_was(vision):
    made = model(**vision)
    before = copy.deepcopy(made.state_dict())
    ImageGraph(made, SPEC)
    ImageGraph(made, SPEC, torch.float16)
    after = made.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_bytes_of_pixels_are_multiplied_as_they_are(tmp_path):
    """The first product of the int8 graph rounds weights alone: pixels are whole numbers."""
    made = model(layers=1)
    export_image_graph(ImageGraph(made, SPEC), SPEC, 24, tmp_path / "fp32.onnx")
    quantise(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", SPEC)
    graph = onnx.load(tmp_path / "int8.onnx")
    onnx.checker.check_model(graph)
    product = next(node for node in graph.graph.node if node.op_type == "MatMulInteger")
    assert len(product.input) == 2  # no zero points: the input is raw bytes
    made_by = {name: node for node in graph.graph.node for name in node.output}
    before = made_by[product.input[0]]
    while before.op_type in ("Reshape", "Transpose"):
        source, before = before.input[0], made_by.get(before.input[0])
        if before is None:
            assert source == "image"
            break
    else:
        pytest.fail(f"{before.op_type} stands between the pixels and their product")
    pixels = parity.images(SPEC)
    rows = [
        open_session(tmp_path / name).run(
            ["embedding"],
            {"image": pixels, "weight": np.zeros((24, 1), "f4"), "bias": np.zeros(1, "f4")},
        )[0]
        for name in ("fp32.onnx", "int8.onnx")
    ]
    found = parity.compare(rows[0], rows[1])
    assert found.cosine_min > 0.998 and found.centred_cosine_min > 0.99


def test_an_int8_embedding_depends_little_on_its_batch(tmp_path):
    """Activations are scaled per run. Tolerance: 200 scenes in batches of 32 gave 0.9998."""
    bundle = ModelBundle.open(demo_bundle())
    quantise(bundle.image_graph("fp32"), tmp_path / "int8.onnx", bundle.preprocess)
    session = open_session(tmp_path / "int8.onnx")
    weight, bias = np.zeros((bundle.embedding_dim, 1), np.float32), np.zeros(1, np.float32)

    def embed(pixels):
        return session.run(["embedding"], {"image": pixels, "weight": weight, "bias": bias})[0]

    side = bundle.preprocess.height
    scenes = np.stack([render_scene(sample_scene(seed), side) for seed in range(24)])
    together = embed(scenes)
    alone = np.concatenate([embed(scene[None]) for scene in scenes])
    assert not np.array_equal(alone, together)  # int8 results depend on the batch, as documented
    found = parity.compare(together, alone)
    assert found.cosine_min > 0.9995 and found.centred_cosine_min > 0.999
