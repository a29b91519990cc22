"""Exports torch towers to ONNX graphs. The image graph contains preprocessing and projection."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from crl_export.encoders import ImageEncoder, TextEncoder
from crl_export.vit import lean_tower
from crl_sdk.errors import ExportError
from crl_sdk.model._preprocess import PreprocessSpec

OPSET = 20
_TRACED_BATCH = 2  # torch treats a batch of one as a constant


class ImageGraph(torch.nn.Module):
    """Image graph: from uint8 pixels to unit embeddings and their projection.

    The tower runs in its own dtype, normalisation and projection in float32. A plain vision
    transformer is rewritten (`crl_export.vit`). In float32 its first weights then include mean and
    standard deviation, so that it takes raw pixels.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(
        self, model: ImageEncoder, spec: PreprocessSpec, dtype: torch.dtype = torch.float32
    ) -> None:
        """Wrap an image tower in float32.

        Args:
            model: Model in eval mode, which is not changed.
            spec: Preprocessing of the model.
            dtype: Dtype of the tower.
        """
        super().__init__()
        mean = torch.tensor(spec.mean) * 255
        scale = 1 / (torch.tensor(spec.std) * 255)
        lean = lean_tower(model)
        self.folded = lean is not None and dtype == torch.float32
        if lean is not None and self.folded:
            lean.fold(mean, scale)
        tower = lean or _ChannelsFirst(model)
        self.tower = tower if dtype == torch.float32 else copy.deepcopy(tower).to(dtype)
        self.dtype = dtype
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)

    def forward(
        self, image: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embed images and project the embeddings.

        Args:
            image: Pixels, shape (b, H, W, 3), uint8.
            weight: Weights of the projection, shape (d, k), float32.
            bias: Bias of the projection, shape (k,), float32.

        Returns:
            Unit embeddings, shape (b, d), float32; and projected columns, shape (b, k), float32.
        """
        pixels = image.to(torch.float32)  # before any transpose: TensorRT has none for uint8
        if not self.folded:
            pixels = ((pixels - self.mean) * self.scale).to(self.dtype)
        embedding = F.normalize(self.tower(pixels).to(torch.float32), dim=-1)
        return embedding, embedding @ weight + bias


class _ChannelsFirst(torch.nn.Module):
    """The unchanged image tower of a model, for pixels of shape (b, H, W, 3)."""

    def __init__(self, model: ImageEncoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model.encode_image(pixels.permute(0, 3, 1, 2))


class TextGraph(torch.nn.Module):
    """Text graph: from token ids, shape (b, L) int64, to unit embeddings, shape (b, d) float32."""

    def __init__(self, model: TextEncoder) -> None:
        """Wrap a text tower."""
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embed texts."""
        return F.normalize(self.model.encode_text(tokens).to(torch.float32), dim=-1)


def export_image_graph(graph: ImageGraph, spec: PreprocessSpec, dim: int, path: Path) -> None:
    """Write an image graph with dynamic batch size and number of columns.

    Args:
        graph: Graph to export.
        spec: Preprocessing, which determines the size of the input.
        dim: Dimension of the embeddings.
        path: Path of the ONNX file to write.

    Raises:
        ExportError: If torch cannot express the model in ONNX.
    """
    inputs = (
        torch.randint(0, 256, (_TRACED_BATCH, spec.height, spec.width, 3), dtype=torch.uint8),
        torch.randn(dim, 3),
        torch.randn(3),
    )
    batch, columns = torch.export.Dim("B", min=1, max=65536), torch.export.Dim("K", max=1 << 20)
    shapes = {"image": {0: batch}, "weight": {1: columns}, "bias": {0: columns}}
    _export(graph, inputs, shapes, ["embedding", "projected"], path)


def export_text_graph(graph: TextGraph, tokens: torch.Tensor, path: Path) -> None:
    """Write a text graph with dynamic batch size and fixed context length.

    Args:
        graph: Graph to export.
        tokens: Token ids of at least two typical texts, shape (n, L), int64.
        path: Path of the ONNX file to write.

    Raises:
        ExportError: If torch cannot express the model in ONNX.
    """
    shapes = {"tokens": {0: torch.export.Dim("B", min=1, max=65536)}}
    _export(graph, (tokens[:_TRACED_BATCH],), shapes, ["embedding"], path)


def _export(
    graph: torch.nn.Module,
    inputs: tuple[torch.Tensor, ...],
    shapes: dict[str, Any],
    outputs: list[str],
    path: Path,
) -> None:
    with _exporting():
        try:
            program = torch.onnx.export(
                graph.eval(),
                inputs,
                input_names=list(shapes),
                output_names=outputs,
                dynamic_shapes=shapes,
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
        except Exception as error:  # the exporter raises many types
            reason = next((s for s in str(error).splitlines() if s.strip()), "no reason given")
            raise ExportError(
                f"torch cannot turn this tower into ONNX ({type(error).__name__}: {reason[:300]}); "
                "see the exception behind this one"
            ) from error
        if program is None:
            raise ExportError("torch.onnx.export returned no program")
        _free_names(program.model.graph, {*shapes, *outputs})
        _forget_origin(program.model)
        program.save(path)


def _free_names(graph: Any, names: set[str]) -> None:
    """Rename inner values and constants that have the name of an input or output.

    torch does not check this.
    """
    outer = {id(value) for value in (*graph.inputs, *graph.outputs)}
    constants = list(graph.initializers.values())
    inner = [*constants, *(value for node in graph for value in node.outputs)]
    clashes = [value for value in inner if value.name in names and id(value) not in outer]
    for number, value in enumerate(clashes):
        value.name = f"inner_{value.name}_{number}"


def _forget_origin(model: Any) -> None:
    """Remove torch's metadata: stack traces with file names of the exporting machine."""
    model.metadata_props.clear()
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        graph.metadata_props.clear()
        for node in graph.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
                value.doc_string = None


@contextmanager
def _exporting() -> Iterator[None]:
    """Context manager that prepares torch for an export and silences its messages."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    chatty = logging.getLogger("onnxscript")
    level = chatty.level
    chatty.setLevel(logging.ERROR)
    try:
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        chatty.setLevel(level)
        torch.backends.mha.set_fastpath_enabled(fastpath)
