"""Read files of universal embeddings. They are memory-mapped and need not fit into memory."""

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

from crl_sdk.basis._basis import Basis, require_one_model
from crl_sdk.errors import InvalidInputError
from crl_sdk.model._fingerprint import require_same_model
from crl_sdk.projection._row_dtypes import is_row_dtype
from crl_sdk.stored._directory import (
    ABOUT,
    MANIFEST,
    UNIVERSAL,
    EmbeddingDirectory,
    import_pyarrow,
    to_numpy,
)

_LOCAL_HEADER = 30  # bytes of the header of a zip member, before its name


@dataclass(frozen=True, slots=True, eq=False)
class StoredEmbeddings:
    """Universal embeddings from a file.

    Attributes:
        path: Path of the file.
        embeddings: Universal embeddings, shape (n, d), a float dtype or int8, unit rows. They are
            memory-mapped if the file allows it.
        fingerprint: Fingerprint of the model that made them; None if the file does not say.
        mapped: Whether they are memory-mapped.
    """

    path: Path
    embeddings: NDArray[Any]
    fingerprint: str | None
    mapped: bool

    @classmethod
    def open(cls, path: Path) -> StoredEmbeddings:
        """Open a `.npy` file of shape (n, d), or a file or a directory of `crl embed`.

        A directory is loaded into memory, without the images that could not be read. A `.npz` file
        is memory-mapped if its embeddings are not compressed. Its checksums are then not verified.
        A `.parquet` file is loaded into memory.

        Raises:
            InvalidInputError: If the file is missing, truncated or of another type, or does not
                hold embeddings.
            MissingDependencyError: If pyarrow is needed for `.parquet` and not installed.
        """
        if (path / ABOUT / MANIFEST).is_file():
            directory = EmbeddingDirectory.open(path)
            return cls(path, directory.read()[0], directory.fingerprint, mapped=False)
        if path.suffix not in SUFFIXES:
            raise InvalidInputError(
                f"{path}: expected a .npy, .npz or .parquet file of embeddings, or a directory of "
                "them; crl embed writes .npz, .parquet and directories"
            )
        try:
            array, fingerprint = _READERS[path.suffix](path)
        except InvalidInputError as error:
            raise InvalidInputError(f"{path}: {error}") from error
        except OSError as error:
            why = error.strerror or str(error)
            raise InvalidInputError(f"{path}: cannot be read ({why}); check the path") from error
        if array.ndim != 2 or not is_row_dtype(array.dtype):
            raise InvalidInputError(
                f"{path}: expected embeddings (n, d) of a float dtype or int8, got {array.shape} "
                f"{array.dtype}"
            )
        return cls(path, array, fingerprint, isinstance(array, np.memmap))

    def require_bases(self, bases: Sequence[Basis], fingerprint: str | None = None) -> str:
        """Check that embeddings and bases belong to one model.

        Args:
            bases: Bases, at least one.
            fingerprint: Fingerprint of the bundle; None if no bundle is given.

        Returns:
            Fingerprint of the model. It is that of the bases if neither the file nor a bundle says.

        Raises:
            BasisMismatchError: If they belong to different models.
        """
        if self.fingerprint is not None and fingerprint is not None:
            require_same_model(
                str(self.path), self.fingerprint, fingerprint,
                remedy="name the bundle that made the embeddings",
            )  # fmt: skip
        return require_one_model(bases, self.fingerprint or fingerprint)


def _open_npy(path: Path) -> tuple[NDArray[Any], None]:
    with path.open("rb") as file:
        return _map_array(file, 0, path.stat().st_size), None


def _open_npz(path: Path) -> tuple[NDArray[Any], str | None]:
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            names = archive.namelist()
            if f"{UNIVERSAL}.npy" not in names:
                raise InvalidInputError(
                    f"expected an array {UNIVERSAL!r}, as crl embed writes, got {names}"
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
    """Memory-map an array in .npy format that takes `size` bytes of a file from `start`."""
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
            "contains pickled Python objects, which are never read: save a float array with np.save"
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
    pyarrow, parquet = import_pyarrow("reading .parquet files")
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
    fingerprint = (table.schema.metadata or {}).get(b"crl_fingerprint")
    return to_numpy(column), fingerprint.decode() if fingerprint else None


_READERS = {".npy": _open_npy, ".npz": _open_npz, ".parquet": _open_parquet}

SUFFIXES = tuple(_READERS)
"""Suffixes of the files that `StoredEmbeddings.open` reads."""
