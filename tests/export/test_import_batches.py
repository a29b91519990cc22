"""Towers that were traced with one image or text take any batch after the import."""

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
from crl_export.imported import weights
from crl_export.imported.batches import with_any_batch
from crl_export.imported.graphs import with_dynamic_batch
from crl_export.imported.reading import read_onnx
from crl_export.imported.towers import Tower, image_tower, text_tower
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


TEXTS = {
    "clip": TEXT,  # the tower takes the token after the last word: ArgMax and Gather
    "siglip": {
        "context_length": 16, "vocab_size": 99, "width": 32, "heads": 2, "layers": 2,
        "no_causal_mask": True, "proj_bias": True, "pool_type": "last",
    },
    "first token": {**TEXT, "pool_type": "first", "no_causal_mask": True},
}  # fmt: skip


def traced(folder: Path, kind: str, *, dynamo: bool) -> Path:
    """The image tower of open_clip, traced with one image as immich does."""
    torch.manual_seed(0)
    model = open_clip.CLIP(embed_dim=16, vision_cfg=TOWERS[kind], text_cfg=TEXT).eval()
    size = TOWERS[kind]["image_size"]
    return trace(folder, model.encode_image, torch.randn(1, 3, size, size), dynamo=dynamo)


def traced_text(folder: Path, kind: str, *, dynamo: bool) -> Path:
    """The text tower of open_clip, traced with one text."""
    torch.manual_seed(0)
    made = open_clip.CLIP if kind == "clip" else open_clip.CustomTextCLIP
    model = made(embed_dim=16, vision_cfg=TOWERS["vit"], text_cfg=TEXTS[kind]).eval()
    tokens = torch.ones(1, TEXTS[kind]["context_length"], dtype=torch.int32)
    return trace(folder, model.encode_text, tokens, dynamo=dynamo)


def trace(folder: Path, encode, sample: torch.Tensor, *, dynamo: bool) -> Path:
    class Tower(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = encode.__self__

        def forward(self, value: torch.Tensor) -> torch.Tensor:
            return encode(value, normalize=True)

    path = folder / "tower.onnx"
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                Tower(), (sample,), str(path), input_names=["input"],
                output_names=["unit_embedding"], opset_version=18 if dynamo else 17, dynamo=dynamo,
                verbose=False,
            )  # fmt: skip
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return path


def singly(path: Path, rows: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(path)
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: row[None]})[0] for row in rows])


def in_batches(tower: Tower, rows: np.ndarray) -> np.ndarray:
    declared = onnx.ModelProto()
    declared.CopyFrom(tower.model)
    with_dynamic_batch(declared)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    path = (tower.weights or tower.path.parent) / "declared.onnx"
    onnx.save(declared, path)
    session = ort.InferenceSession(path, options)
    return session.run(None, {session.get_inputs()[0].name: rows})[0]


@pytest.mark.parametrize("kind", TOWERS)
def test_traced_towers_take_any_batch(tmp_path, kind):
    path = traced(tmp_path, kind, dynamo=False)
    tower = take_weights(image_tower(read_onnx(path), ""), tmp_path, "image")
    before = tower.model.SerializeToString()
    images = np.random.default_rng(0).standard_normal((3, 3, tower.height, tower.width))
    images = images.astype(np.float32)
    rewritten = with_any_batch(tower, tower.weights or tmp_path)
    assert rewritten is not None
    assert tower.model.SerializeToString() == before
    expected = singly(path, images)
    assert np.abs(in_batches(rewritten, images) - expected).max() < 1e-5
    assert np.abs(expected - expected.mean(axis=0)).max() > 1e-4  # the embeddings differ at all
    assert in_batches(rewritten, images[:1]).shape == (1, 16)


@pytest.mark.parametrize("dynamo", [False, True], ids=["traced", "exported"])
@pytest.mark.parametrize("kind", TEXTS)
def test_text_towers_take_any_batch(tmp_path, kind, dynamo):
    path = traced_text(tmp_path, kind, dynamo=dynamo)
    tower = take_weights(text_tower(read_onnx(path), ""), tmp_path, "text")
    assert tower.rows == 99
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 90, (5, tower.length), dtype=np.int32)
    for row, end in zip(tokens, (3, 5, 2, tower.length - 1, 7), strict=True):
        row[end], row[end + 1 :] = 98, 0  # texts of different lengths
    rewritten = with_any_batch(tower, tower.weights or tmp_path)
    assert rewritten is not None
    expected = singly(path, tokens)
    assert np.abs(in_batches(rewritten, tokens) - expected).max() < 1e-5
    assert np.abs(expected - expected.mean(axis=0)).max() > 1e-2
    assert in_batches(rewritten, tokens[:1]).shape == (1, 16)


def test_large_towers_take_any_batch(tmp_path, monkeypatch):
    """Their weights stay in files, those that were folded in a new one."""
    monkeypatch.setattr(weights, "INLINE_BYTES", 100)
    path = traced_text(tmp_path, "clip", dynamo=False)
    (tmp_path / "store").mkdir()
    tower = take_weights(text_tower(read_onnx(path), ""), tmp_path / "store", "text.onnx")
    rewritten = with_any_batch(tower, tower.weights or tmp_path)
    assert rewritten is not None
    assert sorted(each.name for each in (tmp_path / "store").iterdir()) == [
        "text.onnx.data", "text.onnx.folded.data",
    ]  # fmt: skip
    tokens = np.random.default_rng(0).integers(1, 99, (4, tower.length), dtype=np.int32)
    assert np.abs(in_batches(rewritten, tokens) - singly(path, tokens)).max() < 1e-5


def test_a_tower_with_a_node_without_a_rule_is_left_alone(tmp_path):
    onnx.save(tiny.image_model(batch=1, fixed_reshape=True, einsum=True), tmp_path / "tower.onnx")
    tower = image_tower(read_onnx(tmp_path / "tower.onnx"), "")
    assert with_any_batch(take_weights(tower, tmp_path, "image"), tmp_path) is None
