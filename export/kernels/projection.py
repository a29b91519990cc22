"""The projection kernel: conditional embeddings of many bases from stored ones, in one launch.

`crl_sdk.projection` is its specification: for each basis a segment of columns, `x @ weight + bias`,
with row normalisation over the columns of the segment. A program computes a block of rows of one
segment. It keeps the statistics of the normalisation in registers and writes each result once. A
segment with more columns than a block is computed twice instead of being read back.
"""

import triton
import triton.language as tl


@triton.jit
def _columns(
    x, weight, bias, rows, row_mask, cols, col_mask, d, k,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Return a block of `x @ weight + bias`, float32, with zeros outside the segment."""
    product = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, d, BLOCK_D):
        depth = start + tl.arange(0, BLOCK_D)
        part = tl.load(
            x + rows[:, None].to(tl.int64) * d + depth[None, :],
            mask=row_mask[:, None] & (depth < d)[None, :], other=0.0,
        )  # fmt: skip
        factors = tl.load(
            weight + depth[:, None].to(tl.int64) * k + cols[None, :],
            mask=(depth < d)[:, None] & col_mask[None, :], other=0.0,
        )  # fmt: skip
        if UNIT:
            exact = part.to(tl.float32)
            squares += tl.sum(exact * exact, axis=1)
        product += tl.dot(part.to(factors.dtype), factors, input_precision="ieee")
    if UNIT:
        product = product / tl.maximum(tl.sqrt(squares), 1e-12)[:, None]
    product += tl.load(bias + cols, mask=col_mask, other=0.0)[None, :]
    return tl.where(col_mask[None, :], product, 0.0)


@triton.jit
def project_segments(
    x, weight, bias, starts, posts, n, d, k, out,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    UNIT: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """Project rows onto all segments. The grid is (ceil(n / BLOCK_N), segments).

    Args:
        x: Universal embeddings, shape (n, d), float16, bfloat16 or float32, contiguous rows.
        weight: Weights of all bases, shape (d, k), float32, or float16 for tensor cores. Products
            are summed in float32.
        bias: Biases of all bases, shape (k,), float32.
        starts: First column of each segment, then k, shape (segments + 1,), int32.
        posts: Row normalisation of each segment, shape (segments,), int32, by the numbers in
            `POST_NUMBERS` of `crl_sdk/engines/_kernels.py`.
        n: Number of rows.
        d: Length of an embedding.
        k: Number of columns of all segments.
        out: Output, shape (n, k), float32 or float16. It is the last argument because TensorRT's
            plugins pass their outputs last.
        BLOCK_N: Number of rows of a program.
        BLOCK_D: Number of terms of the products in a step.
        BLOCK_K: Number of columns in a step.
        UNIT: Whether to divide each row of x by its L2 norm first.
        SINGLE: Whether no segment has more than BLOCK_K columns, so that none is computed twice.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < n
    segment = tl.program_id(1)
    begin, end = tl.load(starts + segment), tl.load(starts + segment + 1)
    post = tl.load(posts + segment)
    seen = 0.0
    mean = tl.zeros((BLOCK_N,), tl.float32)
    spread = tl.zeros((BLOCK_N,), tl.float32)  # sum of squared differences from the mean
    squares = tl.zeros((BLOCK_N,), tl.float32)
    last = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    if SINGLE or post != 0:
        for first in range(begin, end, BLOCK_K):
            cols = first + tl.arange(0, BLOCK_K)
            col_mask = cols < end
            last = _columns(
                x, weight, bias, rows, row_mask, cols, col_mask, d, k,
                BLOCK_N, BLOCK_D, BLOCK_K, UNIT,
            )  # fmt: skip
            count = tl.minimum(end - first, BLOCK_K).to(tl.float32)
            here = tl.sum(last, axis=1) / count
            away = tl.where(col_mask[None, :], last - here[:, None], 0.0)
            # Chan, Golub and LeVeque's update of mean and spread, without cancellation
            step = here - mean
            spread += tl.sum(away * away, axis=1) + step * step * (seen * count / (seen + count))
            mean += step * (count / (seen + count))
            seen += count
            squares += tl.sum(last * last, axis=1)
    shift = tl.where(post == 2, mean, 0.0)
    deviation = tl.sqrt(spread / tl.maximum((end - begin - 1).to(tl.float32), 1.0))
    scale = tl.maximum(tl.where(post == 2, deviation, tl.sqrt(squares)), 1e-12)
    scale = tl.where(post == 0, 1.0, scale)
    for first in range(begin, end, BLOCK_K):
        cols = first + tl.arange(0, BLOCK_K)
        col_mask = cols < end
        if not SINGLE:
            last = _columns(
                x, weight, bias, rows, row_mask, cols, col_mask, d, k,
                BLOCK_N, BLOCK_D, BLOCK_K, UNIT,
            )  # fmt: skip
        result = (last - shift[:, None]) / scale[:, None]
        tl.store(
            out + rows[:, None].to(tl.int64) * k + cols[None, :],
            result.to(out.dtype.element_ty),
            mask=row_mask[:, None] & col_mask[None, :],
        )
