"""Reads foreign ONNX files and checks their external data.

Nothing outside the directory is read, and no more bytes than its files have.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import onnx

from crl_export.messages import first_lines
from crl_export.model_files import check_inside, check_no_pointer, kind_of
from crl_sdk.errors import ExportError
from crl_sdk.model._bundle import sha256_file

MAX_MODEL = 2 << 30
"""Largest ONNX file in bytes, without external data: protobuf has no larger messages."""

MAX_WEIGHTS = 64 << 30
"""Largest external data that is read, in bytes. The largest towers of open_clip have 20 GB."""

MAX_NODES = 500_000
"""Largest number of nodes of a graph, with its local functions inlined. Towers have thousands."""

MIN_OPSET, CONVERTED_OPSET = 13, 17
"""Graphs of older opsets than the first are converted to the second."""

_BITS = tuple(
    kind
    for name, kind in onnx.TensorProto.DataType.items()
    if name.endswith(("INT4", "INT2", "FLOAT4E2M1", "FLOAT8E8M0"))
)
"""Types of tensors with less than a byte for each value, or without a type in NumPy."""

_VALUES = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")
"""Fields of a tensor with values that are not raw bytes."""

RUNTIME_DOMAINS = ("", "ai.onnx", "com.microsoft")
"""Domains of operators that ONNX Runtime has."""


@dataclass(slots=True)
class OnnxFile:
    """An ONNX model in memory.

    Attributes:
        path: The file.
        model: The model. Its external data is checked, but not read.
        sha256: Digest of the file and of its external data, 64 hex digits.
    """

    path: Path
    model: onnx.ModelProto
    sha256: str


def read_onnx(path: Path) -> OnnxFile:
    """Read an ONNX file and check its external data.

    Local functions are inlined, and opsets below `MIN_OPSET` are converted.

    Raises:
        ExportError: If the file is truncated, too large or not ONNX, its external data is missing,
            short or outside its directory, or it has operators that ONNX Runtime does not have.
    """
    if not path.is_file():
        found = kind_of(path) if path.exists() else "nothing"
        raise ExportError(f"{path}: expected a file, got {found}; check the path")
    try:
        model = _parse(path)
        sizes = _check_weights(path, model)
        digest = hashlib.sha256(sha256_file(path).encode())
        for location in sorted(sizes):
            digest.update(sha256_file(path.parent / location).encode())
    except OSError as error:
        raise ExportError(
            f"{path}: cannot be read ({error.strerror or error}); check its permissions, or "
            "download it again"
        ) from error
    model = _modern(path, model)
    _check_domains(path, model)
    return OnnxFile(path, model, digest.hexdigest())


def external_files(path: Path) -> list[str]:
    """Return the names that an ONNX file has for the files with its external data.

    Raises:
        ExportError: If the file is truncated, too large or not ONNX.
    """
    outside = onnx.TensorProto.EXTERNAL
    tensors = [each for each in _tensors(_parse(path)) if each.data_location == outside]
    names = [
        entry.value for each in tensors for entry in each.external_data if entry.key == "location"
    ]
    return list(dict.fromkeys(names))


def external_part(tensor: onnx.TensorProto) -> tuple[str, int, int]:
    """Return where external data is: the name of the file, the offset and the number of bytes.

    Raises:
        ValueError: If one of the numbers is none.
    """
    entries = {each.key: each.value for each in tensor.external_data}
    length = entries.get("length")
    return (
        entries.get("location", ""),
        int(entries.get("offset") or 0),
        int(length) if length else size_of(tensor) or 0,
    )


def size_of(tensor: onnx.TensorProto) -> int | None:
    """Return how many bytes the shape of a tensor stands for; None if its type has no fixed size.

    Types of less than a byte and strings have none.
    """
    kind = tensor.data_type
    if kind in _BITS or kind in (onnx.TensorProto.STRING, onnx.TensorProto.UNDEFINED):
        return None
    return prod(tensor.dims) * int(onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize)


def _names(model: onnx.ModelProto) -> Iterator[Any]:
    """Yield the names in a model: text, or bytes where they are no text."""
    for graph in all_graphs(model.graph):
        values: list[Any] = [*graph.input, *graph.output, *graph.initializer]
        yield from (value.name for value in values)
        for node in graph.node:
            yield from (node.name, node.op_type, node.domain, *node.input, *node.output)


def _parse(path: Path) -> onnx.ModelProto:
    size = path.stat().st_size
    if size > MAX_MODEL:
        raise ExportError(
            f"{path}: has {size >> 30} GiB; an ONNX file has at most {MAX_MODEL >> 30} and its "
            "weights beside it: download it again, or save it with external data"
        )
    check_no_pointer(path)
    try:
        model = onnx.load(path, load_external_data=False)
        nodes = len(model.graph.node)
    except OSError:
        raise
    except Exception as error:  # protobuf raises types of its own
        raise ExportError(
            f"{path}: not a complete ONNX file ({first_lines(error)}); it is truncated or of "
            "another format: download it again"
        ) from error
    if not all(isinstance(name, str) for name in _names(model)):
        raise ExportError(f"{path}: has names that are not UTF-8; it is damaged: download it again")
    if not nodes or not model.opset_import:
        raise ExportError(
            f"{path}: expected an ONNX model, got a file without operators; download it again"
        )
    return model


def all_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield a graph and the graphs inside its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from all_graphs(attribute.g)
            for inner in attribute.graphs:
                yield from all_graphs(inner)


def opset_of(model: onnx.ModelProto) -> int:
    """Return the opset of ONNX's own operators; 0 if it has none."""
    versions = (each.version for each in model.opset_import if each.domain in ("", "ai.onnx"))
    return max(versions, default=0)


def constants_in_nodes(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yield the tensors that are attributes of nodes."""
    graphs = all_graphs(model.graph)
    nodes = [node for graph in graphs for node in graph.node]
    nodes += [node for function in model.functions for node in function.node]
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    for graph in all_graphs(model.graph):
        yield from graph.initializer
    yield from constants_in_nodes(model)


def _check_weights(path: Path, model: onnx.ModelProto) -> dict[str, int]:
    """Check that all weights are there; return the sizes of the files of external data."""
    sizes: dict[str, int] = {}
    total = 0
    for tensor in _tensors(model):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            _check_size(path, tensor)
            continue
        try:
            location, offset, length = external_part(tensor)
        except ValueError as error:
            raise _bad_external(path, tensor, "its offset or length is not a number") from error
        if location not in sizes:
            sizes[location] = _external_file(path, location).stat().st_size
        if offset < 0 or length < 0 or offset + length > sizes[location]:
            raise _bad_external(
                path,
                tensor,
                f"bytes {offset:,} to {offset + length:,} of {location!r}, which has "
                f"{sizes[location]:,}",
            )
        if size_of(tensor) not in (None, length):
            raise _bad_external(
                path, tensor, f"{length:,} bytes for a shape of {size_of(tensor):,}"
            )
        total += length
    if total > sum(sizes.values()):
        raise ExportError(
            f"{path}: its tensors claim {total:,} bytes of external data, the files have "
            f"{sum(sizes.values()):,}; get the model from a source you trust"
        )
    if sum(sizes.values()) > MAX_WEIGHTS:
        raise ExportError(
            f"{path}: its external data has {sum(sizes.values()) >> 30} GiB, expected at most "
            f"{MAX_WEIGHTS >> 30}; this is not the tower of a CLIP model"
        )
    return sizes


def _check_size(path: Path, tensor: onnx.TensorProto) -> None:
    """Check that a tensor inside a model has as many values as its shape says."""
    claimed = size_of(tensor)
    if any(dim < 0 for dim in tensor.dims):
        claimed = -1
    if tensor.HasField("raw_data"):
        held: int | None = len(tensor.raw_data)
    else:
        counts = (len(getattr(tensor, field)) for field in _VALUES)
        held = None if claimed is None else max(counts) * (claimed // max(prod(tensor.dims), 1))
    if claimed not in (None, held):
        raise ExportError(
            f"{path}: the shape of the weights {tensor.name!r} is {list(tensor.dims)}, the file "
            f"holds {held:,} bytes of them; it is damaged: download it again"
        )


def _external_file(path: Path, location: str) -> Path:
    """Return the path of a file of external data, which must be beside the model."""
    names = (PurePosixPath(location), PureWindowsPath(location))
    if not location or any(n.is_absolute() or n.drive or ".." in n.parts for n in names):
        raise ExportError(
            f"{path}: its external data is at {location!r}, outside its directory; do not use this "
            "model, get it from a source you trust"
        )
    file = path.parent / location
    if not file.is_file():
        raise ExportError(
            f"{path}: its external data {location!r} is missing; download that file into "
            f"{path.parent} too"
        )
    check_inside(file, path.parent)
    return file


def _bad_external(path: Path, tensor: onnx.TensorProto, reason: str) -> ExportError:
    return ExportError(
        f"{path}: the external data of {tensor.name!r} is incomplete: {reason}; download the data "
        "file again"
    )


def _check_domains(path: Path, model: onnx.ModelProto) -> None:
    """Check that ONNX Runtime has all operators of a model without local functions."""
    used = {node.domain for graph in all_graphs(model.graph) for node in graph.node}
    foreign = sorted(used - set(RUNTIME_DOMAINS))
    if foreign:
        raise ExportError(
            f"{path}: has operators of {', '.join(foreign)}, which ONNX Runtime does not have; "
            "take an export without custom operators"
        )
    names = {node.op_type for graph in all_graphs(model.graph) for node in graph.node}
    if four_bit := sorted(names & {"MatMulNBits", "MatMulBnb4", "GatherBlockQuantized"}):
        raise ExportError(
            f"{path}: has 4-bit weights ({', '.join(four_bit)}), which are not supported; import "
            "the fp32 file, and make int8 with --precision fp32,int8"
        )


def _modern(path: Path, model: onnx.ModelProto) -> onnx.ModelProto:
    """Inline local functions and raise an old opset."""
    _check_count(path, model)
    if model.functions:
        from onnx.inliner import inline_local_functions

        model = inline_local_functions(model)
    opset = opset_of(model)
    if opset >= MIN_OPSET:
        return model
    try:
        from onnx.version_converter import convert_version

        return convert_version(model, CONVERTED_OPSET)
    except Exception as error:  # the converter raises many types
        raise ExportError(
            f"{path}: opset {opset} is too old and cannot be converted ({first_lines(error)}); "
            f"export the model again with opset {MIN_OPSET} or later"
        ) from error


def _check_count(path: Path, model: onnx.ModelProto) -> None:
    """Check that a graph stays small when its local functions are inlined."""
    functions = {(each.domain, each.name): each for each in model.functions}
    counts: dict[tuple[str, str], int] = {}
    begun: set[tuple[str, str]] = set()

    def count(nodes: Iterable[onnx.NodeProto]) -> int:
        total = 0
        for node in nodes:
            key = (node.domain, node.op_type)
            total += count_function(key) if key in functions else 1
            for attribute in node.attribute:
                total += count(attribute.g.node)
                total += sum(count(graph.node) for graph in attribute.graphs)
        return total

    def count_function(key: tuple[str, str]) -> int:
        if key not in counts:
            if key in begun:
                raise ExportError(
                    f"{path}: its local function {key[1]!r} calls itself; take another export"
                )
            begun.add(key)
            counts[key] = count(functions[key].node)
        return counts[key]

    try:
        total = count(model.graph.node)
    except RecursionError:
        total = MAX_NODES + 1
    if total > MAX_NODES:
        raise ExportError(
            f"{path}: has more than {MAX_NODES:,} operators; this is not the tower of a CLIP model"
        )
