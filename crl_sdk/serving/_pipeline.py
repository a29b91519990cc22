"""The path of one request: look up, admit, decode, batch, project. Knows no transport."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crl_sdk._embedder import Embedder
from crl_sdk.engines._contract import PipelinedEngine
from crl_sdk.errors import CrlError, EngineError, ImageError
from crl_sdk.projection._projection import normalise_rows
from crl_sdk.projection._row_dtypes import decode_rows, is_row_dtype
from crl_sdk.serving._admission import Admission, ServerLimits
from crl_sdk.serving._bases import BasisStore, StoredBasis
from crl_sdk.serving._batcher import Batcher, EmbeddedImage
from crl_sdk.serving._cache import EmbeddingCache
from crl_sdk.serving._cpu_turns import CpuTurns, NoTurns
from crl_sdk.serving._projection_pack import BasesInUse, EngineRow
from crl_sdk.serving._results import (
    EmbedResult,
    ImageOutcome,
    ImageSource,
    PreparedPixels,
    RequestTiming,
)
from crl_sdk.serving._text_work import TextWork

_log = logging.getLogger(__name__)

_CLOSED = "the embedder was closed while the server used it: restart the server"


class Pipeline:
    """Serves requests with one model. Call `start` in the event loop that will call `embed`."""

    def __init__(
        self, embedder: Embedder, bases: BasisStore, limits: ServerLimits | None = None
    ) -> None:
        """Store the parts.

        Args:
            embedder: Model. Its engine runs in the batcher's thread, and its pool decodes.
            bases: Bases that requests may name.
            limits: Bounds on the accepted work; None for the defaults of `ServerLimits`.
        """
        limits = limits or ServerLimits()
        self.embedder = embedder
        self.bases = bases
        self.limits = limits
        self.cache = EmbeddingCache(limits.cache_bytes)
        self.admission = Admission(
            limits.max_images, limits.max_queue, queued=lambda: self.batcher.depth
        )
        self.texts = TextWork(limits)
        spec = embedder.bundle.preprocess
        self._on_cpu = embedder.engine_name.device == "cpu"
        self._turns = CpuTurns(limits.max_batch) if self._on_cpu else NoTurns()
        # without columns, the engine embeds and NumPy projects
        self._in_use = BasesInUse(
            embedder.bundle.embedding_dim,
            0 if self._on_cpu else embedder.image_engine.max_columns,
            only=None if embedder.baked is None else embedder.baked.sha256(),
        )
        self.batcher = Batcher(
            self._start_engine,
            np.zeros((1, spec.height, spec.width, 3), np.uint8),
            drop=self.admission.drop,
            max_batch=limits.max_batch,
            cpu_turn=self._turns.engine,
            runs_at_once=2 if isinstance(embedder.image_engine, PipelinedEngine) else 1,
        )
        self.on_result: list[Callable[[EmbedResult], None]] = []

    def start(self) -> None:
        """Start the engine's thread. Call it in the event loop."""
        self.batcher.start(asyncio.get_running_loop())

    async def warm_up(self) -> None:
        """Run the engine through the real queue: on one image, and on a GPU on a full batch too.

        An engine on a CPU compiles and allocates nothing for a batch size.
        """
        spec = self.embedder.bundle.preprocess
        blank = np.zeros((spec.height, spec.width, 3), np.uint8)
        for count in (1,) if self._on_cpu else (1, self.limits.max_batch):
            await asyncio.gather(
                *self.batcher.submit([blank] * count, deadline=None, client="warm-up")
            )

    async def stop(self) -> None:
        """Finish the images in the queue, then end the engine's thread."""
        self.texts.close()
        await asyncio.to_thread(self.batcher.stop)

    async def embed(
        self,
        images: Sequence[ImageSource | ImageError],
        criteria: Sequence[str] = (),
        *,
        deadline: float | None = None,
        client: str = "",
    ) -> EmbedResult:
        """Embed images for criteria. A bad image does not affect the others.

        Args:
            images: Encoded images, pixels or stored universal embeddings, see `ImageSource`; or
                the reason why there is none.
            criteria: Names of bases, each at most once.
            deadline: `time.monotonic()` after which nobody waits for the result, or None.
            client: Name of the client, whose requests share one turn in the queue.

        Raises:
            InvalidInputError: If there are no images or too many.
            CriterionError: If a basis does not exist.
            OverloadedError: If there is no room, or the result would come too late.
            DeadlineError: If the deadline has passed.
            EngineError: If the engine failed.
        """
        arrived = time.monotonic()
        self.admission.check_size(len(images))
        bases = await self.bases.find(criteria)
        timing = RequestTiming()
        outcomes = [self._look_up(source) for source in images]
        missing = [
            (source, outcome)
            for source, outcome in zip(images, outcomes, strict=True)
            if outcome.embedding is None
            and outcome.error is None
            and not isinstance(source, ImageError)
        ]
        if missing:
            with self.admission.admit(len(missing), deadline):
                self._in_use.use(bases, self.bases.snapshot)
                await self._compute(missing, deadline, client, timing)
        started = time.monotonic()
        universal, conditional = self._project(outcomes, bases)
        now = time.monotonic()
        timing.project_seconds, timing.total_seconds = now - started, now - arrived
        result = EmbedResult(outcomes, universal, conditional, bases, timing)
        for observe in self.on_result:
            observe(result)
        return result

    def _look_up(self, source: ImageSource | ImageError) -> ImageOutcome:
        """Return the outcome of a stored embedding or a cached image, or an empty outcome."""
        if isinstance(source, ImageError):
            return ImageOutcome(error=source)
        if isinstance(source, np.ndarray) and is_row_dtype(source.dtype):
            dim = self.embedder.bundle.embedding_dim
            if source.shape != (dim,):
                return ImageOutcome(
                    error=ImageError(f"expected an embedding of shape ({dim},), got {source.shape}")
                )
            row = decode_rows(source[None])[0]
            if not np.isfinite(row).all():
                return ImageOutcome(error=ImageError("the embedding holds NaN or infinity"))
            return ImageOutcome(embedding=row)
        if isinstance(source, PreparedPixels):
            spec = self.embedder.bundle.preprocess
            if source.pixels.shape != (spec.height, spec.width, 3):
                return ImageOutcome(
                    error=ImageError(
                        f"expected prepared pixels of shape ({spec.height}, {spec.width}, 3), got "
                        f"{source.pixels.shape}"
                    )
                )
        outcome = ImageOutcome(digest=digest_image(source))
        outcome.embedding = self.cache.get(outcome.digest)
        outcome.cached = outcome.embedding is not None
        return outcome

    async def _compute(
        self,
        missing: list[tuple[ImageSource, ImageOutcome]],
        deadline: float | None,
        client: str,
        timing: RequestTiming,
    ) -> None:
        """Decode images in the pool, run them through the engine, and cache the embeddings."""
        started = time.monotonic()
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[EmbeddedImage[EngineRow] | ImageError]] = [
            loop.create_future() for _ in missing
        ]
        decoded: list[NDArray[np.uint8] | Exception] = [EngineError("not decoded")] * len(missing)
        others_left = threading.Semaphore(len(missing) - 1)

        def decode(i: int) -> None:
            with self._turns.decoding():
                decoded[i] = self._decode(missing[i][0], futures[i], deadline, started)
                if not others_left.acquire(blocking=False):
                    # The last image enqueues all of them here, in the pool's thread, which saves
                    # a detour through the event loop.
                    timing.preprocess_seconds = time.monotonic() - started
                    self._enqueue(decoded, futures, deadline, client)

        def fail(error: BaseException) -> None:
            for future in futures:
                if not future.done():
                    future.set_exception(error)

        def check(task: concurrent.futures.Future[None]) -> None:
            # An image that is never decoded must fail the request, which would wait for it.
            error = EngineError(_CLOSED) if task.cancelled() else task.exception()
            if error is not None:
                with contextlib.suppress(RuntimeError):  # the loop is closed, so nobody waits
                    loop.call_soon_threadsafe(fail, error)

        self._turns.announce(len(missing))
        try:
            for i in range(len(missing)):
                self.embedder.decode_pool.submit(decode, i).add_done_callback(check)
        except RuntimeError as error:  # the pool is shut down
            fail(EngineError(f"{_CLOSED} ({error})"))
        try:
            rows = await asyncio.gather(*futures)
        finally:
            # If one image fails or the caller goes away, nobody waits for the others.
            for future in futures:
                future.cancel()
        for row, (_, outcome) in zip(rows, missing, strict=True):
            if isinstance(row, ImageError):
                outcome.error = row
                continue
            outcome.engine_row = row.row
            outcome.embedding = row.row.universal
            self.cache.put(outcome.digest, outcome.embedding)
            timing.queue_seconds = max(timing.queue_seconds, row.queue_seconds)
            timing.infer_seconds = max(timing.infer_seconds, row.infer_seconds)
            timing.engine_runs += 1 / row.batch_size

    def _decode(
        self,
        source: ImageSource,
        future: asyncio.Future[Any],
        deadline: float | None,
        submitted: float,
    ) -> NDArray[np.uint8] | Exception:
        """Return the pixels of an image, or the reason why there are none; runs in the pool."""
        now = time.monotonic()
        if future.cancelled() or (deadline is not None and deadline <= now):
            return self.admission.drop(cancelled=future.cancelled(), waited=now - submitted)
        if isinstance(source, PreparedPixels):
            return source.pixels
        try:
            return self.embedder.load_pixels(source)
        except Exception as error:  # any exception must reach the caller, not end in the pool
            return error

    def _enqueue(
        self,
        decoded: Sequence[NDArray[np.uint8] | Exception],
        futures: Sequence[asyncio.Future[Any]],
        deadline: float | None,
        client: str,
    ) -> None:
        """Queue the decoded images of a request and resolve the failed ones; runs in the pool."""
        failed = {i: item for i, item in enumerate(decoded) if isinstance(item, Exception)}
        ready = [(item, i) for i, item in enumerate(decoded) if not isinstance(item, Exception)]
        if ready:
            try:
                self.batcher.enqueue(
                    [pixels for pixels, _ in ready], [futures[i] for _, i in ready],
                    deadline=deadline, client=client,
                )  # fmt: skip
            except CrlError as error:
                failed |= {i: error for _, i in ready}

        def resolve() -> None:
            for i, error in failed.items():
                if futures[i].done():
                    continue
                if isinstance(error, ImageError):
                    futures[i].set_result(error)
                else:
                    futures[i].set_exception(error)

        if failed:
            with contextlib.suppress(RuntimeError):  # the loop is closed, so nobody waits
                futures[0].get_loop().call_soon_threadsafe(resolve)

    def _start_engine(self, pixels: NDArray[np.uint8]) -> Callable[[], list[EngineRow]]:
        """Begin an engine run with the bases in use; runs in the batcher's thread."""
        pack = self._in_use.pack  # read once, so that the whole run has the same bases
        try:
            finish = self.embedder.start_run(pixels, pack.weight, pack.bias)
        except EngineError as error:
            if pack is self._in_use.no_bases:
                raise
            pack = self._in_use.no_bases  # it may lack the memory for more columns only
            finish = self.embedder.start_run(pixels, pack.weight, pack.bias)
            self._in_use.leave_to_numpy()
            _log.warning("%s; from now on, the processor projects onto the bases", error)
        return lambda: [EngineRow(*rows, pack) for rows in zip(*finish(), strict=True)]

    def _project(
        self, outcomes: Sequence[ImageOutcome], bases: Sequence[StoredBasis]
    ) -> tuple[NDArray[np.float32], list[NDArray[np.float32]]]:
        """Return universal and conditional embeddings, with NaN in the rows of failed images.

        Columns that the engine computed are normalised. NumPy projects all other rows: those of
        cached and stored embeddings, and those whose run had another version of the basis.
        """
        universal = np.full((len(outcomes), self.embedder.bundle.embedding_dim), np.nan, np.float32)
        good = [i for i, outcome in enumerate(outcomes) if outcome.embedding is not None]
        for i in good:
            universal[i] = outcomes[i].embedding
        conditional = []
        for stored in bases:
            projection = stored.basis.projection
            rows = np.full((len(outcomes), projection.output_dim), np.nan, np.float32)
            found = {i: outcomes[i].columns_of(stored) for i in good}
            columns = {i: each for i, each in found.items() if each is not None}
            if columns:
                fused = np.stack(list(columns.values()))
                rows[list(columns)] = normalise_rows(fused, projection.post)
            if rest := [i for i in good if i not in columns]:
                rows[rest] = projection.apply(universal[rest])
            conditional.append(rows)
        return universal, conditional


def digest_image(source: ImageSource) -> bytes:
    """Return the SHA-256 of encoded bytes, or of the kind, the shape and the pixels: 32 bytes."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).digest()
    if isinstance(source, PreparedPixels):
        kind, pixels = "prepared", source.pixels
    else:
        kind, pixels = "pixels", source
    digest = hashlib.sha256(f"{kind} {pixels.shape}".encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.digest()
