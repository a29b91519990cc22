"""Exports of any size in the layout of transformers.js, from random weights, without torch.

`python tests/large_exports.py DIR` writes an image tower and a text tower of more than 2 GB each,
with the time and memory of whose import docs/MODELS.md is measured. Tests write small ones.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info

import tiny_exports as tiny


class _Writer:
    """Collects the nodes of a transformer and writes its weights into one file beside it."""

    def __init__(self, path: Path, data: str) -> None:
        self.path, self.location = path, data
        self.file = (path.parent / data).open("wb")
        self.rng = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []

    def weight(self, name: str, *shape: int, spread: float | None = None) -> str:
        """Write weights; a row at a time, so that memory stays small."""
        tensor = onnx.TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape)
        tensor.data_location = TensorProto.EXTERNAL
        offset = self.file.tell()
        spread = shape[0] ** -0.5 if spread is None else spread
        for _ in range(shape[0]):
            row = self.rng.standard_normal(shape[1:], np.float32) * np.float32(spread)
            self.file.write(row.tobytes())
        for key, value in (
            ("location", self.location), ("offset", offset), ("length", self.file.tell() - offset),
        ):  # fmt: skip
            tensor.external_data.add(key=key, value=str(value))
        self.tensors.append(tensor)
        return name

    def constant(self, name: str, values: np.ndarray) -> str:
        self.tensors.append(onnx.numpy_helper.from_array(values, name))
        return name

    def add(self, operator: str, inputs: list[str], output: str, **options) -> str:
        self.nodes.append(make_node(operator, inputs, [output], f"{output}_node", **options))
        return output

    def normalise(self, value: str, width: int, output: str) -> str:
        gains = self.constant(f"{output}_gains", np.ones(width, np.float32))
        biases = self.constant(f"{output}_biases", np.zeros(width, np.float32))
        return self.add("LayerNormalization", [value, gains, biases], output, axis=-1)

    def layer(self, value: str, at: int, width: int, heads: int) -> str:
        """Add one layer of a transformer: attention and two products."""
        name = f"layer_{at}"
        normal = self.normalise(value, width, f"{name}_first")
        split = self.constant(f"{name}_split", np.array([0, 0, heads, width // heads]))
        parts = {}
        for part in ("q", "k", "v"):
            product = self.add(
                "MatMul", [normal, self.weight(f"{name}_{part}", width, width)], f"{name}_{part}_x"
            )
            rows = self.add("Reshape", [product, split], f"{name}_{part}_heads")
            order = [0, 2, 3, 1] if part == "k" else [0, 2, 1, 3]
            parts[part] = self.add("Transpose", [rows], f"{name}_{part}_t", perm=order)
        scores = self.add("MatMul", [parts["q"], parts["k"]], f"{name}_scores")
        scale = self.constant(f"{name}_scale", np.array((width // heads) ** -0.5, np.float32))
        scores = self.add("Mul", [scores, scale], f"{name}_scaled")
        shares = self.add("Softmax", [scores], f"{name}_shares", axis=-1)
        mixed = self.add("MatMul", [shares, parts["v"]], f"{name}_mixed")
        mixed = self.add("Transpose", [mixed], f"{name}_mixed_t", perm=[0, 2, 1, 3])
        joined = self.constant(f"{name}_join", np.array([0, 0, width]))
        mixed = self.add("Reshape", [mixed, joined], f"{name}_joined")
        out = self.add("MatMul", [mixed, self.weight(f"{name}_o", width, width)], f"{name}_out")
        value = self.add("Add", [value, out], f"{name}_middle")
        normal = self.normalise(value, width, f"{name}_second")
        wide = self.add(
            "MatMul", [normal, self.weight(f"{name}_up", width, 4 * width)], f"{name}_wide"
        )
        bent = self.add("Sigmoid", [wide], f"{name}_sigmoid")
        bent = self.add("Mul", [wide, bent], f"{name}_bent")
        down = self.weight(f"{name}_down", 4 * width, width)
        narrow = self.add("MatMul", [bent, down], f"{name}_narrow")
        return self.add("Add", [value, narrow], f"{name}_end")

    def save(self, input: onnx.ValueInfoProto, output: str, dim: int) -> None:
        self.file.close()
        result = make_tensor_value_info(output, TensorProto.FLOAT, ["batch", dim])
        graph = make_graph(self.nodes, "tower", [input], [result], self.tensors)
        model = make_model(graph, opset_imports=[make_opsetid("", 17)], ir_version=8)
        self.path.write_bytes(model.SerializeToString())


def image_tower(path: Path, *, width: int, layers: int, size: int, patch: int, dim: int) -> None:
    """Write a vision transformer that pools the mean of its tokens."""
    made = _Writer(path, f"{path.name}_data")
    kernel = made.weight("kernel", width, 3, patch, patch, spread=0.02)
    value = made.add(
        "Conv", ["pixel_values", kernel], "patches", kernel_shape=[patch] * 2, strides=[patch] * 2
    )
    value = made.add(
        "Reshape", [value, made.constant("flat", np.array([0, width, -1]))], "flat_patches"
    )
    value = made.add("Transpose", [value], "tokens", perm=[0, 2, 1])
    places = made.weight("places", (size // patch) ** 2, width, spread=0.02)
    value = made.add("Add", [value, places], "placed")
    for at in range(layers):
        value = made.layer(value, at, width, heads=width // 64)
    value = made.normalise(value, width, "last")
    value = made.add("ReduceMean", [value], "pooled", axes=[1], keepdims=0)
    made.add("MatMul", [value, made.weight("projection", width, dim)], "image_embeds")
    pixels = make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 3, size, size])
    made.save(pixels, "image_embeds", dim)


def text_tower(path: Path, *, width: int, layers: int, words: int, length: int, dim: int) -> None:
    """Write a text transformer that pools the mean of its tokens."""
    made = _Writer(path, f"{path.name}_data")
    table = made.weight("table", words, width, spread=1.0)
    value = made.add("Gather", [table, "input_ids"], "tokens")
    places = made.weight("places", length, width, spread=0.1)
    value = made.add("Add", [value, places], "placed")
    for at in range(layers):
        value = made.layer(value, at, width, heads=width // 64)
    value = made.normalise(value, width, "last")
    value = made.add("ReduceMean", [value], "pooled", axes=[1], keepdims=0)
    made.add("MatMul", [value, made.weight("projection", width, dim)], "text_embeds")
    ids = make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", length])
    made.save(ids, "text_embeds", dim)


def transformers_js(
    folder: Path, *, width: int, layers: int, words: int, text_width: int, text_layers: int
) -> Path:
    """Write the layout of transformers.js with towers of a size."""
    (folder / "onnx").mkdir(parents=True)
    size, patch, dim = 64, 16, 32
    image_tower(
        folder / "onnx" / "vision_model.onnx", width=width, layers=layers, size=size, patch=patch,
        dim=dim,
    )  # fmt: skip
    text_tower(
        folder / "onnx" / "text_model.onnx", width=text_width, layers=text_layers, words=words,
        length=tiny.LENGTH, dim=dim,
    )  # fmt: skip
    config = {"model_type": "clip", "text_config": {"max_position_embeddings": tiny.LENGTH}}
    tiny.write_json(folder / "config.json", config)
    sides = {"height": size, "width": size}
    changes = {"size": {"shortest_edge": size}, "crop_size": sides}
    tiny.write_json(folder / "preprocessor_config.json", tiny.preprocessor(**changes))
    tiny.write_tokenizer(folder)
    return folder


def files(folder: Path) -> Iterator[tuple[str, int]]:
    """Yield the ONNX files and their sizes in bytes."""
    for path in sorted((folder / "onnx").iterdir()):
        yield path.name, path.stat().st_size


if __name__ == "__main__":
    made = transformers_js(
        Path(sys.argv[1]), width=2048, layers=11, words=250_002, text_width=1024, text_layers=24
    )
    for name, size in files(made):
        print(f"{name} {size:,} bytes")
