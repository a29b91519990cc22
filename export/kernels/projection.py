"""Stored embeddings → conditional embeddings of many bases, in one launch; specification: NumPy.

`crl_sdk.projection` says what comes out: for each basis a segment of columns, `x @ weight + bias`,
then normalised over its own columns. A program takes a block of rows and one segment. Each result
is written once: statistics are kept in registers, and a segment of more columns than one block is
computed a second time rather than read back.
"""

import triton
import triton.language as tl


@triton.jit
def _columns(
    x, weight, bias, rows, row_mask, cols, col_mask, d, k,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Give a block of `x @ weight + bias` in float32, zero outside the segment."""
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
    """Project rows onto all segments; grid (ceil(n / BLOCK_N), segments).

    Args:
        x: (n, d) float16, bfloat16 or float32, rows contiguous.
        weight: (d, k) float32, or float16 for tensor cores; products are summed in float32.
        bias: (k,) float32.
        starts: (segments + 1,) int32; segment s has the columns starts[s] to starts[s + 1].
        posts: (segments,) int32, of `crl_sdk.engines.POST_NUMBERS`.
        n: rows.
        d: length of an embedding.
        k: columns of all segments.
        out: (n, k) float32 or float16; last, as plugins of TensorRT have their outputs.
        BLOCK_N: rows of a program.
        BLOCK_D: depth of a step.
        BLOCK_K: columns of a step.
        UNIT: divide each row of x by its L2 norm first.
        SINGLE: no segment has more than BLOCK_K columns, so none is computed twice.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < n
    segment = tl.program_id(1)
    begin, end = tl.load(starts + segment), tl.load(starts + segment + 1)
    post = tl.load(posts + segment)
    seen = 0.0
    mean = tl.zeros((BLOCK_N,), tl.float32)
    spread = tl.zeros((BLOCK_N,), tl.float32)  # squares about the mean
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
            # Chan, Golub and LeVeque's merging of means and squares: nothing large is subtracted
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
