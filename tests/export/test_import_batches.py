"""Towers that were traced with one image take any batch after the import."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import open_clip
import pytest
import torch

import tiny_exports as tiny
from crl_export.imported.batches import with_any_batch
from crl_export.imported.graphs import with_dynamic_batch
from crl_export.imported.reading import read_onnx
from crl_export.imported.towers import image_tower
from crl_export.imported.weights import take_weights

TEXT = {"context_length": 12, "vocab_size": 99, "width": 32, "heads": 2, "layers": 1}
TOWERS = {
    "vit": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
    "vit with pooled tokens": {
        "image_size": 32, "layers": 2, "width": 128, "patch_size": 8, "attentional_pool": True,
        "attn_pooler_queries": 4, "attn_pooler_heads": 2,
    },
    "vit with the mean of its tokens": {
        "image_size": 32, "layers": 1, "width": 64, "patch_size": 8, "pool_type": "avg",
    },
    "resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16},
}  # fmt: skip


def traced(folder: Path, kind: str, *, dynamo: bool) -> Path:
    """The image tower of open_clip, traced with one image as immich does."""
    torch.manual_seed(0)
    model = open_clip.CLIP(embed_dim=16, vision_cfg=TOWERS[kind], text_cfg=TEXT).eval()

    class Tower(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.model.encode_image(image, normalize=True)

    size = TOWERS[kind]["image_size"]
    path = folder / "tower.onnx"
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                Tower(), (torch.randn(1, 3, size, size),), str(path), input_names=["image"],
                output_names=["embedding"], opset_version=18 if dynamo else 17, dynamo=dynamo,
                verbose=False,
            )  # fmt: skip
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return path


def singly(path: Path, images: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(path)
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: images[i : i + 1]})[0] for i in range(3)])


def in_batches(model: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    declared = onnx.ModelProto()
    declared.CopyFrom(model)
    with_dynamic_batch(declared)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(declared.SerializeToString(), options)
    return session.run(None, {session.get_inputs()[0].name: images})[0]


@pytest.mark.parametrize("kind", TOWERS)
def test_traced_towers_take_any_batch(tmp_path, kind):
    path = traced(tmp_path, kind, dynamo=False)
    tower = take_weights(image_tower(read_onnx(path), ""), tmp_path, "image")
    before = tower.model.SerializeToString()
    images = np.random.default_rng(0).standard_normal((3, 3, tower.height, tower.width))
    images = images.astype(np.float32)
    rewritten = with_any_batch(tower)
    assert rewritten is not None
    assert tower.model.SerializeToString() == before
    expected = singly(path, images)
    assert np.abs(in_batches(rewritten.model, images) - expected).max() < 1e-5
    assert np.abs(expected - expected.mean(axis=0)).max() > 1e-4  # the embeddings differ at all
    assert in_batches(rewritten.model, images[:1]).shape == (1, 16)


def test_a_tower_with_a_node_without_a_rule_is_left_alone(tmp_path):
    onnx.save(tiny.image_model(batch=1, fixed_reshape=True, einsum=True), tmp_path / "tower.onnx")
    tower = image_tower(read_onnx(tmp_path / "tower.onnx"), "")
    assert with_any_batch(take_weights(tower, tmp_path, "image")) is None
