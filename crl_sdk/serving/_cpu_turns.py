"""Decoding and an engine on the CPU take turns, since each of them uses all cores.

An engine's threads wait for each other at every step: a core that decodes a picture meanwhile costs
it that time on all cores. Knows no transport.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext


class NoTurns:
    """An engine on a GPU leaves the cores to those who decode: nobody waits for anybody."""

    def expect(self, count: int) -> None:
        """See `Turns.expect`."""

    def decoding(self) -> AbstractContextManager[None]:
        """See `Turns.decoding`."""
        return nullcontext()

    def engine(self) -> AbstractContextManager[None]:
        """See `Turns.engine`."""
        return nullcontext()


class Turns:
    """While the engine runs nothing is decoded; before it runs, what waits to be decoded is.

    An engine that has something to do waits for `most` pictures and for `patience` at most: one
    huge picture does not hold up all the others.
    """

    def __init__(self, most: int, patience: float = 0.1) -> None:
        """Store the settings.

        Args:
            most: pictures that may be decoded while the engine waits.
            patience: seconds that the engine waits; then it runs beside what is being decoded.
        """
        self._most = most
        self._patience = patience
        self._changed = threading.Condition()
        self._expected = 0
        self._decoding = 0
        self._engine_waits = False
        self._engine_runs = False
        self._left = most

    def expect(self, count: int) -> None:
        """Say that so many pictures are about to be decoded; each then enters `decoding` once."""
        with self._changed:
            self._expected += count

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Decode one picture inside: waits until the engine has had its turn."""
        with self._changed:
            while self._engine_runs or (self._engine_waits and not self._left):
                self._changed.wait()
            self._decoding += 1
            if self._engine_waits:
                self._left -= 1
        try:
            yield
        finally:
            with self._changed:
                self._decoding -= 1
                self._expected -= 1
                self._changed.notify_all()

    @contextmanager
    def engine(self) -> Iterator[None]:
        """Run the engine inside: waits for what is being decoded, and what may still be."""
        with self._changed:
            self._engine_waits, self._left = True, self._most
            until = time.monotonic() + self._patience
            while self._decoding or (self._expected and self._left):
                left = until - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    break
            self._engine_waits, self._engine_runs = False, True
        try:
            yield
        finally:
            with self._changed:
                self._engine_runs = False
                self._changed.notify_all()
