"""Project many rows of universal embeddings onto many criteria, at the speed of memory.

The specification is `Projection.apply`, and tests compare this code with it. It is fast because:

- Threads work on blocks of rows that fit the caches of a core. Each row is read from memory once
  for all criteria. Each result is written once, and bias and normalisation are applied to it while
  it is in the cache.
- One number of each cache line of a block is read before the product. These reads run in parallel,
  while most reads of a matrix product wait for each other. This is 1.4 times as fast if memory is
  the limit.
- Products are computed in slices of rows small enough that BLAS neither copies them nor starts
  threads (`_slice_rows`).
- A row that is not finite gives a product that is not finite, so the products are checked instead
  of the rows, which are much longer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from crl_sdk._processors import count_processors
from crl_sdk.errors import InvalidInputError
from crl_sdk.projection._projection import EPSILON, Post, Projection
from crl_sdk.projection._row_dtypes import (
    check_dtype_of,
    normalise_int8,
    require_row_dtype,
    write_rows,
)

_BLOCK_BYTES = 1 << 21  # of float32 rows, which stay in the caches of a core
_PART_BYTES = 1 << 20  # of float32 results, which also stay there
_SLICE = 64  # largest number of rows of a small product; blocks are multiples of it
_LARGE_SLICE = 512  # number of rows of a product that cannot be small
_SLICE_FLOPS = 1_000_000  # OpenBLAS does not copy the matrices up to this many multiplications
_CACHE_LINE = 64
_FEW_BLOCKS = 8  # up to this many blocks, starting threads takes longer than it saves
_SECONDS_BETWEEN_PROGRESS = 0.1


def project_rows(
    embeddings: NDArray[Any],
    projections: Sequence[Projection],
    out: Sequence[NDArray[Any]] | None = None,
    *,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[NDArray[Any]]:
    """Project rows onto several projections at once.

    While several threads work, BLAS is limited to one thread in the whole process. Afterwards its
    number of threads is restored, even if calls overlap. `threads=1` changes nothing in the
    process.

    Args:
        embeddings: Universal embeddings, shape (n, d), int8, float16, float32 or float64, unit
            rows. They may be memory-mapped and are read in blocks.
        projections: Projections of input dimension d, at least one.
        out: Writable array for each projection, such as a memory map, shape (n, m), float32,
            float16 or int8. None creates float32 arrays. After an error they hold some of the rows.
        threads: Number of threads. None chooses one per processor that this
            process may use, or one for few rows.
        progress: Called in the calling thread from time to time with the number of finished rows.

    Returns:
        The arrays in `out`.

    Raises:
        InvalidInputError: If a shape or dtype is wrong, a row is not finite, a value does not fit
            float16, or rows without normalisation are wanted as int8.
    """
    rows = check_rows(embeddings, projections)
    if out is None:
        out = [np.empty((len(rows), each.output_dim), np.float32) for each in projections]
    outputs = list(out)
    _check_out(rows, projections, outputs)
    if threads is not None and threads < 1:
        raise InvalidInputError(f"expected threads >= 1, got {threads}")
    job = _Job(rows, projections, outputs)
    wanted = threads or (1 if len(rows) <= _FEW_BLOCKS * job.block_rows else count_processors())
    _run(job, min(wanted, max(job.parts, 1)), progress or (lambda done: None))
    return outputs


def check_rows(embeddings: NDArray[Any], projections: Sequence[Projection]) -> NDArray[Any]:
    """Check the shape and dtype of embeddings, not their values.

    Args:
        embeddings: Universal embeddings, shape (n, d).
        projections: Projections that they are meant for.

    Returns:
        The embeddings as a plain array on the same memory.

    Raises:
        InvalidInputError: If the embeddings are not int8 or floats of shape (n, d), or a
            projection does not have the input dimension d.
    """
    dims = sorted({projection.input_dim for projection in projections})
    if len(dims) != 1:
        raise InvalidInputError(f"expected projections of one input dimension, got {dims}")
    rows = np.asarray(embeddings)
    if rows.ndim != 2 or rows.shape[1] != dims[0]:
        raise InvalidInputError(f"expected embeddings of shape (n, {dims[0]}), got {rows.shape}")
    check_dtype_of(rows)
    return rows


def _check_out(
    rows: NDArray[Any], projections: Sequence[Projection], out: Sequence[NDArray[Any]]
) -> None:
    if len(out) != len(projections):
        raise InvalidInputError(
            f"expected one output for each of {len(projections)} projections, got {len(out)}"
        )
    for array, projection in zip(out, projections, strict=True):
        shape = (len(rows), projection.output_dim)
        if np.shape(array) != shape:
            raise InvalidInputError(f"expected an output {shape}, got {np.shape(array)}")
        require_row_dtype(str(array.dtype), projection.post)
        if not array.flags.writeable:
            raise InvalidInputError("an output is read-only: open the memory map with mode 'r+'")
        if np.may_share_memory(array, rows):
            raise InvalidInputError("an output shares memory with the embeddings: copy them")


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """One projection, prepared for computation, and its output.

    `standardise` is computed as `l2` of centred rows, times `length`.

    Attributes:
        weight: Weight matrix, shape (d, m), float32.
        bias: Bias repeated in each row, shape (slice_rows, m), float32; None if it is zero.
        post: Row normalisation.
        length: Length of the normalised rows.
        slice_rows: Number of rows of one product.
        out: Output array, shape (n, m), of one of `ROW_DTYPES`.
        direct: Whether products can be written to `out` without conversion.
    """

    weight: NDArray[np.float32]
    bias: NDArray[np.float32] | None
    post: Post
    length: float
    slice_rows: int
    out: NDArray[Any]
    direct: bool


class _Job:
    """The work of one call, divided into parts. Each thread has its own buffers.

    A part has as many blocks as are needed for results of about `_PART_BYTES`.
    """

    def __init__(
        self, rows: NDArray[Any], projections: Sequence[Projection], out: Sequence[NDArray[Any]]
    ) -> None:
        self.rows = rows
        self.steps = [_prepare(p, np.asarray(o)) for p, o in zip(projections, out, strict=True)]
        columns = sum(step.weight.shape[1] for step in self.steps)
        self.block_rows = max(_BLOCK_BYTES // (4 * rows.shape[1]) // _SLICE, 1) * _SLICE
        self.part_rows = self.block_rows * max(_PART_BYTES // (4 * columns * self.block_rows), 1)
        self.parts = -(-len(rows) // self.part_rows)

    def buffers(self) -> tuple[NDArray[np.float32], list[NDArray[np.float32]]]:
        """Return memory for one block of rows and for one part of each result."""
        return (
            np.empty((self.block_rows, self.rows.shape[1]), np.float32),
            [np.empty((self.part_rows, step.weight.shape[1]), np.float32) for step in self.steps],
        )

    def run(
        self, number: int, copy: NDArray[np.float32], buffers: Sequence[NDArray[np.float32]]
    ) -> InvalidInputError | None:
        """Project one part. An error is returned, because an earlier part may still fail too."""
        start = number * self.part_rows
        rows = self.rows[start : start + self.part_rows]
        targets = [step.out[start : start + len(rows)] for step in self.steps]
        results = [
            target if step.direct else buffer[: len(rows)]
            for step, target, buffer in zip(self.steps, targets, buffers, strict=True)
        ]
        for first in range(0, len(rows), self.block_rows):
            block = _load(rows[first : first + self.block_rows], copy)
            for step, values in zip(self.steps, results, strict=True):
                _multiply(block, step, values[first : first + len(block)])
        bad = np.flatnonzero(~np.isfinite(results[0][:, 0]))
        if bad.size:
            return _not_finite(rows[bad[0]], start + int(bad[0]))
        for step, values, target in zip(self.steps, results, targets, strict=True):
            _finish(values, step)
            if not step.direct:
                try:
                    write_rows(values, target)
                except InvalidInputError as error:
                    return InvalidInputError(f"rows {start} to {start + len(rows) - 1}: {error}")
        return None


def _load(block: NDArray[Any], copy: NDArray[np.float32]) -> NDArray[np.float32]:
    """Load a block into the cache as float32."""
    if block.dtype == np.float32 and block.flags.c_contiguous and block.flags.aligned:
        np.maximum.reduce(block.reshape(-1)[:: _CACHE_LINE // 4])
        return block
    loaded = copy[: len(block)]
    np.copyto(loaded, block, casting="same_kind")
    if block.dtype == np.int8:
        normalise_int8(loaded)
    return loaded


def _prepare(projection: Projection, out: NDArray[Any]) -> _Step:
    dim, columns = projection.weight.shape
    weight, bias, length = projection.weight, projection.bias, 1.0
    # subtracting the mean of a row is affine, so it becomes part of the map
    if projection.post == "standardise":
        wide, wide_bias = weight.astype(np.float64), bias.astype(np.float64)
        weight = (wide - wide.mean(axis=1, keepdims=True)).astype(np.float32)
        bias = (wide_bias - wide_bias.mean()).astype(np.float32)
        length = max(columns - 1, 1) ** 0.5
    slice_rows = _slice_rows(dim, columns)
    return _Step(
        np.ascontiguousarray(weight),
        np.tile(bias, (slice_rows, 1)) if bias.any() else None,
        projection.post,
        length,
        slice_rows,
        out,
        out.dtype == np.float32 and out.flags.c_contiguous and out.flags.aligned,
    )


def _slice_rows(dim: int, columns: int) -> int:
    """Return the number of rows of one product.

    BLAS copies both matrices into another memory layout. If one of them is narrow, the copy takes
    longer than the product. OpenBLAS does not copy for small products, which are 1.6 times as fast
    with 40 columns.
    """
    fitting = _SLICE_FLOPS // (dim * columns)
    return max((each for each in (8, 16, 32, _SLICE) if each <= fitting), default=_LARGE_SLICE)


def _multiply(block: NDArray[np.float32], step: _Step, values: NDArray[np.float32]) -> None:
    """Write `block @ weight` to `values`: all complete slices in one call, then the rest."""
    size, (dim, columns) = step.slice_rows, step.weight.shape
    whole = len(block) // size * size
    if whole:
        sliced = values[:whole].reshape(-1, size, columns)
        np.matmul(block[:whole].reshape(-1, size, dim), step.weight, out=sliced)
    if whole < len(block):
        np.matmul(block[whole:], step.weight, out=values[whole:])


def _finish(values: NDArray[np.float32], step: _Step) -> None:
    """Add the bias and normalise the rows, in place."""
    if step.bias is not None:
        size = step.slice_rows
        whole = len(values) // size * size
        sliced = values[:whole].reshape(-1, size * values.shape[1])
        sliced += step.bias.reshape(-1)
        values[whole:] += step.bias[: len(values) - whole]
    if step.post != "none":
        scale = np.sqrt(np.einsum("ij,ij->i", values, values))
        scale /= np.float32(step.length)
        np.maximum(scale, np.float32(EPSILON), out=scale)
        values /= scale[:, None]


def _not_finite(row: NDArray[Any], number: int) -> InvalidInputError:
    if row.any() if row.dtype == np.int8 else np.isfinite(row).all():
        return InvalidInputError(
            f"the embedding at row {number} is so long that its projection is infinite: expected "
            "unit rows"
        )
    return InvalidInputError(
        f"embeddings hold NaN or infinity, the first at row {number}: leave out the rows of images "
        "that failed"
    )


def _run(job: _Job, threads: int, progress: Callable[[int], None]) -> None:
    """Run all parts in order, and raise the error of the first bad row."""
    numbers = iter(range(job.parts))  # next() on a range iterator is thread-safe
    bad: dict[int, InvalidInputError] = {}
    finished: list[int] = []
    stopped = threading.Event()

    def work() -> None:
        buffers = job.buffers()
        with np.errstate(all="ignore"):
            while not (bad or stopped.is_set()) and (number := next(numbers, None)) is not None:
                error = job.run(number, *buffers)
                if error is not None:
                    bad[number] = error
                finished.append(number)
                if threads == 1:
                    progress(min(len(finished) * job.part_rows, len(job.rows)))

    if threads == 1:
        work()
    else:
        with single_threaded_blas, ThreadPoolExecutor(threads, "crl-project") as pool:
            try:
                running = {pool.submit(work) for _ in range(threads)}
                while running:
                    done, running = wait(running, timeout=_SECONDS_BETWEEN_PROGRESS)
                    for future in done:
                        future.result()
                    progress(min(len(finished) * job.part_rows, len(job.rows)))
            finally:  # also on Ctrl-C: threads stop after their current part
                stopped.set()
    if bad:
        raise bad[min(bad)]
    progress(len(job.rows))


class _SingleThreadedBlas:
    """Context manager that limits BLAS to one thread in the whole process.

    The limit applies to the process. If several contexts overlap, the first sets the limit and the
    last removes it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._limits: threadpool_limits | None = None

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                self._limits = threadpool_limits(1, user_api="blas")
            self._users += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0 and self._limits is not None:
                self._limits.restore_original_limits()
                self._limits = None


single_threaded_blas = _SingleThreadedBlas()
