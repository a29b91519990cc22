"""Speed of the projection kernel as a share of what the same GPU reaches in the same run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from crl_benchmarks.gpu.kernel_checks import TORCH, packed
from crl_export.kernels.ahead import KINDS
from crl_export.kernels.jitted import launch_jitted
from crl_sdk.projection._projection import Post, Projection

DIM, BASES = 512, 20


def time_on_gpu(work: Callable[[], object], repeat: int = 20) -> dict[str, float]:
    """Return the median and the quartiles of a piece of work on the GPU, in milliseconds.

    Events around each run measure it. The first runs do not count.
    """
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    pairs = []
    for _ in range(repeat):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    times = sorted(begin.elapsed_time(end) for begin, end in pairs)
    low, median, high = np.percentile(times, [25, 50, 75])
    return {"p50_ms": round(median, 4), "p25_ms": round(low, 4), "p75_ms": round(high, 4)}


def measure_peaks(size: int = 8192, megabytes: int = 1024) -> dict[str, Any]:
    """Return the rates of a copy in device memory and of matrix products on this GPU."""
    found: dict[str, Any] = {"copy": _measure_copy(megabytes)}
    torch.backends.cuda.matmul.allow_tf32 = False
    for dtype in ("fp32", "fp16"):
        left, right = (torch.randn(size, size, device="cuda", dtype=TORCH[dtype]) for _ in range(2))
        out = torch.empty_like(left)
        product = time_on_gpu(lambda: torch.mm(left, right, out=out), repeat=10)  # noqa: B023
        tflops = _rate(2 * size**3, product["p50_ms"], 1e12)
        found[f"product_{dtype}"] = {**product, "tflop_per_s": tflops}
    return found


def _measure_copy(megabytes: int) -> dict[str, float]:
    source = torch.empty(megabytes << 18, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    copy = time_on_gpu(lambda: target.copy_(source))
    return {**copy, "gb_per_s": _rate(2 * source.nbytes, copy["p50_ms"], 1e9)}


def measure_projection(
    peaks: dict[str, Any], rows: int, columns: int, dtype: str
) -> dict[str, Any]:
    """Time the kernel on stored embeddings, and the same work by torch.

    Args:
        peaks: Result of `measure_peaks`.
        rows: Number of embeddings.
        columns: Number of columns of each of the 20 bases.
        dtype: Dtype of the embeddings.
    """
    rng = np.random.default_rng(0)
    posts: list[Post] = ["l2"] * BASES
    projections = [
        Projection(
            rng.standard_normal((DIM, columns)).astype(np.float32), np.zeros(columns, np.float32)
        )
        for _ in range(BASES)
    ]
    weight, bias = packed(projections, "cuda")
    x = torch.nn.functional.normalize(torch.randn(rows, DIM, device="cuda")).to(TORCH[dtype])
    out = torch.empty(rows, BASES * columns, device="cuda")
    sizes = [columns] * BASES

    def kernel(blocks: Any = KINDS) -> None:
        launch_jitted(x, weight, bias, sizes, posts, unit=True, out=out, blocks=blocks)

    def plain() -> torch.Tensor:
        unit = torch.nn.functional.normalize(x.float())
        projected = (unit @ weight + bias).view(rows, BASES, columns)
        return torch.nn.functional.normalize(projected, dim=2)

    expected = plain().view(rows, -1)
    kernel()
    difference = float((out - expected).abs().max())
    assert difference < 1e-4, f"differs from torch by {difference:.2e}"
    flops = 2 * rows * DIM * BASES * columns
    traffic = x.nbytes + out.nbytes + weight.nbytes
    found: dict[str, Any] = {
        "rows": rows, "dim": DIM, "bases": BASES, "columns": columns, "embeddings": dtype,
        "max_abs_difference_from_torch": difference, "torch": time_on_gpu(plain),
    }  # fmt: skip
    for name, blocks in (("kernel", KINDS), ("kernel_with_blocks_of_64", KINDS[-2:])):
        taken = time_on_gpu(lambda: kernel(blocks))  # noqa: B023
        gigabytes = _rate(traffic, taken["p50_ms"], 1e9)
        tflops = _rate(flops, taken["p50_ms"], 1e12)
        found[name] = {
            **taken,
            "gb_per_s": gigabytes,
            "share_of_copy": round(gigabytes / peaks["copy"]["gb_per_s"], 3),
            "tflop_per_s": tflops,
            "share_of_product_fp32": round(tflops / peaks["product_fp32"]["tflop_per_s"], 3),
        }
    return found


def _rate(amount: float, milliseconds: float, unit: float) -> float:
    return round(amount / (milliseconds / 1e3) / unit, 2)
