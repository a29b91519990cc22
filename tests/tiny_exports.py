"""Small ONNX exports in the layouts of other projects, made without those projects."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from crl_export.background import generic_texts

SIZE, DIM, LENGTH = 16, 8, 64
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
_WIDTH = 24


def image_model(
    *,
    input: str = "pixel_values",
    output: str = "image_embeds",
    batch: int | str = "batch",
    fixed_reshape: bool = False,
    opset: int = 17,
    element: int = TensorProto.FLOAT,
    channels_last: bool = False,
    unit: bool = False,
    einsum: bool = False,
) -> onnx.ModelProto:
    """An image tower: patches, one product with a nonlinearity, a product to the embedding."""
    rng = np.random.default_rng(0)
    inner = SIZE * SIZE // 16 * 4
    arrays = {
        "kernel": rng.standard_normal((4, 3, 4, 4)).astype(np.float32) / 7,
        "first": rng.standard_normal((inner, _WIDTH)).astype(np.float32) / 8,
        "second": rng.standard_normal((_WIDTH, DIM)).astype(np.float32) / 5,
        "shape": np.array([1 if fixed_reshape else -1, inner]),
    }
    nodes, value = [], input
    if channels_last:
        nodes.append(make_node("Transpose", [value], ["moved"], perm=[0, 3, 1, 2]))
        value = "moved"
    if element == TensorProto.UINT8:
        scale = np.array(1 / 255, np.float32)
        arrays["scale"] = scale
        nodes.append(make_node("Cast", [value], ["floats"], to=TensorProto.FLOAT))
        nodes.append(make_node("Mul", ["floats", "scale"], ["scaled"]))
        value = "scaled"
    last = "raw" if unit else output
    nodes += [
        make_node("Conv", [value, "kernel"], ["patches"], kernel_shape=[4, 4], strides=[4, 4]),
        make_node("Reshape", ["patches", "shape"], ["flat"]),
        make_node("Einsum", ["flat", "first"], ["hidden"], equation="bi,ij->bj")
        if einsum
        else make_node("MatMul", ["flat", "first"], ["hidden"]),
        make_node("Tanh", ["hidden"], ["bent"]),
        make_node("MatMul", ["bent", "second"], [last]),
    ]
    if unit:
        nodes.append(make_node("LpNormalization", [last], [output], axis=-1, p=2))
    shape = [batch, SIZE, SIZE, 3] if channels_last else [batch, 3, SIZE, SIZE]
    return _model(
        nodes,
        [make_tensor_value_info(input, element, shape)],
        [make_tensor_value_info(output, TensorProto.FLOAT, [batch, DIM])],
        arrays,
        opset,
    )


def text_model(
    *,
    ids: str = "input_ids",
    output: str = "text_embeds",
    mask: str | None = "attention_mask",
    types: str | None = None,
    element: int = TensorProto.INT64,
    length: int | str = "length",
    batch: int | str = "batch",
    words: int = 600,
) -> onnx.ModelProto:
    """A text tower: the mean of the embeddings of the real tokens, and a product."""
    rng = np.random.default_rng(1)
    arrays = {
        "table": rng.standard_normal((words, _WIDTH)).astype(np.float32),
        "last": rng.standard_normal((_WIDTH, DIM)).astype(np.float32),
        "axis": np.array([1]),
        "minus": np.array([-1]),
    }
    inputs = [make_tensor_value_info(ids, element, [batch, length])]
    nodes = [make_node("Gather", ["table", ids], ["rows"])]
    value = "rows"
    if mask:
        inputs.append(make_tensor_value_info(mask, element, [batch, length]))
        nodes += [
            make_node("Cast", [mask], ["real"], to=TensorProto.FLOAT),
            make_node("Unsqueeze", ["real", "minus"], ["column"]),
            make_node("Mul", ["rows", "column"], ["kept"]),
        ]
        value = "kept"
    if types:  # any type but 0 changes the embedding
        inputs.append(make_tensor_value_info(types, element, [batch, length]))
        nodes += [
            make_node("Cast", [types], ["kinds"], to=TensorProto.FLOAT),
            make_node("Unsqueeze", ["kinds", "minus"], ["kind_column"]),
            make_node("Add", [value, "kind_column"], ["typed"]),
        ]
        value = "typed"
    nodes += [
        make_node("ReduceSum", [value, "axis"], ["sum"], keepdims=0),
        make_node("Tanh", ["sum"], ["bent"]),
        make_node("MatMul", ["bent", "last"], [output]),
    ]
    outputs = [make_tensor_value_info(output, TensorProto.FLOAT, [batch, DIM])]
    return _model(nodes, inputs, outputs, arrays, 17)


def _model(nodes, inputs, outputs, arrays, opset) -> onnx.ModelProto:
    constants = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = make_graph(nodes, "tower", inputs, outputs, constants)
    return make_model(graph, opset_imports=[make_opsetid("", opset)], ir_version=8)


def both_towers() -> onnx.ModelProto:
    """One graph with both towers and logits, as optimum writes it."""
    image, text = image_model(), text_model()
    renamed = onnx.compose.add_prefix(image, "v_", rename_inputs=False, rename_outputs=False)
    merged = make_graph(
        [*renamed.graph.node, *text.graph.node,
         make_node("Transpose", ["text_embeds"], ["turned"], perm=[1, 0]),
         make_node("MatMul", ["image_embeds", "turned"], ["logits_per_image"])],
        "both",
        [*renamed.graph.input, *text.graph.input],
        [make_tensor_value_info("logits_per_image", TensorProto.FLOAT, ["batch", "texts"]),
         *text.graph.output, *renamed.graph.output],
        [*renamed.graph.initializer, *text.graph.initializer],
    )  # fmt: skip
    return make_model(merged, opset_imports=[make_opsetid("", 17)], ir_version=8)


def write_tokenizer(folder: Path, *, limit: float = 1e30, words: int = 590) -> None:
    """`tokenizer.json` with one token per word, and `tokenizer_config.json`."""
    known = {word for text in generic_texts() for word in text.lower().split()}
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    for word in sorted(known)[: words - len(vocabulary)]:
        vocabulary[word] = len(vocabulary)
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    fast.normalizer = normalizers.Lowercase()
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    fast.enable_padding(length=LENGTH)
    fast.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {"pad_token": {"content": "<pad>"}, "model_max_length": limit},
    )


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


def preprocessor(**changes) -> dict:
    """`preprocessor_config.json` as transformers writes it."""
    return {
        "do_resize": True, "do_center_crop": True, "do_rescale": True, "do_normalize": True,
        "size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE},
        "image_mean": list(MEAN), "image_std": list(STD), "resample": 3,
        "rescale_factor": 1 / 255, **changes,
    }  # fmt: skip


def transformers_js(folder: Path, image: onnx.ModelProto | None = None, **changes) -> Path:
    """The layout of transformers.js."""
    (folder / "onnx").mkdir(parents=True)
    onnx.save(image or image_model(), folder / "onnx" / "vision_model.onnx")
    onnx.save(text_model(), folder / "onnx" / "text_model.onnx")
    config = {"model_type": "clip", "text_config": {"max_position_embeddings": LENGTH}}
    write_json(folder / "config.json", config)
    write_json(folder / "preprocessor_config.json", preprocessor(**changes))
    write_tokenizer(folder)
    return folder


def immich(folder: Path, **image) -> Path:
    """The layout of immich: a batch of one, int32 tokens, unit embeddings."""
    (folder / "visual").mkdir(parents=True)
    (folder / "textual").mkdir()
    tower = {"input": "image", "output": "embedding", "batch": 1, "unit": True, **image}
    onnx.save(image_model(**tower), folder / "visual" / "model.onnx")
    words = text_model(
        ids="text", output="embedding", mask=None, element=TensorProto.INT32, length=LENGTH,
        batch=1,
    )  # fmt: skip
    onnx.save(words, folder / "textual" / "model.onnx")
    write_json(folder / "config.json", {"text_cfg": {"context_length": LENGTH}})
    write_json(
        folder / "visual" / "preprocess_cfg.json",
        {"size": SIZE, "mean": MEAN, "std": STD, "interpolation": "bilinear",
         "resize_mode": "squash"},
    )  # fmt: skip
    write_tokenizer(folder / "textual", limit=LENGTH)
    return folder


def clip_as_service(folder: Path) -> Path:
    """The layout of clip-as-service, which has no tokenizer and no preprocessing."""
    folder.mkdir()
    onnx.save(image_model(output="output"), folder / "visual.onnx")
    onnx.save(text_model(output="output", length=LENGTH), folder / "textual.onnx")
    return folder


def optimum(folder: Path) -> Path:
    """The layout of optimum: one graph."""
    folder.mkdir()
    onnx.save(both_towers(), folder / "model.onnx")
    write_json(folder / "config.json", {"text_config": {"max_position_embeddings": LENGTH}})
    write_json(folder / "preprocessor_config.json", preprocessor())
    write_tokenizer(folder)
    return folder
