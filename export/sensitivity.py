"""Which products of a graph stay in float32, because int8 would cost the embedding too much there.

Each product is measured alone: its input is rounded to 256 levels, as int8 does, and all others are
not. Errors of different products add up nearly independently.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import onnx
from numpy.typing import NDArray

from crl_export.graph_products import Feeds, Product, find_products, open_probe, run_probe

GOAL = 2.5e-4
"""1 − cosine that rounding the activations may cost. Rounding the weights costs about as much."""

BUDGET = 0.05
"""Largest share of the graph that stays in float32. It costs 5 to 10 % of the speed."""

NEGLIGIBLE = 5e-3
"""Share of the graph of a product that stays in float32 in any case: the last one, of the pooled
token alone, which loses most."""

_ROWS = 4
"""Number of inputs that the products are measured with."""

_BATCHED = ("image", "tokens")
"""Inputs of graphs whose first axis is the batch."""

_SWITCHES = "rounded"
"""Input of the probe: 1 for each product whose input is rounded, 0 for the others."""


def choose_float_products(
    model: onnx.ModelProto, feeds: Feeds, *, skip: Sequence[str] = ()
) -> list[str]:
    """Return the products that are to stay in float32.

    These are the ones that take next to no time and, if rounding costs more than `GOAL`, those
    that lose most for their size, up to `BUDGET`.

    Args:
        model: The graph in float32.
        feeds: Typical inputs of the graph.
        skip: Names of nodes of products that int8 does not touch.

    Returns:
        Names of nodes.
    """
    products = [each for each in find_products(model.graph) if each.node.name not in skip]
    shares = _shares(model, products, feeds)
    with _rounding(model, products, feeds) as error_of:
        total = error_of(range(len(products)))
        measured = [at for at in range(len(products)) if total > GOAL or shares[at] < NEGLIGIBLE]
        errors = {at: error_of([at]) for at in measured}
    kept: list[int] = []
    left, spent = total, 0.0
    for at in sorted(measured, key=lambda at: -errors[at] / shares[at]):
        affordable = left > GOAL and spent + shares[at] <= BUDGET
        if shares[at] < NEGLIGIBLE or affordable:
            kept.append(at)
            left, spent = left - errors[at], spent + shares[at]
    return [products[at].node.name for at in kept]


@contextmanager
def _rounding(
    model: onnx.ModelProto, products: Sequence[Product], feeds: Feeds
) -> Iterator[Callable[[Iterable[int]], float]]:
    """Yield a function that returns the mean 1 − cosine if the inputs of some products are rounded.

    The products are given by their positions.
    """
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    probe.graph.input.append(
        onnx.helper.make_tensor_value_info(_SWITCHES, onnx.TensorProto.FLOAT, [len(products)])
    )
    for at, product in enumerate(products):
        _round_if(probe.graph, product.node.name, at)
    few = {name: rows[:_ROWS] if name in _BATCHED else rows for name, rows in feeds.items()}
    with open_probe(probe) as session:

        def embed(rounded: Iterable[int]) -> NDArray[np.float64]:
            switches = np.zeros(len(products), np.float32)
            switches[list(rounded)] = 1
            (rows,) = session.run(["embedding"], {**few, _SWITCHES: switches})
            return np.asarray(rows, np.float64)

        exact = embed([])
        yield lambda rounded: float(np.square(embed(rounded) - exact).sum(axis=1).mean() / 2)


def _shares(
    model: onnx.ModelProto, products: Sequence[Product], feeds: Feeds
) -> NDArray[np.float64]:
    """Return the share of each product in the graph: of its multiplications, or of its weights.

    The larger of the two counts. A run of one image waits for the weights.
    """
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    counts = [f"count_{at}" for at in range(len(products))]
    for count, product in zip(counts, products, strict=True):
        probe.graph.node.append(onnx.helper.make_node("Size", [product.source], [count]))
    values = np.array([int(n) for n in run_probe(probe, counts, feeds)], np.float64)
    multiplications = values * [each.shape[1] for each in products]
    weights = np.array([math.prod(each.shape) for each in products], np.float64)
    return np.maximum(multiplications / multiplications.sum(), weights / weights.sum())


def _round_if(graph: onnx.GraphProto, product: str, switch: int) -> None:
    """Round the input of a product to 256 levels, as int8 does, if a switch is 1."""
    at, node = next((i, node) for i, node in enumerate(graph.node) if node.name == product)
    source, name = node.input[0], f"switch_{switch}"
    node.input[0] = f"{name}_used"
    index = onnx.numpy_helper.from_array(np.array([switch]), f"{name}_index")
    graph.initializer.append(index)
    make = onnx.helper.make_node
    scaled = [f"{name}_levels", f"{name}_scale", f"{name}_zero"]
    nodes = [
        make("DynamicQuantizeLinear", [source], scaled),
        make("DequantizeLinear", scaled, [f"{name}_rounded"]),
        make("Sub", [f"{name}_rounded", source], [f"{name}_error"]),
        make("Gather", [_SWITCHES, index.name], [f"{name}_on"]),
        make("Mul", [f"{name}_error", f"{name}_on"], [f"{name}_added"]),
        make("Add", [source, f"{name}_added"], [f"{name}_used"]),
    ]
    for offset, added in enumerate(nodes):
        graph.node.insert(at + offset, added)
