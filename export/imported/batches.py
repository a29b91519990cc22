"""Rewrites a graph whose nodes hold a batch of one so that it takes any batch.

Exporters that trace with one image or text write its batch into the shapes of Reshape nodes and
into constants such as the class token. ONNX Runtime first folds everything that is constant for a
batch of one. Then the axis of the batch is followed from node to node. A node without a rule ends
the attempt. That the result is right is not assumed: the importer compares it with the graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx.helper import get_attribute_value, make_node

from crl_export.imported.weights import SMALLEST, AnyTower, is_outside, weights_file

_ELEMENTWISE = {
    "Abs", "Add", "And", "BatchNormalization", "Cast", "Ceil", "Clip", "Cos", "Div", "Equal", "Erf",
    "Exp", "Floor", "Gelu", "Greater", "GreaterOrEqual", "HardSigmoid", "HardSwish", "Identity",
    "LayerNormalization", "Less", "LessOrEqual", "Log", "LpNormalization", "Max", "Min", "Mod",
    "Mul", "Neg", "Not", "Or", "Pow", "Reciprocal", "Relu", "Sigmoid", "Sin", "Softmax", "Sqrt",
    "Sub", "Tanh", "Where",
}  # fmt: skip
_CONVOLUTIONS = {"AveragePool", "Conv", "GlobalAveragePool", "MaxPool"}


class _NoRuleError(Exception):
    """A node for which the axis of the batch cannot be followed."""


def with_any_batch(tower: AnyTower, folder: Path) -> AnyTower | None:
    """Return a tower whose nodes take any batch; None if it has nodes without a rule.

    Args:
        tower: The tower, whose nodes hold a batch of one. It is not changed. If its weights are in
            a file, those of the result are in another one in the same directory.
        folder: Directory for temporary files: that of the weights, if they are in a file.

    Raises:
        OSError: If a file cannot be written.
    """
    try:
        folded = _folded(tower, folder)
        _Rewriting(folded).run()
    except OSError:
        raise
    except Exception:  # a model that cannot be followed is no error: its inputs run one by one
        return None
    return replace(tower, model=folded)


def _folded(tower: AnyTower, folder: Path) -> onnx.ModelProto:
    """Return the model of a tower with fixed shapes, in which everything constant is folded."""
    fixed: onnx.ModelProto = onnx.ModelProto()
    fixed.CopyFrom(tower.model)
    for value in (*fixed.graph.input, *fixed.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    options = ort.SessionOptions()
    if tower.weights is not None:
        prefix = "session.optimized_model_external_initializers_"
        name = f"{weights_file(tower.model).removesuffix('.data')}.folded.data"
        options.add_session_config_entry(f"{prefix}file_name", name)
        options.add_session_config_entry(f"{prefix}min_size_in_bytes", str(SMALLEST))
    source, target = folder / "imported.onnx", folder / "folded.onnx"
    try:
        onnx.save(fixed, source)
        options.log_severity_level = 4
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(target)
        ort.InferenceSession(
            str(source),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=["MatMulAddFusion"],  # its Gemm takes two axes alone
        )
        folded = onnx.load(target, load_external_data=False)
    finally:
        source.unlink(missing_ok=True)
        target.unlink(missing_ok=True)
    return onnx.shape_inference.infer_shapes(folded, data_prop=True)


class _Rewriting:
    """Follows the axis of the batch through a graph and rewrites nodes on the way."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph
        self.constants = {
            tensor.name: onnx.numpy_helper.to_array(tensor)
            for tensor in self.graph.initializer
            if not is_outside(tensor)
        }
        for node in self.graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.constants[node.output[0]] = onnx.numpy_helper.to_array(node.attribute[0].t)
        self.shapes = {name: list(value.shape) for name, value in self.constants.items()}
        self.shapes |= {tensor.name: list(tensor.dims) for tensor in self.graph.initializer}
        for value in (*self.graph.input, *self.graph.output, *self.graph.value_info):
            dims = value.type.tensor_type.shape.dim
            self.shapes[value.name] = [dim.dim_value for dim in dims]
        self.axes = {value.name: 0 for value in self.graph.input}
        self.inner: set[str] = set()  # values whose axis has the batch inside, as (tokens × batch)
        self.added = 0

    def run(self) -> None:
        """Rewrite the graph.

        Raises:
            _NoRuleError: If a node has no rule.
        """
        source = self.graph.input[0].name
        first = self._new_constant(np.array([0]), "first")
        self.batch = "crl_batch"
        nodes = [
            make_node("Shape", [source], ["crl_shape"], "crl_shape_node"),
            make_node("Gather", ["crl_shape", first], [self.batch], "crl_batch_node"),
        ]
        for node in self.graph.node:
            followed = [name for name in node.input if name in self.axes]
            if followed:
                before, axis = self._rule(node)(node)
                nodes += before
                inner = {name in self.inner for name in followed}
                if len(inner) > 1:
                    raise _NoRuleError(node.op_type)
                for name in node.output:
                    self.axes[name] = axis
                    if inner == {True} and node.op_type != "Reshape":
                        self.inner.add(name)
            nodes.append(node)
        if any(self.axes.get(value.name) != 0 for value in self.graph.output):
            raise _NoRuleError("the batch is not the first axis of the output")
        ordered = onnx.GraphProto()
        ordered.node.extend(nodes)
        del self.graph.node[:]
        self.graph.node.extend(ordered.node)
        del self.graph.value_info[:]

    def _rule(self, node: onnx.NodeProto) -> Callable[[onnx.NodeProto], _Followed]:
        if node.domain not in ("", "ai.onnx"):
            raise _NoRuleError(node.op_type)
        if node.op_type in _ELEMENTWISE:
            return self._elementwise
        if node.op_type in _CONVOLUTIONS:
            return self._convolution
        found = getattr(self, f"_{node.op_type.lower()}", None)
        if found is None:
            raise _NoRuleError(node.op_type)
        return found

    def _elementwise(self, node: onnx.NodeProto) -> _Followed:
        rank = max(len(self.shapes[name]) for name in node.input if name)
        found = {
            rank - len(self.shapes[name]) + self.axes[name]
            for name in node.input
            if name in self.axes
        }
        (axis,) = found
        for name in node.input:
            at = axis - rank + len(self.shapes[name]) if name and name not in self.axes else -1
            if at >= 0 and self.shapes[name][at] != 1:
                raise _NoRuleError(node.op_type)
        if node.op_type in ("LayerNormalization", "LpNormalization", "Softmax"):
            over = _option(node, "axis", -1)
            if axis >= over % rank:
                raise _NoRuleError(node.op_type)
        return [], axis

    def _convolution(self, node: onnx.NodeProto) -> _Followed:
        return [], self._only(node, at=0)

    def _gemm(self, node: onnx.NodeProto) -> _Followed:
        if _option(node, "transA", 0):
            raise _NoRuleError("Gemm")
        return [], self._only(node, at=0)

    def _flatten(self, node: onnx.NodeProto) -> _Followed:
        if _option(node, "axis", 1) < 1:
            raise _NoRuleError("Flatten")
        return [], self._only(node, at=0)

    def _matmul(self, node: onnx.NodeProto) -> _Followed:
        ranks = [len(self.shapes[name]) for name in node.input]
        rank = max(ranks)
        found = set()
        for at, name in enumerate(node.input):
            if name in self.axes:
                axis = self.axes[name] + rank - ranks[at]
                if axis >= rank - (1 if at == 0 else 2):  # what is summed, or the columns
                    raise _NoRuleError("MatMul")
                found.add(axis)
        (axis,) = found
        return [], axis

    def _transpose(self, node: onnx.NodeProto) -> _Followed:
        rank = len(self.shapes[node.input[0]])
        order = list(_option(node, "perm", range(rank)[::-1]))
        return [], order.index(self._only(node))

    def _reshape(self, node: onnx.NodeProto) -> _Followed:
        axis = self._only(node)
        inside = node.input[0] in self.inner
        before = math.prod(self.shapes[node.input[0]][: axis + inside])
        shape = list(self.shapes[node.output[0]])
        if not all(shape):
            raise _NoRuleError("Reshape")
        # the batch is the outermost part of an axis with the same number of elements before it
        now = next(at for at in range(len(shape)) if math.prod(shape[:at]) == before)
        if now and now == len(shape) - 1:  # channels stay alone: the axis before holds the batch
            now -= 1
            self.inner.add(node.output[0])
        shape[now] = -1
        node.input[1] = self._new_constant(np.array(shape), "shape")
        return [], now

    def _unsqueeze(self, node: onnx.NodeProto) -> _Followed:
        rank = len(self.shapes[node.output[0]])
        new = {int(each) % rank for each in self._constant(node, 1).reshape(-1)}
        old = [at for at in range(rank) if at not in new]
        return [], old[self._only(node)]

    def _squeeze(self, node: onnx.NodeProto) -> _Followed:
        axis, rank = self._only(node), len(self.shapes[node.input[0]])
        gone = {int(each) % rank for each in self._constant(node, 1).reshape(-1)}
        if axis in gone:
            raise _NoRuleError("Squeeze")
        return [], axis - sum(each < axis for each in gone)

    def _gather(self, node: onnx.NodeProto) -> _Followed:
        data, indices = node.input
        over = _option(node, "axis", 0) % len(self.shapes[data])
        if data in self.axes and indices in self.axes:
            return self._gather_rows(node, over)
        axis = self._only(node, at=None)
        if indices in self.axes:
            return [], over + axis
        if axis == over:
            raise _NoRuleError("Gather")
        return [], axis if axis < over else axis - 1 + len(self.shapes[indices])

    def _gather_rows(self, node: onnx.NodeProto, over: int) -> _Followed:
        """Follow a Gather of one token of each text, from the tokens of all texts in one axis."""
        data, indices = node.input
        if self.axes[data] != over or data in self.inner:
            raise _NoRuleError("Gather")
        before, starts = self._counted(self.shapes[data][over], indices)
        moved = f"{starts}_moved"
        before.append(make_node("Add", [indices, starts], [moved], f"{moved}_node"))
        node.input[1] = moved
        return before, over + self.axes[indices]

    def _gathernd(self, node: onnx.NodeProto) -> _Followed:
        """Follow a GatherND whose first index is that of the text, 0 in the batch of one."""
        data, indices = node.input
        rank = len(self.shapes[indices])
        places = (self.axes.get(data), self.axes.get(indices), _option(node, "batch_dims", 0))
        if places != (0, 0, 0) or rank < 2 or self.shapes[indices][-1] < 2:
            raise _NoRuleError("GatherND")
        before, rows = self._counted(1, indices)
        wide, kept, new = (f"{rows}_{each}" for each in ("wide", "kept", "new"))
        ends = [
            self._new_constant(np.array([each]), "end") for each in (1, np.iinfo(np.int64).max, -1)
        ]
        before += [
            make_node("Slice", [indices, ends[0], ends[1], ends[2]], [kept], f"{kept}_node"),
            make_node("Mul", [indices, self._new_constant(np.array(0), "none")], [f"{new}_zero"]),
            make_node("Add", [f"{new}_zero", rows], [f"{new}_all"]),
            make_node("Slice", [f"{new}_all", ends[2], ends[1], ends[2]], [wide], f"{wide}_node"),
            make_node("Concat", [wide, kept], [new], f"{new}_node", axis=-1),
        ]
        node.input[1] = new
        return before, 0

    def _counted(self, step: int, like: str) -> tuple[list[onnx.NodeProto], str]:
        """Return nodes that count the inputs of the batch in steps, and the name of the result.

        Args:
            step: What is added for each input.
            like: Value whose rank and axis of the batch the result has; its other axes have size 1.
        """
        self.added += 1
        name = f"crl_count_{self.added}"
        shape = [1] * len(self.shapes[like])
        shape[self.axes[like]] = -1
        constants = [self._new_constant(np.array(each), "count") for each in (0, 1, step)]
        one = self._new_constant(np.array([0]), "axis")
        target = self._new_constant(np.array(shape), "shape")
        return [
            make_node("Squeeze", [self.batch, one], [f"{name}_size"], f"{name}_squeeze"),
            make_node("Range", [constants[0], f"{name}_size", constants[1]], [f"{name}_range"]),
            make_node("Mul", [f"{name}_range", constants[2]], [f"{name}_steps"], f"{name}_mul"),
            make_node("Reshape", [f"{name}_steps", target], [name], f"{name}_reshape"),
        ], name

    def _slice(self, node: onnx.NodeProto) -> _Followed:
        axis, rank = self._only(node), len(self.shapes[node.input[0]])
        if len(node.input) < 4 or axis in {int(each) % rank for each in self._constant(node, 3)}:
            raise _NoRuleError("Slice")
        return [], axis

    def _split(self, node: onnx.NodeProto) -> _Followed:
        axis, rank = self._only(node), len(self.shapes[node.input[0]])
        if axis == _option(node, "axis", 0) % rank:
            raise _NoRuleError("Split")
        return [], axis

    def _concat(self, node: onnx.NodeProto) -> _Followed:
        (axis,) = {self.axes[name] for name in node.input if name in self.axes}
        if axis == _option(node, "axis", 0) % len(self.shapes[node.input[0]]):
            raise _NoRuleError("Concat")
        before = []
        for at, name in enumerate(node.input):
            if name not in self.axes:  # such as the class token: one for each image
                added, node.input[at] = self._repeated(name, axis)
                before += added
        return before, axis

    def _reducemean(self, node: onnx.NodeProto) -> _Followed:
        axis, rank = self._only(node), len(self.shapes[node.input[0]])
        listed = _option(node, "axes", None)
        listed = self._constant(node, 1) if listed is None else listed
        gone = {int(each) % rank for each in listed}
        if axis in gone:
            raise _NoRuleError(node.op_type)
        kept = bool(_option(node, "keepdims", 1))
        return [], axis if kept else axis - sum(each < axis for each in gone)

    _reducesum = _reducel2 = _reducemax = _reducemean

    def _argmax(self, node: onnx.NodeProto) -> _Followed:
        axis, rank = self._only(node), len(self.shapes[node.input[0]])
        gone = _option(node, "axis", 0) % rank
        if axis == gone:
            raise _NoRuleError(node.op_type)
        kept = bool(_option(node, "keepdims", 1))
        return [], axis if kept else axis - (gone < axis)

    _argmin = _argmax

    def _cumsum(self, node: onnx.NodeProto) -> _Followed:
        axis, rank = self._only(node), len(self.shapes[node.input[0]])
        if axis == int(self._constant(node, 1).reshape(-1)[0]) % rank:
            raise _NoRuleError("CumSum")
        return [], axis

    def _expand(self, node: onnx.NodeProto) -> _Followed:
        axis = self._only(node)
        shape = self._constant(node, 1)
        now = axis + max(len(shape) - len(self.shapes[node.input[0]]), 0)
        behind = len(shape) - (len(self.shapes[node.output[0]]) - now)
        if behind >= 0 and shape[behind] != 1:
            raise _NoRuleError("Expand")
        return [], now

    def _repeated(self, name: str, axis: int) -> tuple[list[onnx.NodeProto], str]:
        """Return nodes that repeat a constant for each image, and the name of the result."""
        shape = list(self.shapes[name])
        if shape[axis] != 1:
            raise _NoRuleError("Concat")
        self.added += 1
        parts = [self.batch]
        if axis:
            parts.insert(0, self._new_constant(np.array(shape[:axis]), "before"))
        if axis + 1 < len(shape):
            parts.append(self._new_constant(np.array(shape[axis + 1 :]), "behind"))
        target, result = f"crl_repeat_{self.added}", f"crl_repeated_{self.added}"
        return [
            make_node("Concat", parts, [target], f"{target}_node", axis=0),
            make_node("Expand", [name, target], [result], f"{result}_node"),
        ], result

    def _only(self, node: onnx.NodeProto, *, at: int | None = 0) -> int:
        """Return the axis of the batch in the one input that has it.

        Args:
            node: A node whose first input has the batch, unless `at` is None.
            at: The axis that it must be if the rule of the operator is about that axis alone.
        """
        followed = [name for name in node.input if name in self.axes]
        if len(followed) != 1 or (at is not None and followed[0] != node.input[0]):
            raise _NoRuleError(node.op_type)
        axis = self.axes[followed[0]]
        if node.op_type in (*_CONVOLUTIONS, "Gemm", "Flatten") and axis != at:
            raise _NoRuleError(node.op_type)
        return axis

    def _constant(self, node: onnx.NodeProto, at: int) -> NDArray[Any]:
        if at >= len(node.input) or node.input[at] not in self.constants:
            raise _NoRuleError(node.op_type)
        return self.constants[node.input[at]]

    def _new_constant(self, values: NDArray[Any], kind: str) -> str:
        self.added += 1
        name = f"crl_{kind}_{self.added}"
        self.graph.initializer.append(onnx.numpy_helper.from_array(values.astype(np.int64), name))
        return name


_Followed: TypeAlias = tuple[list[onnx.NodeProto], int]
"""Nodes to put before a node, and the axis of the batch in its outputs."""


def _option(node: onnx.NodeProto, name: str, default: Any) -> Any:
    for attribute in node.attribute:
        if attribute.name == name:
            return get_attribute_value(attribute)
    return default
