"""Reads something at the beginning of a time, each second and at its end, beside other work."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

_EVERY = 1.0
"""Seconds between two readings."""


class Sampling(Generic[T]):
    """Readings by a thread of its own. Use as a context manager.

    Attributes:
        samples: Time of `time.perf_counter` and value of each reading, in order.
    """

    def __init__(
        self, read: Callable[[], T], *, begins: float, seconds: float, every: float = _EVERY
    ) -> None:
        """Prepare the thread.

        Args:
            read: Function that reads. It must not raise.
            begins: Time of the first reading, of `time.time`.
            seconds: Seconds until the last reading.
            every: Seconds between two readings.
        """
        self.samples: list[tuple[float, T]] = []
        self._read, self._every = read, every
        self._begins = time.perf_counter() + begins - time.time()
        self._ends = self._begins + seconds
        self._due: float | None = self._begins
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="sampling", daemon=True)

    def __enter__(self) -> Sampling[T]:
        """Read if it is time, and start the thread."""
        if self._begins <= time.perf_counter():
            self._take()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End the thread, after a reading that is under way. Read if the thread is late."""
        self._stop.set()
        self._thread.join()
        if self._due is not None and self.samples and time.perf_counter() >= self._ends:
            self._due = self._ends
            self._take()

    def _sample(self) -> None:
        while self._due is not None and not self._stop.wait(
            max(self._due - time.perf_counter(), 0)
        ):
            self._take()

    def _take(self) -> None:
        """Read, and set the time of the next reading: None after the last."""
        now, due = time.perf_counter(), self._due
        assert due is not None
        self.samples.append((now, self._read()))
        self._due = (
            None if due >= self._ends
            else min(max(due + self._every, time.perf_counter()), self._ends)
        )  # fmt: skip
