"""Write files of conditional embeddings: one array per criterion, and a record of their origin.

The arrays are memory-mapped while they are written, so they need not fit into memory.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from crl_sdk._version import __version__
from crl_sdk.basis._basis import Basis
from crl_sdk.basis._directory import basis_file_name
from crl_sdk.errors import InvalidInputError
from crl_sdk.projection._project_rows import check_rows, project_rows
from crl_sdk.projection._row_dtypes import RowDtype, require_row_dtype
from crl_sdk.storage._atomic_files import make_directory, new_files, write_record
from crl_sdk.stored._reader import StoredEmbeddings

SCHEMA = 1
RECORD = "projections.json"


class ProjectedFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A file of conditional embeddings.

    Attributes:
        criterion: Name of the criterion.
        file: Name of the file, in the directory of the record.
        basis_sha256: `Basis.sha256()` of the basis.
        post: Row normalisation.
        shape: Shape (n, m) of the array.
        dtype: Dtype of the array.
        bytes: Size of the file.
    """

    criterion: str
    file: str
    basis_sha256: str
    post: str
    shape: tuple[int, int]
    dtype: RowDtype
    bytes: int


class ProjectionRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The record of projected files. It is written when all of them are complete.

    Attributes:
        schema: Schema of the record.
        crl_sdk: Version of the SDK that wrote it.
        source: Name of the file of universal embeddings. Its rows have the same order.
        source_bytes: Size of that file.
        source_dtype: Dtype of the universal embeddings.
        dim: Length d of the universal embeddings.
        fingerprint: Fingerprint of the model.
        fingerprint_told_by: Where the fingerprint was found: `source`, `bundle` or `bases`.
        outputs: The files, one for each criterion.
    """

    schema: int
    crl_sdk: str
    source: str
    source_bytes: int
    source_dtype: str
    dim: int
    fingerprint: str
    fingerprint_told_by: Literal["source", "bundle", "bases"]
    outputs: tuple[ProjectedFile, ...]


def project_stored(
    stored: StoredEmbeddings,
    bases: Sequence[Basis],
    directory: Path,
    *,
    fingerprint: str | None = None,
    dtype: RowDtype = "float32",
    overwrite: bool = False,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> ProjectionRecord:
    """Write the conditional embeddings of each basis as `<criterion>.npy`, and a record.

    The arrays are written to temporary files, which are renamed when all are complete on disk.

    Args:
        stored: The universal embeddings.
        bases: Bases of distinct criteria, at least one.
        directory: Directory to write to; created if it does not exist.
        fingerprint: Fingerprint of the bundle; None if no bundle is given.
        dtype: Dtype of the arrays.
        overwrite: Whether to replace existing files.
        threads: Number of threads, see `crl_sdk.projection.project_rows`.
        progress: Called with the number of rows done so far.

    Returns:
        The record.

    Raises:
        BasisMismatchError: If embeddings and bases belong to different models.
        InvalidInputError: If files exist already, a row is not finite, shapes do not fit, the
            dtype does not fit a basis, the directory cannot be written, or the disk is full.
    """
    model = stored.require_bases(bases, fingerprint)
    check_rows(stored.embeddings, [basis.projection for basis in bases])
    for basis in bases:
        require_row_dtype(dtype, basis.projection.post)
    paths = [(directory / basis_file_name(basis.criterion)).with_suffix(".npy") for basis in bases]
    if len(set(paths)) != len(paths):
        raise InvalidInputError(f"expected each criterion once, got {[p.stem for p in paths]}")
    there = [path.name for path in [*paths, directory / RECORD] if path.exists()]
    if there and not overwrite:
        raise InvalidInputError(
            f"{directory}: holds {', '.join(there)} already; pass --overwrite to replace them, or "
            "choose another directory"
        )
    make_directory(directory, InvalidInputError)
    try:
        sizes = _write_arrays(stored, bases, paths, dtype, threads=threads, progress=progress)
    except OSError as error:
        raise InvalidInputError(
            f"{directory}: cannot be written ({error.strerror}); check the directory and free space"
        ) from error
    record = ProjectionRecord(
        schema=SCHEMA,
        crl_sdk=__version__,
        source=stored.path.name,
        source_bytes=stored.path.stat().st_size,
        source_dtype=str(stored.embeddings.dtype),
        dim=stored.embeddings.shape[1],
        fingerprint=model,
        fingerprint_told_by=(
            "source" if stored.fingerprint else "bundle" if fingerprint else "bases"
        ),
        outputs=tuple(
            ProjectedFile(
                criterion=basis.criterion,
                file=path.name,
                basis_sha256=basis.sha256(),
                post=basis.projection.post,
                shape=(len(stored.embeddings), basis.projection.output_dim),
                dtype=dtype,
                bytes=size,
            )
            for basis, path, size in zip(bases, paths, sizes, strict=True)
        ),
    )
    write_record(directory / RECORD, record, InvalidInputError)
    return record


def _write_arrays(
    stored: StoredEmbeddings,
    bases: Sequence[Basis],
    paths: Sequence[Path],
    dtype: RowDtype,
    **options: Any,
) -> list[int]:
    """Write all arrays or none. Returns the sizes of the files in bytes."""
    rows = len(stored.embeddings)
    record = paths[0].parent / RECORD
    with new_files(paths, InvalidInputError, replaces=record) as files:
        arrays = [
            _make_array(file, (rows, basis.projection.output_dim), dtype)
            for file, basis in zip(files, bases, strict=True)
        ]
        project_rows(
            stored.embeddings,
            [basis.projection for basis in bases],
            arrays,
            **options,
        )
        for array in arrays:
            array.flush()
    return [path.stat().st_size for path in paths]


def _make_array(file: Any, shape: tuple[int, int], dtype: RowDtype) -> np.memmap[Any, Any]:
    """Write the .npy header, allocate the space and memory-map the array.

    With allocated space a full disk is an error here. Without it, writing to the memory map would
    kill the process.
    """
    kind = np.dtype(dtype)
    np.lib.format.write_array_header_1_0(
        file, {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
    )
    file.flush()
    start, size = file.tell(), math.prod(shape) * kind.itemsize
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, start + size)
    else:  # macOS
        file.truncate(start + size)
    return np.memmap(file, kind, "r+", start, shape)
