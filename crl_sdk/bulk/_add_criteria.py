"""Further criteria for a directory of embeddings: no image is read again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from crl_sdk.basis._basis import Basis
from crl_sdk.bulk._job import BulkJob, keep_basis, require_column_name
from crl_sdk.bulk._part import BASIS_VERSION, list_column, open_writer
from crl_sdk.errors import InvalidInputError
from crl_sdk.projection._row_dtypes import decode_rows, require_row_dtype
from crl_sdk.storage._atomic_files import new_file
from crl_sdk.stored._directory import ERROR, UNIVERSAL, import_pyarrow, to_numpy


def add_criteria(
    path: Path, bases: Sequence[Basis], progress: Callable[[int], None] = lambda _: None
) -> None:
    """Add a column for each criterion to every part, from the stored universal embeddings.

    Each part is replaced as a whole. If it ends early, call it again with the same bases: parts
    that have the columns already are left alone. Columns of an older basis are replaced.

    Args:
        path: Directory of embeddings whose job is complete.
        bases: Bases of its model.
        progress: Called after each part with the number of rows so far.

    Raises:
        InvalidInputError: If the job is not complete, another process works on the directory, a
            part cannot be read or written, or a criterion has the name of another column.
        BasisMismatchError: If a basis was made for another model.
    """
    with BulkJob.resume(path) as job:
        manifest = job.manifest
        job.finish()
        for basis in bases:
            basis.require_fingerprint(manifest.fingerprint)
            require_column_name(basis.criterion)
            require_row_dtype(manifest.dtype, basis.projection.post)
            keep_basis(path, basis)
        rows = 0
        for part in job.parts():
            rows += _extend(part, bases, manifest.dtype)
            progress(rows)
        versions = {basis.criterion: basis.sha256() for basis in bases}
        job.replace_manifest(
            msgspec.structs.replace(job.manifest, criteria={**manifest.criteria, **versions})
        )


def _extend(part: Path, bases: Sequence[Basis], dtype: str) -> int:
    """Add columns to a part, and return its number of rows."""
    pa, parquet = import_pyarrow("reading .parquet files")
    try:
        with parquet.ParquetFile(part) as opened:
            schema = opened.schema_arrow
            known = schema.metadata or {}
            versions = {f"{BASIS_VERSION}{each.criterion}": each.sha256() for each in bases}
            if any(known.get(key.encode()) != value.encode() for key, value in versions.items()):
                with new_file(part, InvalidInputError) as file:
                    _rewrite(opened, file, bases, dtype, {**known, **versions})
            rows: int = opened.metadata.num_rows
            return rows
    except (pa.ArrowException, OSError) as error:
        raise InvalidInputError(f"{part}: cannot be read ({error})") from error


def _rewrite(
    opened: Any, file: Any, bases: Sequence[Basis], dtype: str, metadata: Mapping[Any, Any]
) -> None:
    pa, parquet = import_pyarrow("writing .parquet files")
    writer = None
    for group in range(opened.num_row_groups):
        table = opened.read_row_group(group)
        column = table[UNIVERSAL].combine_chunks()
        good = column.is_valid().to_numpy(zero_copy_only=False)
        universal = decode_rows(to_numpy(column.drop_null()))
        for basis in bases:
            rows = np.full((len(good), basis.projection.output_dim), np.nan, np.float32)
            rows[good] = basis.projection.apply(universal)
            added = list_column(pa, rows, dtype)
            field = pa.field(basis.criterion, added.type)
            if basis.criterion in table.column_names:
                place = table.column_names.index(basis.criterion)
                table = table.set_column(place, field, added)
            else:
                table = table.add_column(table.column_names.index(ERROR), field, added)
        if writer is None:
            schema = table.schema.with_metadata(metadata)
            writer = open_writer(parquet, file, schema)
        writer.write_table(table.cast(schema))
    if writer is not None:
        writer.close()
