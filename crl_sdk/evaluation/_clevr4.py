"""Clevr4-10k: rendered scenes, each with a texture, a shape, a colour and a count.

Layout: github.com/sgvaze/clevr4 and robots.ox.ac.uk/~vgg/data/clevr4. All images are used,
whatever their `split`, as in the paper.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from crl_sdk.evaluation._dataset import (
    DataSetError,
    LabelledImages,
    Labels,
    encode_labels,
    require_directory,
    require_files,
    wrong_layout,
)

FILE = "clevr_4_annots.json"
LAYOUT = f"Clevr4: {FILE} and images/NAME.png for each of its names"

# fmt: off
VALUES = MappingProxyType({
    "texture": ("rubber", "metal", "checkered", "emojis", "wave", "brick", "star", "circles",
                "zigzag", "chessboard"),
    "shape": ("cube", "sphere", "monkey", "cone", "torus", "star", "teapot", "diamond", "gear",
              "cylinder"),
    "color": ("gray", "red", "blue", "green", "brown", "purple", "cyan", "yellow", "pink",
              "orange"),
    "count": ("1", "2", "3", "4", "5", "6", "7", "8", "9", "10"),
})
# fmt: on
"""The ten classes of each criterion, in the order of the data set's own code. The splits depend on
this order."""


def read_clevr4(root: Path) -> LabelledImages:
    """Read Clevr4.

    Args:
        root: The unpacked archive, or the directory that contains it.

    Returns:
        All annotated images, sorted by name.

    Raises:
        DataSetError: If the layout is another one, a name occurs twice, an image is missing, or a
            class is unknown.
    """
    require_directory(root, LAYOUT)
    home = next(
        (p.parent for p in (root / FILE, *sorted(root.glob(f"*/{FILE}"))) if p.is_file()), None
    )
    if home is None:
        raise wrong_layout(root, LAYOUT)
    annotations = _annotations(home / FILE)
    names = sorted(annotations)
    files = tuple(home / "images" / f"{name}.png" for name in names)
    if not (home / "images").is_dir():
        raise wrong_layout(home, LAYOUT)
    require_files(home, files)
    labels = {}
    for criterion, values in VALUES.items():
        cells = [str(annotations[name][criterion]) for name in names]
        codes = encode_labels(home / FILE, criterion, cells, values)
        labels[criterion] = Labels(np.arange(len(files)), codes, values)
    return LabelledImages(files, labels)


def _annotations(path: Path) -> dict[str, dict[str, Any]]:
    try:
        raw: Any = json.loads(path.read_bytes(), object_pairs_hook=_once)
    except (OSError, ValueError, RecursionError) as error:
        raise DataSetError(
            f"{path}: expected JSON with one entry for each image ({error})"
        ) from error
    if not isinstance(raw, dict) or not raw:
        raise DataSetError(
            f"{path}: expected a JSON object of image name → {{{', '.join(VALUES)}}}, found "
            f"{type(raw).__name__} of {len(raw) if isinstance(raw, list | dict) else 1}"
        )
    for name, entry in raw.items():
        if not isinstance(entry, dict) or not VALUES.keys() <= entry.keys():
            raise DataSetError(
                f"{path}: expected {', '.join(VALUES)} for {name!r}, found {str(entry)[:80]}"
            )
        if Path(name).name != name:
            raise DataSetError(f"{path}: {name[:80]!r} is not the name of an image")
    return raw


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dictionary. Refuse a name that occurs twice."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} occurs twice")
    return made
