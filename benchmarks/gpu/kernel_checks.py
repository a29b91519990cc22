"""Checks of the projection kernel against NumPy in double precision."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from crl_export.kernels.ahead import DTYPES, KINDS, compile_kernels
from crl_export.kernels.jitted import launch_jitted
from crl_sdk.engines._kernels import ProjectionKernel
from crl_sdk.projection._projection import EPSILON, POSTS, Post, Projection

TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

TOLERANCE = 5e-5
"""Largest allowed difference from the definition, absolute, for unit rows. Sums of up to 1,024
products in float32 differ by less than 1e-5; rows of few columns are divided by small numbers."""

SIZES = ((20,), (1, 2, 3), (16, 17), (64, 65, 7), (150, 20, 20, 33), (20,) * 20)

SHAPES = ((1, 64), (33, 512), (257, 768), (1000, 1024))


@dataclass(frozen=True, slots=True)
class Case:
    """Input of one comparison.

    Attributes:
        rows: Number of embeddings.
        dim: Length of an embedding.
        sizes: Numbers of columns of the bases.
        dtype: Dtype of the embeddings, one of `DTYPES`.
        unit: Whether the kernel divides each row by its L2 norm first.
    """

    rows: int
    dim: int
    sizes: tuple[int, ...]
    dtype: str
    unit: bool


def cases(shapes: Sequence[tuple[int, int]] = SHAPES) -> list[Case]:
    """Return all combinations of shapes, bases, dtypes and normalisation."""
    return [
        Case(rows, dim, sizes, dtype, unit)
        for (rows, dim), sizes, dtype, unit in itertools.product(
            shapes, SIZES, DTYPES, (False, True)
        )
    ]


def draw(case: Case, seed: int) -> tuple[torch.Tensor, list[Projection]]:
    """Return random embeddings of a case on the CPU, and random bases."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((case.rows, case.dim)).astype(np.float32)
    if not case.unit:
        x /= np.linalg.norm(x, axis=1, keepdims=True)
    posts = itertools.cycle(POSTS)
    projections = [
        Projection(
            rng.standard_normal((case.dim, size)).astype(np.float32),
            rng.standard_normal(size).astype(np.float32),
            # two values, standardised, are +1 and -1 whatever they were: rounding decides
            next(posts) if size > 2 else "l2",
        )
        for size in case.sizes
    ]
    return torch.from_numpy(x).to(TORCH[case.dtype]), projections


def define(
    x: torch.Tensor, projections: Sequence[Projection], *, unit: bool
) -> NDArray[np.float64]:
    """Return what the kernel has to compute, by its definition in double precision."""
    rows = x.double().numpy()
    if unit:
        rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), EPSILON)
    parts = []
    for each in projections:
        part = rows @ each.weight.astype(np.float64) + each.bias
        if each.post == "standardise":
            part -= part.mean(axis=1, keepdims=True)
            part /= np.maximum(part.std(axis=1, ddof=1, keepdims=True), EPSILON)
        elif each.post == "l2":
            part /= np.maximum(np.linalg.norm(part, axis=1, keepdims=True), EPSILON)
        parts.append(part)
    return np.concatenate(parts, axis=1)


def check_jitted(device: str, shapes: Sequence[tuple[int, int]] = SHAPES) -> dict[str, Any]:
    """Compare the kernel, compiled by Triton at its launch, with its definition.

    Args:
        device: `cuda`, or `cpu` in Triton's interpreter.
        shapes: Numbers of embeddings and dimensions.

    Returns:
        Number of cases and the largest difference.

    Raises:
        AssertionError: If one case differs by more than `TOLERANCE`, or is not finite.
    """
    worst = 0.0
    for seed, case in enumerate(cases(shapes)):
        x, projections = draw(case, seed)
        weight, bias = packed(projections, device)
        out = torch.full((case.rows, sum(case.sizes)), float("nan"), device=device)
        posts: list[Post] = [each.post for each in projections]
        launch_jitted(x.to(device), weight, bias, case.sizes, posts, unit=case.unit, out=out)
        worst = max(worst, _difference(out.cpu().numpy(), x, projections, case))
    return {"cases": len(cases(shapes)), "max_abs": worst, "tolerance": TOLERANCE}


def check_compiled(
    folder: Path, compiled: str, shapes: Sequence[tuple[int, int]] = SHAPES
) -> dict[str, Any]:
    """Compare the machine code that `crl compile --kernel` makes with its definition.

    Args:
        folder: Directory to compile to.
        compiled: Architecture to compile for, such as `sm90`. If it is older than that of the GPU,
            the driver compiles the PTX.
        shapes: Numbers of embeddings and dimensions.

    Returns:
        Number of cases and the largest difference.

    Raises:
        AssertionError: If one case differs by more than `TOLERANCE`, or is not finite.
    """
    compile_kernels(folder, [compiled])
    kernel = ProjectionKernel.open(folder)
    worst, count = 0.0, 0
    try:
        for seed, case in enumerate(cases(shapes)):
            if case.dtype == "bf16":  # NumPy has no such dtype without ml_dtypes
                continue
            x, projections = draw(case, seed)
            got = np.concatenate(kernel.apply(x.numpy(), projections, unit=case.unit), axis=1)
            worst = max(worst, _difference(got, x, projections, case))
            count += 1
    finally:
        kernel.close()
    return {"compiled_for": compiled, "cases": count, "max_abs": worst, "tolerance": TOLERANCE}


def packed(projections: Sequence[Projection], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weights and biases of bases side by side, on a device."""
    weight = np.concatenate([each.weight for each in projections], axis=1)
    bias = np.concatenate([each.bias for each in projections])
    return torch.from_numpy(weight).to(device), torch.from_numpy(bias).to(device)


def _difference(
    got: NDArray[Any], x: torch.Tensor, projections: Sequence[Projection], case: Case
) -> float:
    exact = define(x, projections, unit=case.unit)
    scale = np.maximum(np.abs(exact), 1.0)  # `none` leaves values of any size
    difference = float(np.max(np.abs(got - exact) / scale))
    assert difference <= TOLERANCE, f"{case}: differs by {difference:.2e}"  # false for NaN too
    return difference


assert KINDS[-1][1] is False, "the last kind takes bases of any size"
