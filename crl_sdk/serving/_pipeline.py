"""The path of one request, top to bottom: read, look up, decode, batch, project. No transport."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crl_sdk._embedder import Embedder
from crl_sdk.errors import (
    CrlError,
    DeadlineError,
    EngineError,
    ImageError,
    InvalidInputError,
    OverloadedError,
)
from crl_sdk.projection._projection import check_embeddings
from crl_sdk.serving._bases import BasisStore, StoredBasis
from crl_sdk.serving._batcher import Batcher, EmbeddedImage
from crl_sdk.serving._cache import EmbeddingCache
from crl_sdk.serving._cpu_turns import NoTurns, Turns

Source = bytes | NDArray[Any]

_SPARE = 2.0
"""How much longer than expected a request may take and still be in time."""


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """What the service takes on.

    Attributes:
        max_images: images of one request.
        max_batch: images of one engine run.
        max_queue: images in the works: being decoded, waiting for the engine, or in it.
        cache_bytes: of the embedding cache; 0 for none.
    """

    max_images: int = 256
    max_batch: int = 32
    max_queue: int = 1024
    cache_bytes: int = 256 * 2**20

    def __post_init__(self) -> None:
        """Check that they fit together.

        Raises:
            InvalidInputError: a batch, or a call, would never find room.
        """
        if not max(self.max_batch, self.max_images) <= self.max_queue:
            raise InvalidInputError(
                f"expected room for a batch and a call in the queue, got max_queue "
                f"{self.max_queue} under max_batch {self.max_batch} or max_images "
                f"{self.max_images}: raise the first or lower the others"
            )


@dataclass(slots=True)
class ImageOutcome:
    """What became of one image.

    Attributes:
        embedding: (d,) float32, None if the image failed.
        error: why, else None.
        digest: SHA-256 of its bytes or pixels; empty for a stored embedding.
        cached: whether its embedding was known.
    """

    embedding: NDArray[np.float32] | None = None
    error: ImageError | None = None
    digest: bytes = b""
    cached: bool = False


@dataclass(slots=True)
class Timing:
    """Seconds of the slowest image in each stage, and of the whole request.

    `executions` are engine runs: of each, the share that this request's images had in it.
    """

    preprocess: float = 0.0
    queue: float = 0.0
    infer: float = 0.0
    project: float = 0.0
    total: float = 0.0
    executions: float = 0.0


@dataclass(frozen=True, slots=True)
class Result:
    """The answer to a request.

    Attributes:
        images: one outcome per image.
        universal: (n, d) float32; NaN in the rows of failed images.
        conditional: (n, m) float32 per basis, in the order asked for; NaN likewise.
        bases: those used, all of one moment.
        timing: where the time went.
    """

    images: list[ImageOutcome]
    universal: NDArray[np.float32]
    conditional: list[NDArray[np.float32]]
    bases: list[StoredBasis]
    timing: Timing


class Pace:
    """How long an image takes under the load of the moment, learnt from those that went through.

    An image that had n others before it and took t seconds says t / (n + 1). Recent requests count
    most, and of these the ones with much before them.
    """

    def __init__(self) -> None:
        """Know nothing yet."""
        self._seconds = self._images = 0.0

    @property
    def seconds_per_image(self) -> float:
        """Of a queue that is being worked off; 0 while nothing is known."""
        return self._seconds / self._images if self._images else 0.0

    def learn(self, images: int, seconds: float) -> None:
        """Take into account that a request with so many images in the works took so long."""
        self._seconds = 0.9 * self._seconds + seconds
        self._images = 0.9 * self._images + images

    def learn_at_least(self, images: int, seconds: float) -> None:
        """The same of a request that was given up: it would have taken longer."""
        if seconds > images * self.seconds_per_image:
            self.learn(images, seconds)


class Pipeline:
    """Serves requests with one model. `start` it in the event loop that will call `embed`."""

    def __init__(
        self, embedder: Embedder, bases: BasisStore, limits: ServerLimits = ServerLimits()
    ) -> None:
        """Store the parts; the embedder's engine runs in the batcher's thread."""
        self.embedder = embedder
        self.bases = bases
        self.limits = limits
        self.cache = EmbeddingCache(limits.cache_bytes)
        spec = embedder.bundle.preprocess
        self._on_cpu = embedder.engine_name.device == "cpu"
        self._turns = Turns(limits.max_batch) if self._on_cpu else NoTurns()
        self.batcher = Batcher(
            embedder.embed_pixels,
            np.zeros((1, spec.height, spec.width, 3), np.uint8),
            max_batch=limits.max_batch,
            max_queue=limits.max_queue,
            turn=self._turns.engine,
        )
        self._decoders = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="crl-decode")
        self._in_works = 0
        self._pace = Pace()
        self.on_result: list[Callable[[Result], None]] = []

    def start(self) -> None:
        """Start the engine's thread. Call it in the event loop."""
        self.batcher.start(asyncio.get_running_loop())

    async def warm_up(self) -> None:
        """Run the engine through the real queue: one image, and on a GPU the largest batch too.

        On a CPU nothing is compiled or set aside for a size of batch.
        """
        spec = self.embedder.bundle.preprocess
        blank = np.zeros((spec.height, spec.width, 3), np.uint8)
        for count in (1,) if self._on_cpu else (1, self.limits.max_batch):
            await asyncio.gather(
                *self.batcher.submit([blank] * count, deadline=None, client="warm-up")
            )

    async def stop(self) -> None:
        """Finish what waits, then free the threads."""
        await asyncio.to_thread(self.batcher.stop)
        self._decoders.shutdown(wait=False, cancel_futures=True)

    async def embed(
        self,
        images: Sequence[Source],
        criteria: Sequence[str] = (),
        *,
        deadline: float | None = None,
        client: str = "",
    ) -> Result:
        """Embed images for criteria. A bad image fails alone.

        Args:
            images: each an encoded image (bytes), pixels (uint8 of 2 or 3 dimensions) or a stored
                universal embedding (float of shape (d,)).
            criteria: names of bases, each once.
            deadline: `time.monotonic()` after which nobody waits.
            client: whose turn it is in the queue.

        Raises:
            InvalidInputError: no images, too many, or a stored embedding that does not fit.
            CriterionError: no such basis.
            OverloadedError: too much waits already.
            DeadlineError: the deadline has passed.
            EngineError: the engine failed.
        """
        arrived = time.monotonic()
        if not 1 <= len(images) <= self.limits.max_images:
            raise InvalidInputError(
                f"expected 1 to {self.limits.max_images} images in one call, got {len(images)}"
            )
        bases = self.bases.select(criteria)
        timing = Timing()
        outcomes = [self._look_up(source) for source in images]
        wanted = [
            (source, outcome)
            for source, outcome in zip(images, outcomes, strict=True)
            if outcome.embedding is None and outcome.error is None
        ]
        if wanted:
            await self._compute(wanted, deadline, client, timing)
        started = time.monotonic()
        universal, conditional = self._project(outcomes, bases)
        now = time.monotonic()
        timing.project, timing.total = now - started, now - arrived
        result = Result(outcomes, universal, conditional, bases, timing)
        for tell in self.on_result:
            tell(result)
        return result

    def _look_up(self, source: Source) -> ImageOutcome:
        """Recognise a stored embedding or a known image."""
        if isinstance(source, np.ndarray) and source.dtype.kind == "f":
            row = check_embeddings(source[None], self.embedder.bundle.embedding_dim)[0]
            return ImageOutcome(embedding=row)
        outcome = ImageOutcome(digest=digest_of(source))
        outcome.embedding = self.cache.get(outcome.digest)
        outcome.cached = outcome.embedding is not None
        return outcome

    async def _compute(
        self,
        wanted: list[tuple[Source, ImageOutcome]],
        deadline: float | None,
        client: str,
        timing: Timing,
    ) -> None:
        """Let images in if they can be done in time, have them done, and learn how long it took."""
        started = time.monotonic()
        if deadline is not None and deadline <= started:
            raise DeadlineError("the deadline had passed when the request arrived")
        ahead = self._admit(len(wanted), deadline, started)
        self._in_works = ahead
        try:
            await self._run(wanted, deadline, client, timing)
        except (DeadlineError, asyncio.CancelledError):
            self._pace.learn_at_least(ahead, time.monotonic() - started)
            raise
        finally:
            self._in_works -= len(wanted)
        self._pace.learn(ahead, time.monotonic() - started)

    async def _run(
        self,
        wanted: list[tuple[Source, ImageOutcome]],
        deadline: float | None,
        client: str,
        timing: Timing,
    ) -> None:
        """Decode images in the pool, run them through the engine, and keep what comes out."""
        started = time.monotonic()
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[EmbeddedImage | ImageError]] = [
            loop.create_future() for _ in wanted
        ]
        decoded: list[NDArray[np.uint8] | Exception] = [EngineError("not decoded")] * len(wanted)
        left = threading.Semaphore(len(wanted) - 1)

        def decode(i: int) -> None:
            with self._turns.decoding():
                decoded[i] = self._decode(wanted[i][0], futures[i], deadline)
                if not left.acquire(blocking=False):  # the last one: all go on, without a detour
                    timing.preprocess = time.monotonic() - started
                    self._hand_over(decoded, futures, deadline, client)

        self._turns.expect(len(wanted))
        for i in range(len(wanted)):
            self._decoders.submit(decode, i)
        try:
            rows = await asyncio.gather(*futures)
        finally:
            for future in futures:  # if one fails, or the caller is gone, none is waited for
                future.cancel()
        for row, (_, outcome) in zip(rows, wanted, strict=True):
            if isinstance(row, ImageError):
                outcome.error = row
                continue
            outcome.embedding = row.embedding
            self.cache.put(outcome.digest, row.embedding)
            timing.queue = max(timing.queue, row.queue_seconds)
            timing.infer = max(timing.infer, row.infer_seconds)
            timing.executions += 1 / row.batch_size

    def _decode(
        self, source: Source, future: asyncio.Future[Any], deadline: float | None
    ) -> NDArray[np.uint8] | Exception:
        """Give an image's pixels, or why there are none; in a thread of the pool."""
        now = time.monotonic()
        if future.cancelled() or (deadline is not None and deadline <= now):
            return self.batcher.give_up(future, now)
        try:
            return self.embedder.load_pixels(source)
        except Exception as error:  # whatever it is, its caller must hear of it
            return error

    def _hand_over(
        self,
        decoded: Sequence[NDArray[np.uint8] | Exception],
        futures: Sequence[asyncio.Future[Any]],
        deadline: float | None,
        client: str,
    ) -> None:
        """Queue the images of a request that could be decoded; in a thread of the pool."""
        failed = {i: item for i, item in enumerate(decoded) if isinstance(item, Exception)}
        ready = [(item, i) for i, item in enumerate(decoded) if not isinstance(item, Exception)]
        if ready:
            try:
                self.batcher.put(
                    [pixels for pixels, _ in ready], [futures[i] for _, i in ready],
                    deadline=deadline, client=client,
                )  # fmt: skip
            except CrlError as error:
                failed |= {i: error for _, i in ready}

        def settle() -> None:
            for i, error in failed.items():
                if futures[i].done():
                    continue
                if isinstance(error, ImageError):
                    futures[i].set_result(error)
                else:
                    futures[i].set_exception(error)

        if failed:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                futures[0].get_loop().call_soon_threadsafe(settle)

    def _admit(self, count: int, deadline: float | None, now: float) -> int:
        """Refuse images for which there is no room, or that would not be done in time.

        What is refused costs nothing; what is let in has half its time to spare, so that bursts and
        slow batches do not turn accepted work into work for nobody.

        Returns:
            How many images are in the works, these included.

        Raises:
            OverloadedError: too many, or too slow.
        """
        waiting = self._in_works
        ahead = (waiting + count) * self._pace.seconds_per_image
        if waiting + count > self.limits.max_queue:
            reason = f"the queue is full: {waiting} images wait, {self.limits.max_queue} may"
        elif waiting and deadline is not None and now + _SPARE * ahead > deadline:
            reason = (
                f"{waiting} images wait, which takes about {ahead * 1e3:.0f} ms; the deadline is "
                f"in {(deadline - now) * 1e3:.0f} ms"
            )
        else:
            return waiting + count
        self.batcher.counts.rejected += count
        raise OverloadedError(
            f"{reason}; try again later, or send fewer at once", retry_after=max(ahead / 2, 0.05)
        )

    def _project(
        self, outcomes: Sequence[ImageOutcome], bases: Sequence[StoredBasis]
    ) -> tuple[NDArray[np.float32], list[NDArray[np.float32]]]:
        universal = np.full((len(outcomes), self.embedder.bundle.embedding_dim), np.nan, np.float32)
        good = [i for i, outcome in enumerate(outcomes) if outcome.embedding is not None]
        for i in good:
            universal[i] = outcomes[i].embedding
        conditional = []
        for stored in bases:
            projection = stored.basis.projection
            rows = np.full((len(outcomes), projection.output_dim), np.nan, np.float32)
            if good:
                rows[good] = projection.apply(universal[good])
            conditional.append(rows)
        return universal, conditional


def digest_of(source: Source) -> bytes:
    """Give the SHA-256 of encoded bytes, or of shape and pixels: 32 bytes."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).digest()
    digest = hashlib.sha256(f"pixels {source.shape}".encode())
    digest.update(np.ascontiguousarray(source).data)
    return digest.digest()
