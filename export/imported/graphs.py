"""Puts our preprocessing, normalisation and projection around a foreign tower.

The result has the inputs and outputs of exported graphs (docs/ARCHITECTURE.md, "The graph"), so
that every engine runs it. A tower that cannot take a batch runs its inputs one by one in a Scan.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import onnx
from onnx import TensorProto
from onnx.helper import make_node, make_tensor_value_info

from crl_export.imported.onnx_edits import rename_values
from crl_export.imported.towers import ImageTower, TextTower, Tower
from crl_sdk.model._preprocess import PreprocessSpec

Batching: TypeAlias = Literal["dynamic", "one by one"]
"""How a graph runs a batch: as such, or its inputs one after the other."""

_SMALLEST_NORM = 1e-12
_OURS = ("image", "tokens", "weight", "bias", "embedding", "projected")


def image_graph(
    tower: ImageTower, spec: PreprocessSpec, dim: int, batching: Batching
) -> onnx.ModelProto:
    """Return the image graph: uint8 pixels to unit embeddings and their projection.

    Args:
        tower: The tower. It is not changed.
        spec: Preprocessing, of which mean and standard deviation become part of the graph.
        dim: Dimension d of the embeddings.
        batching: How the tower runs a batch.
    """
    work = _Work(tower)
    graph = work.graph
    value = "image"
    if tower.element != TensorProto.UINT8:
        mean = np.array(spec.mean, np.float32) * 255
        scale = 1 / (np.array(spec.std, np.float32) * 255)
        value = work.add("Cast", [value], to=TensorProto.FLOAT)
        value = work.add("Sub", [value, work.constant(mean)])
        value = work.add("Mul", [value, work.constant(scale)])
    if tower.channels == "first":
        value = work.add("Transpose", [value], perm=[0, 3, 1, 2])
    if tower.element == TensorProto.FLOAT16:
        value = work.add("Cast", [value], to=TensorProto.FLOAT16)
    rows = work.run_tower({tower.input: value}, batching)
    work.normalise(rows, dim)
    work.add_named("MatMul", ["embedding", "weight"], "crl_product")
    work.add_named("Add", ["crl_product", "bias"], "projected")
    image = make_tensor_value_info("image", TensorProto.UINT8, ["B", spec.height, spec.width, 3])
    weight = make_tensor_value_info("weight", TensorProto.FLOAT, [dim, "K"])
    bias = make_tensor_value_info("bias", TensorProto.FLOAT, ["K"])
    graph.input.extend([image, weight, bias])
    graph.output.append(make_tensor_value_info("embedding", TensorProto.FLOAT, ["B", dim]))
    graph.output.append(make_tensor_value_info("projected", TensorProto.FLOAT, ["B", "K"]))
    return work.model


def text_graph(
    tower: TextTower,
    dim: int,
    *,
    context_length: int,
    pad_id: int,
    pad_ends_texts: bool,
    batching: Batching,
) -> onnx.ModelProto:
    """Return the text graph: token ids, shape (B, L) int64, to unit embeddings, shape (B, d).

    Args:
        tower: The tower. It is not changed.
        dim: Dimension d of the embeddings.
        context_length: Number L of tokens per text.
        pad_id: Token id that fills the rest of a row.
        pad_ends_texts: Whether the token that fills rows is also the last one of each text, as in
            CLIP's tokenizer of transformers. The first of them then is part of the text.
        batching: How the tower runs a batch.
    """
    work = _Work(tower)
    values = {tower.ids: _cast(work, "tokens", TensorProto.INT64, tower.element(tower.ids))}
    if tower.mask is not None:
        mask = _mask(work, pad_id, pad_ends_texts)
        values[tower.mask] = _cast(work, mask, TensorProto.INT64, tower.element(tower.mask))
    if tower.types is not None:
        zeros = work.add("Sub", ["tokens", "tokens"])
        values[tower.types] = _cast(work, zeros, TensorProto.INT64, tower.element(tower.types))
    work.normalise(work.run_tower(values, batching), dim)
    tokens = make_tensor_value_info("tokens", TensorProto.INT64, ["B", context_length])
    work.graph.input.append(tokens)
    work.graph.output.append(make_tensor_value_info("embedding", TensorProto.FLOAT, ["B", dim]))
    return work.model


def with_dynamic_batch(model: onnx.ModelProto) -> None:
    """Declare the first dimension of all inputs and outputs as the batch, and change no node."""
    for value in (*model.graph.input, *model.graph.output):
        dims = value.type.tensor_type.shape.dim
        if dims:
            dims[0].dim_param = "B"  # replaces a fixed value


def _cast(work: _Work, value: str, is_type: int, wanted: int) -> str:
    return value if is_type == wanted else work.add("Cast", [value], to=wanted)


def _mask(work: _Work, pad_id: int, pad_ends_texts: bool) -> str:
    """Add the attention mask, int64: 1 up to the last token that does not fill the row."""
    same = work.add("Equal", ["tokens", work.constant(np.array(pad_id, np.int64))])
    other = work.add("Cast", [work.add("Not", [same])], to=TensorProto.INT64)
    after = work.add("CumSum", [other, work.constant(np.array(1, np.int64))], reverse=1)
    real = work.add("Cast", [after], to=TensorProto.BOOL)
    mask = work.add("Cast", [real], to=TensorProto.INT64)
    if not pad_ends_texts:
        return mask
    # shifted by one: the token after the last other one ends the text
    ends = [work.constant(np.array([each], np.int64)) for each in (0, -1, 1)]
    shifted = work.add("Slice", [mask, ends[0], ends[1], ends[2]])
    first = work.add("Slice", [mask, ends[0], ends[2], ends[2]])
    return work.add("Concat", [first, shifted], axis=1)


class _Work:
    """A copy of a tower to which nodes are added."""

    def __init__(self, tower: Tower) -> None:
        self.model = onnx.ModelProto()
        self.model.CopyFrom(tower.model)
        self.model.ir_version = max(self.model.ir_version, 8)
        self.graph = self.model.graph
        self._count = 0
        self._names = {name: f"tower_{name}" for name in _OURS}
        rename_values(self.graph, self._names)
        self._output = self._renamed(tower.output)
        self._output_type = self.graph.output[0].type.tensor_type.elem_type
        self._body = onnx.GraphProto()
        self._body.node.extend(self.graph.node)
        del self.graph.node[:]
        self._types = {}
        for value in self.graph.input:
            tensor = value.type.tensor_type
            self._types[value.name] = (
                tensor.elem_type, [dim.dim_value for dim in tensor.shape.dim],
            )  # fmt: skip
        del self.graph.input[:]
        del self.graph.output[:]

    def _renamed(self, name: str) -> str:
        return self._names.get(name, name)

    def add(self, operator: str, inputs: Sequence[str], **options: Any) -> str:
        """Add a node and return the name of its output."""
        self._count += 1
        return self.add_named(operator, inputs, f"crl_{operator}_{self._count}", **options)

    def add_named(self, operator: str, inputs: Sequence[str], output: str, **options: Any) -> str:
        """Add a node with a name for its output."""
        self.graph.node.append(
            make_node(operator, list(inputs), [output], f"{output}_node", **options)
        )
        return output

    def constant(self, values: np.ndarray) -> str:
        """Add a constant and return its name."""
        self._count += 1
        name = f"crl_constant_{self._count}"
        self.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
        return name

    def run_tower(self, values: dict[str, str], batching: Batching) -> str:
        """Add the tower; return the name of its output.

        Args:
            values: For each input of the tower, the value that it takes.
            batching: How the tower runs a batch.
        """
        feeds = {self._renamed(name): value for name, value in values.items()}
        if batching == "dynamic":
            for name, value in feeds.items():
                self.add_named("Identity", [value], name)
            self.graph.node.extend(self._body.node)
            return self._output
        axis = self.constant(np.array([0], np.int64))
        body = onnx.GraphProto()
        body.name = "one"
        for name in feeds:
            element, shape = self._types[name]
            row = make_tensor_value_info(
                f"{name}_row", element, [size or None for size in shape[1:]]
            )
            body.input.append(row)
            body.node.append(make_node("Unsqueeze", [row.name, axis], [name], f"{name}_unsqueeze"))
        body.node.extend(self._body.node)
        body.node.append(make_node("Squeeze", [self._output, axis], ["tower_row"], "row_squeeze"))
        body.output.append(make_tensor_value_info("tower_row", self._output_type, [None]))
        return self.add("Scan", list(feeds.values()), body=body, num_scan_inputs=len(feeds))

    def normalise(self, rows: str, dim: int) -> None:
        """Add the division of rows by their norms, in float32, with the output `embedding`."""
        if self._output_type != TensorProto.FLOAT:
            rows = self.add("Cast", [rows], to=TensorProto.FLOAT)
        squares = self.add("Mul", [rows, rows])
        axis = self.constant(np.array([-1], np.int64))
        norms = self.add("Sqrt", [self.add("ReduceSum", [squares, axis], keepdims=1)])
        smallest = self.constant(np.array(_SMALLEST_NORM, np.float32))
        self.add_named("Div", [rows, self.add("Max", [norms, smallest])], "embedding")
