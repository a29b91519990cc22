"""Plans: engines compiled from a bundle's image graph. Their records, and the checks before use.

A plan is a file of TensorRT's in `engines/` of the bundle, with a record (JSON) of the same stem
beside it. Nothing here imports TensorRT.
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
"""What plans are compiled in, best first."""

PlanRuntime: TypeAlias = Literal["tensorrt-rtx", "tensorrt"]


class Baked(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The basis whose projection is a constant of a plan: its criterion and its digest."""

    criterion: str
    sha256: str


class PlanSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All that decides what a plan is; equal specs need no second compilation.

    Attributes:
        runtime: whose plan it is.
        runtime_version: a plan runs with the version that made it.
        architectures: compute capabilities it has code for, such as `sm86`, sorted.
        precision: of the tower; normalising and projecting are float32 always.
        batch: fewest, usual and most images of a run.
        max_columns: most columns K of packed bases in a run; 0 where a basis is baked in.
        onnx_sha256: of the image graph.
        baked: the basis that is fixed in it, if any.
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
        """Name of its files without suffix: runtime, version, precision and a digest of all."""
        identity = msgspec.json.encode((SCHEMA, self), order="deterministic")
        digest = hashlib.sha256(identity).hexdigest()[:12]
        return f"{self.runtime}-{self.runtime_version}-{self.precision}-{digest}"


class PlanTensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An input or output: -1 stands for a dimension that differs from run to run."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The record of a compiled engine.

    Attributes:
        schema: of this record.
        spec: what it was made from.
        fingerprint: of the bundle's embedding space.
        sha256: of the plan file.
        bytes: its size.
        inputs: as TensorRT read them from the graph.
        outputs: likewise.
        layers: of the network, before TensorRT fuses them.
        projection: names of the layers from the unit embedding to the projected columns.
        seconds: the compilation took.
        peak_memory: bytes resident in the process that compiled, at most.
        verified: architectures of the GPUs on which `crl verify` found that it agrees with the
            fp32 graph; a compiler alone cannot know.
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
    """Give where the plans of a bundle are by default."""
    return bundle.path / DIRECTORY


def write_plan(directory: Path, plan: Plan, data: bytes) -> Path:
    """Write a plan, then its record: a plan without one is no plan.

    Returns:
        The plan file.

    Raises:
        PlanError: the disk is full, or the directory cannot be written.
    """
    path = directory / f"{plan.spec.stem}.plan"
    make_directory(directory, PlanError)
    write_atomically(path, data, PlanError)
    _write_record(directory, plan)
    return path


def record_verified(directory: Path, plan: Plan, architecture: str, *, agrees: bool) -> None:
    """Record whether a plan agrees with the fp32 graph on GPUs of this architecture.

    Raises:
        PlanError: the record cannot be written.
    """
    others = set(plan.verified) - {architecture}
    verified = tuple(sorted(others | ({architecture} if agrees else set())))
    if verified != plan.verified:
        _write_record(directory, msgspec.structs.replace(plan, verified=verified))


def read_plans(directory: Path) -> list[Plan]:
    """Read the records of a directory, by name; one that is not there has none.

    Raises:
        PlanError: a record is damaged, of another schema, or under another's name.
    """
    return [_read(path) for path in sorted(directory.glob("tensorrt*.json"))]


def find_plan(directory: Path, spec: PlanSpec) -> Plan | None:
    """Give the record of exactly this spec if its plan is there and whole, else None."""
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
    """Choose the plan that fits a machine.

    Args:
        bundle: the model.
        directory: of the plans.
        runtime: what is installed.
        runtime_version: of it.
        architecture: of the GPU, such as `sm89`.
        precision: `auto` takes fp16 before fp32.
        baked: SHA-256 of the basis that must be fixed in it; None for a plan of any bases.

    Raises:
        PlanError: none fits; the message says why each does not and how to compile one.
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
    told = "; ".join(reasons) or f"no plan in {', '.join(order)} there"
    command = compile_command(bundle, runtime, order[0], architecture)
    raise PlanError(
        f"{directory}: no plan for {runtime} {runtime_version} on {architecture} ({told}); "
        f"compile one: {command}"
    )


def load_plan(bundle: ModelBundle, directory: Path, plan: Plan) -> bytes:
    """Read a plan file that is the one its record tells of and was made from this bundle.

    Raises:
        PlanError: it is missing, cut off or changed, or the bundle's graph changed since.
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
    """Give the command that compiles a plan."""
    return shlex.join(
        ["crl", "compile", str(bundle.path), "--runtime", runtime, "--precision", precision,
         *(["--arch", architectures] if runtime == "tensorrt-rtx" and architectures else [])]
    )  # fmt: skip


def graph_digest(bundle: ModelBundle, precision: Precision) -> str:
    """Give the SHA-256 of a bundle's image graph as its manifest has it.

    Raises:
        BundleError: the bundle has no graph in this precision.
    """
    return bundle.manifest.files[bundle.image_graph(precision).name].sha256


def _write_record(directory: Path, plan: Plan) -> None:
    write_record(directory / f"{plan.spec.stem}.json", plan, PlanError)


def _stale(bundle: ModelBundle, plan: Plan) -> str | None:
    spec = plan.spec
    if plan.fingerprint != bundle.fingerprint:
        return f"of another model ({plan.fingerprint[:12]}…, this is {bundle.fingerprint[:12]}…)"
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
        return "with no basis fixed in it"
    if spec.baked is not None and spec.baked.sha256 != baked:
        return f"only for the criterion {spec.baked.criterion!r}"
    return None


def _read(path: Path) -> Plan:
    plan = read_record(path, Plan, SCHEMA, PlanError, "remove it and compile again")
    if plan.spec.stem != path.stem:
        raise PlanError(
            f"{path}: the record of {plan.spec.stem}, renamed or edited; remove it and compile "
            "again"
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
