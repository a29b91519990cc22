"""The weights of a foreign model: checked, taken out of its files, and written beside our graphs.

Small weights are kept in the model itself. Large ones go into one file of ours, so that a model in
memory is a graph that refers to them: copies of it cost nothing, and no graph reaches the 2 GiB
that a protobuf message can hold. ONNX Runtime never opens a foreign file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import onnx

from crl_export.graph_products import INLINE_BYTES
from crl_export.imported.reading import all_graphs, constants_in_nodes, external_part, size_of
from crl_export.imported.towers import ImageTower, TextTower, Tower

SMALLEST = 1024
"""Smaller tensors stay in the model: ONNX Runtime reads shapes from them when it loads it."""

_PAGE = 4096
"""Each tensor begins at a multiple of this number of bytes, so that the file can be mapped."""

_CHUNK = 16 << 20

AnyTower = TypeVar("AnyTower", ImageTower, TextTower)


def take_weights(tower: AnyTower, store: Path, graph: str) -> AnyTower:
    """Return a tower whose weights are in the model, or in one file of ours if they are large.

    Args:
        tower: The tower as it was read. Its external data is beside its file.
        store: Directory of the new bundle.
        graph: Name of the graph that will have the tower. Large weights are in `GRAPH.data`.
    """
    for tensor in constants_in_nodes(tower.model):
        _load(tensor, tower.path.parent)
    if weight_bytes(tower) <= INLINE_BYTES:
        for tensor in _initializers(tower.model):
            _load(tensor, tower.path.parent)
        return replace(tower, weights=None)
    return move_weights(tower, tower.path.parent, store, graph)


def move_weights(tower: AnyTower, source: Path, store: Path, graph: str) -> AnyTower:
    """Return a tower whose weights are in one new file.

    Args:
        tower: The tower. Its model is emptied.
        source: Directory of the files that hold its weights now.
        store: Directory of the new file, and of the graph.
        graph: Name of the graph that will have the tower, whose weights are in `GRAPH.data`.
    """
    name = f"{graph}.data"
    with (store / name).open("xb") as file:
        for tensor in _initializers(tower.model):
            outside = is_outside(tensor)
            if (external_part(tensor)[2] if outside else len(tensor.raw_data)) < SMALLEST:
                _load(tensor, source)
                continue
            file.seek(-(-file.tell() // _PAGE) * _PAGE)
            offset = file.tell()
            for part in _parts(tensor, source) if outside else (tensor.raw_data,):
                file.write(part)
            _refer(tensor, name, offset, file.tell() - offset)
    light = onnx.ModelProto()
    light.CopyFrom(tower.model)  # the memory of removed weights belongs to the old model
    return replace(tower, model=light, weights=store)


def weight_bytes(tower: Tower) -> int:
    """Return the number of bytes of the weights of a tower."""
    return sum(size_of(each) or len(each.raw_data) for each in _initializers(tower.model))


def weights_file(model: onnx.ModelProto) -> str:
    """Return the name of the one file that holds the weights of a model."""
    (name,) = {external_part(each)[0] for each in _initializers(model) if is_outside(each)}
    return name


def remove_unused_weights(directory: Path) -> None:
    """Remove the files of weights that no graph of a directory refers to."""
    used = set()
    for path in directory.glob("*.onnx"):
        model = onnx.load(path, load_external_data=False)
        used |= {external_part(each)[0] for each in _initializers(model) if is_outside(each)}
    for path in directory.glob("*.data"):
        if path.name not in used:
            path.unlink()


@contextmanager
def written(tower: Tower, folder: Path) -> Iterator[Path]:
    """Write a tower into a temporary file; yield its path.

    Args:
        tower: The tower, whose weights are in the model or in this directory.
        folder: Directory of the file.
    """
    path = folder / "imported.onnx"
    try:
        onnx.save(tower.model, path)
        yield path
    finally:
        path.unlink(missing_ok=True)


def _initializers(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    for graph in all_graphs(model.graph):
        yield from graph.initializer


def is_outside(tensor: onnx.TensorProto) -> bool:
    """Return whether the values of a tensor are in another file."""
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL)


def _load(tensor: onnx.TensorProto, source: Path) -> None:
    """Read external data into a tensor. ONNX's own function refuses links of a cache."""
    if is_outside(tensor):
        tensor.raw_data = b"".join(_parts(tensor, source))
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]


def _parts(tensor: onnx.TensorProto, source: Path) -> Iterator[bytes]:
    """Yield the external data of a tensor."""
    location, offset, length = external_part(tensor)
    with (source / location).open("rb") as data:
        data.seek(offset)
        while length:
            part = data.read(min(length, _CHUNK))
            if not part:
                raise OSError(f"{source / location} became shorter while it was read")
            yield part
            length -= len(part)


def _refer(tensor: onnx.TensorProto, name: str, offset: int, length: int) -> None:
    """Make a tensor refer to a part of a file."""
    tensor.ClearField("raw_data")
    del tensor.external_data[:]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", name), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
