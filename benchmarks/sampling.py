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
        self._read, self._every, self._seconds = read, every, seconds
        self._begins = time.perf_counter() + begins - time.time()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="sampling", daemon=True)

    def __enter__(self) -> Sampling[T]:
        """Start the thread."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End the thread, after a reading that is under way."""
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        ends, due = self._begins + self._seconds, self._begins
        while not self._stop.wait(max(due - time.perf_counter(), 0)):
            self.samples.append((time.perf_counter(), self._read()))
            if due >= ends:
                return
            due = min(max(due + self._every, time.perf_counter()), ends)
