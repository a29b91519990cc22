"""Decoding and an engine on the CPU take turns, because each of them uses all cores.

The threads of an engine wait for each other at every step. If one core decodes an image meanwhile,
all cores lose that time. This module knows no transport.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext


class NoTurns:
    """Turns for an engine on a GPU, which leaves the cores to decoding: nobody waits."""

    def announce(self, count: int) -> None:
        """Do nothing; see `CpuTurns.announce`."""

    def decoding(self) -> AbstractContextManager[None]:
        """Return a context that never waits; see `CpuTurns.decoding`."""
        return nullcontext()

    def engine(self) -> AbstractContextManager[None]:
        """Return a context that never waits; see `CpuTurns.engine`."""
        return nullcontext()


class CpuTurns:
    """No image is decoded while the engine runs. Before a run, announced images are decoded first.

    An engine that has work waits for at most `max_images` images and at most `patience` seconds.
    One huge image therefore does not delay all others.
    """

    def __init__(self, max_images: int, patience: float = 0.1) -> None:
        """Store the settings.

        Args:
            max_images: Largest number of images that are decoded while the engine waits.
            patience: Longest time that the engine waits, in seconds. After that it runs beside
                the images that are still being decoded.
        """
        self._max_images = max_images
        self._patience = patience
        self._changed = threading.Condition()
        self._announced = 0
        self._decoding = 0
        self._engine_waits = False
        self._engine_runs = False
        self._remaining = max_images

    def announce(self, count: int) -> None:
        """Announce that `count` images will be decoded; each must enter `decoding` once."""
        with self._changed:
            self._announced += count

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Context in which one image is decoded. Entering it waits until the engine allows it."""
        with self._changed:
            while self._engine_runs or (self._engine_waits and not self._remaining):
                self._changed.wait()
            self._decoding += 1
            if self._engine_waits:
                self._remaining -= 1
        try:
            yield
        finally:
            with self._changed:
                self._decoding -= 1
                self._announced -= 1
                self._changed.notify_all()

    @contextmanager
    def engine(self) -> Iterator[None]:
        """Context of one engine run. Entering it waits for current and announced decoding."""
        with self._changed:
            self._engine_waits, self._remaining = True, self._max_images
            ends = time.monotonic() + self._patience
            while self._decoding or (self._announced and self._remaining):
                seconds = ends - time.monotonic()
                if seconds <= 0 or not self._changed.wait(seconds):
                    break
            self._engine_waits, self._engine_runs = False, True
        try:
            yield
        finally:
            with self._changed:
                self._engine_runs = False
                self._changed.notify_all()
