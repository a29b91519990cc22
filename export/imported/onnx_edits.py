"""Edits of ONNX models in memory: what a tower needs, names, saving with large weights."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort

from crl_export.imported.reading import all_graphs
from crl_sdk.engines._onnx_sessions import open_session
from crl_sdk.model._manifest import Precision

INLINE_BYTES = 1 << 30
"""Larger models are written with their weights beside the graph: a file holds 2 GiB at most."""


def keep_only(graph: onnx.GraphProto, output: str) -> None:
    """Remove from a graph what one of its outputs does not need, its other outputs included."""
    made_by = {name: node for node in graph.node for name in node.output if name}
    needed: set[str] = set()
    waiting = [output]
    while waiting:
        name = waiting.pop()
        if name in needed:
            continue
        needed.add(name)
        if name in made_by:
            waiting += reads_of(made_by[name])
    for node in [each for each in graph.node if not needed.intersection(each.output)]:
        graph.node.remove(node)
    for tensor in [each for each in graph.initializer if each.name not in needed]:
        graph.initializer.remove(tensor)
    for value in [each for each in graph.input if each.name not in needed]:
        graph.input.remove(value)
    for value in [each for each in graph.output if each.name != output]:
        graph.output.remove(value)
    constants = {tensor.name for tensor in graph.initializer}
    for value in [each for each in graph.input if each.name in constants]:
        graph.input.remove(value)
    del graph.value_info[:]  # they may have a fixed batch


def reads_of(node: onnx.NodeProto) -> list[str]:
    """Return the names that a node reads, those in its inner graphs included."""
    names = [name for name in node.input if name]
    for attribute in node.attribute:
        inner = [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]
        for graph in inner:
            names += [name for each in graph.node for name in reads_of(each)]
            names += [value.name for value in graph.output]
    return names


def rename_values(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Rename values of a graph wherever they occur."""
    for each in all_graphs(graph):
        items: list[Any] = [*each.input, *each.output, *each.initializer, *each.value_info]
        for item in items:
            item.name = names.get(item.name, item.name)
        for node in each.node:
            for listed in (node.input, node.output):
                for at, name in enumerate(listed):
                    listed[at] = names.get(name, name)


def name_nodes(graph: onnx.GraphProto) -> None:
    """Set a unique name for every node of a graph."""
    used: set[str] = set()
    for at, node in enumerate(graph.node):
        if not node.name or node.name in used:
            node.name = f"{node.op_type}_node_{at}"
        used.add(node.name)


def sort_nodes(graph: onnx.GraphProto) -> None:
    """Put the nodes of a graph into an order in which each comes after those that it reads."""
    made_by = {name: at for at, node in enumerate(graph.node) for name in node.output if name}
    sorter = TopologicalSorter(
        {
            at: [made_by[name] for name in reads_of(node) if made_by.get(name, at) != at]
            for at, node in enumerate(graph.node)
        }
    )
    nodes = [graph.node[at] for at in sorter.static_order()]
    ordered = onnx.GraphProto()
    ordered.node.extend(nodes)
    del graph.node[:]
    graph.node.extend(ordered.node)


def save(model: onnx.ModelProto, path: Path, size: int) -> None:
    """Write a model, with its weights in `PATH.data` if they are large. The model stays as it is.

    Args:
        model: The model.
        path: Path of the ONNX file to write.
        size: About how many bytes its weights have.
    """
    if size <= INLINE_BYTES:
        onnx.save(model, path)
        return
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data")
    onnx.external_data_helper.load_external_data_for_model(model, str(path.parent))


@contextmanager
def opened(
    model: onnx.ModelProto, size: int, precision: Precision
) -> Iterator[ort.InferenceSession]:
    """Open a model that is not in a file in ONNX Runtime."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        save(model, path, size)
        yield open_session(path, precision=precision)
