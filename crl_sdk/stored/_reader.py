"""Files of stored universal embeddings, mapped into memory so that they need not fit into it."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from crl_sdk.basis._basis import Basis
from crl_sdk.errors import BasisMismatchError, InvalidInputError, MissingDependencyError

UNIVERSAL = "universal"
"""What `crl embed` calls the universal embeddings in the files it writes."""

_LOCAL_HEADER = 30  # bytes of a zip member's header, before its name


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """Universal embeddings out of a file.

    Attributes:
        path: of the file.
        embeddings: (n, d) float; mapped where the file allows it, else in memory.
        fingerprint: of the model that made them; None where the file does not tell.
        mapped: whether they are mapped.
    """

    path: Path
    embeddings: NDArray[Any]
    fingerprint: str | None
    mapped: bool

    @classmethod
    def open(cls, path: Path) -> Stored:
        """Open a `.npy` of (n, d), or the `.npz` or `.parquet` that `crl embed` writes.

        A `.npz` is mapped if its embeddings are not compressed; its check sums are not read then.
        A `.parquet` is loaded.

        Raises:
            InvalidInputError: there is no such file, it is cut off, of another kind, or holds
                something else.
            MissingDependencyError: pyarrow is not installed, for `.parquet`.
        """
        if path.suffix not in SUFFIXES:
            raise InvalidInputError(
                f"{path}: expected a .npy, .npz or .parquet file of embeddings; crl embed writes "
                "the last two"
            )
        try:
            array, fingerprint = _READERS[path.suffix](path)
        except InvalidInputError as error:
            raise InvalidInputError(f"{path}: {error}") from error
        except OSError as error:
            why = error.strerror or str(error)
            raise InvalidInputError(f"{path}: cannot be read ({why}); check the path") from error
        if array.ndim != 2 or array.dtype.kind != "f":
            raise InvalidInputError(
                f"{path}: expected embeddings (n, d) of a float dtype, got {array.shape} "
                f"{array.dtype}"
            )
        return cls(path, array, fingerprint, isinstance(array, np.memmap))

    def require_bases(self, bases: Sequence[Basis], fingerprint: str | None = None) -> str:
        """Check that embeddings and bases are of one model.

        Args:
            bases: at least one.
            fingerprint: of the bundle, if one is named.

        Returns:
            the model's fingerprint; that of the bases where nothing else tells it.

        Raises:
            BasisMismatchError: they are not.
        """
        known = self.fingerprint or fingerprint or bases[0].fingerprint
        if fingerprint is not None and fingerprint != known:
            raise BasisMismatchError(
                f"{self.path}: embeddings of model {known[:12]}…, the bundle is "
                f"{fingerprint[:12]}…: name the bundle that made them"
            )
        for basis in bases:
            basis.require_fingerprint(known)
        return known


def _open_npy(path: Path) -> tuple[NDArray[Any], None]:
    with path.open("rb") as file:
        return _map_array(file, 0, path.stat().st_size), None


def _open_npz(path: Path) -> tuple[NDArray[Any], str | None]:
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            names = archive.namelist()
            if f"{UNIVERSAL}.npy" not in names:
                raise InvalidInputError(
                    f"expected an array {UNIVERSAL!r}, as crl embed writes it, got {names}"
                )
            fingerprint = None
            if "fingerprint.npy" in names:
                with archive.open("fingerprint.npy") as member:
                    fingerprint = str(np.lib.format.read_array(member, allow_pickle=False))
            info = archive.getinfo(f"{UNIVERSAL}.npy")
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
                with archive.open(info) as member:
                    return np.lib.format.read_array(member, allow_pickle=False), fingerprint
            file.seek(info.header_offset)
            header = file.read(_LOCAL_HEADER)
            name, extra = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
            start = info.header_offset + _LOCAL_HEADER + name + extra
            return _map_array(file, start, info.file_size), fingerprint
    except (zipfile.BadZipFile, EOFError, RuntimeError, ValueError) as error:
        if isinstance(error, InvalidInputError):
            raise
        raise InvalidInputError(f"not a valid .npz file ({error}); write it again") from error


def _map_array(file: IO[bytes], start: int, size: int) -> NDArray[Any]:
    """Map the array in the .npy format that takes the `size` bytes of a file from `start`."""
    file.seek(start)
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0}.get(
            version, np.lib.format.read_array_header_2_0
        )
        shape, fortran, dtype = read(file)
    except (ValueError, EOFError, SyntaxError, TypeError) as error:
        raise InvalidInputError(f"not a valid .npy file ({error}); write it again") from error
    if dtype.hasobject:
        raise InvalidInputError(
            "holds pickled Python objects, which are never read: store a float array with np.save"
        )
    has, needs = start + size - file.tell(), math.prod(shape) * dtype.itemsize
    if has != needs or file.seek(0, os.SEEK_END) < start + size:
        raise InvalidInputError(
            f"expected {needs} bytes of {shape} {dtype}, got {has}: the file is cut off or "
            "changed; copy it again"
        )
    file.seek(start + size - needs)
    return np.memmap(file, dtype, "r", start + size - needs, shape, "F" if fortran else "C")


def _open_parquet(path: Path) -> tuple[NDArray[Any], str | None]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingDependencyError("pyarrow", "parquet", "reading .parquet files") from error
    try:
        names = parquet.read_schema(path).names
        if UNIVERSAL not in names:
            raise InvalidInputError(f"expected a column {UNIVERSAL!r}, got {names}")
        table = parquet.read_table(path, columns=[UNIVERSAL])
    except pyarrow.ArrowInvalid as error:
        raise InvalidInputError(f"not a valid .parquet file ({error}); write it again") from error
    column = table[UNIVERSAL].combine_chunks()
    if not pyarrow.types.is_fixed_size_list(column.type) or column.null_count:
        raise InvalidInputError(
            f"expected a column {UNIVERSAL!r} of lists of one length and no nulls, got "
            f"{column.type} with {column.null_count} nulls"
        )
    values = column.flatten().to_numpy(zero_copy_only=False)
    told = (table.schema.metadata or {}).get(b"crl_fingerprint")
    return values.reshape(-1, column.type.list_size), told.decode() if told else None


_READERS = {".npy": _open_npy, ".npz": _open_npz, ".parquet": _open_parquet}

SUFFIXES = tuple(_READERS)
"""Of the files that `Stored.open` takes."""
