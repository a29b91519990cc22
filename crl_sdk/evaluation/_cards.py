"""Cards: photographs of playing cards, by number and by suit.

Two layouts are read. The authors' (`AugDMC_datasets.zip`, read with torchvision's ImageFolder)
holds the pictures twice, sorted by number and by suit. The Kaggle set "Cards Image
Dataset-Classification" by gpiosenka holds them once, under `train`, `valid` and `test`, in folders
named `ace of clubs`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from crl_sdk.errors import ImageError
from crl_sdk.evaluation._labelled import (
    DataSetError,
    Labelled,
    Labels,
    codes_of,
    require_directory,
    wrong_layout,
)
from crl_sdk.model._image_files import find_image_files

CRITERIA = ("number", "suits")
NUMBERS = (
    "ace", "eight", "five", "four", "jack", "king", "nine",
    "queen", "seven", "six", "ten", "three", "two",
)  # fmt: skip
SUITS = ("clubs", "diamonds", "hearts", "spades")
VALUES = {"number": NUMBERS, "suits": SUITS}
"""Criterion → its classes, in the order of folder names, which the splits follow."""

SPLITS = ("train", "valid", "test")
LAYOUT = (
    "Cards: number/ACE…/ and suits/CLUBS…/ (the authors' archive), or "
    "train/, valid/ and test/ with folders such as 'ace of clubs' (Kaggle)"
)


def read_cards(root: Path) -> Labelled:
    """Read Cards in either layout.

    Args:
        root: the directory that holds `number` and `suits`, or `train`, `valid` and `test`; or that
            holds it under `cards`.

    Returns:
        All pictures but the jokers, which have neither number nor suit.

    Raises:
        DataSetError: another layout, a class without a folder or a picture, or an unknown class.
    """
    require_directory(root, LAYOUT)
    for home in (root, root / "cards"):
        if all((home / criterion).is_dir() for criterion in CRITERIA):
            return _by_criterion(home)
        if (home / "train").is_dir():
            return _by_card(home)
    raise wrong_layout(root, LAYOUT)


def _by_criterion(home: Path) -> Labelled:
    files: list[Path] = []
    labels = {}
    for criterion, values in VALUES.items():
        folders = _folders(home / criterion)
        codes_of(home / criterion, criterion, [f.name.lower() for f in folders], values)
        names: list[str] = []
        start = len(files)
        for folder in folders:
            own = _pictures(folder)
            files += own
            names += [folder.name.lower()] * len(own)
        codes = codes_of(home / criterion, criterion, names, values)
        _require_all(home / criterion, codes, values)
        labels[criterion] = Labels(np.arange(start, len(files)), codes, values)
    return Labelled(
        tuple(files), labels, ("the authors' layout: each criterion has its own pictures",)
    )


def _by_card(home: Path) -> Labelled:
    splits = [split for split in SPLITS if (home / split).is_dir()]
    files: list[Path] = []
    cells: dict[str, list[str]] = {criterion: [] for criterion in CRITERIA}
    jokers = 0
    for split in splits:
        for folder in _folders(home / split):
            own = _pictures(folder)
            number, of, suit = folder.name.lower().partition(" of ")
            if folder.name.lower() == "joker":
                jokers += len(own)
                continue
            if not of:
                raise DataSetError(
                    f"{folder}: expected a folder named as a card, 'ace of clubs' or 'joker'"
                )
            files += own
            cells["number"] += [number] * len(own)
            cells["suits"] += [suit] * len(own)
    labels = {}
    for criterion, values in VALUES.items():
        codes = codes_of(home, criterion, cells[criterion], values)
        _require_all(home, codes, values)
        labels[criterion] = Labels(np.arange(len(files)), codes, values)
    lacking = sorted(set(SPLITS) - set(splits))
    notes = [
        f"Kaggle's layout: the pictures of {', '.join(splits)} together"
        + (f", without {', '.join(lacking)}, which are not there" if lacking else ""),
        "not checked to be the same pictures as the authors'",
    ]
    if jokers:
        notes.append(f"{jokers} jokers left out: they have neither number nor suit")
    return Labelled(tuple(files), labels, tuple(notes))


def _folders(parent: Path) -> list[Path]:
    folders = sorted(path for path in parent.iterdir() if path.is_dir())
    if not folders:
        raise wrong_layout(parent, "a folder for each class")
    return folders


def _pictures(folder: Path) -> list[Path]:
    try:
        return find_image_files([folder])
    except ImageError as error:
        raise DataSetError(f"{error}; unpack the data set again") from error


def _require_all(where: Path, codes: np.ndarray, values: tuple[str, ...]) -> None:
    lacking = [value for code, value in enumerate(values) if code not in codes]
    if lacking:
        raise DataSetError(
            f"{where}: expected pictures of {len(values)} classes, none of {', '.join(lacking)}: "
            "unpack it again"
        )
