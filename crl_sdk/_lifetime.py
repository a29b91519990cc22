"""Whether an object may be used: it is open, and this is the process that made it.

Threads do not survive a fork. What they hold, such as the locks of an inference runtime or of gRPC,
stays taken in the child for ever. Objects that need such threads refuse to work there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager

from crl_sdk.errors import ClosedError, ForkError

_REMEDY = (
    "start processes with the method spawn or forkserver "
    "(multiprocessing.get_context('forkserver'), DataLoader(multiprocessing_context='forkserver'))"
)


class Lifetime:
    """Says until when, and in which process, an object may be used.

    Attributes:
        closed: Whether the object was closed.
    """

    def __init__(self, name: str) -> None:
        """Begin the life of an object in this process.

        Args:
            name: What the object is, for messages, such as `embedder`.
        """
        self._name, self._process = name, os.getpid()
        self.closed = False

    @property
    def forked(self) -> bool:
        """Whether this process was forked from the one that made the object."""
        return os.getpid() != self._process

    def require(self) -> None:
        """Raise an error unless the object may be used.

        Raises:
            ClosedError: If it was closed.
            ForkError: If this process was forked from the one that made it.
        """
        if self.closed:
            raise ClosedError(f"the {self._name} is closed: make a new one")
        if self.forked:
            raise ForkError(
                f"the {self._name} was made before this process was forked, and its threads are "
                f"not here: make the {self._name} in this process, or {_REMEDY}"
            )

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Raise `ClosedError` for what a pool of threads says when it is shut down meanwhile."""
        try:
            yield
        except (RuntimeError, CancelledError):
            self.require()
            raise


class ForkGuard:
    """Refuses a library in a child that was forked after the library had been used."""

    def __init__(self, name: str, remedy: str) -> None:
        """Begin with a library that was not used.

        Args:
            name: Name of the library, for messages.
            remedy: What to do instead, besides starting processes in another way.
        """
        self._name, self._own_remedy = name, remedy
        self._process: int | None = None

    def use(self) -> None:
        """Note that the library is used in this process.

        Raises:
            ForkError: If it was used in the parent before this process was forked.
        """
        if self._process is None:
            self._process = os.getpid()
        elif self._process != os.getpid():
            raise ForkError(
                f"{self._name} was used before this process was forked, and does not work in it: "
                f"{self._own_remedy}, or {_REMEDY}"
            )
