"""The graphs of a Triton model repository: the tower alone, and a basis with its normalisation.

The image graph of a bundle cannot be batched by Triton, because its inputs `weight` and `bias` have
no batch dimension. Both graphs are compared with what they come from before they are used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from crl_export.graph_products import is_large
from crl_sdk.basis._basis import Basis
from crl_sdk.engines._onnx_sessions import open_session
from crl_sdk.errors import ExportError, ParityError
from crl_sdk.model._bundle import ModelBundle
from crl_sdk.model._manifest import Precision
from crl_sdk.model._parity import BATCHES, images
from crl_sdk.projection._projection import EPSILON, Post

IMAGE, UNIT = "image", "embedding"
"""Input and output of the tower, as in the image graph."""

EMBEDDING, CONDITIONAL, SHA256 = "EMBEDDING", "CONDITIONAL", "BASIS_SHA256"
"""Input and outputs of a basis, as in the KServe models of `crl serve`."""

TOWER_TOLERANCE = 1e-6
"""Largest difference of an element between the cut graph and the image graph."""

BASIS_TOLERANCE = 1e-5
"""Largest difference of an element of unit rows from `Projection.apply`."""

_OPSET, _IR = 20, 10
"""Versions of the graphs of a basis: those of exported bundles, which servers of 2024 read."""


def write_tower(bundle: ModelBundle, precision: Precision, path: Path) -> float:
    """Write the image graph of a bundle without the projection.

    Args:
        bundle: Model bundle.
        precision: Precision of its image graph.
        path: Path of the ONNX file to write.

    Returns:
        Largest difference of an element from the embeddings of the image graph.

    Raises:
        BundleError: If the bundle has no graph in this precision.
        ExportError: If the graph does not look like an image graph of `crl export`.
        ParityError: If the two graphs differ by more than `TOWER_TOLERANCE`.
    """
    whole = bundle.image_graph(precision)
    model = onnx.load(whole)
    _keep(model.graph, UNIT, whole)
    onnx.save(model, path, save_as_external_data=is_large(model), location=f"{path.name}.data")
    fused = open_session(whole, precision=precision)
    cut = open_session(path, precision=precision)
    none: dict[str, NDArray[Any]] = {
        "weight": np.zeros((bundle.embedding_dim, 0), np.float32), "bias": np.zeros(0, np.float32),
    }  # fmt: skip
    pixels = images(bundle.preprocess, BATCHES[1])
    difference = max(
        float(
            np.abs(
                fused.run([UNIT], {IMAGE: batch, **none})[0] - cut.run([UNIT], {IMAGE: batch})[0]
            ).max()
        )
        for batch in (pixels, pixels[:1])
    )
    if not difference <= TOWER_TOLERANCE:
        raise ParityError(
            f"the tower differs from {whole} by {difference:.1e}, expected at most "
            f"{TOWER_TOLERANCE:g}; nothing was written. Try another --precision"
        )
    return difference


def _keep(graph: Any, output: str, where: Path) -> None:
    """Remove everything from a graph that one of its outputs does not need."""
    needed, nodes = {output}, []
    for node in reversed(graph.node):  # nodes are sorted: a user comes after what it uses
        if needed.intersection(node.output):
            needed.update(node.input)
            nodes.append(node)
    outputs = [each for each in graph.output if each.name == output]
    inputs = [each for each in graph.input if each.name in needed]
    if len(outputs) != 1 or [each.name for each in inputs] != [IMAGE]:
        raise ExportError(
            f"{where}: expected a graph whose {UNIT!r} needs {IMAGE!r} alone, it needs "
            f"{', '.join(each.name for each in inputs) or 'nothing'}; export the model again with "
            "crl export"
        )
    weights = [each for each in graph.initializer if each.name in needed]
    kept = {name for node in nodes for name in node.output}
    values = [each for each in graph.value_info if each.name in kept]
    for field, rest in (
        ("node", nodes[::-1]), ("output", outputs), ("input", inputs),
        ("initializer", weights), ("value_info", values),
    ):  # fmt: skip
        graph.ClearField(field)
        getattr(graph, field).extend(rest)


def write_basis(basis: Basis, path: Path) -> float:
    """Write the projection of a basis as a graph, with its weights and row normalisation inside.

    Its third output repeats the SHA-256 of the basis, so that every reply names its version.

    Args:
        basis: The basis.
        path: Path of the ONNX file to write.

    Returns:
        Largest difference of an element from `Projection.apply`, on 64 random unit rows.

    Raises:
        ParityError: If it is more than `BASIS_TOLERANCE` times the largest element, or 1.
    """
    projection = basis.projection
    d, m = projection.input_dim, projection.output_dim
    constants: dict[str, NDArray[Any]] = {
        "weight": np.ascontiguousarray(projection.weight), "bias": projection.bias,
        "sha256": np.array([[basis.sha256()]], dtype=object), "one": np.array([1], np.int64),
    }  # fmt: skip
    nodes = [
        helper.make_node("MatMul", [EMBEDDING, "weight"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["projected"]),
        *_normalisation(projection.post, m, constants),
        helper.make_node("Shape", [EMBEDDING], ["rows"], start=0, end=1),
        helper.make_node("Concat", ["rows", "one"], ["shape"], axis=0),
        helper.make_node("Expand", ["sha256", "shape"], [SHA256]),
    ]
    graph = helper.make_graph(
        nodes,
        "basis",
        [helper.make_tensor_value_info(EMBEDDING, TensorProto.FLOAT, ["B", d])],
        [
            helper.make_tensor_value_info(CONDITIONAL, TensorProto.FLOAT, ["B", m]),
            helper.make_tensor_value_info(SHA256, TensorProto.STRING, ["B", 1]),
        ],
        [numpy_helper.from_array(values, name) for name, values in constants.items()],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR
    )
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    rows = np.random.default_rng(0).standard_normal((64, d)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    expected = projection.apply(rows)
    measured = open_session(path, threads=1).run([CONDITIONAL], {EMBEDDING: rows})[0]
    difference = float(np.abs(measured - expected).max())
    bound = BASIS_TOLERANCE * max(1.0, float(np.abs(expected).max()))
    if not difference <= bound:
        raise ParityError(
            f"the graph of basis {basis.criterion!r} differs from its projection by "
            f"{difference:.1e}, expected at most {bound:.1e}; nothing was written. Make the basis "
            f"again: crl basis create {basis.criterion!r}"
        )
    return difference


def _normalisation(post: Post, m: int, constants: dict[str, NDArray[Any]]) -> list[Any]:
    """Return the nodes from `projected` to the output: `crl_sdk.projection.normalise_rows`."""
    if post == "none":
        return [helper.make_node("Identity", ["projected"], [CONDITIONAL])]
    constants["axis"] = constants["one"]
    constants["epsilon"] = np.array(EPSILON, np.float32)
    divide = [
        helper.make_node("Max", ["scale", "epsilon"], ["divisor"]),
        helper.make_node("Div", ["centred", "divisor"], [CONDITIONAL]),
    ]
    if post == "l2":
        return [
            helper.make_node("Identity", ["projected"], ["centred"]),
            helper.make_node("ReduceL2", ["centred", "axis"], ["scale"]),
            *divide,
        ]
    constants["freedom"] = np.array(max(m - 1, 1), np.float32)
    return [
        helper.make_node("ReduceMean", ["projected", "axis"], ["mean"]),
        helper.make_node("Sub", ["projected", "mean"], ["centred"]),
        helper.make_node("ReduceSumSquare", ["centred", "axis"], ["squares"]),
        helper.make_node("Div", ["squares", "freedom"], ["variance"]),
        helper.make_node("Sqrt", ["variance"], ["scale"]),
        *divide,
    ]
