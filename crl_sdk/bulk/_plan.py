"""The plan of a job: which pictures make which part. It is made before anything is embedded.

A part follows from its unit of the plan alone, so that it can be made again, in any order, and by
any process that sees the same files.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeAlias

import msgspec
import numpy as np

from crl_sdk.bulk._sources import (
    ParquetColumns,
    Picture,
    count_parquet,
    find_columns,
    kind_of,
    list_files,
    read_ids,
    read_parquet,
    read_tar,
    require_apart,
)
from crl_sdk.errors import InvalidInputError
from crl_sdk.model._image_files import LeaveOut, printable_path
from crl_sdk.storage._atomic_files import make_directory, new_file, write_atomically

PLAN = "plan"
"""Name of the directory of the plan, in `_crl`."""

_UNITS = "units.jsonl"


class Files(msgspec.Struct, frozen=True, tag="files"):
    """Image files, whose paths are in a file of the plan.

    Attributes:
        list: Name of the file. Each path ends with a zero byte.
        count: Number of paths.
    """

    list: str
    count: int


class Tar(msgspec.Struct, frozen=True, tag="tar"):
    """A tar archive."""

    path: str
    count: None = None


class Rows(msgspec.Struct, frozen=True, tag="parquet"):
    """Rows of a Parquet file.

    Attributes:
        path: Path of the file.
        first: Number of the first row.
        count: Number of rows.
        columns: Names of the columns: image, path and id.
    """

    path: str
    first: int
    count: int
    columns: tuple[str, str, str]


Unit: TypeAlias = Files | Tar | Rows
"""What makes a part."""


def make_plan(
    directory: Path,
    sources: Sequence[Path],
    *,
    working: Path,
    formats: Sequence[str],
    part_rows: int,
    columns: ParquetColumns,
    leave_out: LeaveOut,
) -> int:
    """Write the plan of a job, and return its number of parts.

    Image files of all sources come first. Each archive is a part, and each Parquet file becomes
    parts of its own.

    Args:
        directory: Directory for the plan. What an interrupted planning left there is replaced.
        sources: Sources, see `BulkJob`.
        working: Directory to which relative paths are relative.
        formats: Formats of images that are looked for.
        part_rows: Largest number of rows of a part.
        columns: Columns of Parquet files.
        leave_out: Called with each directory and file that is left out.

    Raises:
        InvalidInputError: If a source is missing or damaged, there is no picture, or one is named
            twice.
    """
    make_directory(directory, InvalidInputError)
    require_apart([working / source for source in sources])
    kinds = {source: kind_of(working / source) for source in sources}
    plain = [source for source in sources if kinds[source] in ("directory", "list", "image")]
    tables = {
        source: find_columns(working / source, columns)
        for source in sources
        if kinds[source] == "parquet"
    }
    if columns.id or "list" in kinds.values():  # otherwise no two rows have one name
        _require_unlike(lambda: _list_ids(plain, tables, working, formats))

    def units() -> Iterator[Unit]:
        files = list_files(plain, working, formats, leave_out)
        number = 0
        while chunk := list(islice(files, part_rows)):
            name = f"{number:05d}.paths"
            paths = b"".join(os.fsencode(path) + b"\0" for path in chunk)
            write_atomically(directory / name, paths, InvalidInputError)
            yield Files(name, len(chunk))
            number += 1
        for source in sources:
            if kinds[source] == "tar":
                yield Tar(str(source))
            elif source in tables:
                chosen, rows = tables[source], count_parquet(working / source)
                for first in range(0, rows, part_rows):
                    yield Rows(
                        str(source), first, min(part_rows, rows - first),
                        (chosen.image, chosen.path, chosen.id),
                    )  # fmt: skip

    count = 0
    with new_file(directory / _UNITS, InvalidInputError) as file:
        for unit in units():
            file.write(msgspec.json.encode(unit) + b"\n")
            count += 1
    if not count:
        raise InvalidInputError(
            f"{sources[0]}: expected pictures, found none; looked for {', '.join(formats)}"
        )
    return count


def read_plan(directory: Path) -> Iterator[Unit]:
    """Yield the units of a plan, in order.

    Raises:
        InvalidInputError: If the plan is missing or damaged.
    """
    path = directory / _UNITS
    try:
        with path.open("rb") as file:
            for line in file:
                yield msgspec.json.decode(line, type=Unit)
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot be read ({error.strerror})") from error
    except msgspec.MsgspecError as error:
        raise InvalidInputError(f"{path}: damaged ({error}); embed into a new directory") from error


def read_unit(
    plan: Path, unit: Unit, *, working: Path, formats: Sequence[str]
) -> Iterator[Picture]:
    """Yield the pictures of a unit, in order.

    Args:
        plan: Directory of the plan.
        unit: A unit of it.
        working: Directory to which relative paths are relative.
        formats: Formats of images.

    Raises:
        InvalidInputError: If the plan or a Parquet file cannot be read.
    """
    if isinstance(unit, Tar):
        yield from read_tar(working / unit.path, printable_path(Path(unit.path)), formats)
    elif isinstance(unit, Rows):
        name = printable_path(Path(unit.path))
        columns = ParquetColumns(*unit.columns)
        for each in read_parquet(working / unit.path, name, columns, unit.first, unit.count):
            image = working / each.image if isinstance(each.image, Path) else each.image
            yield Picture(each.id, each.path, image)
    else:
        try:
            paths = (plan / unit.list).read_bytes().split(b"\0")[:-1]
        except OSError as error:
            raise InvalidInputError(
                f"{plan / unit.list}: cannot be read ({error.strerror})"
            ) from error
        for path in map(Path, map(os.fsdecode, paths)):
            name = printable_path(path)
            yield Picture(name, name, working / path)


def _list_ids(
    plain: Sequence[Path],
    tables: Mapping[Path, ParquetColumns],
    working: Path,
    formats: Sequence[str],
) -> Iterator[tuple[str, str]]:
    """Yield the names of all rows that could be equal, and where they come from."""
    for source in plain:
        for path in list_files([source], working, formats, lambda _: None):
            yield printable_path(path), str(source)
    for source, columns in tables.items():
        if columns.id:
            for identifier in read_ids(working / source, columns.id):
                yield identifier, str(source)


def _require_unlike(list_ids: Callable[[], Iterator[tuple[str, str]]]) -> None:
    """Check that no two rows have one name. It takes eight bytes of memory for each name."""
    seen = array("Q", (_digest(name) for name, _ in list_ids()))
    digests = np.frombuffer(seen, np.uint64)
    digests.sort()
    twice = set(digests[1:][digests[1:] == digests[:-1]].tolist())
    if not twice:
        return
    places: dict[str, str] = {}
    for name, place in list_ids():
        if _digest(name) not in twice:
            continue
        if name in places:
            raise InvalidInputError(
                f"{place}: {name!r} is the name of two rows"
                + (f", the other one in {places[name]}" if places[name] != place else "")
                + ": each picture needs a name of its own; leave one out"
            )
        places[name] = place


def _digest(name: str) -> int:
    data = name.encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
