"""Batches: while the engine runs, images wait; when it is free, it takes what waits.

There is no timer: an idle engine starts at once, a busy one finds its next batch complete. The
queue is bounded, and what nobody waits for any more costs nothing. Knows no transport.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crl_sdk.errors import DeadlineError, EngineError, OverloadedError

Run = Callable[[NDArray[np.uint8]], NDArray[np.float32]]

_REVIVE_SECONDS = 1.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EmbeddedImage:
    """What the engine gave for one image.

    Attributes:
        embedding: (d,) float32, unit norm.
        queue_seconds: from submission to the start of the run.
        infer_seconds: of the run, with the batch it was in.
        batch_size: images in that run.
    """

    embedding: NDArray[np.float32]
    queue_seconds: float
    infer_seconds: float
    batch_size: int


@dataclass(slots=True)
class _Item:
    pixels: NDArray[np.uint8]
    deadline: float | None
    future: asyncio.Future[EmbeddedImage]
    submitted: float


@dataclass(slots=True)
class Counts:
    """What became of images since the start.

    Attributes:
        served: went through the engine.
        rejected: refused because the queue was full.
        expired: their deadline passed while they waited.
        cancelled: nobody waited for them any more.
        batches: engine runs.
    """

    served: int = 0
    rejected: int = 0
    expired: int = 0
    cancelled: int = 0
    batches: int = 0


class Batcher:
    """A bounded queue before an engine, emptied by one thread. `start` before use, then `stop`.

    Clients take turns: a batch takes one image of each client that waits, again and again, so that
    one that sends a million does not starve the others.

    A failed run fails its batch. Until the engine has succeeded on the probe again, everything is
    refused.
    """

    def __init__(
        self,
        run: Run,
        probe: NDArray[np.uint8],
        *,
        max_batch: int = 32,
        max_queue: int = 512,
        turn: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        """Store the settings.

        Args:
            run: pixels (b, H, W, 3) uint8 to unit embeddings (b, d) float32; called by one thread.
            probe: (1, H, W, 3) uint8; after a failed run it tells whether the engine still lives.
            max_batch: images of one run at most.
            max_queue: images that may wait.
            turn: what a batch is taken and run in; it may wait, and more images come meanwhile.
        """
        self.max_batch = max_batch
        self.max_queue = max_queue
        self.counts = Counts()
        self.failed: EngineError | None = None
        self.on_batch: Callable[[int], None] | None = None
        self._run = run
        self._probe = probe
        self._turn = turn
        self._waiting: OrderedDict[str, deque[_Item]] = OrderedDict()
        self._depth = 0
        self._changed = threading.Condition()
        self._stopping = False
        self._running_since: float | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    @property
    def depth(self) -> int:
        """Images that wait now."""
        return self._depth

    @property
    def running_seconds(self) -> float:
        """How long the run that is under way has taken so far; 0 if there is none."""
        since = self._running_since
        return 0.0 if since is None else time.monotonic() - since

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the thread; results are delivered in `loop`."""
        self._loop = loop
        self._thread = threading.Thread(target=self._work, name="crl-engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Finish what waits, then end the thread. Call it in a thread that may block."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def submit(
        self, images: Sequence[NDArray[np.uint8]], *, deadline: float | None, client: str
    ) -> list[asyncio.Future[EmbeddedImage]]:
        """Queue images and give what will hold their rows; for the event loop. See `put`."""
        assert self._loop is not None, "start the batcher first"
        futures: list[asyncio.Future[EmbeddedImage]] = [self._loop.create_future() for _ in images]
        self.put(images, futures, deadline=deadline, client=client)
        return futures

    def put(
        self,
        images: Sequence[NDArray[np.uint8]],
        futures: Sequence[asyncio.Future[Any]],
        *,
        deadline: float | None,
        client: str,
    ) -> None:
        """Queue the images of one request, all or none. Call it in any thread.

        Args:
            images: (H, W, 3) uint8 each.
            futures: of the event loop, one per image; each gets an `EmbeddedImage`. Cancelling one
                takes its image out of the queue.
            deadline: `time.monotonic()` after which nobody waits; None for never.
            client: who takes turns; requests of one client wait for each other.

        Raises:
            OverloadedError: the queue has no room for all of them.
            EngineError: the engine has failed.
        """
        now = time.monotonic()
        with self._changed:
            if self.failed is not None:
                raise self.failed
            if self._stopping:
                raise EngineError("the server is shutting down")
            if self._depth + len(images) > self.max_queue:
                self.counts.rejected += len(images)
                raise OverloadedError(
                    f"the queue is full: {self._depth} images wait, {self.max_queue} may; try "
                    "again later, or send fewer at once",
                    retry_after=self._drain_seconds(),
                )
            items = [
                _Item(pixels, deadline, future, now)
                for pixels, future in zip(images, futures, strict=True)
            ]
            self._waiting.setdefault(client, deque()).extend(items)
            self._depth += len(items)
            self._changed.notify()

    def give_up(self, future: asyncio.Future[Any], since: float) -> DeadlineError:
        """Count an image that nobody waits for any more, and say why. Call it in any thread."""
        with self._changed:
            if future.cancelled():
                self.counts.cancelled += 1
            else:
                self.counts.expired += 1
        waited = time.monotonic() - since
        return DeadlineError(f"the deadline passed after {waited * 1e3:.0f} ms in the queue")

    def _drain_seconds(self) -> float:
        """Guess when there will be room: the time of a few runs."""
        return max(0.05, 4 * self.running_seconds)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._depth and not self._stopping and self.failed is None:
                    self._changed.wait()
                if not self._depth and self._stopping:
                    return
            with self._turn():
                with self._changed:
                    batch, dropped = self._take()
                self._deliver(
                    [(item, self.give_up(item.future, item.submitted)) for item in dropped]
                )
                outcomes = self._infer(batch) if batch else []
            self._deliver(outcomes)
            if self.failed is not None:
                self._revive()

    def _take(self) -> tuple[list[_Item], list[_Item]]:
        """Take a batch, clients in turn; beside it what nobody waits for."""
        batch: list[_Item] = []
        dropped: list[_Item] = []
        now = time.monotonic()
        while self._waiting and len(batch) < self.max_batch:
            client, items = self._waiting.popitem(last=False)
            item = items.popleft()
            self._depth -= 1
            if items:
                self._waiting[client] = items  # to the end: the others come first
            late = item.deadline is not None and item.deadline <= now
            (dropped if late or item.future.cancelled() else batch).append(item)
        return batch, dropped

    def _infer(self, batch: list[_Item]) -> list[tuple[_Item, EmbeddedImage | Exception]]:
        started = time.monotonic()
        self._running_since = started
        try:
            embeddings = self._run(np.stack([item.pixels for item in batch]))
        except Exception as error:
            _log.exception("the engine failed on a batch of %d", len(batch))
            failure = error if isinstance(error, EngineError) else EngineError(str(error))
            self.failed = failure
            return [(item, failure) for item in batch]
        finally:
            self._running_since = None
        seconds = time.monotonic() - started
        self.counts.served += len(batch)
        self.counts.batches += 1
        if self.on_batch is not None:
            self.on_batch(len(batch))
        return [
            (item, EmbeddedImage(embeddings[i], started - item.submitted, seconds, len(batch)))
            for i, item in enumerate(batch)
        ]

    def _revive(self) -> None:
        """See whether the engine lives; if not, wait a little before the next look."""
        try:
            self._run(self._probe)
        except Exception:
            with self._changed:
                self._changed.wait(timeout=_REVIVE_SECONDS)
        else:
            _log.warning("the engine runs again")
            self.failed = None

    def _deliver(self, outcomes: Sequence[tuple[_Item, EmbeddedImage | Exception]]) -> None:
        """Hand over all results of a run in one step of the event loop."""
        if not outcomes or self._loop is None:
            return

        def settle() -> None:
            for item, outcome in outcomes:
                if item.future.done():
                    continue
                if isinstance(outcome, Exception):
                    item.future.set_exception(outcome)
                else:
                    item.future.set_result(outcome)

        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(settle)
