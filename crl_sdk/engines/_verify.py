"""Comparison of an engine, or the projection kernel, with its reference, and its speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from crl_sdk.basis._basis import Basis
from crl_sdk.engines import _registry as registry
from crl_sdk.engines._contract import ImageEngine
from crl_sdk.engines._kernels import ProjectionKernel, kernels_directory
from crl_sdk.engines._machine import Machine, inspect_machine
from crl_sdk.engines._onnx import OnnxImageEngine
from crl_sdk.engines._selection import choose_engine, list_candidates, open_engine
from crl_sdk.engines._tensorrt import TensorRTImageEngine
from crl_sdk.engines._tensorrt_plans import plans_directory, record_verified
from crl_sdk.errors import InvalidInputError
from crl_sdk.model import _parity as parity
from crl_sdk.model._bundle import ModelBundle
from crl_sdk.model._manifest import Parity
from crl_sdk.projection._projection import Post, Projection, normalise_rows

SCHEMA = 1

_COLUMNS = 7
_PROJECTED = 1e-4
"""Largest allowed difference of projected columns from `embedding @ weight + bias`. The
weights have unit columns."""

_KERNEL = 1e-4
"""Largest allowed difference of the kernel from NumPy, which sums in another order."""


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """Speed of runs of one batch size.

    Attributes:
        batch: Number of images of a run.
        runs: Number of timed runs.
        p50_ms: Median duration of a run in milliseconds.
        p99_ms: 99th percentile of the duration in milliseconds.
    """

    batch: int
    runs: int
    p50_ms: float
    p99_ms: float


class Verification(msgspec.Struct, frozen=True, kw_only=True):
    """The record of a verified engine, as `crl verify --out` writes it.

    Attributes:
        schema: Version of this record's format.
        time: Time of the verification, ISO 8601, UTC.
        engine: Name of the engine.
        model: Name and fingerprint of the bundle.
        agrees: Whether everything is within tolerance.
        failures: Each quantity that is not, with its value and its bound.
        parity: Difference of the universal embeddings from those of the fp32 graph on the CPU, on
            fixed synthetic images.
        projected_max_abs: Largest difference of the projected columns from NumPy's projection of
            the engine's own embeddings.
        latencies: Speed of engine runs, without image decoding.
        machine: Machine that it ran on.
    """

    schema: int
    time: str
    engine: str
    model: dict[str, str]
    agrees: bool
    failures: tuple[str, ...]
    parity: Parity
    projected_max_abs: float
    latencies: tuple[Latency, ...]
    machine: Machine


def verify(
    bundle: ModelBundle,
    engine: str | None = None,
    *,
    batches: Sequence[int] = (1, 8, 32),
    seconds: float = 2.0,
    baked: Basis | None = None,
    progress: Callable[[str], None] | None = None,
) -> Verification:
    """Compare an engine with the bundle's fp32 graph on the CPU, and time it.

    For a TensorRT plan, the result is also written to the plan's record, so that `auto` may choose
    the plan on GPUs of this architecture.

    Args:
        bundle: Model bundle with an fp32 graph.
        engine: Name of the engine, such as `onnx/cpu/int8`, or its beginning; None for the default
            engine of this machine.
        batches: Batch sizes to time.
        seconds: Seconds to time each batch size for; at least five runs are timed.
        baked: Basis that is compiled into the plan to verify.
        progress: Function that is called with a description of each step.

    Raises:
        InvalidInputError: If the bundle has no such engine, or `batches` or `seconds` is invalid.
        BundleError: If the bundle has no fp32 graph.
        EngineError: If the engine cannot run here, does not load, or a run failed.
        PlanError: If a compiled plan is damaged or out of date, or its record cannot be written.
    """
    report = progress or (lambda _: None)
    if not batches or min(batches) < 1 or seconds <= 0:
        raise InvalidInputError(
            f"expected batches >= 1 and seconds > 0, got {list(batches)}, {seconds}"
        )
    machine = inspect_machine()
    wanted = engine or "auto"
    if baked is None:
        wanted = str(choose_engine(list_candidates(bundle), wanted).name)
    report(f"running the fp32 reference of {bundle.manifest.name}")
    pixels = parity.images(bundle.preprocess)
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((bundle.embedding_dim, _COLUMNS)).astype(np.float32)
    weight /= np.linalg.norm(weight, axis=0)
    bias = rng.standard_normal(_COLUMNS).astype(np.float32)
    if baked is not None:
        weight, bias = baked.projection.weight, baked.projection.bias
    reference = OnnxImageEngine.open(bundle, precision="fp32", device="cpu")
    expected = parity.batched(lambda part: reference.run(part, weight, bias)[0], pixels)

    report(f"running {wanted} on the same images")
    opened = open_engine(bundle, wanted, baked=baked)
    tolerances = registry.family_of(opened.name).tolerances
    try:
        rows, columns = opened.run(pixels, weight, bias)
        measured = parity.batched(lambda part: opened.run(part, weight, bias)[0], pixels)
        found = parity.compare(expected, measured)
        projected = float(np.abs(columns - (rows @ weight + bias)).max())
        failures = parity.failures(found, tolerances[opened.name.precision])
        if not projected <= _PROJECTED:  # NaN fails too
            failures.append(f"projected_max_abs {projected:.3g} (required <= {_PROJECTED:g})")
        if isinstance(opened, TensorRTImageEngine):
            record_verified(
                plans_directory(bundle),
                opened.plan,
                machine.gpus[0].architecture,
                agrees=not failures,
            )
        latencies = []
        for batch in batches:
            report(f"timing batches of {batch}")
            repeated = np.resize(pixels, (batch, *pixels.shape[1:]))
            latencies.append(_time(opened, repeated, weight, bias, seconds))
    finally:
        opened.close()
    return Verification(
        schema=SCHEMA,
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        engine=str(opened.name),
        model={"name": bundle.manifest.name, "fingerprint": bundle.fingerprint},
        agrees=not failures,
        failures=tuple(failures),
        parity=found,
        projected_max_abs=projected,
        latencies=tuple(latencies),
        machine=machine,
    )


class KernelCheck(msgspec.Struct, frozen=True, kw_only=True):
    """Comparison of the projection kernel with NumPy for one dtype.

    Attributes:
        embeddings: Dtype of the embeddings.
        max_abs: Largest difference from NumPy's results.
        rows: Number of rows of the timed calls.
        p50_ms: Median duration of a call in milliseconds, with the copies to and from the GPU.
        numpy_p50_ms: Median duration of the same computation in NumPy, in milliseconds.
    """

    embeddings: str
    max_abs: float
    rows: int
    p50_ms: float
    numpy_p50_ms: float


class KernelVerification(msgspec.Struct, frozen=True, kw_only=True):
    """The record of a verified projection kernel, as `crl verify --kernel --out` writes it.

    Attributes:
        schema: Version of this record's format.
        time: Time of the verification, ISO 8601, UTC.
        agrees: Whether all differences are within tolerance.
        checks: Comparisons, one per dtype.
        machine: Machine that it ran on.
    """

    schema: int
    time: str
    agrees: bool
    checks: tuple[KernelCheck, ...]
    machine: Machine


def verify_kernel(bundle: ModelBundle, *, rows: int = 100_000) -> KernelVerification:
    """Compare the compiled projection kernel with its specification in NumPy, and time both.

    Args:
        bundle: Model bundle whose kernels `crl compile BUNDLE --kernel` has compiled.
        rows: Number of rows of the timed calls.

    Raises:
        PlanError: If the kernels are missing, damaged, or for other GPUs only.
        EngineError: If there is no driver or GPU, or a launch failed.
        MissingDependencyError: If cuda-python is not installed.
    """
    rng = np.random.default_rng(0)
    dim = bundle.embedding_dim
    posts: tuple[Post, ...] = ("l2", "standardise", "none", "l2")
    projections = [
        Projection(
            rng.standard_normal((dim, columns)).astype(np.float32) / np.float32(dim**0.5),
            rng.standard_normal(columns).astype(np.float32),
            post,
        )
        for columns, post in zip((20, 64, 7, 150), posts, strict=True)
    ]
    stored = rng.standard_normal((rows, dim)).astype(np.float32)
    stored /= np.linalg.norm(stored, axis=1, keepdims=True)
    kernel = ProjectionKernel.open(kernels_directory(bundle))
    try:
        checks = tuple(
            _check_kernel(kernel, stored.astype(dtype), projections)
            for dtype in (np.float32, np.float16)
        )
    finally:
        kernel.close()
    return KernelVerification(
        schema=SCHEMA,
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        agrees=all(check.max_abs <= _KERNEL for check in checks),  # false for NaN
        checks=checks,
        machine=inspect_machine(),
    )


def _check_kernel(
    kernel: ProjectionKernel, embeddings: NDArray[Any], projections: Sequence[Projection]
) -> KernelCheck:
    exact = embeddings.astype(np.float32)

    def reference() -> list[NDArray[np.float32]]:
        return [normalise_rows(exact @ p.weight + p.bias, p.post) for p in projections]

    pairs = zip(kernel.apply(embeddings, projections), reference(), strict=True)
    return KernelCheck(
        embeddings=embeddings.dtype.name,
        max_abs=float(np.max([np.abs(got - expected).max() for got, expected in pairs])),
        rows=len(embeddings),
        p50_ms=_median(lambda: kernel.apply(embeddings, projections)),
        numpy_p50_ms=_median(reference),
    )


def _median(work: Callable[[], object]) -> float:
    return round(float(np.median(_times(work, 0.0))) * 1e3, 3)


def _times(work: Callable[[], object], seconds: float) -> list[float]:
    """Return the durations of calls in seconds; at least five, for at least `seconds`."""
    times: list[float] = []
    ends = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < ends:
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return times


def _time(
    engine: ImageEngine,
    pixels: NDArray[np.uint8],
    weight: NDArray[np.float32],
    bias: NDArray[np.float32],
    seconds: float,
) -> Latency:
    engine.run(pixels, weight, bias)  # the first run of a shape does extra work, so it is not timed
    times = _times(lambda: engine.run(pixels, weight, bias), seconds)
    p50, p99 = np.percentile(times, (50, 99)) * 1e3
    return Latency(
        batch=len(pixels), runs=len(times), p50_ms=round(float(p50), 3), p99_ms=round(float(p99), 3)
    )
