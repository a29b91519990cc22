"""Pictures with labels by several criteria, and the error of a data set in the wrong layout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crl_sdk.errors import InvalidInputError

_SHOWN = 8


class DataSetError(InvalidInputError):
    """A directory is not the data set it was given as: the message says what was expected."""


@dataclass(frozen=True, slots=True, eq=False)
class Labels:
    """What a criterion says of pictures.

    Attributes:
        files: positions of the pictures in `Labelled.files`, (n,) int64, each once.
        codes: each one's value, (n,) int64 into `values`.
        values: the names of the classes.
    """

    files: NDArray[np.int64]
    codes: NDArray[np.int64]
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Labelled:
    """A data set for clustering and few-shot classification.

    Attributes:
        files: the pictures, each once.
        labels: criterion → its labels.
        notes: what the user should know of how it was read.
    """

    files: tuple[Path, ...]
    labels: Mapping[str, Labels]
    notes: tuple[str, ...] = ()

    def part(self, count: int, seed: int = 0) -> Labelled:
        """Give a random part: for trying things, since its figures are not the benchmark's.

        Args:
            count: pictures to keep; all if there are no more.
            seed: equal seeds give equal parts.

        Raises:
            InvalidInputError: count is below 1.
        """
        if count < 1:
            raise InvalidInputError(f"expected at least one picture, got {count}")
        if count >= len(self.files):
            return self
        chosen = np.sort(np.random.default_rng(seed).permutation(len(self.files))[:count])
        note = f"a random part: {count} of {len(self.files)} pictures, not the benchmark"
        return self._kept(chosen, self.labels, (*self.notes, note))

    def only(self, criteria: Sequence[str]) -> Labelled:
        """Give the labels of some criteria, with no pictures but theirs.

        Raises:
            KeyError: one is not among `labels`.
        """
        labels = {criterion: self.labels[criterion] for criterion in criteria}
        used = np.unique(np.concatenate([own.files for own in labels.values()]))
        return self._kept(used, labels, self.notes)

    def _kept(
        self, chosen: NDArray[np.int64], labels: Mapping[str, Labels], notes: tuple[str, ...]
    ) -> Labelled:
        """Keep the pictures at `chosen` (ascending), and what the labels say of them."""
        place = np.full(len(self.files), -1, np.int64)
        place[chosen] = np.arange(len(chosen))
        kept = {}
        for criterion, own in labels.items():
            there = place[own.files] >= 0
            kept[criterion] = Labels(place[own.files[there]], own.codes[there], own.values)
        return Labelled(tuple(self.files[i] for i in chosen), kept, notes)


def require_directory(root: Path, layout: str) -> None:
    """Refuse what is not a directory.

    Args:
        root: as the user gave it.
        layout: what the data set looks like, for the message.

    Raises:
        DataSetError: it is missing or not a directory.
    """
    if not root.is_dir():
        found = "a file" if root.exists() else "nothing"
        raise DataSetError(f"{root}: expected {layout}; found {found} there: check --data")


def wrong_layout(root: Path, layout: str, more: str = "") -> DataSetError:
    """Make the error that says what was expected and what lies there instead."""
    try:
        names = sorted(each.name + "/" * each.is_dir() for each in root.iterdir())
    except OSError as error:
        names = [f"({error.strerror})"]
    shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" * (len(names) > _SHOWN))
    return DataSetError(
        f"{root}: expected {layout}; found {shown or 'an empty directory'}"
        + (f". {more}" if more else "; docs/EVAL.md tells where to get it")
    )


def require_files(root: Path, files: Iterable[Path]) -> None:
    """Refuse a data set that lacks pictures.

    Args:
        root: of the data set, for the message.
        files: that it names.

    Raises:
        DataSetError: some do not exist; the message counts them and names the first.
    """
    wanted = list(files)
    missing = [path for path in wanted if not path.is_file()]
    if missing:
        raise DataSetError(
            f"{root}: {len(missing)} of {len(wanted)} pictures are missing, the first is "
            f"{missing[0]}: unpack the data set again, figures on a part of it would not be its own"
        )


def codes_of(
    root: Path, criterion: str, names: Sequence[str], values: Sequence[str]
) -> NDArray[np.int64]:
    """Turn class names into positions in `values`.

    Raises:
        DataSetError: a name is not among them.
    """
    codes = {value: code for code, value in enumerate(values)}
    unknown = sorted({name for name in names if name not in codes})
    if unknown:
        raise DataSetError(
            f"{root}: expected a {criterion} of {', '.join(values)}, found "
            f"{', '.join(unknown[:_SHOWN])}"
        )
    return np.array([codes[name] for name in names], np.int64)
