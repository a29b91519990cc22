"""Data sets of labelled images, and checks of their layout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crl_sdk.errors import InvalidInputError

_SHOWN = 8


class DataSetError(InvalidInputError):
    """A directory does not hold the expected data set."""


@dataclass(frozen=True, slots=True, eq=False)
class Labels:
    """Labels of images for one criterion.

    Attributes:
        files: Positions of the labelled images in `LabelledImages.files`, shape (n,), int64, each
            once.
        codes: Label of each image as a position in `values`, shape (n,), int64.
        values: Names of the classes.
    """

    files: NDArray[np.int64]
    codes: NDArray[np.int64]
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class LabelledImages:
    """Data set for clustering and few-shot classification.

    Attributes:
        files: Images, each once.
        labels: Labels of each criterion.
        notes: Remarks on how the data set was read.
    """

    files: tuple[Path, ...]
    labels: Mapping[str, Labels]
    notes: tuple[str, ...] = ()

    def sample(self, count: int, seed: int = 0) -> LabelledImages:
        """Return a random sample of the images. Its results are not those of the benchmark.

        Args:
            count: Number of images to keep. All are kept if there are not more.
            seed: Seed of the choice. Equal seeds give equal samples.

        Raises:
            InvalidInputError: If `count` is below 1.
        """
        if count < 1:
            raise InvalidInputError(f"expected at least one image, got {count}")
        if count >= len(self.files):
            return self
        chosen = np.sort(np.random.default_rng(seed).permutation(len(self.files))[:count])
        note = f"a random sample of {count} of {len(self.files)} images, not the whole benchmark"
        return self._kept(chosen, self.labels, (*self.notes, note))

    def select(self, criteria: Sequence[str]) -> LabelledImages:
        """Return the labels of some criteria, and the images that have such a label.

        Args:
            criteria: Names of the criteria.

        Raises:
            KeyError: If a criterion is not in `labels`.
        """
        labels = {criterion: self.labels[criterion] for criterion in criteria}
        used = np.unique(np.concatenate([own.files for own in labels.values()]))
        return self._kept(used, labels, self.notes)

    def _kept(
        self, chosen: NDArray[np.int64], labels: Mapping[str, Labels], notes: tuple[str, ...]
    ) -> LabelledImages:
        """Keep the images at the ascending positions `chosen`, and their labels."""
        place = np.full(len(self.files), -1, np.int64)
        place[chosen] = np.arange(len(chosen))
        kept = {}
        for criterion, own in labels.items():
            there = place[own.files] >= 0
            kept[criterion] = Labels(place[own.files[there]], own.codes[there], own.values)
        return LabelledImages(tuple(self.files[i] for i in chosen), kept, notes)


def require_directory(root: Path, layout: str) -> None:
    """Check that a path is a directory.

    Args:
        root: Path that the user gave.
        layout: Description of the data set's layout, for the message.

    Raises:
        DataSetError: If the path does not exist or is not a directory.
    """
    if not root.is_dir():
        found = "a file" if root.exists() else "nothing"
        raise DataSetError(f"{root}: expected {layout}; found {found} there: check --data")


def wrong_layout(root: Path, layout: str, more: str = "") -> DataSetError:
    """Return an error that says which layout was expected and what was found."""
    try:
        names = sorted(each.name + "/" * each.is_dir() for each in root.iterdir())
    except OSError as error:
        names = [f"({error.strerror})"]
    shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" * (len(names) > _SHOWN))
    return DataSetError(
        f"{root}: expected {layout}; found {shown or 'an empty directory'}"
        + (f". {more}" if more else "; docs/EVAL.md says where to get it")
    )


def require_files(root: Path, files: Iterable[Path]) -> None:
    """Check that all images of a data set exist.

    Args:
        root: Directory of the data set, for the message.
        files: Files that the data set names.

    Raises:
        DataSetError: If some do not exist. The message counts them and names the first.
    """
    wanted = list(files)
    missing = [path for path in wanted if not path.is_file()]
    if missing:
        raise DataSetError(
            f"{root}: {len(missing)} of {len(wanted)} images are missing, the first is "
            f"{missing[0]}: unpack the data set again, results need all of its images"
        )


def encode_labels(
    root: Path, criterion: str, names: Sequence[str], values: Sequence[str]
) -> NDArray[np.int64]:
    """Return the position of each class name in `values`, shape (n,), int64.

    Args:
        root: File or directory that the names come from, for the message.
        criterion: Criterion of the names, for the message.
        names: Class names of n images.
        values: All class names.

    Raises:
        DataSetError: If a name is not in `values`.
    """
    codes = {value: code for code, value in enumerate(values)}
    unknown = sorted({name for name in names if name not in codes})
    if unknown:
        raise DataSetError(
            f"{root}: expected a {criterion} of {', '.join(values)}, found "
            f"{', '.join(unknown[:_SHOWN])}"
        )
    return np.array([codes[name] for name in names], np.int64)
