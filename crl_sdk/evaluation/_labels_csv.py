"""Data sets of images with a labels.csv: the demo world and the photographs of cards."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from crl_sdk.evaluation._dataset import (
    DataSetError,
    LabelledImages,
    Labels,
    require_directory,
    require_files,
    wrong_layout,
)

FILE = "labels.csv"


def read_table(root: Path, columns: Mapping[str, str]) -> LabelledImages:
    """Read a directory with a `labels.csv`: a column `file` and one column per criterion.

    Args:
        root: The directory. The files in the table are relative to it.
        columns: Column of each criterion. Other columns are ignored.

    Returns:
        All images, in the order of the table. Classes are sorted as numbers if possible, else as
        names.

    Raises:
        DataSetError: If the table, a column or an image is missing, a cell is empty, or a file
            occurs twice or lies outside the directory.
    """
    layout = f"{FILE} (columns file, {', '.join(columns.values())}) and the images it names"
    require_directory(root, layout)
    table = root / FILE
    if not table.is_file():
        raise wrong_layout(root, layout)
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            header = list(reader.fieldnames or ())
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataSetError(f"{table}: cannot be read as CSV in UTF-8 ({error})") from error
    lacking = [name for name in ("file", *columns.values()) if name not in header]
    if lacking or not rows:
        raise DataSetError(
            f"{table}: expected the columns file, {', '.join(columns.values())} and a line for "
            f"each image, found the columns {', '.join(header) or 'none'} and {len(rows)} lines"
        )
    seen: dict[str, int] = {}
    for line, row in enumerate(rows, start=2):
        if not all(row[name] for name in ("file", *columns.values())):
            raise DataSetError(f"{table}, line {line}: a cell is empty: {row}")
        name = row["file"]
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise DataSetError(f"{table}, line {line}: {name!r} lies outside the directory")
        if name in seen:
            raise DataSetError(
                f"{table}, line {line}: {name!r} occurs twice, first in line {seen[name]}: "
                "remove one of the lines"
            )
        seen[name] = line
    files = tuple(root / name for name in seen)
    require_files(root, files)
    labels = {}
    for criterion, column in columns.items():
        cells = [row[column] for row in rows]
        values = sorted(set(cells), key=lambda cell: (_number(cell), cell))
        codes = {value: code for code, value in enumerate(values)}
        labels[criterion] = Labels(
            np.arange(len(files)), np.array([codes[cell] for cell in cells], np.int64),
            tuple(values),
        )  # fmt: skip
    return LabelledImages(files, labels)


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return float("inf")
