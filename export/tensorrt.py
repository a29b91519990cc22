"""Compilation of a bundle's image tower and projection to one TensorRT plan.

TensorRT-RTX needs no GPU: it compiles ahead of time for given architectures. Enterprise TensorRT
compiles for the GPU that it finds, so only it needs a driver.
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

MAX_IMAGES, MAX_COLUMNS = 1024, 65536

_NO_FLOAT32 = ("sm75",)
"""Architectures (Turing) for which TensorRT-RTX 1.7 refuses float32 matrix products. The projection
is one."""

_DTYPES = {"UINT8": "uint8", "FLOAT": "float32", "HALF": "float16"}
_INPUTS = {"image": ("uint8", 4), "weight": ("float32", 2), "bias": ("float32", 1)}
_OUTPUTS = {"embedding": ("float32", 2), "projected": ("float32", 2)}


@dataclass(frozen=True, slots=True)
class Compiled:
    """Result of `compile_plan`.

    Attributes:
        plan: Record of the plan.
        path: Path of the plan file.
        cached: Whether the plan existed already.
    """

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
    """Compile the image graph of a bundle, unless the same plan exists already.

    Args:
        bundle: Model bundle.
        runtime: TensorRT to compile with.
        precision: Precision of the tower, fp16 or fp32. Normalisation and projection always use
            float32.
        architectures: Compute capabilities to compile for, such as `sm89`. If empty, all that
            TensorRT-RTX can compile for.
        batch: Minimum, usual and maximum number of images of a run. The plan is tuned for the
            usual number.
        max_columns: Maximum number of columns K of packed bases in a run.
        baked: Basis that becomes a constant of the plan, which then needs only images.
        directory: Directory for the plan; `engines` in the bundle by default.
        force: Whether to compile even if the plan exists.
        progress: Function that is called with the current stage, the number of its steps that are
            done, and their total number.

    Raises:
        InvalidInputError: If an architecture is unknown, or the batch sizes or columns are invalid.
        BundleError: If the bundle has no graph in this precision.
        BasisMismatchError: If the baked basis was made for another model.
        ExportError: If TensorRT cannot compile the graph, or finds other inputs or outputs in it.
        PlanError: If the plan cannot be written.
        MissingDependencyError: If this TensorRT is not installed.
        EngineError: If enterprise TensorRT finds no GPU.
    """
    _check_profile(precision, batch, max_columns)
    origin = bundle.manifest.origin
    if origin is not None and origin.image_batch == "one by one":
        raise ExportError(
            f"{bundle.path}: the imported graph takes one image at a time, so that the bundle runs "
            "images one by one, which TensorRT cannot; export the model with a dynamic batch, and "
            "import it again"
        )
    if baked is not None:
        baked.require_fingerprint(bundle.fingerprint)
    digest = graph_digest(bundle, precision)
    tensorrt = load_tensorrt(runtime)
    spec = PlanSpec(
        runtime=runtime,
        runtime_version=tensorrt.version,
        architectures=_architectures(tensorrt, architectures),
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
    plan, data = _build(tensorrt, bundle, spec, baked, progress)
    return Compiled(plan, write_plan(folder, plan, data), cached=False)


def _check_profile(precision: str, batch: tuple[int, int, int], max_columns: int) -> None:
    if precision not in ("fp16", "fp32"):
        raise InvalidInputError(f"expected precision fp16 or fp32, got {precision!r}")
    minimum, usual, maximum = batch
    if not 1 <= minimum <= usual <= maximum <= MAX_IMAGES:
        raise InvalidInputError(
            f"expected batch min:opt:max with 1 <= min <= opt <= max <= {MAX_IMAGES}, got "
            f"{minimum}:{usual}:{maximum}"
        )
    if not 1 <= max_columns <= MAX_COLUMNS:
        raise InvalidInputError(f"expected 1 to {MAX_COLUMNS} columns, got {max_columns}")


def _architectures(tensorrt: TensorRTRuntime, wanted: Sequence[str]) -> tuple[str, ...]:
    if tensorrt.runtime == "tensorrt":
        here = cuda.architecture()
        if set(wanted) - {here}:
            raise InvalidInputError(
                f"expected no --arch, or {here}: TensorRT compiles for the GPU it runs on; got "
                f"{', '.join(wanted)}. --runtime tensorrt-rtx compiles for others"
            )
        return (here,)
    known = tuple(name for name in tensorrt.architectures if name not in _NO_FLOAT32)
    if unknown := sorted(set(wanted) - set(known)):
        raise InvalidInputError(
            f"expected architectures among {', '.join(known)}, got {', '.join(unknown)}; for other "
            "GPUs (sm75: Turing, sm87: Jetson Orin, sm90: H100) compile there with --runtime "
            "tensorrt"
        )
    return tuple(name for name in known if name in wanted or not wanted)


def _build(
    tensorrt: TensorRTRuntime,
    bundle: ModelBundle,
    spec: PlanSpec,
    baked: Basis | None,
    progress: Progress | None,
) -> tuple[Plan, bytes]:
    trt, log = tensorrt.module, tensorrt.logger()
    started = time.perf_counter()
    builder = trt.Builder(log)
    network = builder.create_network(tensorrt.network_flags)
    parser = trt.OnnxParser(network, log)
    graph = bundle.image_graph(spec.precision)
    parsed = parser.parse(_bake(graph, baked)) if baked else parser.parse_from_file(str(graph))
    if not parsed:
        errors = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise ExportError(
            f"{graph}: {spec.runtime} cannot read it ({errors}): export the model again"
        )
    inputs = tuple(_tensor(network.get_input(i)) for i in range(network.num_inputs))
    outputs = tuple(_tensor(network.get_output(i)) for i in range(network.num_outputs))
    expected = {"image": _INPUTS["image"]} if baked else _INPUTS
    _check_tensors(graph, inputs, expected)
    _check_tensors(graph, outputs, _OUTPUTS)
    projection = _projection_layers(network)
    if not any("MATRIX_MULTIPLY" in layer for layer in projection):
        raise ExportError(
            f"{graph}: {spec.runtime} finds no projection in it: export the model again"
        )

    config = builder.create_builder_config()
    if tensorrt.runtime == "tensorrt-rtx":  # CUDA graphs need it
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if tensorrt.architectures:
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
        reason = " ".join("; ".join(log.errors[-3:]).split()) or "it gave no reason"
        raise ExportError(
            f"{graph}: {spec.runtime} {spec.runtime_version} cannot compile it ({reason}); choose "
            "another precision, or an engine onnx/cuda"
        )
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
    """Return the graph with the projection of a basis as constants instead of inputs."""
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
    actual = {each.name: (each.dtype, len(each.shape)) for each in found}
    if actual != expected:
        raise ExportError(
            f"{graph}: expected tensors {expected}, TensorRT finds {actual}: export the model again"
        )


def _projection_layers(network: Any) -> tuple[str, ...]:
    """Return the names of the layers from `embedding` to `projected`, in order."""
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
    """Return a monitor for the builder: it reports progress, and ends the build on Ctrl-C."""

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
            except KeyboardInterrupt:  # an exception must not pass through TensorRT
                self.interrupted = True
            return not self.interrupted

        def phase_finish(self, phase: str) -> None:
            self.steps.pop(phase, None)

    return Monitor()


def _peak_memory() -> int:
    """Return the largest resident memory of this process so far, in bytes."""
    try:  # own code: psutil has no peak on Linux, and getrusage includes the parent's at the fork
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
