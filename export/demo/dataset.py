"""The demo world as a data set: JPEG files with a labels table, or pixels and codes in memory."""

from __future__ import annotations

import csv
import io
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from crl_export.demo.scenes import encode_scene, sample_scene
from crl_export.demo.world import CRITERIA, FACTORS
from crl_sdk._processors import count_processors

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

LABELS_FILE = "labels.csv"
TRAIN_SEED, TEST_SEED, MONITOR_SEED = 1, 2, 3
"""Seeds of the demo model's data sets. The test scenes are used once, after training."""

_CHUNK = 64


def scene_seed(seed: int, index: int) -> int:
    """Return the seed of scene `index` in data set `seed`. Data sets have no scene in common.

    Raises:
        ValueError: If either is negative or `index` is a million or more.
    """
    if seed < 0 or not 0 <= index < 1_000_000:
        raise ValueError(f"expected seed >= 0 and 0 <= index < 1,000,000, got {seed} and {index}")
    return seed * 1_000_000 + index


def write_dataset(
    directory: Path,
    n: int,
    seed: int = 0,
    *,
    workers: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Path:
    """Write scenes as JPEG files and their factors as a table.

    Args:
        directory: Directory, created if missing. It must not contain `labels.csv`.
        n: Number of scenes, 1 to 1,000,000.
        seed: Seed of the data set. Equal arguments give equal bytes.
        workers: Number of rendering processes; one per CPU by default.
        on_progress: Function that is called with the number of files written so far.

    Returns:
        Path of the table: a column `file` (relative to `directory`), then one per factor.

    Raises:
        ValueError: If `n` is out of range.
        FileExistsError: If the directory already holds a data set.
    """
    if not 1 <= n <= 1_000_000:
        raise ValueError(f"expected 1 to 1,000,000 images, got {n}")
    table = directory / LABELS_FILE
    if table.exists():
        raise FileExistsError(f"{table} exists already: choose an empty directory or remove it")
    (directory / "images").mkdir(parents=True, exist_ok=True)
    partial_table = table.with_suffix(".csv.part")
    with (
        ProcessPoolExecutor(workers or count_processors()) as pool,
        partial_table.open("w", newline="") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["file", *FACTORS])
        rendered = pool.map(partial(_render_labelled, seed), range(n), chunksize=_CHUNK)
        for index, (data, values) in enumerate(rendered):
            name = f"images/{index:06d}.jpg"
            (directory / name).write_bytes(data)
            writer.writerow([name, *values])
            if on_progress is not None:
                on_progress(index + 1)
    partial_table.replace(table)
    return table


def read_labels(table: Path) -> tuple[list[Path], NDArray[np.int64]]:
    """Read a data set written by `write_dataset`.

    Args:
        table: Path of `labels.csv`.

    Returns:
        The image files, and their codes, shape (n, number of factors), int64, in table order.
    """
    with table.open(newline="") as file:
        scenes = list(csv.DictReader(file))
    codes = [[FACTORS[name].index(scene[name]) for name in FACTORS] for scene in scenes]
    return [table.parent / scene["file"] for scene in scenes], np.array(codes, np.int64)


def labels_of(codes: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """Return the labels of each criterion, shape (n,), from codes, shape (n, number of factors)."""
    names = list(FACTORS)
    return {criterion: codes[:, names.index(criterion)] for criterion in CRITERIA}


def _render_labelled(seed: int, index: int) -> tuple[bytes, list[str]]:
    scene = sample_scene(scene_seed(seed, index))
    return encode_scene(scene), [scene.values[name] for name in FACTORS]


def render_arrays(
    n: int, seed: int, side: int, *, workers: int | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Render scenes into memory, with the same JPEG encoding and resizing as a user's images.

    Args:
        n: Number of scenes.
        seed: Seed of the data set. The scenes are those of `write_dataset(…, seed)`.
        side: Width and height of the images in pixels.
        workers: Number of rendering processes; one per CPU by default.

    Returns:
        Pixels, shape (n, side, side, 3), uint8; and codes, shape (n, number of factors), int64.
    """
    pixels = np.empty((n, side, side, 3), np.uint8)
    codes = np.empty((n, len(FACTORS)), np.int64)
    with ProcessPoolExecutor(workers or count_processors()) as pool:
        rendered = pool.map(partial(_render_resized, seed, side), range(n), chunksize=_CHUNK)
        for index, (image, code) in enumerate(rendered):
            pixels[index], codes[index] = image, code
    return pixels, codes


def _render_resized(seed: int, side: int, index: int) -> tuple[NDArray[np.uint8], tuple[int, ...]]:
    scene = sample_scene(scene_seed(seed, index))
    image = Image.open(io.BytesIO(encode_scene(scene)))
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)), scene.codes()
