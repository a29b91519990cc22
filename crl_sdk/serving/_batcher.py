"""Collects images into batches for the engine.

While the engine runs, images wait. When the engine is free, it takes what waits. There is no
timer: an idle engine starts at once, and a busy engine finds its next batch complete. A pipelined
engine takes a full batch while the last one is under way. How much may wait is decided in
`_admission`. This module knows no transport.
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
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from crl_sdk.errors import EngineError

Row = TypeVar("Row")
"""What the engine returns for one image."""

_PROBE_SECONDS = 1.0
"""Time between two attempts to run an engine that has failed."""

_log = logging.getLogger(__name__)


class DropImage(Protocol):
    """Counts an image that nobody waits for any more and returns the error for its caller."""

    def __call__(self, *, cancelled: bool, waited: float) -> Exception:
        """See `Admission.drop`."""


@dataclass(frozen=True, slots=True)
class EmbeddedImage(Generic[Row]):
    """What the engine returned for one image.

    Attributes:
        row: The image's part of the result of the run.
        queue_seconds: Time from submission to the start of the engine run.
        infer_seconds: Duration of the engine run that the image was in.
        batch_size: Number of images in that run.
    """

    row: Row
    queue_seconds: float
    infer_seconds: float
    batch_size: int


@dataclass(slots=True)
class _Item(Generic[Row]):
    """An image in the queue, and the future that receives its `EmbeddedImage`."""

    pixels: NDArray[np.uint8]
    deadline: float | None
    future: asyncio.Future[EmbeddedImage[Row]]
    submitted: float


@dataclass(frozen=True, slots=True)
class _Run(Generic[Row]):
    """A run that is under way.

    Attributes:
        batch: Its images.
        started: `time.monotonic()` at its start.
        finish: Function that waits for its rows.
    """

    batch: list[_Item[Row]]
    started: float
    finish: Callable[[], Sequence[Row]]


class Batcher(Generic[Row]):
    """A queue in front of an engine, emptied by one thread. Call `start` first and `stop` last.

    Clients take turns: a batch takes one image of each waiting client, again and again. A client
    that sends a million images therefore does not delay the others.

    If a run fails, all images of its batch fail. After that everything is refused until the engine
    has run on the probe image.
    """

    def __init__(
        self,
        start: Callable[[NDArray[np.uint8]], Callable[[], Sequence[Row]]],
        probe: NDArray[np.uint8],
        *,
        drop: DropImage,
        max_batch: int = 32,
        cpu_turn: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
        runs_at_once: int = 1,
    ) -> None:
        """Store the settings.

        Args:
            start: Function that begins a run on pixels, shape (b, H, W, 3), uint8, and returns a
                function that waits for its b rows. Only one thread calls them.
            probe: One image, shape (1, H, W, 3), uint8. It is run after a failure, to find out
                whether the engine works again.
            drop: Function called for each image whose deadline has passed or whose caller has gone.
            max_batch: Largest number of images in one run.
            cpu_turn: Context manager held while a batch is taken and started. Entering it may
                block. An engine on a CPU has finished the run when it is started.
            runs_at_once: Number of runs that may be under way.
        """
        self.max_batch = max_batch
        self.batches = 0
        self.failed: EngineError | None = None
        self.on_batch: Callable[[int], None] | None = None
        self._start_run = start
        self._runs_at_once = runs_at_once
        self._under_way: deque[_Run[Row]] = deque()
        self._probe = probe
        self._drop = drop
        self._cpu_turn = cpu_turn
        self._waiting: OrderedDict[str, deque[_Item[Row]]] = OrderedDict()
        self._depth = 0
        self._changed = threading.Condition()
        self._stopping = False
        self._running_since: float | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    @property
    def depth(self) -> int:
        """Number of images in the queue."""
        return self._depth

    @property
    def running_seconds(self) -> float:
        """Seconds since the current engine run started; 0 if none is running."""
        since = self._running_since
        return 0.0 if since is None else time.monotonic() - since

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the thread. Results are delivered in `loop`."""
        self._loop = loop
        self._thread = threading.Thread(target=self._work, name="crl-engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Finish the images in the queue, then end the thread. It blocks until then."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def submit(
        self, images: Sequence[NDArray[np.uint8]], *, deadline: float | None, client: str
    ) -> list[asyncio.Future[EmbeddedImage[Row]]]:
        """Queue images and return a future for each; call it in the event loop. See `enqueue`."""
        assert self._loop is not None, "start the batcher first"
        futures: list[asyncio.Future[EmbeddedImage[Row]]] = [
            self._loop.create_future() for _ in images
        ]
        self.enqueue(images, futures, deadline=deadline, client=client)
        return futures

    def enqueue(
        self,
        images: Sequence[NDArray[np.uint8]],
        futures: Sequence[asyncio.Future[Any]],
        *,
        deadline: float | None,
        client: str,
    ) -> None:
        """Queue the images of one request; call it in any thread.

        Args:
            images: Pixels of each image, shape (H, W, 3), uint8.
            futures: Futures of the event loop, one per image. Each receives an `EmbeddedImage`. An
                image whose future is cancelled is not run.
            deadline: `time.monotonic()` after which nobody waits for the images, or None.
            client: Name of the client, for the turns. Requests of one client wait for each other.

        Raises:
            EngineError: If the engine has failed or the server is stopping.
        """
        now = time.monotonic()
        with self._changed:
            failed = self.failed  # read once: the engine's thread may reset it at any time
            if failed is not None:
                # Always a new error: the traceback of one that is raised again and again grows.
                raise EngineError(str(failed))
            if self._stopping:
                raise EngineError("the server is shutting down: send the request to another one")
            items = [
                _Item(pixels, deadline, future, now)
                for pixels, future in zip(images, futures, strict=True)
            ]
            self._waiting.setdefault(client, deque()).extend(items)
            self._depth += len(items)
            self._changed.notify()

    def _work(self) -> None:
        """Run batches until the batcher is stopped and its queue is empty."""
        while True:
            with self._changed:
                while not (
                    self._depth or self._under_way or self._stopping or self.failed is not None
                ):
                    self._changed.wait()
                if not self._depth and not self._under_way and self._stopping:
                    return
                # only a full batch is worth starting before the last one is finished
                enough = self.max_batch if self._under_way else 1
                begins = self._depth >= enough and len(self._under_way) < self._runs_at_once
            if begins:
                self._begin()
            elif self._under_way:
                self._finish(self._under_way[0])
            if self.failed is not None and not self._under_way:
                self._probe_engine()

    def _begin(self) -> None:
        """Take a batch and start its run."""
        with self._cpu_turn():
            with self._changed:
                batch, abandoned = self._take_batch()
            now = time.monotonic()
            self._deliver(
                [
                    (item, self._drop(cancelled=item.future.cancelled(),
                                      waited=now - item.submitted))
                    for item in abandoned
                ]
            )  # fmt: skip
            if not batch:
                return
            self._running_since = self._running_since or now
            try:
                finish = self._start_run(np.stack([item.pixels for item in batch]))
            except Exception as error:
                outcomes = self._failed(batch, error)
                self._running_since = self._under_way[0].started if self._under_way else None
            else:
                self._under_way.append(_Run(batch, now, finish))
                return
        self._deliver(outcomes)

    def _take_batch(self) -> tuple[list[_Item[Row]], list[_Item[Row]]]:
        """Take a batch, one image per client in turn; return it and the abandoned images met."""
        batch: list[_Item[Row]] = []
        abandoned: list[_Item[Row]] = []
        now = time.monotonic()
        while self._waiting and len(batch) < self.max_batch:
            client, items = self._waiting.popitem(last=False)
            item = items.popleft()
            self._depth -= 1
            if items:
                self._waiting[client] = items  # at the end, behind all other clients
            late = item.deadline is not None and item.deadline <= now
            (abandoned if late or item.future.cancelled() else batch).append(item)
        return batch, abandoned

    def _finish(self, run: _Run[Row]) -> None:
        """Wait for the oldest run and deliver its rows."""
        try:
            rows = run.finish()
        except Exception as error:
            outcomes = self._failed(run.batch, error)
        else:
            seconds = time.monotonic() - run.started
            self.batches += 1
            if self.on_batch is not None:
                self.on_batch(len(run.batch))
            outcomes = [
                (
                    item,
                    EmbeddedImage(rows[i], run.started - item.submitted, seconds, len(run.batch)),
                )
                for i, item in enumerate(run.batch)
            ]
        finally:
            self._under_way.popleft()
            self._running_since = self._under_way[0].started if self._under_way else None
        self._deliver(outcomes)

    def _failed(
        self, batch: list[_Item[Row]], error: Exception
    ) -> list[tuple[_Item[Row], EmbeddedImage[Row] | Exception]]:
        """Note that the engine failed on a batch, and return the error of its images."""
        if isinstance(error, MemoryError):  # not the engine's fault: the next batch may have enough
            return [(item, error) for item in batch]
        _log.error("the engine failed on a batch of %d", len(batch), exc_info=error)
        failure = error if isinstance(error, EngineError) else EngineError(str(error))
        self.failed = failure
        return [(item, failure) for item in batch]

    def _probe_engine(self) -> None:
        """Run the failed engine on the probe image; if that fails too, wait before the next try."""
        try:
            self._start_run(self._probe)()
        except Exception:
            with self._changed:
                self._changed.wait(timeout=_PROBE_SECONDS)
        else:
            _log.warning("the engine runs again")
            self.failed = None

    def _deliver(
        self, outcomes: Sequence[tuple[_Item[Row], EmbeddedImage[Row] | Exception]]
    ) -> None:
        """Resolve the futures of all outcomes in one step of the event loop."""
        if not outcomes or self._loop is None:
            return

        def resolve() -> None:
            for item, outcome in outcomes:
                if item.future.done():
                    continue
                if isinstance(outcome, Exception):
                    item.future.set_exception(outcome)
                else:
                    item.future.set_result(outcome)

        with contextlib.suppress(RuntimeError):  # the loop is closed, so nobody waits
            self._loop.call_soon_threadsafe(resolve)
