"""Bundle → TensorRT plan: image tower and projection in one engine, compiled without a GPU.

TensorRT-RTX compiles ahead of time for the architectures one names. Enterprise TensorRT compiles
for the GPU it finds. Nothing here asks a driver for anything unless the latter is chosen.
"""

from __future__ import annotations

import hashlib
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crl_sdk.basis._basis import Basis
from crl_sdk.engines import _cuda as cuda
from crl_sdk.engines._tensorrt_plans import (
    SCHEMA,
    Baked,
    Plan,
    PlanRuntime,
    PlanSpec,
    PlanTensor,
    find_plan,
    graph_digest,
    plans_directory,
    write_plan,
)
from crl_sdk.engines._tensorrt_runtime import TensorRTRuntime, load_tensorrt
from crl_sdk.errors import ExportError, InvalidInputError, MissingDependencyError
from crl_sdk.model._bundle import ModelBundle
from crl_sdk.model._manifest import Precision

Progress = Callable[[str, int, int], None]

MOST_IMAGES, MOST_COLUMNS = 1024, 65536

_NO_FLOAT32 = ("sm75",)
"""TensorRT-RTX 1.7 refuses float32 matrix products for Turing, and the projection is one."""

_DTYPES = {"UINT8": "uint8", "FLOAT": "float32", "HALF": "float16"}
_INPUTS = {"image": ("uint8", 4), "weight": ("float32", 2), "bias": ("float32", 1)}
_OUTPUTS = {"embedding": ("float32", 2), "projected": ("float32", 2)}


@dataclass(frozen=True, slots=True)
class Compiled:
    """What `compile_plan` gives: the plan's record, its file, and whether it was there before."""

    plan: Plan
    path: Path
    cached: bool


def compile_plan(
    bundle: ModelBundle,
    *,
    runtime: PlanRuntime = "tensorrt-rtx",
    precision: Precision = "fp16",
    architectures: Sequence[str] = (),
    batch: tuple[int, int, int] = (1, 8, 32),
    max_columns: int = 4096,
    baked: Basis | None = None,
    directory: Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Compiled:
    """Compile the image graph of a bundle, unless its plan is there already.

    Args:
        bundle: the model.
        runtime: which TensorRT.
        precision: fp16 (the tower in half; normalising and projecting in float32) or fp32.
        architectures: for TensorRT-RTX, such as `sm89`; all it can compile for if empty.
        batch: fewest, usual and most images of a run; the engine is tuned for the second.
        max_columns: most columns K of packed bases.
        baked: a basis whose projection becomes a constant; the engine then takes images alone.
        directory: of the plan; `engines` in the bundle by default.
        force: compile even if the plan is there.
        progress: called with what is done now, how many steps of it are done, and how many there
            are.

    Raises:
        InvalidInputError: an unknown architecture, or a profile that contradicts itself.
        BundleError: the bundle has no graph in this precision.
        BasisMismatchError: the baked basis is of another model.
        ExportError: TensorRT cannot compile the graph, or gives it other inputs or outputs.
        PlanError: the plan cannot be written.
        MissingDependencyError: this TensorRT is not installed.
        EngineError: enterprise TensorRT found no GPU.
    """
    _check_profile(precision, batch, max_columns)
    if baked is not None:
        baked.require_fingerprint(bundle.fingerprint)
    digest = graph_digest(bundle, precision)
    toolkit = load_tensorrt(runtime)
    spec = PlanSpec(
        runtime=runtime,
        runtime_version=toolkit.version,
        architectures=_architectures(toolkit, architectures),
        precision=precision,
        batch=batch,
        max_columns=0 if baked is not None else max_columns,
        onnx_sha256=digest,
        baked=Baked(criterion=baked.criterion, sha256=baked.sha256()) if baked else None,
    )
    folder = directory or plans_directory(bundle)
    path = folder / f"{spec.stem}.plan"
    if not force and (known := find_plan(folder, spec)) is not None:
        return Compiled(known, path, cached=True)
    plan, data = _build(toolkit, bundle, spec, baked, progress)
    return Compiled(plan, write_plan(folder, plan, data), cached=False)


def _check_profile(precision: str, batch: tuple[int, int, int], max_columns: int) -> None:
    if precision not in ("fp16", "fp32"):
        raise InvalidInputError(f"expected precision fp16 or fp32, got {precision!r}")
    fewest, usual, most = batch
    if not 1 <= fewest <= usual <= most <= MOST_IMAGES:
        raise InvalidInputError(
            f"expected batch min:opt:max with 1 <= min <= opt <= max <= {MOST_IMAGES}, got "
            f"{fewest}:{usual}:{most}"
        )
    if not 1 <= max_columns <= MOST_COLUMNS:
        raise InvalidInputError(f"expected 1 to {MOST_COLUMNS} columns, got {max_columns}")


def _architectures(toolkit: TensorRTRuntime, wanted: Sequence[str]) -> tuple[str, ...]:
    if toolkit.runtime == "tensorrt":
        here = cuda.architecture()
        if set(wanted) - {here}:
            raise InvalidInputError(
                f"expected no --arch, or {here}: TensorRT compiles for the GPU it runs on; got "
                f"{', '.join(wanted)}. --runtime tensorrt-rtx compiles for others"
            )
        return (here,)
    known = tuple(name for name in toolkit.architectures if name not in _NO_FLOAT32)
    if unknown := sorted(set(wanted) - set(known)):
        raise InvalidInputError(
            f"expected architectures of {', '.join(known)}, got {', '.join(unknown)}; for other "
            "GPUs (sm75: Turing, sm87: Jetson Orin, sm90: H100) compile there with --runtime "
            "tensorrt"
        )
    return tuple(name for name in known if name in wanted or not wanted)


def _build(
    toolkit: TensorRTRuntime,
    bundle: ModelBundle,
    spec: PlanSpec,
    baked: Basis | None,
    progress: Progress | None,
) -> tuple[Plan, bytes]:
    trt, log = toolkit.module, toolkit.logger()
    started = time.perf_counter()
    builder = trt.Builder(log)
    network = builder.create_network(toolkit.network_flags)
    parser = trt.OnnxParser(network, log)
    graph = bundle.image_graph(spec.precision)
    parsed = parser.parse(_bake(graph, baked)) if baked else parser.parse_from_file(str(graph))
    if not parsed:
        told = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise ExportError(f"{graph}: {spec.runtime} cannot read it ({told})")
    inputs = tuple(_tensor(network.get_input(i)) for i in range(network.num_inputs))
    outputs = tuple(_tensor(network.get_output(i)) for i in range(network.num_outputs))
    expected = {"image": _INPUTS["image"]} if baked else _INPUTS
    _check_tensors(graph, inputs, expected)
    _check_tensors(graph, outputs, _OUTPUTS)
    projection = _projection_layers(network)
    if not any("MATRIX_MULTIPLY" in layer for layer in projection):
        raise ExportError(f"{graph}: no projection in {spec.runtime}'s network: export again")

    config = builder.create_builder_config()
    if toolkit.runtime == "tensorrt-rtx":  # without it a run cannot be recorded as a CUDA graph
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if toolkit.architectures:
        config.num_compute_capabilities = len(spec.architectures)
        for i, name in enumerate(spec.architectures):
            config.set_compute_capability(trt.ComputeCapability.__members__[name.upper()], i)
    config.add_optimization_profile(_profile(builder, bundle, spec))
    monitor = _monitor(trt, progress)
    config.progress_monitor = monitor
    blob = builder.build_serialized_network(network, config)
    if monitor.interrupted:
        raise KeyboardInterrupt
    if blob is None:
        told = " ".join("; ".join(log.errors[-3:]).split()) or "it gave no reason"
        raise ExportError(f"{graph}: {spec.runtime} {spec.runtime_version} failed ({told})")
    data = bytes(blob)
    plan = Plan(
        schema=SCHEMA,
        spec=spec,
        fingerprint=bundle.fingerprint,
        sha256=hashlib.sha256(data).hexdigest(),
        bytes=len(data),
        inputs=inputs,
        outputs=outputs,
        layers=network.num_layers,
        projection=projection,
        seconds=round(time.perf_counter() - started, 2),
        peak_memory=_peak_memory(),
    )
    return plan, data


def _bake(graph: Path, basis: Basis) -> bytes:
    """Give the graph with a basis' projection as constants in place of the inputs."""
    try:
        import onnx
    except ImportError as error:
        raise MissingDependencyError("onnx", "tensorrt-rtx", "--baked") from error
    model = onnx.load(graph)
    projection = basis.projection
    for name, array in (("weight", projection.weight), ("bias", projection.bias)):
        model.graph.input.remove(next(each for each in model.graph.input if each.name == name))
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    columns = next(each for each in model.graph.output if each.name == "projected")
    columns.type.tensor_type.shape.dim[1].dim_value = projection.output_dim
    return bytes(model.SerializeToString())


def _tensor(tensor: Any) -> PlanTensor:
    return PlanTensor(
        name=tensor.name,
        dtype=_DTYPES.get(tensor.dtype.name, tensor.dtype.name.lower()),
        shape=tuple(tensor.shape),
    )


def _check_tensors(
    graph: Path, found: Sequence[PlanTensor], expected: dict[str, tuple[str, int]]
) -> None:
    told = {each.name: (each.dtype, len(each.shape)) for each in found}
    if told != expected:
        raise ExportError(f"{graph}: expected tensors {expected}, TensorRT has {told}")


def _projection_layers(network: Any) -> tuple[str, ...]:
    """Name the layers through which `projected` depends on `embedding`, in order."""
    reached = {"embedding"}
    layers = []
    for i in range(network.num_layers):  # in topological order
        layer = network.get_layer(i)
        inputs = [layer.get_input(j) for j in range(layer.num_inputs)]
        if any(tensor is not None and tensor.name in reached for tensor in inputs):
            reached |= {layer.get_output(j).name for j in range(layer.num_outputs)}
            layers.append(f"{layer.name} ({layer.type.name})")
    return tuple(layers) if "projected" in reached else ()


def _profile(builder: Any, bundle: ModelBundle, spec: PlanSpec) -> Any:
    profile = builder.create_optimization_profile()
    pixels, dim = bundle.preprocess, bundle.embedding_dim
    image = (pixels.height, pixels.width, 3)
    profile.set_shape("image", *((count, *image) for count in spec.batch))
    if spec.baked is None:
        columns = (1, min(256, spec.max_columns), spec.max_columns)
        profile.set_shape("weight", *((dim, count) for count in columns))
        profile.set_shape("bias", *((count,) for count in columns))
    return profile


def _monitor(trt: Any, progress: Progress | None) -> Any:
    """Make the builder's monitor: it tells of the outer phases, and ends the build on Ctrl-C."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}
            self.interrupted = False

        def phase_start(self, phase: str, _parent: str | None, steps: int) -> None:
            self.steps[phase] = steps

        def step_complete(self, phase: str, step: int) -> bool:
            try:
                if progress is not None and self.steps.get(phase, 0) > 1:
                    progress(phase.lower(), step + 1, self.steps[phase])
            except KeyboardInterrupt:  # it must not pass through TensorRT
                self.interrupted = True
            return not self.interrupted

        def phase_finish(self, phase: str) -> None:
            self.steps.pop(phase, None)

    return Monitor()


def _peak_memory() -> int:
    """Return the largest resident memory of this process so far, in bytes.

    On Linux this is at least the memory that the parent process had when it started this one.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # psutil has no peak on Linux
    return peak if sys.platform == "darwin" else peak * 1024
