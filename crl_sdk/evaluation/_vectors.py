"""Read stored vectors with labels, and the vectors of texts, for `crl eval vectors`.

docs/EVAL.md describes the layout of the files.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crl_sdk._criterion import normalise_criterion
from crl_sdk.errors import InvalidInputError, MissingDependencyError
from crl_sdk.evaluation._criterion_texts import CriterionTexts
from crl_sdk.evaluation._dataset import Labels
from crl_sdk.model._fingerprint import require_same_model
from crl_sdk.projection._projection import check_embeddings
from crl_sdk.projection._row_dtypes import is_row_dtype

TEXT, WORDS = "text:", "words:"
"""Start of the names of the arrays with the text vectors and the words of a criterion."""

BACKGROUND = "background"

_UNIT_TOLERANCE = 1e-3
"""Largest deviation of a norm from 1 that passes as rounding. That of float16 is 3e-4."""
_SHOWN = 8


class VectorFile:
    """A `.npz` or `.parquet` file of named arrays. Arrays are read one by one.

    Attributes:
        path: Path of the file.
        names: Names of its arrays or columns.
    """

    def __init__(self, path: Path, renamed: Mapping[str, str] | None = None) -> None:
        """Read the names of the arrays of a file.

        Args:
            path: The `.npz` or `.parquet` file.
            renamed: Name in the file of arrays that have another name there than in docs/EVAL.md.

        Raises:
            InvalidInputError: If the file cannot be read or is of another type.
            MissingDependencyError: If pyarrow is needed for `.parquet` and not installed.
        """
        self.path = path
        self._renamed = dict(renamed or {})
        if path.suffix not in (".npz", ".parquet"):
            raise InvalidInputError(f"{path}: expected a .npz or .parquet file of vectors")
        try:
            if path.suffix == ".npz":
                with np.load(path, allow_pickle=False) as archive:
                    self.names: tuple[str, ...] = tuple(archive.files)
            else:
                self.names = tuple(_parquet().read_schema(path).names)
        except OSError as error:
            why = error.strerror or str(error)
            raise InvalidInputError(f"{path}: cannot be read ({why}); check the path") from error
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            raise InvalidInputError(
                f"{path}: not a valid {path.suffix} file ({error}); write it again"
            ) from error

    def __contains__(self, name: str) -> bool:
        """Whether the file has an array."""
        return self._renamed.get(name, name) in self.names

    def read(self, name: str, purpose: str) -> NDArray[Any]:
        """Read an array.

        Args:
            name: Name of the array.
            purpose: What the array must hold, for the message.

        Raises:
            InvalidInputError: If there is no such array, or it contains Python objects.
        """
        stored = self._renamed.get(name, name)
        if stored not in self.names:
            hint = "" if name in self._renamed else f", or say which one it is: --array {name}=NAME"
            raise InvalidInputError(
                f"{self.path}: expected an array {stored!r} with {purpose}, found "
                f"{', '.join(self.names) or 'no arrays'}: add it{hint}"
            )
        if self.path.suffix == ".parquet":
            return _read_column(self.path, stored)
        try:
            with np.load(self.path, allow_pickle=False) as archive:
                return np.asarray(archive[stored])
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            raise InvalidInputError(
                f"{self.path}: the array {stored!r} cannot be read ({error}); write vectors as "
                "floats and labels as strings, such as np.array(labels, dtype=str)"
            ) from error

    def fingerprint(self) -> str | None:
        """Return the fingerprint of the model that made the vectors; None if it is not stored."""
        if self.path.suffix == ".npz" and "fingerprint" in self.names:
            return str(self.read("fingerprint", "the fingerprint of the model"))
        if self.path.suffix == ".parquet":
            stored = (_parquet().read_schema(self.path).metadata or {}).get(b"crl_fingerprint")
            return None if stored is None else str(stored.decode())
        return None


@dataclass(frozen=True, slots=True, eq=False)
class VectorSet:
    """Image vectors with labels.

    Attributes:
        images: Image vectors, shape (n, d), float32, unit rows.
        labels: Labels by name of their column. Images with an empty label and images of small
            classes are not in it.
        groups: Group of each image, shape (n,), int64. Without groups, each image is its own.
        grouped: Whether the user gave groups.
        notes: Remarks on what was changed or left out.
    """

    images: NDArray[np.float32]
    labels: Mapping[str, Labels]
    groups: NDArray[np.int64]
    grouped: bool
    notes: tuple[str, ...] = field(default=())


def read_images(file: VectorFile) -> tuple[NDArray[np.float32], list[str]]:
    """Read image vectors. They are scaled to unit length.

    Returns:
        Image vectors, shape (n, d), float32, unit rows; and a remark if they had another length.

    Raises:
        InvalidInputError: If the array is missing or has the wrong shape or dtype, or a vector
            holds NaN or is zero.
    """
    return _unit_rows(file.read("image", "the image vectors (n, d)"), f"{file.path}: image")


def read_labels(
    file: VectorFile,
    images: NDArray[np.float32],
    columns: Sequence[str],
    group: str | None,
    smallest: int,
) -> VectorSet:
    """Read the labels and the groups of image vectors.

    Args:
        file: The file.
        images: Its image vectors, shape (n, d), float32, unit rows.
        columns: Names of the label columns.
        group: Name of the column of groups; None for `group`, if the file has it.
        smallest: Smallest number of groups (without groups: images) of a class. Smaller classes are
            left out.

    Raises:
        InvalidInputError: If a column is missing or has the wrong shape or dtype, or fewer than two
            classes are left.
    """
    notes: list[str] = []
    wanted = group or ("group" if "group" in file else None)
    groups = np.arange(len(images))
    if wanted is not None:
        names = _strings(file, wanted, len(images), "groups")
        empty = names == ""
        groups = np.unique(names, return_inverse=True)[1].reshape(-1).astype(np.int64)
        groups[empty] = groups.max() + 1 + np.arange(int(empty.sum()))
        if empty.any():
            notes.append(
                f"{wanted}: {int(empty.sum())} of {len(images)} images have no group and are "
                "treated as groups of one image"
            )
    what = "images" if wanted is None else "groups"
    labels = {}
    for column in columns:
        names = _strings(file, column, len(images), "labels")
        kept = names != ""
        if not kept.all():
            notes.append(
                f"{column}: {int((~kept).sum())} of {len(names)} images have an empty label and "
                "are left out"
            )
        values = np.unique(names[kept])
        sizes = {v: len(np.unique(groups[names == v])) for v in values}
        small = [v for v in values if sizes[v] < smallest]
        if small:
            left = np.isin(names, small)
            notes.append(
                f"{column}: {int(left.sum())} images of {len(small)} classes with fewer than "
                f"{smallest} {what} are left out: {_listed([f'{v} ({sizes[v]})' for v in small])}"
            )
            kept &= ~left
        files = np.flatnonzero(kept)
        classes, codes = np.unique(names[files], return_inverse=True)
        if len(classes) < 2:
            raise InvalidInputError(
                f"{file.path}: {column}: expected two classes or more with at least {smallest} "
                f"{what} each, found {len(classes)} of {len(values)}: pass fewer "
                "--shots, a smaller --min-class-size, or another label column"
            )
        labels[column] = Labels(
            files.astype(np.int64), codes.reshape(-1).astype(np.int64), tuple(map(str, classes))
        )
    return VectorSet(images, labels, groups, wanted is not None, tuple(notes))


def read_text_vectors(
    files: Sequence[VectorFile], words: Mapping[str, Sequence[str]], dim: int
) -> tuple[dict[str, CriterionTexts], list[str]]:
    """Read the text vectors of all criteria.

    A file holds arrays `text:CRITERION` with optional `words:CRITERION`, or it is a bank: `text`,
    `word` and optional `kind`, the criterion of each word. A file of images may have neither, or an
    array `text` without `word`, which is ignored.

    Args:
        files: The files.
        words: Words of a criterion, to be taken from the banks. They replace the bank's own choice.
        dim: Number of dimensions of the image vectors.

    Returns:
        Texts of each criterion, and remarks on what was changed.

    Raises:
        InvalidInputError: If an array is missing or wrong, a criterion is given twice, or a word is
            in no bank.
    """
    found: dict[str, CriterionTexts] = {}
    notes: list[str] = []
    banks: list[tuple[VectorFile, NDArray[np.float32], NDArray[Any]]] = []

    def add(criterion: str, rows: NDArray[np.float32], names: Sequence[str], source: str) -> None:
        key = normalise_criterion(criterion)
        if key in found:
            raise InvalidInputError(
                f"{source}: the texts of {key} are already given by {found[key].source}: leave "
                "one of the two out"
            )
        found[key] = CriterionTexts(tuple(map(str, names)), rows, (), source)

    for file in files:
        for name in (each for each in file.names if each.startswith(TEXT)):
            criterion = name.removeprefix(TEXT)
            rows, own = _text_rows(file, name, dim)
            notes += own
            if WORDS + criterion in file:
                names = _strings(file, WORDS + criterion, len(rows), "texts")
            else:
                names = np.array([f"text {i + 1}" for i in range(len(rows))])
            add(criterion, rows, list(names), str(file.path))
        has_images = "image" in file
        if (
            not has_images
            and "text" not in file
            and not any(n.startswith(TEXT) for n in file.names)
        ):
            raise InvalidInputError(
                f"{file.path}: expected text vectors: arrays {TEXT}CRITERION, or a bank of words "
                f"with text, word and kind; found {', '.join(file.names) or 'no arrays'}"
            )
        if "text" in file and ("word" in file or not has_images):
            rows, own = _text_rows(file, "text", dim)
            notes += own
            bank = _strings(file, "word", len(rows), "words")
            banks.append((file, rows, bank))
            if "kind" in file:
                kinds = _strings(file, "kind", len(rows), "criteria")
                for kind in np.unique(kinds[kinds != ""]):
                    if normalise_criterion(str(kind)) not in words:
                        at = kinds == kind
                        add(str(kind), rows[at], list(bank[at]), str(file.path))
    for criterion, wanted in words.items():
        known = {str(word).casefold() for _, _, bank in banks for word in bank}
        missing = [word for word in wanted if word.casefold() not in known]
        if missing or not banks:
            raise InvalidInputError(
                f"--words: {criterion}: {_listed(missing)} not found in "
                + (
                    f"the bank {', '.join(str(file.path) for file, _, _ in banks)}: correct the "
                    "list, or add vectors of these words to the bank"
                    if banks
                    else "any bank: pass --texts FILE with the arrays text (k, d) and word (k,)"
                )
            )
        chosen = {word.casefold() for word in wanted}
        picked = [
            (rows[i], str(bank[i]))
            for _, rows, bank in banks
            for i in range(len(bank))
            if str(bank[i]).casefold() in chosen
        ]
        add(
            criterion, np.array([row for row, _ in picked]), [word for _, word in picked],
            ", ".join(str(file.path) for file, _, _ in banks),
        )  # fmt: skip
    return found, notes


def read_background(
    files: Sequence[VectorFile],
    name: str | None,
    known: dict[str, CriterionTexts],
    dim: int,
) -> NDArray[np.float32] | None:
    """Read the vectors of generic texts.

    Args:
        files: The files.
        name: Name of an array, or of a criterion in `known`, which is then removed from it. None
            for the array `background`, if a file has it.
        known: Texts of each criterion.
        dim: Number of dimensions of the image vectors.

    Returns:
        Vectors, shape (n, d), float32, unit rows; None if there are none.

    Raises:
        InvalidInputError: If no file has the array, or it has the wrong shape or dtype.
    """
    if name is not None and normalise_criterion(name) in known:
        return known.pop(normalise_criterion(name)).embeddings
    for file in files:
        if (name or BACKGROUND) in file:
            return _text_rows(file, name or BACKGROUND, dim)[0]
    if name is None:
        return None
    raise InvalidInputError(
        f"--background: expected an array of {', '.join(str(file.path) for file in files)}, or one "
        f"of the criteria {', '.join(known) or '(none)'}, got {name!r}"
    )


def require_one_space(files: Sequence[VectorFile]) -> None:
    """Check that vectors come from one model, if the files say from which.

    Raises:
        BasisMismatchError: If two files have different fingerprints.
    """
    known = [(file, mark) for file in files if (mark := file.fingerprint()) is not None]
    for file, mark in known[1:]:
        require_same_model(
            str(file.path), mark, known[0][1], used_with=str(known[0][0].path),
            remedy="vectors of different models cannot be compared; embed both with one model",
        )  # fmt: skip


def _text_rows(file: VectorFile, name: str, dim: int) -> tuple[NDArray[np.float32], list[str]]:
    rows, notes = _unit_rows(file.read(name, "text vectors (k, d)"), f"{file.path}: {name}")
    if rows.shape[1] != dim:
        raise InvalidInputError(
            f"{file.path}: {name}: expected text vectors of {dim} dimensions, as the image vectors "
            f"have, got {rows.shape[1]}: embed texts and images with the same model"
        )
    return rows, notes


def _unit_rows(given: NDArray[Any], what: str) -> tuple[NDArray[np.float32], list[str]]:
    """Check vectors and scale them to unit length. Also return a remark if they did not have it."""
    if given.ndim != 2 or 0 in given.shape or not is_row_dtype(given.dtype):
        raise InvalidInputError(
            f"{what}: expected vectors (n, d) of a float dtype or int8 with n, d >= 1, got "
            f"{given.shape} {given.dtype}"
        )
    try:
        rows = check_embeddings(given, given.shape[1])
    except InvalidInputError as error:
        raise InvalidInputError(f"{what}: {error}") from error
    norms = np.linalg.norm(rows.astype(np.float64), axis=1)
    if not norms.all():
        raise InvalidInputError(
            f"{what}: {int((norms == 0).sum())} of {len(rows)} vectors are zero, the first at row "
            f"{int(np.flatnonzero(norms == 0)[0])}: leave out the rows of images that failed"
        )
    off = np.abs(norms - 1.0) > _UNIT_TOLERANCE
    notes = []
    if off.any():
        notes.append(
            f"{what}: {int(off.sum())} of {len(rows)} vectors do not have unit length (norms "
            f"{norms.min():.3g} to {norms.max():.3g}); they were scaled to it"
        )
    return np.asarray(rows / norms[:, None], np.float32), notes


def _strings(file: VectorFile, name: str, count: int, what: str) -> NDArray[Any]:
    """Read a column as strings without surrounding blanks."""
    array = file.read(name, f"{what} ({count},)")
    if array.shape != (count,) or array.dtype.kind not in "USiub":
        raise InvalidInputError(
            f"{file.path}: {name}: expected {what} ({count},) of strings or integers, one for each "
            f"vector, got {array.shape} {array.dtype}"
        )
    try:
        return np.char.strip(array.astype(str))
    except UnicodeDecodeError as error:
        raise InvalidInputError(
            f"{file.path}: {name}: expected {what} as strings, got bytes that are not ASCII: write "
            "them with dtype=str"
        ) from error


def _parquet() -> Any:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise MissingDependencyError("pyarrow", "parquet", "reading .parquet files") from error
    return parquet


def _read_column(path: Path, name: str) -> NDArray[Any]:
    """Read a column: lists as an array (n, d), anything else as (n,). Null becomes ''."""
    import pyarrow

    column = _parquet().read_table(path, columns=[name])[name].combine_chunks()
    kind = column.type
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        lengths = np.unique(column.value_lengths().to_numpy(zero_copy_only=False))
    elif pyarrow.types.is_fixed_size_list(kind):
        lengths = np.array([kind.list_size])
    elif pyarrow.types.is_floating(kind):
        return np.asarray(column.to_numpy(zero_copy_only=False))
    else:
        return np.array(["" if value is None else str(value) for value in column.to_pylist()])
    if column.null_count or len(lengths) != 1:
        raise InvalidInputError(
            f"{path}: {name}: expected a list of one length in every row, got {column.null_count} "
            f"nulls and lengths {lengths.min() if len(lengths) else 0} to "
            f"{lengths.max() if len(lengths) else 0}"
        )
    values = column.flatten().to_numpy(zero_copy_only=False)
    return np.asarray(values).reshape(-1, int(lengths[0]))


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
