"""How far embeddings are from a reference in float32, on fixed pictures and texts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from crl_sdk.errors import ParityError
from crl_sdk.model._manifest import Parity
from crl_sdk.model._preprocess import PreprocessSpec

Scalar = TypeVar("Scalar", bound=np.generic)

BATCHES = (1, 3, 12)
"""Sizes of the checked runs; none is the size that was traced."""

COLUMNS = 7

TEXTS = (
    "a photo of a cat", "red", "three small striped stars on grey", "an oil painting of a harbour",
    "x", "A4 paper, 80 g/m²", "it's raining", "the quick brown fox jumps over the lazy dog",
    "animal habitat: mangrove swamp", "日本の庭園", "😀 smiling",
    "zero one two three four five six", "rust", "no", "fashion",
    "a satellite picture of farmland in winter, seen from far above",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What a graph must reach.

    Attributes:
        cosine_min: of any row with torch's.
        cosine_mean: over all rows.
        max_abs: largest difference of any element.
        centred_cosine_min: of any row, once torch's mean row is taken from both sides. Towers with
            random weights give nearly the same embedding for all images, so that a graph which
            ignored its input would pass the plain cosine; it does not pass this one.
    """

    cosine_min: float = -1.0
    cosine_mean: float = -1.0
    max_abs: float = np.inf
    centred_cosine_min: float = -1.0


TOLERANCES = {
    "fp32": Tolerance(cosine_min=0.99999, max_abs=1e-4, centred_cosine_min=0.999),
    "fp16": Tolerance(cosine_min=0.9995),
    "int8": Tolerance(cosine_mean=0.99),
}
"""By precision of a graph, how far its embeddings may be from those of torch in float32."""


def images(spec: PreprocessSpec, count: int = sum(BATCHES), seed: int = 0) -> NDArray[np.uint8]:
    """Make pictures with the statistics of photographs: 1/f noise in colour, and hard edges.

    Returns:
        (count, spec.height, spec.width, 3) uint8, the same for the same arguments.
    """
    rng = np.random.default_rng(seed)
    height, width = spec.height, spec.width
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None, :])
    falloff = 1 / np.maximum(frequency, 1 / max(height, width))
    pictures = np.empty((count, height, width, 3), np.uint8)
    for picture in pictures:
        noise = rng.standard_normal((3, height, width))
        smooth = np.fft.ifft2(np.fft.fft2(noise) * falloff).real.transpose(1, 2, 0)
        smooth = (smooth - smooth.mean()) / smooth.std()
        values = rng.uniform(60, 200, 3) + rng.uniform(15, 60) * smooth
        for _ in range(rng.integers(0, 5)):  # rectangles, for the edges
            y, x = rng.integers(0, height), rng.integers(0, width)
            values[y : y + rng.integers(4, height), x : x + rng.integers(4, width)] = rng.uniform(
                0, 255, 3
            )
        picture[...] = np.clip(values, 0, 255).astype(np.uint8)
    return pictures


def batched(
    run: Callable[[NDArray[Scalar]], NDArray[np.float32]], rows: NDArray[Scalar]
) -> NDArray[np.float32]:
    """Run a graph over rows in batches of `BATCHES`, then what is left.

    Args:
        run: from some rows to their embeddings.
        rows: (n, …).

    Returns:
        (n, d) float32.
    """
    ends = np.minimum(np.cumsum((*BATCHES, len(rows))), len(rows))
    starts = (0, *ends[:-1])
    parts = [run(rows[a:b]) for a, b in zip(starts, ends, strict=True) if b > a]
    return np.concatenate(parts)


def compare(reference: NDArray[np.float32], measured: NDArray[np.float32]) -> Parity:
    """Compare embeddings row by row.

    Args:
        reference: (n, d), in float32, unit rows.
        measured: (n, d), of what is compared.
    """
    exact, other = reference.astype(np.float64), measured.astype(np.float64)
    cosines = _cosines(exact, other)
    mean = exact.mean(axis=0)
    centred = _cosines(exact - mean, other - mean)
    return Parity(
        samples=len(exact),
        cosine_mean=float(cosines.mean()),
        cosine_min=float(cosines.min()),
        max_abs=float(np.abs(exact - other).max()),
        centred_cosine_min=float(centred.min()),
    )


def failures(parity: Parity, tolerance: Tolerance) -> list[str]:
    """Tell what does not reach a tolerance, with what was measured and what is required."""
    return [
        f"{name} {getattr(parity, name):.7g} (required {sign} {getattr(tolerance, name):g})"
        for name, sign in (
            ("cosine_min", ">="),
            ("cosine_mean", ">="),
            ("centred_cosine_min", ">="),
            ("max_abs", "<="),
        )
        if not _holds(getattr(parity, name), sign, getattr(tolerance, name))
    ]


def require(parity: Parity, tolerance: Tolerance, graph: str) -> None:
    """Fail where a graph does not reach its tolerance.

    Raises:
        ParityError: names the graph, what was measured and what is required.
    """
    if told := failures(parity, tolerance):
        raise ParityError(
            f"{graph} does not agree with torch fp32 on {parity.samples} samples: "
            f"{', '.join(told)}; nothing was written. Try another precision"
        )


def _holds(value: float, sign: str, bound: float) -> bool:
    return value >= bound if sign == ">=" else value <= bound


def _cosines(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.asarray((a * b).sum(axis=1) / np.maximum(norms, 1e-30))
