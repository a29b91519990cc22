"""Which requests the server accepts: the limits, and whether a request can finish in time.

This is the only place that refuses work for lack of room or time, and that counts images which
never reach the engine. A refused request costs almost nothing.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from crl_sdk.errors import DeadlineError, InvalidInputError, OverloadedError

_SAFETY_FACTOR = 2.0
"""A request is accepted only if its deadline allows this multiple of its expected duration.

The reserve covers bursts and slow batches, so that accepted work is rarely late.
"""

_MIN_RETRY_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """Bounds on the work that a server accepts.

    Attributes:
        max_images: Largest number of images in one request.
        max_batch: Largest number of images in one engine run.
        max_queue: Largest number of images in progress: those being decoded, those waiting for the
            engine and those in it.
        cache_bytes: Largest size of the embedding cache, in bytes; 0 disables it.
        max_texts: Largest number of texts in one request.
        max_prompts: Largest number of prompts in one request.
        max_text_length: Largest number of characters of a text or prompt.
        max_text_rows: Largest number of texts times prompts in one request.
        max_text_queue: Largest number of texts, times prompts, in progress.
    """

    max_images: int = 256
    max_batch: int = 32
    max_queue: int = 1024
    cache_bytes: int = 256 * 2**20
    max_texts: int = 2048
    max_prompts: int = 128
    max_text_length: int = 4096
    max_text_rows: int = 16_384
    max_text_queue: int = 32_768

    def __post_init__(self) -> None:
        """Check that the limits are consistent.

        Raises:
            InvalidInputError: If the queue has no room for one batch or one request.
        """
        if not max(self.max_batch, self.max_images) <= self.max_queue:
            raise InvalidInputError(
                f"expected room for one batch and one request in the queue, got max_queue "
                f"{self.max_queue} under max_batch {self.max_batch} or max_images "
                f"{self.max_images}: raise max_queue or lower the others"
            )


@dataclass(slots=True)
class DroppedImages:
    """Number of images since the start that never reached the engine, by reason.

    Attributes:
        rejected: Images refused on arrival, for lack of room or time.
        expired: Images whose deadline passed while they waited.
        cancelled: Images whose caller went away while they waited.
    """

    rejected: int = 0
    expired: int = 0
    cancelled: int = 0


class Pace:
    """Running estimate of the seconds that the server needs per image.

    A request that had n images in progress, its own included, and took t seconds is one
    observation (n, t). The estimate is Σ wᵢ·tᵢ / Σ wᵢ·nᵢ, where the weight w falls by a factor of
    0.9 with each later observation. Requests with many images in progress thus count most.
    """

    def __init__(self) -> None:
        """Start without observations."""
        self._seconds = self._images = 0.0

    @property
    def seconds_per_image(self) -> float:
        """Estimate in seconds; 0 before the first observation."""
        return self._seconds / self._images if self._images else 0.0

    def learn(self, images: int, seconds: float) -> None:
        """Add the observation of a request that finished."""
        self._seconds = 0.9 * self._seconds + seconds
        self._images = 0.9 * self._images + images

    def learn_at_least(self, images: int, seconds: float) -> None:
        """Add the observation of a request that was given up after so many seconds.

        It would have taken longer, so it counts only if it raises the estimate.
        """
        if seconds > images * self.seconds_per_image:
            self.learn(images, seconds)


class Admission:
    """Accepts or refuses requests, and counts what is in progress and what is dropped.

    `check_size` and `admit` belong to the event loop; `drop` may be called in any thread.
    """

    def __init__(
        self, per_request: int, room: int, *, queued: Callable[[], int], unit: str = "images"
    ) -> None:
        """Store the limits.

        Args:
            per_request: Largest number of images in one request.
            room: Largest number of images in progress.
            queued: Function that returns the number of images in the engine's queue. Images whose
                caller went away stay there until the engine's thread drops them, so they take up
                room although they are no longer in progress.
            unit: What is counted, if not images.
        """
        self._per_request, self._room, self._unit = per_request, room, unit
        self.dropped = DroppedImages()
        self._queued = queued
        self._in_progress = 0
        self._pace = Pace()
        self._dropping = threading.Lock()

    @property
    def in_progress(self) -> int:
        """Number of accepted images whose requests have not finished."""
        return self._in_progress

    def check_size(self, count: int) -> None:
        """Check the number of images of one request.

        Raises:
            InvalidInputError: If there are none or too many.
        """
        if not 1 <= count <= self._per_request:
            raise InvalidInputError(
                f"expected 1 to {self._per_request} {self._unit} in one call, got {count}: split "
                "them over several calls"
            )

    @contextmanager
    def admit(self, count: int, deadline: float | None) -> Iterator[None]:
        """Hold the places of a request's images while the context is open.

        Args:
            count: Number of images to compute.
            deadline: `time.monotonic()` by which the caller needs the result, or None.

        Raises:
            DeadlineError: If the deadline has passed already.
            OverloadedError: If there is no room, or the result would come too late.
        """
        started = time.monotonic()
        if deadline is not None and deadline <= started:
            raise DeadlineError(
                "the deadline had passed when the request arrived: allow the call more time"
            )
        in_progress = self._reserve(count, deadline, started)
        try:
            yield
        except (DeadlineError, asyncio.CancelledError):
            self._pace.learn_at_least(in_progress, time.monotonic() - started)
            raise
        finally:
            self._in_progress -= count
        self._pace.learn(in_progress, time.monotonic() - started)

    def drop(self, *, cancelled: bool, waited: float) -> DeadlineError:
        """Count an image that nobody waits for any more; return the error for its caller.

        Args:
            cancelled: Whether the caller went away. Otherwise the deadline passed.
            waited: Time that the image waited, in seconds.
        """
        with self._dropping:
            if cancelled:
                self.dropped.cancelled += 1
            else:
                self.dropped.expired += 1
        return DeadlineError(
            f"the deadline passed after {waited * 1e3:.0f} ms in the queue: allow the call more "
            "time, or send fewer images at once"
        )

    def _reserve(self, count: int, deadline: float | None, now: float) -> int:
        """Take places for images; return how many are in progress, these included."""
        waiting = max(self._in_progress, self._queued())
        seconds = (waiting + count) * self._pace.seconds_per_image
        if waiting + count > self._room:
            reason = (
                f"the queue is full: {waiting} {self._unit} are in progress, at most "
                f"{self._room} may be"
            )
        elif waiting and deadline is not None and now + _SAFETY_FACTOR * seconds > deadline:
            reason = (
                f"{waiting} {self._unit} are in progress, which takes about "
                f"{seconds * 1e3:.0f} ms; the deadline is in {(deadline - now) * 1e3:.0f} ms"
            )
        else:
            self._in_progress += count
            return waiting + count
        self.dropped.rejected += count
        raise OverloadedError(
            f"{reason}; try again later, or send fewer at once",
            retry_after=max(seconds / 2, _MIN_RETRY_SECONDS),
        )
