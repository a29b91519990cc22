"""Outliers of activations, spread before int8 rounds them (SmoothQuant, arXiv 2211.10438).

In trained transformers a few channels are much larger than the others, and one scale for all of
them leaves the others few levels. Each channel of the input of a product is therefore divided by a
factor, and the row of weights behind it is multiplied by it, so that the product stays the same.
Behind a normalisation the factors are folded into its gains and biases, and cost nothing. Elsewhere
they are an explicit multiplication, which is added only where it helps much.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx

from crl_export.graph_products import (
    Feeds,
    Floats,
    Product,
    channel_ranges,
    constants_of,
    find_products,
    replace_constant,
)

BALANCE = 0.5
"""Part of an outlier, on a logarithmic scale, that moves from the activations to the weights."""

WORTH = 4.0
"""An explicit multiplication is added if it divides the variance of the error by this or more."""


def equalise(model: onnx.ModelProto, feeds: Feeds, *, skip: Sequence[str] = ()) -> None:
    """Spread the outliers of the activations of a graph, in place.

    Args:
        model: The graph in float32.
        feeds: Typical inputs of the graph.
        skip: Names of nodes of products to leave as they are.
    """
    graph = model.graph
    by_source: dict[str, list[Product]] = {}
    for product in find_products(graph):
        if product.node.name not in skip:
            by_source.setdefault(product.source, []).append(product)
    ranges = channel_ranges(model, list(by_source), feeds)
    for number, (node, sources) in enumerate(_normalisations(graph, by_source)):
        # All sources are the output of the same normalisation, in another order of tokens.
        products = [each for source in sources for each in by_source.pop(source)]
        factors = _factors(*ranges[sources[0]], products)
        constants = constants_of(graph)
        for at in range(1, len(node.input)):  # its gains, and its biases if it has any
            values = onnx.numpy_helper.to_array(constants[node.input[at]])
            replace_constant(graph, node, at, values / factors, f"equalised_{number}_{at}")
        _scale_rows(graph, products, factors)
    for source, products in by_source.items():
        factors = _factors(*ranges[source], products)
        before = _variance(*ranges[source], products, np.ones_like(factors))
        if before >= WORTH * _variance(*ranges[source], products, factors):
            _divide(graph, source, products, factors)
            _scale_rows(graph, products, factors)
    used = {name for node in graph.node for name in node.input}
    for tensor in [each for each in graph.initializer if each.name not in used]:
        graph.initializer.remove(tensor)


def _factors(low: Floats, high: Floats, products: Sequence[Product]) -> Floats:
    """Return what the channels of an input are divided by, from their ranges and the weights."""
    channels = np.maximum(np.maximum(-low, high), 1e-6)
    rows = np.max([np.abs(each.weight).max(axis=1) for each in products], axis=0)
    factors = channels**BALANCE / np.maximum(rows, 1e-6) ** (1 - BALANCE)
    return np.asarray(factors / np.exp(np.mean(np.log(factors))), np.float32)


def _variance(low: Floats, high: Floats, products: Sequence[Product], factors: Floats) -> float:
    """Return the variance of what rounding the input to 256 levels adds to the products.

    It is given up to a constant: the square of the step, times the squares of the weights behind.
    """
    step = max((high / factors).max(), 0) - min((low / factors).min(), 0)
    rows = np.sum([np.square(each.weight).sum(axis=1) for each in products], axis=0)
    return float(step**2 * (rows * factors**2).sum())


def _normalisations(
    graph: onnx.GraphProto, by_source: Mapping[str, Sequence[Product]]
) -> list[tuple[onnx.NodeProto, list[str]]]:
    """Return the normalisations that nothing but products read, with the products' inputs."""
    constants = constants_of(graph)
    outputs = {each.name for each in graph.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found = []
    for node in graph.node:
        if node.op_type != "LayerNormalization" or not all(
            name in constants for name in node.input[1:]
        ):
            continue
        sources: list[str] = []
        waiting, foldable = [node.output[0]], True
        while waiting and foldable:
            name = waiting.pop()
            products = {each.node.name for each in by_source.get(name, ())}
            others = [each for each in readers.get(name, ()) if each.name not in products]
            foldable = name not in outputs and all(_moves_tokens(each) for each in others)
            waiting += [each.output[0] for each in others]
            if products:
                sources.append(name)
        if foldable and sources:
            found.append((node, sources))
    return found


def _moves_tokens(node: onnx.NodeProto) -> bool:
    """Return whether an operator changes the order of tokens alone, and not that of channels."""
    if node.op_type != "Transpose":
        return False
    (axes,) = (onnx.helper.get_attribute_value(each) for each in node.attribute)
    return bool(axes[-1] == len(axes) - 1)


def _scale_rows(graph: onnx.GraphProto, products: Sequence[Product], factors: Floats) -> None:
    for product in products:
        weight = product.weight * factors[:, None]
        replace_constant(
            graph, product.node, 1, weight.T if product.transposed else weight,
            f"{product.node.name}_equalised",
        )  # fmt: skip


def _divide(
    graph: onnx.GraphProto, source: str, products: Sequence[Product], factors: Floats
) -> None:
    """Divide the input of some products by factors, with a node before the first of them."""
    divided = f"{source}_divided"
    node = onnx.helper.make_node("Mul", [source, ""], [divided], f"{divided}_by_factors")
    replace_constant(graph, node, 1, 1 / factors, f"{divided}_factors")
    names = {each.node.name for each in products}
    first = next(at for at, each in enumerate(graph.node) if each.name in names)
    graph.node.insert(first, node)
    for product in products:
        product.node.input[0] = divided
