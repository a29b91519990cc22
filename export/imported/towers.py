"""The towers in foreign ONNX graphs: their inputs, their outputs, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from crl_export.imported.onnx_edits import keep_only, name_nodes
from crl_export.imported.reading import OnnxFile, all_graphs
from crl_sdk.errors import ExportError
from crl_sdk.model._manifest import Precision

_IMAGE_OUTPUTS = (
    "image_embeds", "image_embeddings", "image_features", "l2norm_image_embeddings", "embedding",
)  # fmt: skip
_TEXT_OUTPUTS = (
    "text_embeds", "text_embeddings", "text_features", "l2norm_text_embeddings", "embedding",
    "sentence_embedding",
)  # fmt: skip
_POOLED = "pooler_output"
_HIDDEN = ("last_hidden_state", _POOLED, "hidden_states")

_WITHOUT_PROJECTION = ("siglip", "siglip2")
"""Types of models whose towers end with the pooling: `pooler_output` is the embedding."""

_SCORES = ("logit", "prob", "score", "class")
"""Parts of the names of outputs of classifiers."""

_LISTED = 6
"""Number of inputs or outputs that an error message lists."""

_INT8_OPERATORS = {
    "ConvInteger", "DynamicQuantizeLinear", "DynamicQuantizeMatMul", "MatMulInteger",
    "MatMulIntegerToFloat", "QGemm", "QLinearConv", "QLinearMatMul", "QuantizeLinear",
}  # fmt: skip

_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
_INTEGERS = (onnx.TensorProto.INT32, onnx.TensorProto.INT64)


@dataclass(slots=True)
class Tower:
    """One tower of a foreign model.

    Attributes:
        path: File that it comes from.
        model: The model, reduced to this tower.
        output: Name of the output with the embeddings, shape (B, d) float.
        precision: Precision of its weights.
        weights: Directory of the file that holds its weights; None if they are in the model.
    """

    path: Path
    model: onnx.ModelProto
    output: str
    precision: Precision
    weights: Path | None

    @property
    def inputs(self) -> list[onnx.ValueInfoProto]:
        """Inputs of the tower."""
        return list(self.model.graph.input)


@dataclass(slots=True)
class ImageTower(Tower):
    """An image tower.

    Attributes:
        input: Name of the input with the pixels.
        element: Element type of the input, of `onnx.TensorProto`.
        channels: Whether the channels come before or after the pixels.
        height: Height of the input in pixels, if it is fixed.
        width: Width of the input in pixels, if it is fixed.
    """

    input: str
    element: int
    channels: Literal["first", "last"]
    height: int | None
    width: int | None

    def pixels(
        self, rows: NDArray[Any], mean: tuple[float, ...], std: tuple[float, ...]
    ) -> NDArray[Any]:
        """Return the input for images, by the definition of the preprocessing.

        Args:
            rows: Pixels, shape (n, H, W, 3), uint8.
            mean: Mean of each channel after scaling to [0, 1].
            std: Standard deviation of each channel.
        """
        values: NDArray[Any] = rows
        if self.element != onnx.TensorProto.UINT8:
            offset, scale = np.array(mean, np.float32), np.array(std, np.float32)
            scaled = (rows.astype(np.float32) / 255 - offset) / scale
            values = scaled.astype(onnx.helper.tensor_dtype_to_np_dtype(self.element))
        return np.ascontiguousarray(
            values.transpose(0, 3, 1, 2) if self.channels == "first" else values
        )


@dataclass(slots=True)
class TextTower(Tower):
    """A text tower.

    Attributes:
        ids: Name of the input with the token ids.
        mask: Name of the input with the attention mask, if it has one.
        types: Name of the input with the token types, if it has one.
        length: Number of tokens, if it is fixed.
        rows: Number of rows of its table of token embeddings, if it is found.
    """

    ids: str
    mask: str | None
    types: str | None
    length: int | None
    rows: int | None

    def element(self, name: str) -> int:
        """Return the element type of an input, of `onnx.TensorProto`."""
        value = next(each for each in self.inputs if each.name == name)
        return int(value.type.tensor_type.elem_type)

    def feeds(self, tokens: NDArray[Any], lengths: list[int]) -> dict[str, NDArray[Any]]:
        """Return the inputs for texts, by the definition of the mask.

        Args:
            tokens: Token ids, shape (n, L), int64.
            lengths: Number of tokens of each text without padding.
        """
        found = {self.ids: tokens}
        if self.mask is not None:
            real = np.arange(tokens.shape[1])[None] < np.array(lengths)[:, None]
            found[self.mask] = real
        if self.types is not None:
            found[self.types] = np.zeros_like(tokens)
        return {
            name: each.astype(onnx.helper.tensor_dtype_to_np_dtype(self.element(name)))
            for name, each in found.items()
        }


def image_tower(
    file: OnnxFile, model_type: str, *, input: str | None = None, output: str | None = None
) -> ImageTower:
    """Reduce a model to its image tower. The model is changed.

    Args:
        file: The model.
        model_type: `model_type` of `config.json`; empty if it is not known.
        input: Name of the input, if it is not the only one with four dimensions.
        output: Name of the output, if it is not one of the usual names.

    Raises:
        ExportError: If this is not the image tower of a CLIP model, or its projection is missing.
    """
    chosen = _choose_output(file, _IMAGE_OUTPUTS, "image", model_type, output)
    model = _reduced(file.model, chosen)
    inputs = {each.name: each for each in model.graph.input}
    if input is not None and input not in inputs:
        raise ExportError(
            f"{file.path}: has no input {input!r}, expected one of {', '.join(inputs)}; "
            "check --image-input"
        )
    pictures = [name for name, each in inputs.items() if len(each.type.tensor_type.shape.dim) == 4]
    name = input or (pictures[0] if len(pictures) == 1 else None)
    if name is None or len(inputs) != 1:
        raise ExportError(
            f"{file.path}: expected an image tower with one input of four dimensions, {chosen!r} "
            f"needs {_described(inputs)}; this is not the image tower of a CLIP model"
        )
    tensor = inputs[name].type.tensor_type
    shape = [dim.dim_value or None for dim in tensor.shape.dim]
    if tensor.elem_type not in (*_FLOATS, onnx.TensorProto.UINT8) or len(shape) != 4:
        raise ExportError(
            f"{file.path}: expected pixels of float32, float16 or uint8 with four dimensions, "
            f"{_described(inputs)}; this is not the image tower of a CLIP model"
        )
    if 3 in (shape[1], shape[3]):
        last = shape[1] != 3
    elif None in (shape[1], shape[3]):
        last = tensor.elem_type == onnx.TensorProto.UINT8
    else:
        raise ExportError(
            f"{file.path}: expected images with 3 channels, {_described(inputs)}; this is not the "
            "image tower of a CLIP model"
        )
    height, width = shape[1:3] if last else shape[2:4]
    return ImageTower(
        file.path,
        model,
        chosen,
        precision_of(model),
        file.path.parent,
        input=name,
        element=tensor.elem_type,
        channels="last" if last else "first",
        height=height,
        width=width,
    )


def text_tower(file: OnnxFile, model_type: str, *, output: str | None = None) -> TextTower:
    """Reduce a model to its text tower. The model is changed.

    Args:
        file: The model.
        model_type: `model_type` of `config.json`; empty if it is not known.
        output: Name of the output, if it is not one of the usual names.

    Raises:
        ExportError: If this is not the text tower of a CLIP model, or its projection is missing.
    """
    chosen = _choose_output(file, _TEXT_OUTPUTS, "text", model_type, output)
    model = _reduced(file.model, chosen)
    inputs = {each.name: each for each in model.graph.input}
    mask = next((name for name in inputs if "mask" in name), None)
    types = next((name for name in inputs if name == "token_type_ids"), None)
    rest = [name for name in inputs if name not in (mask, types)]
    integers = all(
        each.type.tensor_type.elem_type in _INTEGERS and len(each.type.tensor_type.shape.dim) == 2
        for name, each in inputs.items()
        if name != mask
    )
    if len(rest) != 1 or not integers:
        raise ExportError(
            f"{file.path}: expected token ids of shape (batch, length), int32 or int64, and "
            f"perhaps attention_mask and token_type_ids, got {_described(inputs)}; this is not the "
            "text tower of a CLIP model"
        )
    length = inputs[rest[0]].type.tensor_type.shape.dim[1].dim_value or None
    return TextTower(
        file.path,
        model,
        chosen,
        precision_of(model),
        file.path.parent,
        ids=rest[0],
        mask=mask,
        types=types,
        length=length,
        rows=_table_rows(model.graph, rest[0]),
    )


def _table_rows(graph: onnx.GraphProto, ids: str) -> int | None:
    """Return the number of rows of the table that token ids are looked up in."""
    tables = {each.name: each.dims for each in graph.initializer if len(each.dims) == 2}
    followed = {ids}
    for node in graph.node:
        if node.op_type in ("Cast", "Identity", "Reshape") and node.input[0] in followed:
            followed.update(node.output)
        if node.op_type == "Gather" and node.input[1] in followed and node.input[0] in tables:
            return int(tables[node.input[0]][0])
    return None


def has_text(file: OnnxFile) -> bool:
    """Return whether a model has token ids among its inputs."""
    return any(
        each.type.tensor_type.elem_type in _INTEGERS and len(each.type.tensor_type.shape.dim) == 2
        for each in file.model.graph.input
    )


def precision_of(model: onnx.ModelProto) -> Precision:
    """Return the precision of the weights of a model."""
    operators = {node.op_type for graph in all_graphs(model.graph) for node in graph.node}
    if operators & _INT8_OPERATORS:
        return "int8"
    sizes = {False: 0, True: 0}
    for tensor in model.graph.initializer:
        half = tensor.data_type == onnx.TensorProto.FLOAT16
        if half or tensor.data_type == onnx.TensorProto.FLOAT:
            sizes[half] += int(np.prod(tensor.dims))
    return "fp16" if sizes[True] > sizes[False] else "fp32"


def _reduced(model: onnx.ModelProto, output: str) -> onnx.ModelProto:
    keep_only(model.graph, output)
    name_nodes(model.graph)
    return model


def _choose_output(
    file: OnnxFile, names: tuple[str, ...], kind: str, model_type: str, wanted: str | None
) -> str:
    outputs = {each.name: each for each in file.model.graph.output}
    if wanted is not None:
        if wanted not in outputs:
            raise ExportError(
                f"{file.path}: has no output {wanted!r}, expected one of {', '.join(outputs)}; "
                f"check --{kind}-output"
            )
        return wanted
    for name in names:
        if name in outputs:
            return name
    if _POOLED in outputs and model_type.startswith(_WITHOUT_PROJECTION):
        return _POOLED
    if set(outputs) & set(_HIDDEN):
        with_projection = f"CLIP{'Vision' if kind == 'image' else 'Text'}ModelWithProjection"
        raise ExportError(
            f"{file.path}: its outputs are {', '.join(outputs)}, without CLIP's projection into "
            f"the space that images and texts share (expected {names[0]}); take an export of "
            f"{with_projection}, or name an output with --{kind}-output if you know that it is an "
            "embedding"
        )
    flat = [
        name
        for name, each in outputs.items()
        if len(each.type.tensor_type.shape.dim) == 2 and each.type.tensor_type.elem_type in _FLOATS
    ]
    if len(outputs) == 1 and len(flat) == 1:
        if _are_scores(file.model.graph, flat[0]):
            raise ExportError(
                f"{file.path}: its output {flat[0]!r} has scores of classes and no embeddings: "
                f"this is not the {kind} tower of a CLIP model; pass --{kind}-output {flat[0]} if "
                "you know that it is an embedding"
            )
        return flat[0]
    raise ExportError(
        f"{file.path}: expected an output named {' or '.join(names)}, got "
        f"{_described(outputs)}; this is not the {kind} tower of a CLIP model, or name its "
        f"output with --{kind}-output"
    )


def _are_scores(graph: onnx.GraphProto, output: str) -> bool:
    last = next((node.op_type for node in graph.node if output in node.output), "")
    return last in ("Softmax", "LogSoftmax", "Sigmoid") or any(
        word in output.lower() for word in _SCORES
    )


def _described(values: dict[str, onnx.ValueInfoProto]) -> str:
    parts = []
    for name, each in values.items():
        tensor = each.type.tensor_type
        kind = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
        dims = ", ".join(str(dim.dim_value or dim.dim_param or "?") for dim in tensor.shape.dim)
        parts.append(f"{name} {kind} ({dims})")
    more = len(parts) - _LISTED
    return ", ".join(parts[:_LISTED]) + (f" and {more} more" if more > 0 else "") or "nothing"
