"""The matrix products of an ONNX graph that int8 computes, and what their inputs look like."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from crl_sdk.engines._onnx_sessions import open_session

Feeds: TypeAlias = "Mapping[str, NDArray[Any]]"
"""Inputs of a graph, by name."""

Floats: TypeAlias = "NDArray[np.float32]"

_AXES_ARE_INPUT = 18
"""Opset from which the axes of ReduceMin and ReduceMax are an input."""

INLINE_BYTES = 1 << 30
"""Larger models are written with their weights beside the graph: a file holds 2 GiB at most."""


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix product with constant weights.

    Attributes:
        node: Its node, a MatMul or Gemm.
        tensor: Its weights in the graph.
        transposed: Whether the graph holds them as (n, k).
    """

    node: onnx.NodeProto
    tensor: onnx.TensorProto
    transposed: bool

    @property
    def weight(self) -> Floats:
        """Its weights, shape (k, n). They are read anew, since all of them may be gigabytes."""
        values: Floats = onnx.numpy_helper.to_array(self.tensor)
        return values.T if self.transposed else values

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (k, n) of its weights."""
        rows, columns = self.tensor.dims
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def source(self) -> str:
        """Name of the input that is multiplied."""
        return str(self.node.input[0])


def find_products(graph: onnx.GraphProto) -> list[Product]:
    """Return the products that int8 computes, in the order of the graph."""
    constants = constants_of(graph)
    found = []
    for node in graph.node:
        if node.op_type not in ("MatMul", "Gemm") or node.input[1] not in constants:
            continue
        options = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
        tensor = constants[node.input[1]]
        if len(tensor.dims) == 2 and not options.get("transA", 0):
            found.append(Product(node, tensor, bool(options.get("transB", 0))))
    return found


def constants_of(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """Return the constants of a graph by name."""
    return {tensor.name: tensor for tensor in graph.initializer}


def replace_constant(
    graph: onnx.GraphProto, node: onnx.NodeProto, at: int, values: NDArray[Any], name: str
) -> None:
    """Replace a constant input of a node, which other nodes may share, by one of its own."""
    tensor = onnx.numpy_helper.from_array(np.ascontiguousarray(values), name)
    graph.initializer.append(tensor)
    node.input[at] = name


def channel_ranges(
    model: onnx.ModelProto, names: Sequence[str], feeds: Feeds
) -> dict[str, tuple[Floats, Floats]]:
    """Return the lowest and the highest value of each channel of some tensors.

    Args:
        model: The graph.
        names: Names of tensors, whose last axis are the channels.
        feeds: Inputs of the graph.
    """
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    axis = onnx.numpy_helper.from_array(np.array([0]), "probed_axis")
    probe.graph.initializer.append(axis)
    opset = max(each.version for each in model.opset_import if each.domain in ("", "ai.onnx"))
    old = opset < _AXES_ARE_INPUT
    wanted = []
    for at, name in enumerate(names):
        rows = f"probed_{at}"
        probe.graph.node.append(onnx.helper.make_node("Flatten", [name], [rows], axis=-1))
        for reduce in ("ReduceMin", "ReduceMax"):
            wanted.append(f"{rows}_{reduce}")
            inputs = [rows] if old else [rows, axis.name]
            node = onnx.helper.make_node(reduce, inputs, wanted[-1:], keepdims=0)
            if old:
                node.attribute.append(onnx.helper.make_attribute("axes", [0]))
            probe.graph.node.append(node)
    values = run_probe(probe, wanted, feeds)
    return {name: (values[2 * i], values[2 * i + 1]) for i, name in enumerate(names)}


def run_probe(model: onnx.ModelProto, names: Sequence[str], feeds: Feeds) -> list[NDArray[Any]]:
    """Run a graph once and return some of its tensors, which become outputs of it."""
    existing = {each.name for each in model.graph.output}
    for name in names:
        if name not in existing:
            model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    with open_probe(model) as session:
        return list(session.run(list(names), dict(feeds)))


def is_large(model: onnx.ModelProto) -> bool:
    """Return whether a model has to be written with its weights beside the graph.

    `ByteSize` fails for those that protobuf cannot write as one message.
    """
    return sum(len(each.raw_data) for each in model.graph.initializer) > INLINE_BYTES


@contextmanager
def open_probe(model: onnx.ModelProto) -> Iterator[ort.InferenceSession]:
    """Open a graph that is not in a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.onnx"
        onnx.save(model, path, save_as_external_data=is_large(model), location="probe.data")
        yield open_session(path)
