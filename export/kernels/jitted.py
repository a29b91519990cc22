"""The projection kernel on torch tensors: compiled by Triton at its first launch.

The SDK launches machine code that was compiled ahead of time (`crl_sdk.engines.ProjectionKernel`).
This module is for tests and measurements, on a GPU or in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from crl_export.kernels.ahead import BLOCKS, KINDS, WARPS
from crl_export.kernels.projection import project_segments
from crl_sdk.engines._kernels import POST_NUMBERS, group_segments
from crl_sdk.projection._projection import Post


@dataclass(frozen=True, slots=True)
class _Kind:
    """Block of a compiled kernel, see `KINDS`."""

    columns: int
    single: bool


_KINDS = [_Kind(*each) for each in KINDS]


def launch_jitted(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    sizes: Sequence[int],
    posts: Sequence[Post],
    *,
    unit: bool,
    out: torch.Tensor,
    blocks: Sequence[tuple[int, bool]] = KINDS,
) -> None:
    """Project rows onto bases and write the result to `out`. It does not wait for the GPU.

    Args:
        x: Embeddings, shape (n, d), float32, float16 or bfloat16, contiguous.
        weight: Weights of all bases, shape (d, K), float32 or float16, on the device of x.
        bias: Biases, shape (K,), float32.
        sizes: Number of columns of each basis; their sum is K.
        posts: Row normalisation of each basis.
        unit: Whether to divide each row of x by its L2 norm first.
        out: Output, shape (n, K), float32 or float16.
        blocks: Blocks to choose from, as `columns` and `single`.
    """
    kinds = [each for each in _KINDS if (each.columns, each.single) in blocks]
    starts = torch.tensor([0, *np.cumsum(sizes)], dtype=torch.int32, device=x.device)
    numbers = torch.tensor([POST_NUMBERS[post] for post in posts], dtype=torch.int32).to(x.device)
    for kind, first, count in group_segments(sizes, kinds):
        grid = (-(-len(x) // BLOCKS["BLOCK_N"]), count)
        project_segments[grid](
            x, weight, bias, starts[first:], numbers[first:], len(x), x.shape[1], out.shape[1], out,
            **BLOCKS, BLOCK_K=kind.columns, UNIT=unit, SINGLE=kind.single, num_warps=WARPS,
        )  # fmt: skip
