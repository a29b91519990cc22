"""Edits of ONNX graphs in memory: what a tower needs, names, the order of nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from graphlib import TopologicalSorter
from typing import Any

import onnx

from crl_export.imported.reading import all_graphs


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
    _keep(graph.node, lambda node: bool(needed.intersection(node.output)))
    _keep(graph.initializer, lambda tensor: tensor.name in needed)
    constants = {tensor.name for tensor in graph.initializer}
    _keep(graph.input, lambda value: value.name in needed and value.name not in constants)
    _keep(graph.output, lambda value: value.name == output)
    del graph.value_info[:]  # they may have a fixed batch


def _keep(items: Any, wanted: Callable[[Any], bool]) -> None:
    """Remove the items of a field that are not wanted. Removal by value would compare weights."""
    for at in reversed(range(len(items))):
        if not wanted(items[at]):
            del items[at]


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
