"""A limited amount of something that threads share, in the order in which they ask."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class Budget:
    """Lets threads use something of which there is a limited amount, such as memory, or one turn.

    They take their turns in the order in which they ask, so that those that need much are not kept
    waiting for ever by those that need little.

    Attributes:
        limit: Largest amount at once.
        used: Amount that is reserved now.
    """

    def __init__(self, limit: int) -> None:
        """Begin with nothing reserved.

        Args:
            limit: Largest amount at once.
        """
        self.limit, self.used = limit, 0
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()

    @contextmanager
    def reserve(self, amount: int) -> Iterator[None]:
        """Wait until an amount is free, and keep it for the block.

        Args:
            amount: The amount. More than `limit` waits until nothing else is reserved.
        """
        amount = min(amount, self.limit)
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
            try:
                self._changed.wait_for(
                    lambda: self._waiting[0] is ticket and self.used + amount <= self.limit
                )
                self.used += amount
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self.used -= amount
                self._changed.notify_all()
