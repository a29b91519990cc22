"""Files of conditional embeddings: one array for each criterion, and a record of what made them.

They are mapped while they are written, so that they need not fit into memory.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec
import numpy as np

from crl_sdk._version import __version__
from crl_sdk.basis._basis import Basis, basis_path
from crl_sdk.errors import InvalidInputError
from crl_sdk.projection._project_rows import check_rows, project_rows
from crl_sdk.storage._atomic_files import write_record
from crl_sdk.stored._reader import Stored

SCHEMA = 1
RECORD = "projections.json"

OutputDtype: TypeAlias = Literal["float32", "float16"]


class Output(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One written array.

    Attributes:
        criterion: its name.
        file: beside the record.
        basis_sha256: `Basis.sha256()` of the basis it was made with.
        post: normalisation of the rows.
        shape: (n, m).
        dtype: of the file.
        bytes: of the file.
    """

    criterion: str
    file: str
    basis_sha256: str
    post: str
    shape: tuple[int, int]
    dtype: OutputDtype
    bytes: int


class Projected(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The record beside the arrays; it is written when all of them are complete.

    Attributes:
        schema: of this record.
        crl_sdk: version that wrote it.
        source: name of the file of universal embeddings; row i of each output is its row i.
        source_bytes: its size.
        source_dtype: of the embeddings.
        dim: d of the embeddings.
        fingerprint: of the model.
        fingerprint_told_by: where it was found: the `source`, the `bundle`, or only the `bases`.
        outputs: one for each criterion.
    """

    schema: int
    crl_sdk: str
    source: str
    source_bytes: int
    source_dtype: str
    dim: int
    fingerprint: str
    fingerprint_told_by: Literal["source", "bundle", "bases"]
    outputs: tuple[Output, ...]


def project_stored(
    stored: Stored,
    bases: Sequence[Basis],
    directory: Path,
    *,
    fingerprint: str | None = None,
    dtype: OutputDtype = "float32",
    overwrite: bool = False,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Projected:
    """Write the conditional embeddings of each basis as `<criterion>.npy`, and a record.

    The arrays are written beside their places and renamed when all are complete and on the disk.

    Args:
        stored: the universal embeddings.
        bases: at least one, of distinct criteria.
        directory: made if it does not exist.
        fingerprint: of the bundle, if one is named.
        dtype: of the arrays.
        overwrite: replace what is there.
        threads: see `crl_sdk.projection.project_rows`.
        progress: called with the number of rows done so far.

    Returns:
        the record.

    Raises:
        BasisMismatchError: embeddings and bases are not of one model.
        InvalidInputError: there are files already; a row is not finite; shapes do not fit; the
            directory cannot be written or the disk is full.
    """
    model = stored.require_bases(bases, fingerprint)
    check_rows(stored.embeddings, [basis.projection for basis in bases])
    paths = [basis_path(directory, basis.criterion).with_suffix(".npy") for basis in bases]
    if len(set(paths)) != len(paths):
        raise InvalidInputError(f"expected each criterion once, got {[p.stem for p in paths]}")
    there = [path.name for path in [*paths, directory / RECORD] if path.exists()]
    if there and not overwrite:
        raise InvalidInputError(
            f"{directory}: holds {', '.join(there)} already; pass --overwrite to replace them, or "
            "take another directory"
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        sizes = _write_arrays(stored, bases, paths, dtype, threads=threads, progress=progress)
    except OSError as error:
        raise InvalidInputError(
            f"{directory}: cannot be written ({error.strerror}); check the directory and free space"
        ) from error
    record = Projected(
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
            Output(
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
    stored: Stored,
    bases: Sequence[Basis],
    paths: Sequence[Path],
    dtype: OutputDtype,
    **options: Any,
) -> list[int]:
    """Write all arrays, or none. Returns the sizes of the files."""
    rows = len(stored.embeddings)
    with ExitStack() as stack:
        files = []
        for path in paths:
            file = stack.enter_context(
                tempfile.NamedTemporaryFile(
                    dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False
                )
            )
            stack.callback(Path(file.name).unlink, missing_ok=True)
            files.append(file)
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
        for file, array in zip(files, arrays, strict=True):
            array.flush()
            os.fchmod(file.fileno(), 0o644)  # a temporary file is its owner's alone
            os.fsync(file.fileno())
        (paths[0].parent / RECORD).unlink(missing_ok=True)  # it tells of what is now replaced
        for file, path in zip(files, paths, strict=True):
            Path(file.name).replace(path)
    return [path.stat().st_size for path in paths]


def _make_array(file: Any, shape: tuple[int, int], dtype: OutputDtype) -> np.memmap[Any, Any]:
    """Write the header, take the space, and map the rest.

    Space that is taken beforehand makes a full disk an error here; a mapping that finds no space
    later would end the process.
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
