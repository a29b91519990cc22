"""Reads the tensors of TorchScript archives, such as OpenAI's CLIP files, and runs none of them."""

from __future__ import annotations

import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch

_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def is_torchscript(path: Path) -> bool:
    """Return whether a file is a TorchScript archive, which holds code beside its tensors."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.split("/", 1)[-1] == "constants.pkl" for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a TorchScript archive by their names in the module.

    `torch.jit.load` runs no Python, but it compiles the code of the archive, and modules may have
    code of theirs run while they are loaded. Here only `data.pkl` is read, with an unpickler that
    knows tensors and containers, and makes every module a plain object.

    Raises:
        pickle.UnpicklingError: If the archive asks for anything else, or is malformed.
    """
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        found = [name for name in names if name.split("/", 1)[-1] == "data.pkl"]
        if len(found) != 1:
            raise pickle.UnpicklingError("expected one data.pkl in the TorchScript archive")
        root = found[0].removesuffix("data.pkl")
        if f"{root}byteorder" in names:
            order = _read(archive, f"{root}byteorder").decode()
            if order != sys.byteorder:
                raise pickle.UnpicklingError(f"its numbers are {order}-endian")
        with archive.open(_stored(archive, found[0])) as file:
            module = _unpickler(file, archive, f"{root}data/").load()
    tensors: dict[str, torch.Tensor] = {}
    _collect(module, "", tensors, set())
    return tensors


def _stored(archive: zipfile.ZipFile, name: str) -> str:
    """Return the name of a member that takes as much memory as the file has bytes for it."""
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise pickle.UnpicklingError(f"{name} is compressed, which TorchScript does not write")
    return name


def _read(archive: zipfile.ZipFile, name: str) -> bytes:
    return archive.read(_stored(archive, name))


def _unpickler(file: Any, archive: zipfile.ZipFile, data: str) -> pickle.Unpickler:
    # classes and functions of each call alone: a pickle may set attributes of what it is given

    class Module:
        """A module or other object of the archive: its attributes, without its code."""

    storages: dict[str, torch.Tensor] = {}

    def tensor(
        storage: torch.Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
    ) -> torch.Tensor:
        return storage.as_strided(size, stride, offset)

    def container(*values: Any) -> Any:
        return values[0] if values else {}

    known = {
        ("torch._utils", "_rebuild_tensor_v2"): tensor,
        ("collections", "OrderedDict"): container,
        **{
            ("torch.jit._pickle", f"build_{kind}list"): container
            for kind in ("int", "double", "bool", "tensor")
        },
        **{("torch", name): name for name in _DTYPES},
    }

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if module.split(".", maxsplit=1)[0] == "__torch__":
                return Module
            if (module, name) not in known:
                raise pickle.UnpicklingError(f"it asks for {module}.{name}")
            return known[module, name]

        def persistent_load(self, pid: Any) -> torch.Tensor:
            kind, dtype, key, _, _ = pid
            if kind != "storage" or dtype not in _DTYPES:
                raise pickle.UnpicklingError(f"expected a storage of numbers, got {kind} {dtype}")
            if key not in storages:
                content = bytearray(_read(archive, f"{data}{key}"))
                empty = torch.empty(0, dtype=_DTYPES[dtype])
                storages[key] = (
                    torch.frombuffer(content, dtype=_DTYPES[dtype]) if content else empty
                )
            return storages[key]

    return Unpickler(file)


def _collect(value: Any, prefix: str, tensors: dict[str, torch.Tensor], seen: set[int]) -> None:
    for name, item in vars(value).items():
        if isinstance(item, torch.Tensor):
            tensors[f"{prefix}{name}"] = item
        elif hasattr(item, "__dict__") and id(item) not in seen:
            seen.add(id(item))
            _collect(item, f"{prefix}{name}.", tensors, seen)
