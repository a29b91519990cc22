"""`crl import`: every layout becomes a bundle that equals the export; bad exports leave nothing.

The exports here are small graphs. tests/imports compares exports of the real tools.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import large_exports as large
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto
from typer.testing import CliRunner

import tiny_exports as tiny
from crl_export import graph_products
from crl_export.imported import weights
from crl_export.imported.importer import Given, import_model
from crl_export.imported.preprocessing import spec_from
from crl_sdk import Embedder
from crl_sdk.cli import app
from crl_sdk.errors import CrlError, ExportError, InvalidInputError
from crl_sdk.model import ModelBundle, load_pixels

TEXTS = ["a photo of a dog", "red", "two cats on a roof", "water"]
PIXELS = np.random.default_rng(3).integers(0, 256, (5, 40, 24, 3), dtype=np.uint8)


def definition(bundle: ModelBundle, image: Path, output: str, channels_last=False) -> np.ndarray:
    """The embeddings of the export itself, one image at a time, by its own preprocessing."""
    session = ort.InferenceSession(image)
    (value,) = [each for each in session.get_inputs() if len(each.shape) == 4]
    rows = []
    for pixels in PIXELS:
        fitted = load_pixels(pixels, bundle.preprocess)
        if value.type != "tensor(uint8)":
            fitted = (fitted / np.float32(255) - np.float32(tiny.MEAN)) / np.float32(tiny.STD)
        one = fitted[None] if channels_last else fitted.transpose(2, 0, 1)[None]
        feeds = {value.name: np.ascontiguousarray(one)}
        for other in session.get_inputs():
            if other.name != value.name:
                feeds[other.name] = np.ones((1, 4), np.int64)
        rows.append(session.run([output], feeds)[0][0])
    rows = np.array(rows)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def definition_of_texts(bundle: ModelBundle, text: Path, output: str) -> np.ndarray:
    session = ort.InferenceSession(text)
    tokenizer = bundle.tokenizer()
    rows = []
    for each in TEXTS:
        tokens, count = tokenizer.encode([each]), tokenizer.count([each])[0]
        feeds = {}
        for value in session.get_inputs():
            if len(value.shape) == 4:
                feeds[value.name] = np.zeros((1, 3, tiny.SIZE, tiny.SIZE), np.float32)
                continue
            real = (np.arange(tokens.shape[1]) < count)[None]
            kind = np.int32 if value.type == "tensor(int32)" else np.int64
            values = {"attention_mask": real, "token_type_ids": np.zeros_like(tokens)}
            feeds[value.name] = values.get(value.name, tokens).astype(kind)
        rows.append(session.run([output], feeds)[0][0])
    rows = np.array(rows)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def embed(bundle: ModelBundle) -> tuple[np.ndarray, np.ndarray]:
    with Embedder.open(bundle, threads=1) as embedder:
        return embedder.embed(list(PIXELS)).universal, embedder.embed_text(TEXTS)


def assert_equals(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(found - expected).max() < 1e-5
    assert np.abs(expected - expected.mean(axis=0)).max() > 0.01


def test_transformers_js(tmp_path):
    source = tiny.transformers_js(tmp_path / "xenova")
    bundle = import_model(source, out=tmp_path / "b", precisions=("fp32", "fp16", "int8"))
    assert bundle.manifest.origin.layout == "transformers.js"
    assert bundle.manifest.origin.image_batch == "dynamic"
    assert bundle.precisions == ("fp32", "fp16", "int8")
    assert bundle.background is not None and bundle.prompt == "a photo of {}"
    with Embedder.open(bundle, engine="onnx/cpu/fp32", threads=1) as embedder:
        found = embedder.embed(list(PIXELS)).universal
    image, text = source / "onnx" / "vision_model.onnx", source / "onnx" / "text_model.onnx"
    assert_equals(found, definition(bundle, image, "image_embeds"))
    assert_equals(embed(bundle)[1], definition_of_texts(bundle, text, "text_embeds"))


@pytest.mark.parametrize(
    ("nodes", "batch"),
    [
        ({}, "dynamic"),
        ({"fixed_reshape": True}, "dynamic"),
        ({"fixed_reshape": True, "einsum": True}, "one by one"),
    ],
    ids=["batch declared", "batch in the nodes", "node without a rule"],
)
def test_immich_with_a_batch_of_one(tmp_path, nodes, batch):
    source = tiny.immich(tmp_path / "immich", **nodes)
    bundle = import_model(source, out=tmp_path / "b", precisions=("fp32", "fp16"))
    assert bundle.manifest.origin.image_batch == batch
    assert bundle.preprocess.resize_mode == "squash"
    assert bundle.preprocess.interpolation == "bilinear"
    with Embedder.open(bundle, engine="onnx/cpu/fp32", threads=1) as embedder:
        found = embedder.embed(list(PIXELS)).universal
    assert_equals(found, definition(bundle, source / "visual" / "model.onnx", "embedding"))
    words = definition_of_texts(bundle, source / "textual" / "model.onnx", "embedding")
    assert_equals(embed(bundle)[1], words)


def test_pixels_in_bytes_with_the_channels_last(tmp_path):
    """As newer exports of immich have them: preprocessing is part of their graph."""
    source = tiny.immich(tmp_path / "immich", element=TensorProto.UINT8, channels_last=True)
    bundle = import_model(source, out=tmp_path / "b")
    expected = definition(bundle, source / "visual" / "model.onnx", "embedding", True)
    assert_equals(embed(bundle)[0], expected)


def test_one_graph_with_both_towers(tmp_path):
    source = tiny.optimum(tmp_path / "optimum")
    bundle = import_model(source, out=tmp_path / "b")
    images, texts = embed(bundle)
    assert_equals(images, definition(bundle, source / "model.onnx", "image_embeds"))
    assert_equals(texts, definition_of_texts(bundle, source / "model.onnx", "text_embeds"))
    inputs = onnx.load(bundle.image_graph("fp32")).graph.input
    assert [each.name for each in inputs] == ["image", "weight", "bias"]


def test_clip_as_service_asks_for_the_tokenizer(tmp_path):
    source = tiny.clip_as_service(tmp_path / "cas")
    with pytest.raises(ExportError, match="--tokenizer FILE"):
        import_model(source, out=tmp_path / "b")
    tiny.write_tokenizer(tmp_path)
    given = Given(tokenizer=tmp_path / "tokenizer.json")
    bundle = import_model(source, out=tmp_path / "b", given=given)
    assert bundle.preprocess.mean[0] == pytest.approx(0.48145466)
    assert_equals(embed(bundle)[1], definition_of_texts(bundle, source / "textual.onnx", "output"))


def test_fastembed_has_the_text_tower_elsewhere(tmp_path):
    for name in ("vision", "text"):
        (tmp_path / name).mkdir()
    onnx.save(tiny.image_model(), tmp_path / "vision" / "model.onnx")
    tiny.write_json(tmp_path / "vision" / "preprocessor_config.json", tiny.preprocessor())
    onnx.save(tiny.text_model(), tmp_path / "text" / "model.onnx")
    tiny.write_tokenizer(tmp_path / "text", limit=32)
    bundle = import_model(tmp_path / "vision", out=tmp_path / "b", text_source=tmp_path / "text")
    assert bundle.manifest.text.context_length == 32
    images, texts = embed(bundle)
    assert_equals(images, definition(bundle, tmp_path / "vision" / "model.onnx", "image_embeds"))
    text = tmp_path / "text" / "model.onnx"
    assert_equals(texts, definition_of_texts(bundle, text, "text_embeds"))


def test_an_image_tower_alone(tmp_path):
    onnx.save(tiny.image_model(output="whatever"), tmp_path / "tower.onnx")
    with pytest.raises(ExportError, match="pass --size, --mean and --std"):
        import_model(tmp_path / "tower.onnx", out=tmp_path / "b")
    given = Given(preprocess={"mean": tiny.MEAN, "std": tiny.STD})
    bundle = import_model(tmp_path / "tower.onnx", out=tmp_path / "b", given=given)
    assert bundle.manifest.text is None and bundle.preprocess.height == tiny.SIZE
    with Embedder.open(bundle, threads=1) as embedder:
        found = embedder.embed(list(PIXELS)).universal
    assert_equals(found, definition(bundle, tmp_path / "tower.onnx", "whatever"))


def test_a_token_that_fills_and_ends_texts_is_part_of_the_text_once(tmp_path):
    """CLIP's tokenizer in transformers fills texts with the token that ends them."""
    source = tiny.transformers_js(tmp_path / "xenova")
    bundle = import_model(source, out=tmp_path / "b", given=Given(pad_id=2))
    text = source / "onnx" / "text_model.onnx"
    assert_equals(embed(bundle)[1], definition_of_texts(bundle, text, "text_embeds"))


@pytest.mark.parametrize("element", [TensorProto.INT32, TensorProto.INT64])
def test_text_towers_with_masks_and_types_of_tokens(tmp_path, element):
    """As those of M-CLIP in immich (int32), and of towers made from BERT."""
    source = tiny.immich(tmp_path / "immich")
    text = source / "textual" / "model.onnx"
    onnx.save(tiny.text_model(output="embedding", types="token_type_ids", element=element), text)
    bundle = import_model(source, out=tmp_path / "b")
    assert_equals(embed(bundle)[1], definition_of_texts(bundle, text, "embedding"))


def test_context_length(tmp_path):
    source = tiny.transformers_js(tmp_path / "xenova")
    (source / "config.json").unlink()
    with pytest.raises(ExportError, match="pass --context-length"):  # 1e30 is no limit
        import_model(source, out=tmp_path / "b")
    tiny.write_json(source / "config.json", {"text_config": {"max_position_embeddings": 8192}})
    bundle = import_model(source, out=tmp_path / "b")
    assert bundle.manifest.text.context_length == 128
    with pytest.raises(ExportError, match="takes 64 tokens, got --context-length 9"):
        import_model(
            tiny.immich(tmp_path / "immich"), out=tmp_path / "b2", given=Given(context_length=9)
        )


def test_external_data_and_large_weights(tmp_path, monkeypatch):
    source = tiny.transformers_js(tmp_path / "xenova")
    file = source / "onnx" / "vision_model.onnx"
    inline = import_model(source, out=tmp_path / "inline")
    onnx.save(
        onnx.load(file), file, save_as_external_data=True, location="vision_model.onnx_data",
        size_threshold=0,
    )  # fmt: skip
    monkeypatch.setattr(weights, "INLINE_BYTES", 100)
    bundle = import_model(source, out=tmp_path / "b", precisions=("fp32", "int8"))
    assert "image.fp32.onnx.data" in bundle.manifest.files
    assert_equals(bundle.background.astype(np.float64), inline.background.astype(np.float64))
    with Embedder.open(bundle, engine="onnx/cpu/fp32", threads=1) as embedder:
        found = embedder.embed(list(PIXELS)).universal
    assert_equals(found, embed(inline)[0])
    # the digest covers the data
    data = source / "onnx" / "vision_model.onnx_data"
    changed = bytearray(data.read_bytes())
    changed[0] ^= 1
    data.write_bytes(changed)
    other = import_model(source, out=tmp_path / "b2")
    assert other.fingerprint != bundle.fingerprint


def test_a_large_transformer(tmp_path, monkeypatch):
    """Every precision of a tower whose weights stay in files, with a lower limit for large ones."""
    options = {"width": 64, "layers": 2, "words": 600, "text_width": 64, "text_layers": 1}
    source = large.transformers_js(tmp_path / "export", **options)
    small = import_model(source, out=tmp_path / "small", precisions=("fp32", "fp16", "int8"))
    monkeypatch.setattr(weights, "INLINE_BYTES", 1000)
    monkeypatch.setattr(graph_products, "INLINE_BYTES", 1000)
    bundle = import_model(source, out=tmp_path / "b", precisions=("fp32", "fp16", "int8"))
    assert set(bundle.manifest.files) - set(small.manifest.files) == {
        "image.fp32.onnx.data", "image.fp16.onnx.data", "text.onnx.data",
    }  # fmt: skip
    assert bundle.fingerprint == small.fingerprint
    for precision in bundle.precisions:
        found = []
        for each in (small, bundle):
            with Embedder.open(each, engine=f"onnx/cpu/{precision}", threads=1) as embedder:
                found.append(embedder.embed(list(PIXELS)).universal)
        assert np.abs(found[0] - found[1]).max() < 1e-3
    alone = import_model(source, out=tmp_path / "c", precisions=("int8",), text=False)
    assert not [name for name in alone.manifest.files if name.endswith(".data")]


def test_links_of_the_hugging_face_cache_are_followed_and_others_are_not(tmp_path):
    source = tiny.transformers_js(tmp_path / "models--a--b" / "snapshots" / "c0ffee")
    file = source / "onnx" / "vision_model.onnx"
    onnx.save(onnx.load(file), file, save_as_external_data=True, location="data", size_threshold=0)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    (source / "onnx" / "data").rename(blobs / "1234")
    (source / "onnx" / "data").symlink_to("../../../blobs/1234")
    import_model(source, out=tmp_path / "b")
    (blobs / "1234").rename(tmp_path / "elsewhere")
    (source / "onnx" / "data").unlink()
    (source / "onnx" / "data").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ExportError, match="a link that leads out of the directory"):
        import_model(source, out=tmp_path / "b2")


def external(model: onnx.ModelProto, **entries) -> onnx.ModelProto:
    """Claim that the largest weights of a model are in another file."""
    tensor = max(model.graph.initializer, key=lambda each: len(each.raw_data))
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))
    return model


@pytest.mark.parametrize(
    "location", ["../secret", "/etc/passwd", "a/../../secret", "C:\\secret", "..\\secret", ""]
)
def test_external_data_outside_the_directory(tmp_path, location):
    (tmp_path / "secret").write_bytes(bytes(100_000))
    model = external(tiny.image_model(), location=location)
    source = tiny.transformers_js(tmp_path / "xenova", image=model)
    with pytest.raises(ExportError, match="outside its directory"):
        import_model(source, out=tmp_path / "b")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"location": "missing.data"}, "is missing; download that file"),
        ({"location": "short.data", "offset": 0, "length": 6144}, "which has 1,000"),
        ({"location": "short.data", "offset": -5, "length": 10}, "is incomplete"),
        ({"location": "short.data", "offset": "x"}, "not a number"),
    ],
)
def test_incomplete_external_data(tmp_path, entries, message):
    source = tiny.transformers_js(
        tmp_path / "xenova", image=external(tiny.image_model(), **entries)
    )
    (source / "onnx" / "short.data").write_bytes(bytes(1000))
    with pytest.raises(ExportError, match=message):
        import_model(source, out=tmp_path / "b")


def test_tensors_that_claim_the_same_bytes_many_times(tmp_path):
    model = tiny.image_model()
    for tensor in model.graph.initializer:
        size = len(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="data")
        tensor.external_data.add(key="length", value=str(size))
    source = tiny.transformers_js(tmp_path / "xenova", image=model)
    largest = max(int(np.prod(t.dims)) * 4 for t in model.graph.initializer)
    (source / "onnx" / "data").write_bytes(bytes(largest))
    with pytest.raises(ExportError, match=r"claim .* bytes of external data"):
        import_model(source, out=tmp_path / "b")


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:2000])


def pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def custom(path: Path) -> None:
    model = onnx.load(path)
    model.graph.node[0].domain = "com.example"
    model.opset_import.append(onnx.helper.make_opsetid("com.example", 1))
    onnx.save(model, path)


def four_bit(path: Path) -> None:
    model = onnx.load(path)
    node = next(node for node in model.graph.node if node.op_type == "MatMul")
    node.op_type, node.domain = "MatMulNBits", "com.microsoft"
    onnx.save(model, path)


def hidden(path: Path) -> None:
    onnx.save(tiny.image_model(output="last_hidden_state"), path)


def text_in_place_of_images(path: Path) -> None:
    onnx.save(tiny.text_model(output="image_embeds"), path)


def not_a_clip(path: Path) -> None:
    model = tiny.image_model(output="logits")
    model.graph.output.add().CopyFrom(
        onnx.helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["b", 24])
    )
    onnx.save(model, path)


def not_finite(path: Path) -> None:
    model = tiny.image_model()
    tensor = next(t for t in model.graph.initializer if t.name == "second")
    tensor.raw_data = np.full((24, tiny.DIM), np.nan, np.float32).tobytes()
    onnx.save(model, path)


def broken_nodes(path: Path) -> None:
    model = onnx.load(path)
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, "download it again"),
        (pointer, "git lfs pull"),
        (lambda path: path.write_bytes(b""), "without operators"),
        (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(500)), "not a complete ONNX file"),
        (custom, "com.example, which ONNX Runtime does not have"),
        (four_bit, "4-bit weights"),
        (hidden, "without CLIP's projection"),
        (text_in_place_of_images, "one input of four dimensions"),
        (not_a_clip, "not the image tower of a CLIP model"),
        (not_finite, "not finite"),
        (broken_nodes, "cannot load it"),
    ],
)
def test_damaged_image_towers_leave_nothing(tmp_path, damage, message):
    source = tiny.transformers_js(tmp_path / "xenova")
    damage(source / "onnx" / "vision_model.onnx")
    with pytest.raises(ExportError, match=message) as raised:
        import_model(source, out=tmp_path / "b")
    assert "vision_model.onnx" in str(raised.value)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["xenova"]


def test_an_old_opset_is_converted(tmp_path):
    source = tiny.transformers_js(tmp_path / "xenova", image=tiny.image_model(opset=11))
    bundle = import_model(source, out=tmp_path / "b")
    image = source / "onnx" / "vision_model.onnx"
    assert_equals(embed(bundle)[0], definition(bundle, image, "image_embeds"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resample": 1}, "`resample` is 1, expected 2"),
        ({"size": {"shortest_edge": 12}}, "`crop_size` is 16×16, expected at most `size`, 12×12"),
        ({"size": {"height": 15, "width": 30}}, "`crop_size` is 16×16, expected at most .*15×30"),
        ({"do_center_crop": False, "size": {"shortest_edge": 12}}, "`crop_size` is 16×16"),
        ({"size": {"longest_edge": 16}}, "`size` is"),
        ({"size": {"shortest_edge": "wide"}}, "--resize-mode"),
        ({"do_center_crop": False, "crop_pct": 0, "size": {"shortest_edge": 16}}, "--resize-mode"),
        ({"size": {"shortest_edge": 0}, "crop_size": 0}, "a size of 0×0 pixels: .*--resize-mode"),
        ({"crop_size": {"height": -16, "width": 16}}, "a size of -16×16 pixels"),
        ({"rescale_factor": 0}, "ZeroDivisionError.*--resize-mode"),
        ({"crop_size": {"height": 16}}, "--resize-mode"),
        ({"do_flip_channel_order": True}, "`do_flip_channel_order` is True, expected false"),
        ({"do_pad": True}, "`do_pad` is True"),
        ({"do_resize": False}, "`do_resize` is False"),
        ({"image_mean": [0.5, 0.5]}, "--mean"),
        ({"size": None}, "--size"),
        (
            {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}},
            "gives 32×32 pixels, .* takes 16×16",
        ),
    ],
)
def test_preprocessing_that_cannot_be_reproduced(tmp_path, changes, message):
    source = tiny.transformers_js(tmp_path / "xenova", **changes)
    with pytest.raises(ExportError, match=message):
        import_model(source, out=tmp_path / "b")


def test_preprocessing_of_hugging_face():
    path = Path("preprocessor_config.json")
    crop = spec_from(tiny.preprocessor(), path)
    assert (crop.resize_mode, crop.interpolation, crop.mean) == ("shortest", "bicubic", tiny.MEAN)
    old = spec_from(tiny.preprocessor(size=16, crop_size=16, resample=2), path)
    assert (old.resize_mode, old.interpolation, old.height) == ("shortest", "bilinear", 16)
    squashed = spec_from(
        tiny.preprocessor(size={"height": 16, "width": 16}, do_center_crop=False), path
    )
    assert squashed.resize_mode == "squash"
    raw = spec_from(tiny.preprocessor(do_rescale=False, image_mean=[255] * 3), path)
    assert raw.mean == pytest.approx((1, 1, 1))
    plain = spec_from(tiny.preprocessor(do_normalize=False), path)
    assert (plain.mean, plain.std) == ((0, 0, 0), (1, 1, 1))


def test_sizes_of_hugging_face():
    """What is scaled to which size, and cropped to which."""
    path = Path("preprocessor_config.json")

    def read(input_size=None, **changes):
        spec = spec_from(tiny.preprocessor(**changes), path, input_size)
        return spec.resize_mode, spec.resize, (spec.height, spec.width)

    assert read(size={"shortest_edge": 20}) == ("shortest", (20, 20), (16, 16))
    assert read(size=20.0, crop_size=16) == ("shortest", (20, 20), (16, 16))
    assert read(size={"shortest_edge": 16}) == ("shortest", None, (16, 16))
    tall = {"height": 20, "width": 16}
    assert read(size={"shortest_edge": 20}, crop_size=tall) == ("shortest", (20, 20), (20, 16))
    assert read(size=tall) == ("squash", (20, 16), (16, 16))
    assert read(size=[20, 16]) == ("squash", (20, 16), (16, 16))
    assert read(size=tall, do_center_crop=False) == ("squash", None, (20, 16))
    assert read(size={"shortest_edge": 20}, do_center_crop=False, input_size=(16, 12)) == (
        "shortest", (20, 20), (16, 12),
    )  # fmt: skip
    with pytest.raises(
        ExportError, match=r"`do_center_crop` is False, expected a crop.*import --size 20"
    ):
        read(size={"shortest_edge": 20}, do_center_crop=False)
    conv = {"do_center_crop": False, "crop_pct": 0.875}
    assert read(size={"shortest_edge": 224}, **conv) == ("shortest", (256, 256), (224, 224))
    assert read(size=224, **conv) == ("shortest", (256, 256), (224, 224))
    assert read(size={"shortest_edge": 384}, **conv) == ("squash", None, (384, 384))


def test_values_of_efficient_net():
    """ALIGN's pixels are from -1 to 1; its classifiers divide by the deviation twice."""
    path = Path("preprocessor_config.json")
    align = {
        "image_processor_type": "EfficientNetImageProcessor", "rescale_offset": True,
        "rescale_factor": 0.00784313725490196, "do_normalize": False, "include_top": False,
        "size": {"height": 346, "width": 346}, "crop_size": {"height": 289, "width": 289},
        "resample": 2,
    }  # fmt: skip
    spec = spec_from(tiny.preprocessor(**align), path)
    assert (spec.resize_mode, spec.resize, spec.height) == ("squash", (346, 346), 289)
    assert spec.interpolation == "bilinear"
    assert spec.mean == spec.std == pytest.approx((0.5, 0.5, 0.5), abs=1e-15)
    again = spec_from(tiny.preprocessor(**{**align, "include_top": True}), path)
    assert again.std == pytest.approx([each / 2 for each in tiny.STD])
    del align["include_top"]  # true by default
    assert spec_from(tiny.preprocessor(**align), path) == again
    both = spec_from(tiny.preprocessor(**{**align, "do_normalize": True}), path)
    assert both.mean == pytest.approx([(each + 1) / 2 for each in tiny.MEAN])
    assert both.std == pytest.approx([each * each / 2 for each in tiny.STD])


@pytest.mark.parametrize(
    ("changes", "options", "expected"),
    [
        ({"size": {"shortest_edge": 20}}, (), ("shortest", (20, 20))),
        ({"size": {"height": 19, "width": 22}}, (), ("squash", (19, 22))),
        ({"size": {"shortest_edge": 20}, "do_center_crop": False}, (), ("shortest", (20, 20))),
        ({}, ("--resize", "18,21"), ("shortest", (18, 21))),
        ({"size": {"shortest_edge": 20}}, ("--resize", "16"), ("shortest", None)),
        (
            {"do_pad": True},  # a file that is wrong altogether is not needed
            ("--size", "16", "--mean", ",".join(map(str, tiny.MEAN)), "--std",
             ",".join(map(str, tiny.STD)), "--interpolation", "bicubic", "--resize-mode", "squash",
             "--resize", "24"),
            ("squash", (24, 24)),
        ),
    ],
)  # fmt: skip
def test_an_export_that_crops_less_than_it_scales(tmp_path, changes, options, expected):
    source = tiny.transformers_js(tmp_path / "xenova", **changes)
    code, printed, said = run("import", source, "--out", tmp_path / "b", *options)
    assert code == 0, said
    bundle = ModelBundle.open(tmp_path / "b")
    spec = bundle.preprocess
    assert (spec.resize_mode, spec.resize) == expected
    assert bundle.manifest.schema == (1 if spec.resize is None else 2)
    sizes = "16×16" if spec.resize is None else f"16×16, the centre of {spec.resize[0]}×"
    assert sizes in printed
    image = source / "onnx" / "vision_model.onnx"
    assert_equals(embed(bundle)[0], definition(bundle, image, "image_embeds"))


def test_the_tokenizer_of_another_model(tmp_path):
    source = tiny.transformers_js(tmp_path / "xenova")
    onnx.save(tiny.text_model(words=100), source / "onnx" / "text_model.onnx")
    with pytest.raises(ExportError, match="the tokenizer is of another model"):
        import_model(source, out=tmp_path / "b")
    (source / "tokenizer.json").write_text("{}")
    with pytest.raises(ExportError, match="expected a file of the `tokenizers` library"):
        import_model(source, out=tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_towers_of_different_models(tmp_path):
    source = tiny.transformers_js(tmp_path / "xenova")
    model = tiny.text_model()
    last = next(each for each in model.graph.initializer if each.name == "last")
    last.CopyFrom(onnx.numpy_helper.from_array(np.ones((24, 5), np.float32), "last"))
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    onnx.save(model, source / "onnx" / "text_model.onnx")
    with pytest.raises(ExportError, match="have 5 dimensions, those of the image tower 8"):
        import_model(source, out=tmp_path / "b")


@pytest.mark.parametrize("content", ["[", "[1]", '{"a": ' * 10_000, "\udcff"])
def test_configurations_that_are_no_json(tmp_path, content):
    source = tiny.transformers_js(tmp_path / "xenova")
    (source / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ExportError, match=r"config\.json"):
        import_model(source, out=tmp_path / "b")


def test_a_configuration_without_end(tmp_path):
    source = tiny.transformers_js(tmp_path / "xenova")
    with (source / "config.json").open("wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(ExportError, match="at most 64 MiB of JSON"):
        import_model(source, out=tmp_path / "b")


def test_places_that_hold_no_export(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    onnx.save(tiny.image_model(), tmp_path / "other" / "net.onnx")
    for source, message in (
        ("a.zip", "unpack archives"),
        ("empty", "expected visual/model.onnx"),
        ("other", "it has net.onnx: pass the image tower itself"),
        ("none", "no such file or directory"),
    ):
        with pytest.raises(ExportError, match=message):
            import_model(tmp_path / source, out=tmp_path / "b")


def test_variants(tmp_path):
    source = tiny.transformers_js(tmp_path / "xenova")
    onnx_folder = source / "onnx"
    for name in ("vision_model", "text_model"):
        (onnx_folder / f"{name}.onnx").rename(onnx_folder / f"{name}_fp16.onnx")
    with pytest.raises(ExportError, match="choose another with --variant fp16"):
        import_model(source, out=tmp_path / "b")
    with pytest.raises(ExportError, match="expected a variant among"):
        import_model(source, out=tmp_path / "b", variant="q4")
    import_model(source, out=tmp_path / "b", variant="fp16")


def test_lower_precisions_need_the_right_graph(tmp_path):
    source = tiny.immich(tmp_path / "immich", fixed_reshape=True, einsum=True)
    with pytest.raises(ExportError, match="one image at a time, so that int8 cannot be made"):
        import_model(source, out=tmp_path / "b", precisions=("int8",))
    with pytest.raises(InvalidInputError, match="expected precisions among"):
        import_model(source, out=tmp_path / "b", precisions=("fp8",))


def run(*words: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    if isinstance(result.exception, CrlError):
        return 1, result.stdout, str(result.exception)
    return result.exit_code, result.stdout, result.stderr


def test_command_with_a_check(tmp_path):
    from PIL import Image

    source = tiny.transformers_js(tmp_path / "xenova")
    Image.fromarray(PIXELS[0]).save(tmp_path / "a.png")
    code, printed, _ = run(
        "import", source, "--out", tmp_path / "b", "--check", tmp_path / "a.png", "red", "water",
        "--license", "MIT", "--json",
    )  # fmt: skip
    assert code == 0
    document = json.loads(printed)
    assert set(document["check"]) == {"red", "water"}
    assert document["origin"]["layout"] == "transformers.js"
    with Embedder.open(tmp_path / "b", threads=1) as embedder:
        expected = embedder.embed([PIXELS[0]]).universal @ embedder.embed_text(["red", "water"]).T
    assert list(document["check"].values()) == pytest.approx(expected[0].tolist(), abs=1e-6)
    code, printed, _ = run("info", tmp_path / "b")
    assert code == 0 and "not against torch" in " ".join(printed.replace("│", " ").split())


def test_command_warns_if_the_texts_hardly_differ(tmp_path):
    from PIL import Image

    source = tiny.transformers_js(tmp_path / "xenova")
    Image.fromarray(PIXELS[0]).save(tmp_path / "a.png")
    code, _, said = run(
        "import", source, "-o", tmp_path / "b", "--check", tmp_path / "a.png", "red", "Red",
    )  # fmt: skip
    assert code == 0 and "the tokenizer or the preprocessing is not that of the model" in said


def test_command_says_what_a_bundle_without_texts_cannot_do(tmp_path):
    source = tiny.transformers_js(tmp_path / "xenova")
    code, printed, said = run("import", source, "-o", tmp_path / "b", "--no-text")
    assert code == 0 and "`crl basis create`" in said and "image-only bundle" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--check", "a.png"], "belong together"),
        (["red"], "belong together"),
        (["--check", "none.png", "red"], "no such picture"),
        (["--check", __file__, "red", " "], "no visible characters"),
        (["--no-text", "--tokenizer", "x"], "--no-text leaves the text tower out"),
        (["--size", "a"], "--size: expected 1 or 2 numbers"),
        (["--size", "inf"], "--size: expected whole pixels"),
        (["--size", "0"], "--size: expected whole pixels"),
        (["--resize", "20.5"], "--resize: expected whole pixels, such as 224, got '20.5'"),
        (["--resize", "20,20,20"], "--resize: expected 1 or 2 numbers"),
        (["--resize", "15"], "15×15 cannot be cropped to the model's 16×16 pixels"),
        (["--resize", "20", "--resize-mode", "longest"], "`longest` pads to 16×16"),
        (["--mean", "1,2"], "--mean: expected 3 numbers"),
        (["--std", "1,2,0"], "--std: expected positive numbers"),
        (["--precision", "fp8"], "--precision: expected"),
    ],
)
def test_command_with_wrong_options(tmp_path, words, message):
    source = tiny.transformers_js(tmp_path / "xenova")
    code, _, said = run("import", source, "--out", tmp_path / "b", *words)
    assert code == 1 and message in said
    assert not (tmp_path / "b").exists()


def test_the_image_tower_named_as_text_tower_is_refused(tmp_path):
    source = tiny.transformers_js(tmp_path / "xenova")
    image = source / "onnx" / "vision_model.onnx"
    with pytest.raises(ExportError, match="has no text tower; check --text-model"):
        import_model(source, out=tmp_path / "b", text_source=image)
    assert not (tmp_path / "b").exists()


def test_command_does_not_replace_a_bundle(tmp_path):
    source = tiny.transformers_js(tmp_path / "xenova")
    assert run("import", source, "-o", tmp_path / "b", "--no-text")[0] == 0
    before = (tmp_path / "b" / "manifest.json").read_bytes()
    code, _, said = run("import", source, "-o", tmp_path / "b")
    assert code == 1 and "exists already" in said
    assert (tmp_path / "b" / "manifest.json").read_bytes() == before
    assert run("import", source, "-o", tmp_path / "b", "--overwrite")[0] == 0


def test_an_import_needs_no_torch(tmp_path):
    """In a process where torch, open_clip and transformers cannot be imported."""
    source = tiny.transformers_js(tmp_path / "xenova")
    script = (
        "import sys\n"
        "for name in ('torch', 'torchvision', 'open_clip', 'transformers', 'onnxscript'):\n"
        "    sys.modules[name] = None\n"
        "from crl_sdk.__main__ import main\n"
        "sys.argv = ['crl', *sys.argv[1:]]\n"
        "main()\n"
    )
    words = ["import", str(source), "--out", str(tmp_path / "b"), "--precision", "fp32,fp16,int8"]
    done = subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert ModelBundle.open(tmp_path / "b").precisions == ("fp32", "fp16", "int8")
