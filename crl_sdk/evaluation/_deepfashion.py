"""DeepFashion's attribute images with the retrieval lists of ASEN: queries, candidates, values.

Layout: github.com/Maryeon/asenpp (`data.zip`), with DeepFashion's `img/` next to the lists.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crl_sdk.evaluation._dataset import (
    DataSetError,
    require_directory,
    require_files,
    wrong_layout,
)

ATTRIBUTES = ("texture", "fabric", "shape", "part", "style")
"""Attributes, in the order of their numbers in the lists. ASEN calls them `texture-related` etc."""

VALUES = (156, 218, 180, 216, 230)
"""Number of values of each attribute, from `config/DeepFashion/DeepFashion.yaml` of ASEN++."""

SPLITS = ("test", "valid")


@dataclass(frozen=True, slots=True, eq=False)
class AttributeImages:
    """Queries or candidates of an attribute.

    Attributes:
        files: Positions of the images in `DeepFashion.files`, shape (n,), int64.
        values: Value of the attribute for each image, shape (n,), int64.
    """

    files: NDArray[np.int64]
    values: NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class DeepFashion:
    """Retrieval task of DeepFashion.

    Attributes:
        files: Images that occur in a list.
        queries: Queries of each attribute.
        candidates: Candidates of each attribute.
        notes: Remarks on how the data set was read.
    """

    files: tuple[Path, ...]
    queries: Mapping[str, AttributeImages]
    candidates: Mapping[str, AttributeImages]
    notes: tuple[str, ...] = ()

    def sample(self, count: int, seed: int = 0) -> DeepFashion:
        """Return a random sample of the images. Its results are not those of the benchmark.

        Args:
            count: Number of images to keep.
            seed: Seed of the choice. Equal seeds give equal samples.

        Raises:
            DataSetError: If an attribute would have no query or no candidate.
        """
        if count >= len(self.files):
            return self
        chosen = np.sort(np.random.default_rng(seed).permutation(len(self.files))[:count])
        place = np.full(len(self.files), -1, np.int64)
        place[chosen] = np.arange(count)

        def kept(sides: Mapping[str, AttributeImages]) -> dict[str, AttributeImages]:
            return {
                name: AttributeImages(place[side.files][place[side.files] >= 0],
                           side.values[place[side.files] >= 0])
                for name, side in sides.items()
            }  # fmt: skip

        queries, candidates = kept(self.queries), kept(self.candidates)
        for name in ATTRIBUTES:
            if not len(queries[name].files) or not len(candidates[name].files):
                raise DataSetError(
                    f"a sample of {count} images has no query or no candidate for {name}: take more"
                )
        note = f"a random sample of {count} of {len(self.files)} images, not the whole benchmark"
        files = tuple(self.files[i] for i in chosen)
        return DeepFashion(files, queries, candidates, (*self.notes, note))


def layout(split: str) -> str:
    """Return a description of the directory of a split, `test` or `valid`."""
    return f"DeepFashion: {', '.join(_lists(split))} of ASEN, and img/ with the images they name"


def read_deepfashion(root: Path, split: str = "test") -> DeepFashion:
    """Read the lists of a split.

    Each line of `query_SPLIT.txt` and `candidate_SPLIT.txt` has three numbers: the position of an
    image in `filenames_SPLIT.txt` (from 0), an attribute and a value. A line that occurs twice
    counts twice, as in the authors' code; a note says how many do.

    Args:
        root: The directory `DeepFashion` of ASEN's `data.zip`, or the directory that contains it.
        split: `test` or `valid`.

    Raises:
        DataSetError: If the layout is another one, a line is malformed, a number is out of range,
            an image is missing, or an attribute has no query or no candidate.
    """
    lists, expected = _lists(split), layout(split)
    require_directory(root, expected)
    home = next((p for p in (root, root / "DeepFashion") if (p / lists[0]).is_file()), None)
    if home is None or not all((home / name).is_file() for name in lists):
        raise wrong_layout(home or root, expected)
    names = _lines(home / lists[0])
    queries, repeated_q = _side(home / lists[1], len(names))
    candidates, repeated_c = _side(home / lists[2], len(names))
    used = np.unique(np.concatenate([s.files for d in (queries, candidates) for s in d.values()]))
    files = tuple(home / names[i] for i in used)
    for name in (names[i] for i in used):
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise DataSetError(f"{home / lists[0]}: {name!r} lies outside the directory")
    require_files(home, files)
    place = np.full(len(names), -1, np.int64)
    place[used] = np.arange(len(used))
    notes = [f"split {split}: {sum(len(s.files) for s in queries.values())} queries, "
             f"{sum(len(s.files) for s in candidates.values())} candidates"]  # fmt: skip
    if repeated_q + repeated_c:
        notes.append(f"{repeated_q + repeated_c} lines occur twice and count twice")
    return DeepFashion(
        files,
        {name: AttributeImages(place[s.files], s.values) for name, s in queries.items()},
        {name: AttributeImages(place[s.files], s.values) for name, s in candidates.items()},
        tuple(notes),
    )


def _lists(split: str) -> list[str]:
    return [f"{name}_{split}.txt" for name in ("filenames", "query", "candidate")]


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataSetError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    while lines and not lines[-1]:
        lines.pop()
    if not lines or not all(lines):
        raise DataSetError(f"{path}: expected one entry per line and no blank lines")
    return lines


def _side(path: Path, images: int) -> tuple[dict[str, AttributeImages], int]:
    """Read a list. Return its entries by attribute, and the number of repeated lines."""
    rows = []
    limits = (images, len(ATTRIBUTES))
    for number, line in enumerate(_lines(path), start=1):
        try:
            image, attribute, value = map(int, line.split())
        except ValueError as error:
            raise DataSetError(
                f"{path}, line {number}: expected three whole numbers (image, attribute, value), "
                f"found {line[:60]!r}"
            ) from error
        fine = 0 <= image < limits[0] and 0 <= attribute < limits[1]
        if not fine or not 0 <= value < VALUES[attribute]:
            raise DataSetError(
                f"{path}, line {number}: expected an image below {images}, an attribute below "
                f"{limits[1]} and a value below {VALUES}, found {line[:60]!r}"
            )
        rows.append((image, attribute, value))
    table = np.array(rows, np.int64)
    sides = {}
    for code, name in enumerate(ATTRIBUTES):
        own = table[table[:, 1] == code]
        if len(own) == 0:
            raise DataSetError(f"{path}: expected lines of all {len(ATTRIBUTES)} attributes, found "
                               f"none of {name} (number {code})")  # fmt: skip
        sides[name] = AttributeImages(own[:, 0], own[:, 2])
    return sides, len(rows) - len(set(rows))
