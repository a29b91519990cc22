"""Where pictures come from: directories, tar archives, Parquet files, and lists of paths."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from tarfile import EOFHeaderError  # type: ignore[attr-defined]
from typing import Any, Literal, TypeAlias

from crl_sdk.errors import ImageError, InvalidInputError
from crl_sdk.model._image_files import LeaveOut, printable_path, walk_image_files
from crl_sdk.model._image_formats import SUFFIXES
from crl_sdk.stored._directory import import_pyarrow

Kind: TypeAlias = Literal["directory", "tar", "parquet", "list", "image"]

_TAR = (".tar", ".tar.gz", ".tgz")
_LARGEST = 2**31
"""Largest number of bytes of a member of an archive. Images have a limit of their own."""

_BUFFER = 2**20
"""Number of bytes that are read of a column of a Parquet file at once. Row groups of images can be
larger than memory."""

_ENDED = "crl_ended"
"""Attribute of an archive whose end was read."""

_IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "bytes")
_PATH_COLUMNS = ("path", "file", "filename", "image_path")


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture of a source.

    Attributes:
        id: Name of its row.
        path: Where it is: the path of its file, or of the archive that holds it.
        image: Path or bytes of the image, or why there is none.
    """

    id: str
    path: str
    image: Path | bytes | ImageError


@dataclass(frozen=True, slots=True)
class ParquetColumns:
    """Columns of a Parquet source.

    Attributes:
        image: Column of encoded images: bytes, or a struct with `bytes`, as `datasets` writes.
            Empty if there is none.
        path: Column of paths. Empty if there is none.
        id: Column of names of rows. Empty to name them by file and number.
    """

    image: str = ""
    path: str = ""
    id: str = ""


def kind_of(path: Path) -> Kind:
    """Return what kind of source a path is.

    Raises:
        InvalidInputError: If it does not exist.
    """
    if path.is_dir():
        return "directory"
    if not path.exists():
        raise InvalidInputError(
            f"{path}: expected a directory, a .tar archive, a .parquet file, a .txt list of paths "
            "or an image; this path does not exist"
        )
    name = path.name.lower()
    if name.endswith(_TAR):
        return "tar"
    return {".parquet": "parquet", ".txt": "list"}.get(path.suffix.lower(), "image")  # type: ignore[return-value]


def require_apart(paths: Sequence[Path]) -> None:
    """Check that no source contains another one, whose pictures would then have two rows.

    Raises:
        InvalidInputError: If one does.
    """
    resolved = {path: path.resolve() for path in dict.fromkeys(paths)}
    if len(resolved) != len(paths):
        twice = next(path for path in paths if list(paths).count(path) > 1)
        raise InvalidInputError(f"{twice}: given twice; name each source once")
    owners = {inside: path for path, inside in resolved.items()}
    for path, inside in resolved.items():
        for above in (inside, *inside.parents):
            owner = owners.get(above, path)
            if owner != path:
                raise InvalidInputError(
                    f"{path}: lies in {owner}, which is a source too; leave one out"
                )


def list_files(
    sources: Sequence[Path], working: Path, formats: Sequence[str], leave_out: LeaveOut
) -> Iterator[Path]:
    """Yield the paths of image files: of directories, of lists, and those that are sources.

    Args:
        sources: Sources of these kinds.
        working: Directory to which relative paths are relative, also those that are yielded.
        formats: Formats of images that are looked for in directories.
        leave_out: Called with each directory and file that is left out.
    """
    for source in sources:
        kind = kind_of(working / source)
        if kind == "directory":
            for path in walk_image_files(working / source, formats=formats, leave_out=leave_out):
                yield path if source.is_absolute() else path.relative_to(working)
        elif kind == "list":
            yield from read_list(working / source)
        else:
            yield source


def read_list(path: Path) -> Iterator[Path]:
    """Yield the paths of a text file, one a line. Empty lines are left out."""
    try:
        with path.open("rb") as file:
            for line in file:
                if name := line.rstrip(b"\r\n"):
                    yield Path(os.fsdecode(name))
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot be read ({error.strerror})") from error


def read_tar(path: Path, name: str, formats: Sequence[str]) -> Iterator[Picture]:
    """Yield the pictures of a tar archive, in order. It is read once, from beginning to end.

    If the archive ends early or is damaged, the last picture says so. A second picture of one name
    is left out, and its row says so.

    Args:
        path: Path of the archive, such as a shard of WebDataset.
        name: Its name in the rows.
        formats: Formats whose members are pictures, by their suffixes.

    Raises:
        InvalidInputError: If the file cannot be read, such as while its disk is away.
    """
    suffixes = tuple(suffix for each in formats for suffix in SUFFIXES[each])
    count = 0
    known: dict[str, int] = {}
    try:
        with tarfile.open(path, "r|*", tarinfo=_Header) as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # it would keep all of them
                if not member.isfile() or not member.name.lower().endswith(suffixes):
                    continue
                image = _member(archive, member)
                count += 1
                row = f"{name}/{_printable(member.name)}"
                if (first := known.setdefault(member.name, count)) != count:
                    image = ImageError(
                        f"pictures {first:,} and {count:,} of the archive both have the name "
                        f"{_printable(member.name)}: give each a name of its own", source=row,
                    )  # fmt: skip
                    row = f"{row}#{count}"
                yield Picture(row, name, image)
            if not getattr(archive, _ENDED, False):
                raise tarfile.ReadError("it has no end")
    except OSError as error:
        raise InvalidInputError(
            f"{path}: cannot be read ({error.strerror or error}); when it can, run the same crl "
            "embed with --resume"
        ) from error
    except (tarfile.TarError, EOFError) as error:
        reason = str(error) or "it ends early"
        yield Picture(
            f"{name}#end", name,
            ImageError(
                f"the archive cannot be read further after {count:,} pictures ({reason}): copy it "
                "again, and embed it into another directory", source=name,
            ),
        )  # fmt: skip


class _Header(tarfile.TarInfo):
    """A header that notes the end of its archive. `tarfile` takes a damaged one for an end too."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> _Header:
        """Read the next header."""
        try:
            return super().fromtarfile(tarfile)
        except EOFHeaderError:
            setattr(tarfile, _ENDED, True)
            raise


def _member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | ImageError:
    if member.size > _LARGEST:
        return ImageError(f"the file has {member.size:,} bytes", source=member.name)
    opened = archive.extractfile(member)
    data = opened.read() if opened is not None else b""
    if len(data) < member.size:
        raise tarfile.ReadError(f"it ends within {_printable(member.name)}")
    return data


def find_columns(path: Path, wanted: ParquetColumns) -> ParquetColumns:
    """Return the columns of a Parquet file that hold pictures.

    Args:
        path: Path of the file.
        wanted: Columns that the user named. Others are looked for by usual names.

    Raises:
        InvalidInputError: If a column is missing, or the file is damaged.
        MissingDependencyError: If pyarrow is not installed.
    """
    pa, parquet = import_pyarrow("reading .parquet files")
    try:
        names = parquet.read_schema(path).names
    except (pa.ArrowException, OSError) as error:
        raise InvalidInputError(f"{path}: not a readable .parquet file ({error})") from error
    for option, column in (
        ("--image-column", wanted.image), ("--path-column", wanted.path), ("--id-column", wanted.id)
    ):  # fmt: skip
        if column and column not in names:
            raise InvalidInputError(f"{path}: {option}: expected one of {names}, got {column!r}")
    if wanted.image or wanted.path:
        return wanted
    image = next((name for name in _IMAGE_COLUMNS if name in names), "")
    place = next((name for name in _PATH_COLUMNS if name in names), "")
    if not image and not place:
        raise InvalidInputError(
            f"{path}: expected a column of images or of paths, found {names}: name it with "
            "--image-column or --path-column"
        )
    return ParquetColumns(image, "" if image else place, wanted.id)


def count_parquet(path: Path) -> int:
    """Return the number of rows of a Parquet file."""
    _, parquet = import_pyarrow("reading .parquet files")
    rows: int = parquet.read_metadata(path).num_rows
    return rows


def read_ids(path: Path, column: str) -> Iterator[str]:
    """Yield the values of a column as text."""
    _, parquet = import_pyarrow("reading .parquet files")
    with parquet.ParquetFile(path) as opened:
        for batch in opened.iter_batches(columns=[column]):
            yield from map(str, batch.column(0).to_pylist())


def read_parquet(
    path: Path, name: str, columns: ParquetColumns, first: int, count: int
) -> Iterator[Picture]:
    """Yield pictures of a Parquet file.

    Args:
        path: Path of the file.
        name: Its name in the rows.
        columns: Columns of the file.
        first: Number of the first row.
        count: Number of rows.

    Raises:
        InvalidInputError: If the file is damaged.
    """
    pa, parquet = import_pyarrow("reading .parquet files")
    wanted = [each for each in (columns.image, columns.path, columns.id) if each]
    try:
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER) as opened:
            sizes = [opened.metadata.row_group(i).num_rows for i in range(opened.num_row_groups)]
            starts = list(accumulate(sizes, initial=0))
            groups = [
                i for i in range(len(sizes)) if starts[i] < first + count and starts[i + 1] > first
            ]
            row = starts[groups[0]] if groups else 0
            for batch in opened.iter_batches(batch_size=64, row_groups=groups, columns=wanted):
                for values in batch.to_pylist():
                    if first <= row < first + count:
                        yield _parquet_picture(values, f"{name}#{row}", name, columns)
                    row += 1
    except (pa.ArrowException, OSError) as error:
        raise InvalidInputError(f"{path}: cannot be read ({error}); copy it again") from error


def _parquet_picture(
    values: Mapping[str, Any], row: str, name: str, columns: ParquetColumns
) -> Picture:
    identifier = str(values[columns.id]) if columns.id else row
    if columns.path:
        place = values[columns.path]
        if not isinstance(place, str):
            return Picture(identifier, name, ImageError("expected a path, found none", source=row))
        return Picture(identifier, place, Path(place))
    image = values[columns.image]
    if isinstance(image, Mapping):  # as `datasets` writes
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str):
        return Picture(identifier, image, Path(image))
    if not isinstance(image, bytes):
        kind = "nothing" if image is None else type(image).__name__
        return Picture(
            identifier, name, ImageError(f"expected bytes of an image, found {kind}", source=row)
        )
    return Picture(identifier, name, image)


def _printable(name: str) -> str:
    return printable_path(Path(name))
