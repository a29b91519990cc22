"""The image graph in int8 with dynamic quantisation. It needs no torch."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import QuantType, quantize_dynamic

from crl_export.equalisation import equalise
from crl_export.graph_products import Feeds, find_products, is_large
from crl_export.sensitivity import choose_float_products
from crl_sdk.errors import ExportError
from crl_sdk.model._parity import images
from crl_sdk.model._preprocess import PreprocessSpec

_CALIBRATION_IMAGES, _CALIBRATION_SEED = 8, 1
"""Images that show the ranges of activations."""


def quantise(
    fp32: Path, int8: Path, spec: PreprocessSpec, *, against_outliers: bool = True
) -> None:
    """Write an int8 image graph: weights quantised per channel, activations in every run.

    Matrix products with constant weights become int8. Outliers of their inputs are spread first
    (`crl_export.equalisation`), and products that lose too much stay in float32
    (`crl_export.sensitivity`). So does the projection, whose weight is an input. If patches are
    embedded by a matrix product (`crl_export.vit`), that product takes the bytes of the pixels, so
    that the image is not rounded. Convolutions stay in float32: ONNX Runtime's dynamic ConvInteger
    was slower than its fp32 convolution on the CPUs measured.

    Args:
        fp32: Path of the fp32 graph.
        int8: Path of the graph to write.
        spec: Preprocessing, which gives the mean of the pixels.
        against_outliers: Whether to spread outliers and to leave products in float32. Without it,
            benchmarks show what that changes.

    Raises:
        ExportError: If the graph has no such product, as those of convolutions alone.
    """
    model = onnx.load(fp32)
    if not find_products(model.graph):
        raise ExportError(
            "the image tower has no matrix product that int8 would round, convolutions alone: "
            "leave int8 out of --precision; fp16 is smaller too"
        )
    product = _patch_product(model.graph)
    patches = None if product is None else str(product.name)
    skip = [] if patches is None else [patches]
    if against_outliers:
        feeds = _calibration_feeds(model.graph, spec)
        equalise(model, feeds, skip=skip)
        model = _compact(model)
        skip += choose_float_products(model, feeds, skip=skip)
    with tempfile.TemporaryDirectory(dir=int8.parent) as folder:
        spread = Path(folder) / "spread.onnx"
        onnx.save(model, spread, save_as_external_data=is_large(model), location="spread.data")
        del model, product  # or its weights would be in memory twice
        quantise_products(spread, int8, skip=skip)
    if patches is not None:
        quantised = onnx.load(int8)
        _multiply_bytes(quantised.graph, patches, spec)
        onnx.save(quantised, int8)


def quantise_products(
    model: onnx.ModelProto | Path, path: Path, *, skip: Sequence[str] = ()
) -> None:
    """Write a graph whose matrix products with constant weights are in int8.

    Args:
        model: The graph in float32, which is changed, or its file.
        path: Path of the graph to write.
        skip: Names of nodes of products that stay in float32.
    """
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it recommends a preprocessing that gains nothing here
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            quantize_dynamic(
                model,
                path,
                op_types_to_quantize=["MatMul", "Gemm"],
                per_channel=True,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=list(skip),
            )
    finally:
        root.setLevel(level)


def _compact(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of a model. A message keeps the memory of what was removed from it."""
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    return copied


def _calibration_feeds(graph: onnx.GraphProto, spec: PreprocessSpec) -> Feeds:
    """Return typical inputs of an image graph, which are not those that parity is measured on."""
    weight = next(each for each in graph.input if each.name == "weight")
    dim = weight.type.tensor_type.shape.dim[0].dim_value
    return {
        "image": images(spec, _CALIBRATION_IMAGES, seed=_CALIBRATION_SEED),
        "weight": np.zeros((dim, 1), np.float32),
        "bias": np.zeros(1, np.float32),
    }


def _patch_product(graph: onnx.GraphProto) -> onnx.NodeProto | None:
    """Return the matrix product that embeds patches, if its input is moved but unchanged pixels."""
    constants = {tensor.name for tensor in graph.initializer}
    made_by = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in constants:
            before = made_by.get(node.input[0])
            while before is not None and before.op_type in ("Reshape", "Transpose"):
                before = made_by.get(before.input[0])
            if before is not None and before.op_type == "Cast" and before.input[0] == "image":
                return node
    return None


def _multiply_bytes(graph: onnx.GraphProto, name: str, spec: PreprocessSpec) -> None:
    """Make the product that embeds patches work on bytes, with the cast after it.

    Let W be the weights, Q the rounded ones and m the mean of the pixels. The constant m·(Q − W) is
    subtracted from the result. Without that it would be the largest part of the error, since the
    mean of bytes is far from zero.
    """
    at, product = next((i, node) for i, node in enumerate(graph.node) if node.name == name)
    weight = next(t for t in graph.initializer if t.name == product.input[1])
    values = onnx.numpy_helper.to_array(weight)
    scale = np.maximum(np.abs(values).max(axis=0), np.finfo(np.float32).tiny) / 127
    rounded = np.rint(values / scale).astype(np.int8)
    mean = np.resize(
        np.array(spec.mean) * 255, len(values)
    )  # channels are the last axis of a patch
    error = mean @ (rounded * scale - values)
    graph.initializer.remove(weight)
    for array, suffix in (
        (rounded, "int8"),
        (scale.astype(np.float32), "scale"),
        (-error.astype(np.float32), "correction"),
    ):
        graph.initializer.append(onnx.numpy_helper.from_array(array, f"{weight.name}_{suffix}"))
    whole, floats, scaled = f"{name}_int32", f"{name}_float", f"{name}_scaled"
    make = onnx.helper.make_node
    nodes = [
        make("MatMulInteger", [product.input[0], f"{weight.name}_int8"], [whole], f"{name}_bytes"),
        make("Cast", [whole], [floats], f"{name}_cast", to=onnx.TensorProto.FLOAT),
        make("Mul", [floats, f"{weight.name}_scale"], [scaled], f"{name}_scale"),
        make("Add", [scaled, f"{weight.name}_correction"], list(product.output), f"{name}_correct"),
    ]
    graph.node.remove(product)
    for offset, node in enumerate(nodes):
        graph.node.insert(at + offset, node)
    cast = next(node for node in graph.node if node.op_type == "Cast" and "image" in node.input)
    for node in graph.node:
        for i, source in enumerate(node.input):
            if source == cast.output[0]:
                node.input[i] = "image"
    graph.node.remove(cast)
    del graph.value_info[:]  # they describe values that are bytes now
