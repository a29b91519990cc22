"""TensorRT plans: engines compiled from a bundle's image graph, their records, and checks.

A plan is a file in `engines/` of the bundle. A JSON record with the same stem describes it. Nothing
here imports TensorRT.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec

from crl_sdk.errors import PlanError
from crl_sdk.model._bundle import ModelBundle, sha256_file
from crl_sdk.model._manifest import Precision
from crl_sdk.storage._atomic_files import (
    make_directory,
    read_record,
    write_atomically,
    write_record,
)

SCHEMA = 2
DIRECTORY = "engines"

PLAN_PRECISIONS: tuple[Precision, ...] = ("fp16", "fp32")
"""Precisions that plans are compiled in, best first."""

PlanRuntime: TypeAlias = Literal["tensorrt-rtx", "tensorrt"]
"""Runtimes that run plans."""


class Baked(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The basis that is compiled into a plan as a constant.

    Attributes:
        criterion: Name of its criterion.
        sha256: SHA-256 of the basis.
    """

    criterion: str
    sha256: str


class PlanSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything that a plan is compiled from. Equal specs need no second compilation.

    Attributes:
        runtime: Runtime that compiles and runs the plan.
        runtime_version: Version of that runtime; a plan runs with no other.
        architectures: Compute capabilities that the plan has code for, such as `sm86`, sorted.
        precision: Precision of the tower. Normalisation and projection always use float32.
        batch: Minimum, usual and maximum number of images of a run.
        max_columns: Maximum number of columns K of packed bases in a run; 0 with a baked basis.
        onnx_sha256: SHA-256 of the image graph.
        baked: Basis that is compiled into the plan, or None.
    """

    runtime: PlanRuntime
    runtime_version: str
    architectures: tuple[str, ...]
    precision: Precision
    batch: tuple[int, int, int]
    max_columns: int
    onnx_sha256: str
    baked: Baked | None = None

    @property
    def stem(self) -> str:
        """Name of the plan's files without suffix, with a digest of the whole spec."""
        identity = msgspec.json.encode((SCHEMA, self), order="deterministic")
        digest = hashlib.sha256(identity).hexdigest()[:12]
        return f"{self.runtime}-{self.runtime_version}-{self.precision}-{digest}"


class PlanTensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An input or output of a plan.

    Attributes:
        name: Name of the tensor.
        dtype: Type of its elements, such as `uint8`.
        shape: Its dimensions; -1 for a dimension that may differ between runs.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The record of a compiled plan.

    Attributes:
        schema: Version of this record's format.
        spec: Everything that the plan was compiled from.
        fingerprint: Fingerprint of the bundle's embedding space.
        sha256: SHA-256 of the plan file.
        bytes: Size of the plan file in bytes.
        inputs: Inputs that TensorRT found in the graph.
        outputs: Outputs that TensorRT found in the graph.
        layers: Number of layers of the network before TensorRT fuses them.
        projection: Names of the layers from the unit embedding to the projected columns.
        seconds: Duration of the compilation in seconds.
        peak_memory: Largest resident memory of the compiling process, in bytes.
        verified: Architectures of the GPUs on which `crl verify` found that the plan agrees with
            the fp32 graph.
    """

    schema: int
    spec: PlanSpec = msgspec.field(name="recipe")  # its name in the file
    fingerprint: str
    sha256: str
    bytes: int
    inputs: tuple[PlanTensor, ...]
    outputs: tuple[PlanTensor, ...]
    layers: int
    projection: tuple[str, ...]
    seconds: float
    peak_memory: int
    verified: tuple[str, ...] = ()


def plans_directory(bundle: ModelBundle) -> Path:
    """Return the default directory of a bundle's plans."""
    return bundle.path / DIRECTORY


def write_plan(directory: Path, plan: Plan, data: bytes) -> Path:
    """Write a plan and then its record. A plan without a record is ignored.

    Args:
        directory: Directory to write to; it is created if it does not exist.
        plan: Record of the plan.
        data: Contents of the plan file.

    Returns:
        Path of the plan file.

    Raises:
        PlanError: If the disk is full or the directory cannot be written.
    """
    path = directory / f"{plan.spec.stem}.plan"
    make_directory(directory, PlanError)
    write_atomically(path, data, PlanError)
    _write_record(directory, plan)
    return path


def record_verified(directory: Path, plan: Plan, architecture: str, *, agrees: bool) -> None:
    """Record whether a plan agrees with the fp32 graph on GPUs of an architecture.

    Raises:
        PlanError: If the record cannot be written.
    """
    others = set(plan.verified) - {architecture}
    verified = tuple(sorted(others | ({architecture} if agrees else set())))
    if verified != plan.verified:
        _write_record(directory, msgspec.structs.replace(plan, verified=verified))


def read_plans(directory: Path) -> list[Plan]:
    """Read the records of a directory, sorted by name. A missing directory has none.

    Raises:
        PlanError: If a record is damaged, renamed, or in another format version.
    """
    return [_read(path) for path in sorted(directory.glob("tensorrt*.json"))]


def find_plan(directory: Path, spec: PlanSpec) -> Plan | None:
    """Return the record of a spec if its plan file is there and intact, else None."""
    path = directory / f"{spec.stem}.json"
    try:
        plan = _read(path)
        _check_file(path.with_suffix(".plan"), plan)
    except (PlanError, OSError):
        return None
    return plan


def choose_plan(
    bundle: ModelBundle,
    directory: Path,
    *,
    runtime: PlanRuntime,
    runtime_version: str,
    architecture: str,
    precision: Precision | Literal["auto"] = "auto",
    baked: str | None = None,
) -> Plan:
    """Return the plan that runs on a machine.

    Args:
        bundle: Model bundle.
        directory: Directory of the plans.
        runtime: Installed TensorRT.
        runtime_version: Version of the installed TensorRT.
        architecture: Compute capability of the GPU, such as `sm89`.
        precision: Required precision; `auto` prefers fp16 to fp32.
        baked: SHA-256 of the basis that must be compiled into the plan; None for a plan that takes
            any bases.

    Raises:
        PlanError: If no plan runs there. The message says why not, and how to compile one.
    """
    order: Sequence[str] = [each for each in PLAN_PRECISIONS if each in bundle.precisions]
    if precision != "auto":
        order = [precision]
    reasons = []
    for wanted in order:
        for plan in read_plans(directory):
            spec = plan.spec
            if spec.precision != wanted:
                continue
            reason = _misfit(plan, runtime, runtime_version, architecture, baked)
            reason = reason or _stale(bundle, plan)
            if reason is None:
                return plan
            reasons.append(f"{spec.stem}: {reason}")
    details = "; ".join(reasons) or f"no plan in {', '.join(order)} there"
    command = compile_command(bundle, runtime, order[0], architecture)
    raise PlanError(
        f"{directory}: no plan for {runtime} {runtime_version} on {architecture} ({details}); "
        f"compile one: {command}"
    )


def load_plan(bundle: ModelBundle, directory: Path, plan: Plan) -> bytes:
    """Read a plan file, and check it against its record and the bundle.

    Raises:
        PlanError: If the file is missing, cut off or changed, or the bundle's graph has changed
            since the compilation.
    """
    reason = _stale(bundle, plan)
    if reason is not None:
        spec = plan.spec
        command = compile_command(
            bundle, spec.runtime, spec.precision, ",".join(spec.architectures)
        )
        raise PlanError(f"{directory / spec.stem}.plan: {reason}; compile it again: {command}")
    path = directory / f"{plan.spec.stem}.plan"
    _check_file(path, plan)
    return path.read_bytes()


def compile_command(
    bundle: ModelBundle, runtime: PlanRuntime, precision: str, architectures: str
) -> str:
    """Return the command that compiles a plan."""
    return shlex.join(
        ["crl", "compile", str(bundle.path), "--runtime", runtime, "--precision", precision,
         *(["--arch", architectures] if runtime == "tensorrt-rtx" and architectures else [])]
    )  # fmt: skip


def graph_digest(bundle: ModelBundle, precision: Precision) -> str:
    """Return the SHA-256 of a bundle's image graph, from its manifest.

    Raises:
        BundleError: If the bundle has no graph in this precision.
    """
    return bundle.manifest.files[bundle.image_graph(precision).name].sha256


def _write_record(directory: Path, plan: Plan) -> None:
    write_record(directory / f"{plan.spec.stem}.json", plan, PlanError)


def _stale(bundle: ModelBundle, plan: Plan) -> str | None:
    spec = plan.spec
    if plan.fingerprint != bundle.fingerprint:
        return f"for another model ({plan.fingerprint[:12]}…, this is {bundle.fingerprint[:12]}…)"
    if spec.precision not in bundle.precisions:
        return f"the bundle has no {spec.precision} graph any more"
    now = graph_digest(bundle, spec.precision)
    if now != spec.onnx_sha256:
        return f"made from graph {spec.onnx_sha256[:12]}…, the bundle now has {now[:12]}…"
    return None


def _misfit(
    plan: Plan,
    runtime: PlanRuntime,
    version: str,
    architecture: str,
    baked: str | None,
) -> str | None:
    spec = plan.spec
    if spec.runtime != runtime:
        return f"for {spec.runtime}"
    if spec.runtime_version != version:
        return f"for version {spec.runtime_version}"
    if architecture not in spec.architectures:
        return f"for {', '.join(spec.architectures)}"
    if spec.baked is None and baked is not None:
        return "without a baked basis"
    if spec.baked is not None and spec.baked.sha256 != baked:
        return f"only for the criterion {spec.baked.criterion!r}"
    return None


def _read(path: Path) -> Plan:
    plan = read_record(path, Plan, SCHEMA, PlanError, "remove it and compile again")
    if plan.spec.stem != path.stem:
        raise PlanError(
            f"{path}: expected the record of {plan.spec.stem}, it was renamed or edited; remove it "
            "and compile again"
        )
    return plan


def _check_file(path: Path, plan: Plan) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise PlanError(f"{path}: missing ({error.strerror}); compile it again") from error
    if size != plan.bytes:
        raise PlanError(
            f"{path}: expected {plan.bytes:,} bytes, got {size:,}: it is cut off or was changed; "
            "compile it again"
        )
    if (digest := sha256_file(path)) != plan.sha256:
        raise PlanError(
            f"{path}: expected SHA-256 {plan.sha256[:12]}…, got {digest[:12]}…: it was changed; "
            "compile it again"
        )
