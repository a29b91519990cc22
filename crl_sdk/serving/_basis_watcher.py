"""Looks again and again for changes of bases that other processes made."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable

from crl_sdk.errors import CrlError

_LEAST_PAUSE = 0.1
"""Seconds between two looks at least, however many callers ask for one."""

_PATIENCE = 2.0
"""Seconds that a caller waits for a look. One at a place that is away may take much longer."""

_OVERDUE = 10.0
"""Seconds after which a look that has not ended counts as failed."""

_log = logging.getLogger(__name__)


class BasisWatcher:
    """Calls a function that reads changes, in a thread of its own.

    If it fails, the bases stay as they were. The log says so once, and once when it works again.
    """

    def __init__(self, refresh: Callable[[], None], seconds: float, place: str) -> None:
        """Store how to look and how often.

        Args:
            refresh: Function that reads changes.
            seconds: Seconds between two looks.
            place: Where the bases are, for the log.
        """
        self._refresh = refresh
        self._seconds = seconds
        self._place = place
        self._asked = threading.Event()
        self._stopping = False
        self._waiting: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._failure: str | None = None
        self._seen = time.monotonic()

    @property
    def age(self) -> float:
        """Seconds since the last look that succeeded."""
        return time.monotonic() - self._seen

    @property
    def problem(self) -> str | None:
        """Why changes cannot be seen at the moment, or None if they can."""
        if self._failure is None and self.age > self._seconds + _OVERDUE:
            return f"no answer for {self.age:.0f} s"
        return self._failure

    def start(self) -> None:
        """Start looking."""
        self._seen = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="crl-bases", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop looking. A look that is under way is waited for, but not for long."""
        self._stopping = True
        self._asked.set()
        if self._thread is not None:
            self._thread.join(_PATIENCE)

    async def look_again(self) -> None:
        """Wait until a look that begins now has ended, but not for long."""
        loop = asyncio.get_running_loop()
        done = loop.create_future()

        def resolve() -> None:
            if not done.done():
                done.set_result(None)

        def notify() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, so nobody waits
                loop.call_soon_threadsafe(resolve)

        with self._lock:
            self._waiting.append(notify)
        self._asked.set()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(done, _PATIENCE)

    def _run(self) -> None:
        while True:
            self._asked.wait(self._seconds)
            if self._stopping:
                return
            self._asked.clear()
            with self._lock:
                waiting, self._waiting = self._waiting, []
            self._look()
            for notify in waiting:
                notify()
            time.sleep(_LEAST_PAUSE)

    def _look(self) -> None:
        try:
            self._refresh()
        except (OSError, CrlError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            if self._failure is None:
                _log.error(
                    "%s: cannot be read (%s): the bases that were read %.0f s ago are served until "
                    "it can be read again", self._place, reason, self.age,
                )  # fmt: skip
            self._failure = reason
            return
        except Exception:
            _log.exception("%s: looking for changes of bases failed", self._place)
            self._failure = "unexpected error, see the log"
            return
        if self._failure is not None:
            _log.warning("%s: can be read again", self._place)
        self._failure = None
        self._seen = time.monotonic()
