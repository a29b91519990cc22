"""The hardware check: `sh benchmarks/gpu/check.sh` on a machine with an NVIDIA GPU.

Every step is tried, whatever happened to the others. The record says of each whether it passed,
failed or was skipped, and why. Figures of a GPU appear in this project with such a record only.
"""

from __future__ import annotations

import argparse
import platform
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec

from crl_benchmarks.gpu import decode_checks, driver_checks, engine_checks
from crl_benchmarks.machine import describe_commit
from crl_sdk.engines import _cuda as cuda
from crl_sdk.engines._hardware import inspect_hardware
from crl_sdk.engines._processor import find_processor_name
from crl_sdk.errors import CrlError, MissingDependencyError

SCHEMA = 1

SECONDS = 450.0
"""Time after which no further step is begun."""

PACKAGES = (
    "torch",
    "triton",
    "cuda-bindings",
    "numpy",
    "onnxruntime-gpu",
    "onnxruntime",
    "tensorrt",
    "nvidia-nvimgcodec-cu12",
)

RESULTS = Path(__file__).parents[1] / "results" / "gpu"


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """Result of a step.

    Attributes:
        name: What was checked.
        outcome: `passed`, `failed` or `skipped`.
        seconds: Duration.
        reason: Why it failed or was skipped.
        figures: What it measured.
    """

    name: str
    outcome: str
    seconds: float
    reason: str = ""
    figures: dict[str, Any] = {}


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """Record of a hardware check.

    Attributes:
        schema: Version of this format.
        time: Time of the beginning in UTC, ISO 8601.
        commit: Commit of the checkout, or `unknown` where git is missing.
        seconds: Duration of all steps.
        device: Name, architecture and memory of each GPU.
        driver: CUDA version of the driver.
        processor: Name of the processor.
        system: Operating system and architecture.
        versions: Python and the packages that matter.
        steps: Results, in the order in which they ran.
    """

    schema: int
    time: str
    commit: str
    seconds: float
    device: list[dict[str, Any]]
    driver: str
    processor: str
    system: str
    versions: dict[str, str]
    steps: tuple[Step, ...]

    @property
    def passed(self) -> bool:
        """Whether at least one step passed and none failed."""
        outcomes = [step.outcome for step in self.steps]
        return "passed" in outcomes and "failed" not in outcomes


@dataclass(frozen=True, slots=True)
class Check:
    """A step to run: its name, and the function that returns its figures."""

    name: str
    run: Callable[[], dict[str, Any]]


def run_checks(checks: Iterable[Check], seconds: float = SECONDS) -> list[Step]:
    """Run all checks, each whatever became of the others.

    Args:
        checks: Checks in their order.
        seconds: Time after which no further check is begun.
    """
    steps, ends = [], time.monotonic() + seconds
    for check in checks:
        started = time.monotonic()
        if started > ends:
            step = Step(
                name=check.name, outcome="skipped", seconds=0.0,
                reason=f"the time of {seconds:.0f} s was used up",
            )  # fmt: skip
        else:
            step = _run_one(check, started)
        print(f"{step.outcome:8} {step.seconds:6.1f} s  {step.name}  {step.reason}", flush=True)
        steps.append(step)
    return steps


def _run_one(check: Check, started: float) -> Step:
    outcome, reason, figures = "passed", "", {}
    try:
        figures = check.run()
    except Exception as error:
        if _is_missing(error):
            outcome, reason = "skipped", str(error)
        else:
            outcome, reason = "failed", f"{type(error).__name__}: {error}"
            traceback.print_exc()
    seconds = round(time.monotonic() - started, 2)
    return Step(name=check.name, outcome=outcome, seconds=seconds, reason=reason, figures=figures)


def _is_missing(error: Exception) -> bool:
    """Return whether an error says that something is not installed that others have made."""
    if isinstance(error, ModuleNotFoundError):
        return not (error.name or "").startswith(("crl_", "benchmarks", "export"))
    return isinstance(error, engine_checks.NotHere | MissingDependencyError)


def list_checks(scratch: Path, architecture: str) -> Iterable[Check]:
    """Yield the checks of this GPU, the most important ones first.

    Args:
        scratch: Empty directory.
        architecture: Compute capability of the GPU, such as `sm90`.
    """
    yield Check("driver: copies", driver_checks.check_copies)
    yield Check("driver: graphs", driver_checks.check_graphs)
    yield Check("driver: threads", driver_checks.check_threads)
    yield Check("driver: errors", driver_checks.check_errors)
    yield Check("driver: memory is returned", driver_checks.check_memory_is_returned)
    yield Check("kernel: compiled at its launch", _check_jitted)
    known = _compilable()
    fitting = [each for each in known if int(each[2:]) <= int(architecture[2:])]
    if architecture in known:
        yield Check(
            "kernel: machine code",
            partial(_check_compiled, scratch / "code", architecture),
        )
    older = [each for each in fitting if each != architecture]
    if older:
        yield Check("kernel: PTX", partial(_check_compiled, scratch / "ptx", older[-1]))
    yield Check("roofline", _measure_roofline)
    yield Check("kernel: from host memory", partial(_measure_host, scratch / "host", fitting))
    yield Check("decoder: nvImageCodec", decode_checks.check_decoder)
    for provider in ("cuda", "tensorrt", "tensorrt-rtx"):
        yield Check(
            f"ONNX Runtime: {provider}", partial(engine_checks.check_onnx_runtime, provider)
        )
    for runtime in ("tensorrt", "tensorrt-rtx"):
        folder = scratch / runtime
        folder.mkdir()
        yield Check(f"plan: {runtime}", partial(engine_checks.check_tensorrt, runtime, folder))


def _compilable() -> list[str]:
    try:
        from crl_export.kernels.ahead import ARCHITECTURES
    except ImportError:
        return []
    return [name.replace("_", "") for name in ARCHITECTURES]


def _check_jitted() -> dict[str, Any]:
    from crl_benchmarks.gpu.kernel_checks import check_jitted

    return check_jitted("cuda")


def _check_compiled(folder: Path, architecture: str) -> dict[str, Any]:
    from crl_benchmarks.gpu.kernel_checks import check_compiled

    return check_compiled(folder, architecture)


def _measure_roofline() -> dict[str, Any]:
    from crl_benchmarks.gpu.roofline import measure_peaks, measure_projection

    peaks = measure_peaks()
    return {
        "peaks": peaks,
        "projections": [
            measure_projection(peaks, rows=1_000_000, columns=columns, dtype=dtype)
            for dtype in ("fp16", "fp32")
            for columns in (10, 20, 40)
        ],
    }


def _measure_host(folder: Path, architectures: list[str]) -> dict[str, Any]:
    """Time `ProjectionKernel.apply` and NumPy on embeddings in host memory, through the SDK."""
    import numpy as np

    from crl_export.kernels.ahead import compile_kernels
    from crl_sdk.engines._kernels import ProjectionKernel
    from crl_sdk.projection import Projection, project_rows

    if not architectures:
        raise engine_checks.NotHere("the kernel is compiled for no architecture that runs here")
    compile_kernels(folder, architectures[-1:])
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((200_000, 512), np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    projections = [
        Projection(rng.standard_normal((512, 20)).astype(np.float32), np.zeros(20, np.float32))
        for _ in range(20)
    ]
    kernel = ProjectionKernel.open(folder)
    try:
        exact = project_rows(rows, projections)
        got = kernel.apply(rows, projections)
        difference = max(float(np.abs(a - b).max()) for a, b in zip(got, exact, strict=True))
        assert difference < 1e-4, f"differs from NumPy by {difference:.2e}"
        times: dict[str, list[float]] = {"kernel": [], "numpy": []}
        for _ in range(7):  # in turns
            for name, work in (
                ("kernel", lambda: kernel.apply(rows, projections)),
                ("numpy", lambda: project_rows(rows, projections)),
            ):
                started = time.perf_counter()
                work()
                times[name].append((time.perf_counter() - started) * 1e3)
    finally:
        kernel.close()
    return {
        "rows": len(rows),
        "max_abs": difference,
        **{
            name: {f"p{percent}_ms": round(float(np.percentile(each, percent)), 2)
                   for percent in (25, 50, 75)}
            for name, each in times.items()
        },
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line: 0 if all that ran passed, 1 if a step failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="crl_benchmarks.gpu.check", description=__doc__)
    parser.add_argument("--out", type=Path, help="record to write, JSON")
    options = parser.parse_args(arguments)
    try:
        architecture = cuda.architecture()
    except CrlError as error:
        print(f"no GPU to check: {error}", file=sys.stderr)
        return 2
    started, hardware = time.monotonic(), inspect_hardware()
    begun = datetime.now(timezone.utc).isoformat(timespec="seconds")
    with tempfile.TemporaryDirectory() as folder:
        steps = run_checks(list_checks(Path(folder), architecture))
    record = Record(
        schema=SCHEMA,
        time=begun,
        commit=describe_commit(),
        seconds=round(time.monotonic() - started, 1),
        device=[msgspec.to_builtins(gpu) for gpu in hardware.gpus],
        driver=hardware.cuda,
        processor=find_processor_name(),
        system=f"{platform.system()} {platform.machine()}",
        versions=_versions(),
        steps=tuple(steps),
    )
    out = options.out or RESULTS / f"{_file_name(record)}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")
    print(f"wrote {out}")
    return 0 if record.passed else 1


def _file_name(record: Record) -> str:
    name = record.device[0].get("name", "gpu") if record.device else "gpu"
    return re.sub(r"[^a-z0-9]+", "-", str(name).lower()).strip("-") + "-" + record.time[:10]


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    sys.exit(main())
