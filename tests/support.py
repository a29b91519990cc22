"""What tests share: waiting for something, pictures that no cache has seen."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import count

import numpy as np
from numpy.typing import NDArray

_numbers = count()


def picture() -> NDArray[np.uint8]:
    number = next(_numbers)
    pixels = np.full((96, 96, 3), 100, np.uint8)
    pixels[0, :2] = [[number % 256, number // 256 % 256, 0], [number // 65536, 1, 2]]
    return pixels


def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "it did not happen in time"
        time.sleep(0.01)
