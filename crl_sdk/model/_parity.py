"""Compare embeddings with a float32 reference, on fixed images and texts."""

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
"""Batch sizes of the checked runs. None of them is the size that the export traced."""

COLUMNS = 7
"""Number of columns of the projection with which the export checks an image graph."""

TEXTS = (
    "a photo of a cat", "red", "three small striped stars on grey", "an oil painting of a harbour",
    "x", "A4 paper, 80 g/m²", "it's raining", "the quick brown fox jumps over the lazy dog",
    "animal habitat: mangrove swamp", "日本の庭園", "😀 smiling",
    "zero one two three four five six", "rust", "no", "fashion",
    "a satellite picture of farmland in winter, seen from far above",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Bounds on the parity of a graph.

    Attributes:
        cosine_min: Lower bound of the cosine of any row with the reference.
        cosine_mean: Lower bound of the mean cosine.
        max_abs: Upper bound of the absolute difference of any element.
        centred_cosine_min: Lower bound of the cosine of any row, after the mean row of the
            reference is subtracted from both sides. A tower with random weights gives nearly the
            same embedding for all images, so a graph that ignores its input would pass the plain
            cosine. It does not pass this one.
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
"""Tolerances by precision of a graph, compared with torch in float32."""


def images(spec: PreprocessSpec, count: int = sum(BATCHES), seed: int = 0) -> NDArray[np.uint8]:
    """Return images with the statistics of photographs: coloured 1/f noise and hard edges.

    Args:
        spec: Preprocessing of the model, which sets the size.
        count: Number of images.
        seed: Random seed.

    Returns:
        Images, shape (count, spec.height, spec.width, 3), uint8.
    """
    rng = np.random.default_rng(seed)
    height, width = spec.height, spec.width
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None, :])
    falloff = 1 / np.maximum(frequency, 1 / max(height, width))
    made = np.empty((count, height, width, 3), np.uint8)
    for image in made:
        noise = rng.standard_normal((3, height, width))
        smooth = np.fft.ifft2(np.fft.fft2(noise) * falloff).real.transpose(1, 2, 0)
        smooth = (smooth - smooth.mean()) / smooth.std()
        values = rng.uniform(60, 200, 3) + rng.uniform(15, 60) * smooth
        for _ in range(rng.integers(0, 5)):  # rectangles, for the edges
            y, x = rng.integers(0, height), rng.integers(0, width)
            values[y : y + rng.integers(4, height), x : x + rng.integers(4, width)] = rng.uniform(
                0, 255, 3
            )
        image[...] = np.clip(values, 0, 255).astype(np.uint8)
    return made


def batched(
    run: Callable[[NDArray[Scalar]], NDArray[np.float32]], rows: NDArray[Scalar]
) -> NDArray[np.float32]:
    """Run a graph on rows in batches of the sizes in `BATCHES`; the last batch has the rest.

    Args:
        run: Function from a batch of rows to their embeddings.
        rows: Inputs of the graph, shape (n, …).

    Returns:
        Embeddings, shape (n, d), float32.
    """
    ends = np.minimum(np.cumsum((*BATCHES, len(rows))), len(rows))
    starts = (0, *ends[:-1])
    parts = [run(rows[a:b]) for a, b in zip(starts, ends, strict=True) if b > a]
    return np.concatenate(parts)


def compare(reference: NDArray[np.float32], measured: NDArray[np.float32]) -> Parity:
    """Compare embeddings row by row.

    Args:
        reference: Reference embeddings, shape (n, d), float32, unit rows.
        measured: Embeddings to compare, shape (n, d).

    Returns:
        The agreement of the two.
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
    """Return the figures outside a tolerance, each with the measured and the required value."""
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


def require(
    parity: Parity, tolerance: Tolerance, graph: str, reference: str = "torch fp32"
) -> None:
    """Raise an error if the parity of a graph is outside a tolerance.

    Args:
        parity: Measured parity.
        tolerance: Required parity.
        graph: Name of the graph, for the error message.
        reference: What the graph was compared with, for the error message.

    Raises:
        ParityError: If a figure is outside the tolerance.
    """
    if failed := failures(parity, tolerance):
        raise ParityError(
            f"{graph} does not agree with {reference} on {parity.samples} samples: "
            f"{', '.join(failed)}; nothing was written. Try another precision"
        )


def _holds(value: float, sign: str, bound: float) -> bool:
    return value >= bound if sign == ">=" else value <= bound


def _cosines(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.asarray((a * b).sum(axis=1) / np.maximum(norms, 1e-30))
