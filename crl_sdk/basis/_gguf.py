"""Check GGUF files and read their metadata, before llama.cpp reads them."""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crl_sdk.errors import GenerationError

_MAGIC = b"GGUF"
_HEADER = struct.Struct("<4sIQQ")  # magic, version, numbers of tensors and of metadata values
_STRING, _ARRAY = 8, 9
_SCALARS = {
    kind: struct.Struct(f"<{code}")
    for kind, code in {
        0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
    }.items()
}  # fmt: skip
_MAX_DIMENSIONS = 4


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a GGUF file says about its model.

    Attributes:
        metadata: Numbers and strings of the metadata. Arrays are left out.
        parameters: Number of parameters: the values of all tensors together.
    """

    metadata: dict[str, Any]
    parameters: int

    @property
    def chat_template(self) -> str:
        """The model's chat template; empty if it has none."""
        template = self.metadata.get("tokenizer.chat_template", "")
        return template if isinstance(template, str) else ""


def read_header(path: Path) -> GgufHeader:
    """Read the metadata and the shapes of the tensors of a GGUF file.

    Args:
        path: Path of the file.

    Raises:
        GenerationError: If it cannot be read, is another type of file, is damaged, or ends before
            its last tensor begins.
    """
    # Not gguf.GGUFReader: it parses every token of the vocabulary (1.7 s for the default model)
    # and raises KeyError, IndexError or ValueError for damaged files.
    try:
        with path.open("rb") as file:
            head = file.read(_HEADER.size)
            _check_header(path, head)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(path, data).header()
    except OSError as error:
        raise GenerationError(f"{path}: cannot be read ({error.strerror})") from error


def _check_header(path: Path, head: bytes) -> None:
    if not head.startswith(_MAGIC):
        raise GenerationError(f"{path}: not a GGUF file (it begins with {head[:8]!r})")
    if len(head) < _HEADER.size:
        raise GenerationError(f"{path}: cut off after {len(head)} bytes; download it again")
    version = _HEADER.unpack(head)[1]
    if version not in (2, 3):
        raise GenerationError(f"{path}: GGUF version {version}; llama.cpp reads versions 2 and 3")


class _Reader:
    """Reads the values of a GGUF file one after the other."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._at = path, data, 0

    def header(self) -> GgufHeader:
        _, _, tensors, values = _HEADER.unpack_from(self._data)
        self._skip(_HEADER.size)
        if max(tensors, values) > len(self._data):
            raise self._damaged(f"{tensors} tensors and {values} values of metadata")
        found: dict[str, Any] = {}
        for _ in range(values):
            key = self._string()
            kind = self._number(4)
            if kind == _ARRAY:
                self._skip_array()
            else:
                found[key] = self._string() if kind == _STRING else self._number(kind)
        last, parameters = -1, 0
        for _ in range(tensors):
            self._skip_string()
            dimensions = self._number(4)
            if dimensions > _MAX_DIMENSIONS:
                raise self._damaged(f"a tensor of {dimensions} dimensions")
            parameters += math.prod(self._number(10) for _ in range(dimensions))
            self._skip(4)  # its type
            last = max(last, self._number(10))
        self._skip(last + 1)  # llama.cpp checks the last tensor to the byte
        return GgufHeader(found, parameters)

    def _number(self, kind: int) -> Any:
        if kind not in _SCALARS:
            raise self._damaged(f"a value of type {kind}")
        start = self._at
        self._skip(_SCALARS[kind].size)
        return _SCALARS[kind].unpack_from(self._data, start)[0]

    def _string(self) -> str:
        start = self._at + 8
        self._skip_string()
        return self._data[start : self._at].decode("utf-8", "replace")

    def _skip_string(self) -> None:
        self._skip(self._number(10))

    def _skip_array(self) -> None:
        kind, count = self._number(4), self._number(10)
        if kind == _STRING:
            for _ in range(count):
                self._skip_string()
        elif kind in _SCALARS:
            self._skip(_SCALARS[kind].size * count)
        else:
            raise self._damaged(f"an array of values of type {kind}")

    def _skip(self, count: int) -> None:
        self._at += count
        if self._at > len(self._data):
            raise GenerationError(
                f"{self._path}: cut off after {len(self._data)} bytes; download it again"
            )

    def _damaged(self, reason: str) -> GenerationError:
        return GenerationError(
            f"{self._path}: damaged (it claims {reason}); download it again, or use another"
        )
