"""Which engine runs a bundle on this machine, why not the others, and opening it by name.

An engine's name is `runtime/device/precision`, such as `onnx/cpu/fp32` or `tensorrt-rtx/cuda/fp16`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import cast, get_args

from crl_sdk.basis._basis import Basis
from crl_sdk.engines._contract import ImageEngine, TextEngine
from crl_sdk.engines._engine_name import EngineName, EnginePattern
from crl_sdk.engines._machine import find_gpus, find_providers
from crl_sdk.engines._onnx import OnnxImageEngine, OnnxTextEngine
from crl_sdk.engines._onnx_providers import PROVIDERS, Device
from crl_sdk.engines._openvino import (
    RUN_PRECISIONS,
    OpenVinoImageEngine,
    RunPrecision,
    lacking_instructions,
)
from crl_sdk.engines._processor import find_features
from crl_sdk.engines._tensorrt import TensorRTImageEngine
from crl_sdk.engines._tensorrt_plans import (
    PLAN_PRECISIONS,
    Runtime,
    choose_plan,
    compile_command,
    plans_directory,
    read_plans,
)
from crl_sdk.engines._tensorrt_runtime import load_tensorrt
from crl_sdk.errors import CrlError, EngineError, InvalidInputError
from crl_sdk.model._bundle import ModelBundle
from crl_sdk.model._manifest import Precision
from crl_sdk.model._parity import Tolerance, failures

_log = logging.getLogger(__name__)

_BYTE_PRODUCTS = ("avx512_vnni", "avx_vnni", "amx_int8")
"""Instructions that multiply bytes fast: without one, int8 is no faster than fp32 on a CPU."""

_ON_CUDA = EnginePattern("onnx", "cuda")

_INT8 = Tolerance(cosine_mean=0.999, centred_cosine_min=0.99)
"""What the bundle must have recorded of its int8 graph for `auto` to take it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCandidate:
    """An engine for a bundle.

    Attributes:
        name: Name of the engine.
        usable: whether it can run here.
        automatic: whether `auto` may take it.
        reason: why it is usable, is not, or has to be asked for.
    """

    name: EngineName
    usable: bool
    automatic: bool
    reason: str


def list_candidates(bundle: ModelBundle) -> list[EngineCandidate]:
    """List the engines of a bundle; `auto` takes the first that is usable and automatic.

    On a GPU: plans that `crl verify` found to agree on its architecture, then ONNX Runtime's CUDA
    provider. On a CPU: ONNX Runtime, in int8 if the processor multiplies bytes fast and the parity
    that the export recorded allows it, else in fp32. ONNX Runtime's TensorRT providers compile for
    minutes when they first start, plans that nobody verified may be wrong, and no bundle records
    how far OpenVINO is off, so that all of these have to be asked for.
    """
    gpus, cuda = find_gpus()
    here = gpus[0].architecture if gpus else None
    found = [
        _plan(bundle, runtime, precision, here, cuda)
        for runtime in get_args(Runtime)
        for precision in PLAN_PRECISIONS
        if precision in bundle.precisions
    ]
    providers = find_providers()
    for device in ("cuda", "tensorrt", "tensorrt-rtx", "cpu"):
        found += [
            _onnx(bundle, device, precision, providers=providers, here=here, cuda=cuda)
            for precision in _precision_order(device)
            if precision in bundle.precisions
        ]
    if "fp32" in bundle.precisions:
        found += [_openvino(bundle, precision) for precision in RUN_PRECISIONS]
    return found


def choose_engine(engines: Sequence[EngineCandidate], wanted: str) -> EngineCandidate:
    """Choose an engine by name.

    Args:
        engines: from `list_candidates`.
        wanted: `auto`, a name, or the beginning of one, such as `onnx/cuda` or `tensorrt-rtx`; of
            several that begin so, one that `auto` may take comes first.

    Raises:
        InvalidInputError: no engine of this bundle is called so.
        EngineError: none that is called so can run here; the message says why.
    """
    if wanted == "auto":
        named = [each for each in engines if each.automatic]
    else:
        pattern = _parse(wanted)
        named = [each for each in engines if pattern is not None and pattern.matches(each.name)]
        if not named:
            raise InvalidInputError(
                f"expected an engine of {', '.join(str(each.name) for each in engines)}, the "
                f"beginning of a name, or auto; got {wanted!r}"
            )
    usable = [each for each in named if each.usable]
    if not usable:
        told = "; ".join(f"{each.name}: {each.reason}" for each in named)
        raise EngineError(
            f"engine {wanted!r} cannot run here ({told}); `crl doctor` lists what can"
        )
    return next((each for each in usable if each.automatic), usable[0])


def open_engine(
    bundle: ModelBundle,
    engine: str = "auto",
    *,
    threads: int | None = None,
    baked: Basis | None = None,
) -> ImageEngine:
    """Open the image engine of a name, and log what was chosen and why.

    Args:
        bundle: a verified bundle.
        engine: see `choose_engine`.
        threads: of one run on a CPU; None for one per physical core.
        baked: with a TensorRT engine, take the plan that has this basis fixed in it.

    Raises:
        InvalidInputError: no engine of this bundle is called so.
        EngineError: it cannot run here, or does not load.
        PlanError: a plan is missing, damaged or stale.
        MissingDependencyError: a package is not installed.
    """
    if baked is not None:
        return _open_baked(bundle, engine, baked)
    chosen = choose_engine(list_candidates(bundle), engine)
    _log.info("engine %s: %s (%s)", engine, chosen.name, chosen.reason)
    runtime, device, precision = chosen.name.runtime, chosen.name.device, chosen.name.precision
    if runtime in get_args(Runtime):
        return TensorRTImageEngine.open(
            bundle, runtime=cast(Runtime, runtime), precision=cast(Precision, precision)
        )
    if runtime == "openvino":
        return OpenVinoImageEngine.open(
            bundle, precision=cast(RunPrecision, precision), threads=threads
        )
    return OnnxImageEngine.open(
        bundle,
        precision=cast(Precision, precision),
        device=cast(Device, device),
        threads=threads,
    )


def _open_baked(bundle: ModelBundle, engine: str, baked: Basis) -> ImageEngine:
    pattern = _parse(engine) or EnginePattern("")
    runtime, device = pattern.runtime, pattern.device or "cuda"
    precision = pattern.precision or "auto"
    known = (*PLAN_PRECISIONS, "auto")
    if runtime not in get_args(Runtime) or device != "cuda" or precision not in known:
        raise InvalidInputError(
            f"expected an engine of {', '.join(get_args(Runtime))} to go with a baked basis, such "
            f"as tensorrt-rtx/cuda/fp16; got {engine!r}"
        )
    return TensorRTImageEngine.open(
        bundle,
        runtime=cast(Runtime, runtime),
        precision=cast(Precision, precision),
        baked=baked,
    )


def open_text_engine(
    bundle: ModelBundle, image_engine: EngineName, *, threads: int | None = None
) -> TextEngine:
    """Open the text engine that goes with an image engine: on CUDA with it, else on the CPU.

    Raises:
        BundleError: the bundle is image-only.
        EngineError: the graph does not load.
        MissingDependencyError: ONNX Runtime is not installed.
    """
    device: Device = "cuda" if _ON_CUDA.matches(image_engine) else "cpu"
    return OnnxTextEngine.open(bundle, device=device, threads=threads)


def _parse(wanted: str) -> EnginePattern | None:
    try:
        return EnginePattern.parse(wanted)
    except InvalidInputError:
        return None  # the callers' errors list the names that are possible


def _precision_order(device: Device) -> tuple[Precision, ...]:
    return ("int8", "fp32", "fp16") if device == "cpu" else ("fp16", "fp32", "int8")


def _int8_on_cpu(bundle: ModelBundle) -> tuple[bool, str]:
    """Tell whether `auto` may take int8 on this processor, and why or why not."""
    found = [name for name in find_features() if name in _BYTE_PRODUCTS]
    parity = next(graph.parity for graph in bundle.manifest.images if graph.precision == "int8")
    if not found:
        return False, f"has to be asked for: no {', '.join(_BYTE_PRODUCTS)} here to make it fast"
    if missed := failures(parity, _INT8):
        return False, f"has to be asked for: recorded parity with fp32 {', '.join(missed)}"
    return True, f"fast with {found[0]}; recorded cosine with fp32 {parity.cosine_mean:.5f}"


def _onnx(
    bundle: ModelBundle,
    device: Device,
    precision: Precision,
    *,
    providers: Sequence[str],
    here: str | None,
    cuda: str,
) -> EngineCandidate:
    provider, usable, reason = PROVIDERS[device], True, "runs everywhere"
    automatic = device in ("cpu", "cuda")
    if provider.name not in providers:
        usable = False
        has = ", ".join(providers) or "nothing"
        reason = f"ONNX Runtime has no {provider.name} (it has {has}): {provider.install}"
    elif device != "cpu":
        usable = here is not None
        reason = f"a GPU of {here}" if here else cuda
        if usable and not automatic:
            reason = "has to be asked for: it compiles when it first starts"
    if usable and device == "cpu" and precision == "int8":
        automatic, reason = _int8_on_cpu(bundle)
    return EngineCandidate(
        name=EngineName("onnx", device, precision),
        usable=usable,
        automatic=automatic,
        reason=reason,
    )


def _openvino(bundle: ModelBundle, precision: RunPrecision) -> EngineCandidate:
    name, usable = EngineName("openvino", "cpu", precision), False
    if find_spec("openvino") is None:
        reason = "OpenVINO is not installed: pip install 'crl-embeddings[openvino]'"
    elif (lacking := lacking_instructions(precision)) is not None:
        reason = lacking
    else:
        usable = True
        reason = (
            "has to be asked for: the bundle records no parity of it; "
            f"crl verify {bundle.path} --engine {name} measures it here"
        )
    return EngineCandidate(name=name, usable=usable, automatic=False, reason=reason)


def _plan(
    bundle: ModelBundle, runtime: Runtime, precision: Precision, here: str | None, cuda: str
) -> EngineCandidate:
    name, usable, automatic = EngineName(runtime, "cuda", precision), False, False
    folder = plans_directory(bundle)
    try:
        compiled = [
            plan.spec
            for plan in read_plans(folder)
            if (plan.spec.runtime, plan.spec.precision) == (runtime, precision)
        ]
        if not compiled:
            reason = f"not compiled: {compile_command(bundle, runtime, precision, here or '')}"
        elif here is None:
            architectures = sorted({name for spec in compiled for name in spec.architectures})
            reason = f"compiled for {', '.join(architectures)}; {cuda}"
        else:
            plan = choose_plan(
                bundle,
                folder,
                runtime=runtime,
                runtime_version=load_tensorrt(runtime).version,
                architecture=here,
                precision=precision,
            )
            usable, automatic = True, here in plan.verified
            reason = f"verified on {here}" if automatic else (
                f"has to be asked for until crl verify {bundle.path} --engine {name} has run here"
            )  # fmt: skip
    except CrlError as error:
        reason = str(error)
    return EngineCandidate(name=name, usable=usable, automatic=automatic, reason=reason)
