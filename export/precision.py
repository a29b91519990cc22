"""The image tower in lower precision: fp16 weights and arithmetic, or dynamic int8."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
from pathlib import Path

import onnx
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic

from crl_export.graphs import ImageGraph
from crl_sdk.preprocess import PreprocessSpec


def half_graph(model: torch.nn.Module, spec: PreprocessSpec) -> ImageGraph:
    """Give the image graph with its tower in half precision.

    Normalising the embedding and projecting it stay in float32, and so do input and output.
    """
    return ImageGraph(copy.deepcopy(model).half(), spec, torch.float16)


def quantise(fp32: Path, int8: Path) -> None:
    """Write an int8 image graph: weights per channel, activations per run.

    Matrix products with constant weights become int8; the projection, whose weight is an input,
    stays in fp32. Convolutions stay in fp32 too: ONNX Runtime's dynamic ConvInteger is slower
    than its fp32 convolution on the CPUs measured.

    Args:
        fp32: the graph to start from.
        int8: the file to write.
    """
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it advises a preprocessing that gains nothing here
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            quantize_dynamic(
                onnx.load(fp32),
                int8,
                op_types_to_quantize=["MatMul", "Gemm"],
                per_channel=True,
                weight_type=QuantType.QInt8,
            )
    finally:
        root.setLevel(level)
