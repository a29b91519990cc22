"""Sources of pictures for the tests of bulk embedding: small squares of noise, in every form."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def picture(number: int, kind: str = "PNG") -> bytes:
    """Return an encoded picture of 24×24 pixels that differs from those of other numbers."""
    rng = np.random.default_rng(number)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def write_directory(folder: Path, count: int, first: int = 0) -> Path:
    """Write pictures into subdirectories of a new directory, ten in each."""
    for number in range(first, first + count):
        inside = folder / f"{number // 10:03d}"
        inside.mkdir(parents=True, exist_ok=True)
        (inside / f"{number:05d}.png").write_bytes(picture(number))
    return folder


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    """Write a tar archive of these names and contents."""
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def write_shard(path: Path, count: int, first: int = 0) -> Path:
    """Write a shard of WebDataset: a picture and a label for each key."""
    members = []
    for number in range(first, first + count):
        members += [(f"{number:06d}.cls", b"1"), (f"{number:06d}.png", picture(number))]
    return write_tar(path, members)
