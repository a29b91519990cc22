"""Reads the files of a foreign export: bounded JSON, and ONNX with its external data.

Nothing outside the directory is read, and no more bytes than its files have. ONNX Runtime never
opens a foreign file itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import onnx

from crl_sdk.errors import ExportError, IntegrityError
from crl_sdk.model._bundle import sha256_file
from crl_sdk.storage._json import decode_json

MAX_JSON = 64 << 20
"""Largest JSON file that is read, in bytes. The tokenizer of a multilingual model has 17 MB."""

MIN_OPSET, CONVERTED_OPSET = 13, 17
"""Graphs of older opsets than the first are converted to the second."""

_LFS = b"version https://git-lfs.github.com"

RUNTIME_DOMAINS = ("", "ai.onnx", "com.microsoft")
"""Domains of operators that ONNX Runtime has."""


@dataclass(slots=True)
class OnnxFile:
    """An ONNX model in memory.

    Attributes:
        path: The file.
        model: The model, with its external data.
        sha256: Digest of the file and of its external data, 64 hex digits.
        bytes: Number of bytes of its weights.
    """

    path: Path
    model: onnx.ModelProto
    sha256: str
    bytes: int


def read_json(path: Path) -> dict[str, Any]:
    """Read an object from a JSON file; empty if there is no file.

    Raises:
        ExportError: If it is too large, cannot be read, or is not a JSON object.
    """
    if not path.exists():
        return {}
    try:
        if path.stat().st_size > MAX_JSON:
            raise ExportError(
                f"{path}: expected at most {MAX_JSON >> 20} MiB of JSON, got "
                f"{path.stat().st_size >> 20} MiB; get the file again from its source"
            )
        content = decode_json(path.read_bytes())
    except (OSError, ValueError, IntegrityError) as error:
        raise ExportError(
            f"{path}: not readable as JSON ({error}); get the file again from its source"
        ) from error
    if not isinstance(content, dict):
        raise ExportError(
            f"{path}: expected a JSON object, got {type(content).__name__}; get the file again"
        )
    return content


def read_onnx(path: Path) -> OnnxFile:
    """Read an ONNX file and its external data.

    Local functions are inlined, and opsets below `MIN_OPSET` are converted.

    Raises:
        ExportError: If the file is truncated or not ONNX, its external data is missing, short or
            outside its directory, or it has operators that ONNX Runtime does not have.
    """
    if not path.is_file():
        raise ExportError(f"{path}: no such file; check the path")
    with path.open("rb") as file:
        if file.read(len(_LFS)) == _LFS:
            raise ExportError(
                f"{path}: a pointer of Git LFS, not the file itself; run `git lfs pull` in the "
                "repository, or download the file"
            )
    try:
        model = onnx.load(path, load_external_data=False)
        nodes = len(model.graph.node)
    except Exception as error:  # protobuf raises types of its own
        raise ExportError(
            f"{path}: not a complete ONNX file ({_first_line(error)}); it is truncated or of "
            "another format: download it again"
        ) from error
    if not nodes or not model.opset_import:
        raise ExportError(
            f"{path}: expected an ONNX model, got a file without operators; download it again"
        )
    digest = hashlib.sha256(sha256_file(path).encode())
    size = _load_external_data(path, model, digest)
    _check_domains(path, model)
    return OnnxFile(path, _modern(path, model), digest.hexdigest(), size)


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


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    graphs = [*all_graphs(model.graph)]
    nodes = [node for graph in graphs for node in graph.node]
    nodes += [node for function in model.functions for node in function.node]
    for graph in graphs:
        yield from graph.initializer
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def _load_external_data(path: Path, model: onnx.ModelProto, digest: Any) -> int:
    """Put external data into a model; return the number of bytes of all weights."""
    outside = [t for t in _tensors(model) if t.data_location == onnx.TensorProto.EXTERNAL]
    inside = path.stat().st_size
    if not outside:
        return inside
    sizes: dict[str, int] = {}
    wanted = []
    for tensor in outside:
        entries = {each.key: each.value for each in tensor.external_data}
        location = entries.get("location", "")
        if location not in sizes:
            sizes[location] = _external_file(path, location).stat().st_size
        try:
            offset = int(entries.get("offset", 0))
            length = int(entries.get("length", sizes[location] - offset))
        except ValueError as error:
            raise _bad_external(path, tensor, "its offset is not a number") from error
        if offset < 0 or length < 0 or offset + length > sizes[location]:
            raise _bad_external(
                path,
                tensor,
                f"bytes {offset:,} to {offset + length:,} of {location!r}, which has "
                f"{sizes[location]:,}",
            )
        wanted.append((tensor, location, offset, length))
    total = sum(length for *_, length in wanted)
    if total > sum(sizes.values()):
        raise ExportError(
            f"{path}: its tensors claim {total:,} bytes of external data, the files have "
            f"{sum(sizes.values()):,}; get the model from a source you trust"
        )
    for location in sorted(sizes):
        digest.update(sha256_file(path.parent / location).encode())
    for tensor, location, offset, length in wanted:
        with (path.parent / location).open("rb") as file:
            file.seek(offset)
            tensor.raw_data = file.read(length)
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]
    return inside + total


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
    if not file.resolve().is_relative_to(_root(path)):
        raise ExportError(
            f"{file}: a link that leads out of the directory of the model; do not use this model, "
            "or copy the file if you trust it"
        )
    return file


def _root(path: Path) -> Path:
    """Return the directory that links may point into: the model's own, or its cache.

    The cache of huggingface_hub has `models--OWNER--NAME/snapshots/REVISION`, whose files are links
    into `models--OWNER--NAME/blobs`.
    """
    directory = path.absolute().parent
    for parent in directory.parents:
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            return parent.parent.resolve()
    return directory.resolve()


def _bad_external(path: Path, tensor: onnx.TensorProto, reason: str) -> ExportError:
    return ExportError(
        f"{path}: the external data of {tensor.name!r} is incomplete: {reason}; download the data "
        "file again"
    )


def _check_domains(path: Path, model: onnx.ModelProto) -> None:
    own = {function.domain for function in model.functions}
    used = {node.domain for graph in all_graphs(model.graph) for node in graph.node}
    foreign = sorted(used - own - set(RUNTIME_DOMAINS))
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
            f"{path}: opset {opset} is too old and cannot be converted ({_first_line(error)}); "
            f"export the model again with opset {MIN_OPSET} or later"
        ) from error


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
