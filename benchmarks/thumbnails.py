"""Any number of small pictures in tar archives, as WebDataset writes them.

`python -m crl_benchmarks.thumbnails 1000000 --out build/thumbnails` writes a hundred shards of
10,000 JPEGs. Scenes of the demo world are rendered, and each gives 40 thumbnails, because rendering
is slower than embedding: twenty crops and their mirror images. Every 997th file is cut off in its
middle, so that a job meets files that cannot be read. Equal arguments give equal bytes.
"""

from __future__ import annotations

import argparse
import io
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from crl_export.demo.scenes import render_scene, sample_scene
from crl_sdk._processors import count_processors
from crl_sdk.errors import InvalidInputError
from crl_sdk.storage._atomic_files import new_file

SHARD = 10_000
"""Number of pictures of a shard; the last shard may have fewer."""

EVERY = 997
"""One file of so many is cut off."""

_RENDERED, _SIDE = 64, 56
"""Sides of a scene and of its crops, in pixels."""

_CROPS = tuple(product((0, 2, 4, 6, 8), (0, 3, 5, 8)))
_VARIANTS = 2 * len(_CROPS)
_SEED = 9_000_000
"""Seed of the first scene, which no data set of the demo model contains."""


def count_cut(count: int) -> int:
    """Return how many of the first `count` files are cut off."""
    return count // EVERY


def shard_name(number: int) -> str:
    """Return the name of a shard."""
    return f"shard-{number:05d}.tar"


def member_name(index: int) -> str:
    """Return the name of a picture in its shard."""
    return f"{index:09d}.jpg"


def thumbnails(first: int, count: int) -> Iterator[tuple[int, bytes]]:
    """Yield pictures and their indices.

    Args:
        first: Index of the first picture.
        count: Number of pictures.
    """
    scene, pixels = -1, np.empty(0, np.uint8)
    for index in range(first, first + count):
        own, variant = divmod(index, _VARIANTS)
        if own != scene:
            scene, pixels = own, render_scene(sample_scene(_SEED + own), _RENDERED)
        crop, mirrored = divmod(variant, 2)
        top, left = _CROPS[crop]
        shown = pixels[top : top + _SIDE, left : left + _SIDE]
        if mirrored:
            shown = np.ascontiguousarray(shown[:, ::-1])
        file = io.BytesIO()
        Image.fromarray(shown).save(file, "JPEG", quality=85)
        data = file.getvalue()
        yield index, data[: len(data) // 2] if (index + 1) % EVERY == 0 else data


def write_shards(directory: Path, count: int, *, shard: int = SHARD) -> list[Path]:
    """Write pictures into shards, unless the shards are there.

    Args:
        directory: Directory of the shards, created if missing.
        count: Number of pictures.
        shard: Number of pictures of a shard.

    Returns:
        Paths of the shards.

    Raises:
        InvalidInputError: If the directory holds other shards.
    """
    directory.mkdir(parents=True, exist_ok=True)
    number = -(-count // shard)
    paths = [directory / shard_name(i) for i in range(number)]
    if extra := sorted(set(directory.glob("shard-*.tar")) - set(paths)):
        raise InvalidInputError(f"{extra[0]}: left from a larger set; choose another --out")
    missing = [i for i, path in enumerate(paths) if not path.exists()]
    write = partial(_write_shard, directory, count, shard)
    if len(missing) * shard <= SHARD:  # not worth other processes
        for i in missing:
            write(i)
        return paths
    with ProcessPoolExecutor(count_processors(), get_context("spawn")) as pool:
        for done, future in enumerate(as_completed(pool.submit(write, i) for i in missing), 1):
            future.result()
            if done % 10 == 0 or done == len(missing):
                print(f"{done} of {len(missing)} shards", flush=True)
    return paths


def _write_shard(directory: Path, count: int, shard: int, number: int) -> None:
    first = number * shard
    with (
        new_file(directory / shard_name(number), InvalidInputError) as file,
        tarfile.open(fileobj=file, mode="w") as archive,
    ):
        for index, data in thumbnails(first, min(shard, count - first)):
            member = tarfile.TarInfo(member_name(index))
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def main() -> None:
    """Write the shards."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    write_shards(arguments.out, arguments.count)


if __name__ == "__main__":
    main()
