"""Cards: photographs of playing cards, by number and by suit.

Two layouts are supported. The authors' archive (`AugDMC_datasets.zip`, made for torchvision's
ImageFolder) holds the images twice, sorted by number and by suit. The Kaggle set "Cards Image
Dataset-Classification" by gpiosenka holds them once, under `train`, `valid` and `test`, in folders
such as `ace of clubs`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from crl_sdk.errors import ImageError
from crl_sdk.evaluation._dataset import (
    DataSetError,
    LabelledImages,
    Labels,
    encode_labels,
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
"""Classes of each criterion, in the order of the folder names. The splits depend on this order."""

SPLITS = ("train", "valid", "test")
LAYOUT = (
    "Cards: number/ACE…/ and suits/CLUBS…/ (the authors' archive), or "
    "train/, valid/ and test/ with folders such as 'ace of clubs' (Kaggle)"
)


def read_cards(root: Path) -> LabelledImages:
    """Read Cards in either layout.

    Args:
        root: Directory that holds `number` and `suits`, or `train`, `valid` and `test`, itself or
            in its subdirectory `cards`.

    Returns:
        All images except the jokers, which have neither number nor suit.

    Raises:
        DataSetError: If the layout is another one, a class has no folder or no image, or a class
            is unknown.
    """
    require_directory(root, LAYOUT)
    for home in (root, root / "cards"):
        if all((home / criterion).is_dir() for criterion in CRITERIA):
            return _by_criterion(home)
        if (home / "train").is_dir():
            return _by_card(home)
    raise wrong_layout(root, LAYOUT)


def _by_criterion(home: Path) -> LabelledImages:
    files: list[Path] = []
    labels = {}
    for criterion, values in VALUES.items():
        folders = _folders(home / criterion)
        encode_labels(home / criterion, criterion, [f.name.lower() for f in folders], values)
        names: list[str] = []
        start = len(files)
        for folder in folders:
            own = _images(folder)
            files += own
            names += [folder.name.lower()] * len(own)
        codes = encode_labels(home / criterion, criterion, names, values)
        _require_all(home / criterion, codes, values)
        labels[criterion] = Labels(np.arange(start, len(files)), codes, values)
    return LabelledImages(
        tuple(files), labels, ("the authors' layout: each criterion has its own images",)
    )


def _by_card(home: Path) -> LabelledImages:
    splits = [split for split in SPLITS if (home / split).is_dir()]
    files: list[Path] = []
    cells: dict[str, list[str]] = {criterion: [] for criterion in CRITERIA}
    jokers = 0
    for split in splits:
        for folder in _folders(home / split):
            own = _images(folder)
            number, of, suit = folder.name.lower().partition(" of ")
            if folder.name.lower() == "joker":
                jokers += len(own)
                continue
            if not of:
                raise DataSetError(
                    f"{folder}: expected a folder named after a card, such as 'ace of clubs', or "
                    "'joker'"
                )
            files += own
            cells["number"] += [number] * len(own)
            cells["suits"] += [suit] * len(own)
    labels = {}
    for criterion, values in VALUES.items():
        codes = encode_labels(home, criterion, cells[criterion], values)
        _require_all(home, codes, values)
        labels[criterion] = Labels(np.arange(len(files)), codes, values)
    lacking = sorted(set(SPLITS) - set(splits))
    notes = [
        f"Kaggle's layout: the images of {', '.join(splits)} together"
        + (f", without {', '.join(lacking)}, which do not exist" if lacking else ""),
        "it was not checked that these are the same images as the authors'",
    ]
    if jokers:
        notes.append(f"{jokers} jokers left out: they have neither number nor suit")
    return LabelledImages(tuple(files), labels, tuple(notes))


def _folders(parent: Path) -> list[Path]:
    folders = sorted(path for path in parent.iterdir() if path.is_dir())
    if not folders:
        raise wrong_layout(parent, "a folder for each class")
    return folders


def _images(folder: Path) -> list[Path]:
    try:
        return find_image_files([folder])
    except ImageError as error:
        raise DataSetError(f"{error}; unpack the data set again") from error


def _require_all(where: Path, codes: np.ndarray, values: tuple[str, ...]) -> None:
    lacking = [value for code, value in enumerate(values) if code not in codes]
    if lacking:
        raise DataSetError(
            f"{where}: expected images of {len(values)} classes, found none of "
            f"{', '.join(lacking)}: unpack it again"
        )
