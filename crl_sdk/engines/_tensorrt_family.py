"""The TensorRT engines of a bundle: which plans there are, and which may run here."""

from __future__ import annotations

from functools import partial
from typing import Literal, cast

from crl_sdk.basis._basis import Basis
from crl_sdk.engines._contract import ImageEngine
from crl_sdk.engines._engine_name import EngineName, EnginePattern
from crl_sdk.engines._family import EngineCandidate, EngineFamily
from crl_sdk.engines._hardware import Hardware
from crl_sdk.engines._tensorrt import TensorRTImageEngine
from crl_sdk.engines._tensorrt_plans import (
    PLAN_PRECISIONS,
    PlanRuntime,
    choose_plan,
    compile_command,
    plans_directory,
    read_plans,
)
from crl_sdk.engines._tensorrt_runtime import load_tensorrt
from crl_sdk.errors import CrlError, InvalidInputError
from crl_sdk.model._bundle import ModelBundle
from crl_sdk.model._manifest import Precision


def _family(runtime: PlanRuntime, *packages: str) -> EngineFamily:
    return EngineFamily(
        runtime=runtime,
        packages=packages,
        list_candidates=partial(_list_candidates, runtime),
        open=partial(_open, runtime),
        open_baked=partial(_open_baked, runtime),
    )


def _list_candidates(
    runtime: PlanRuntime, bundle: ModelBundle, hardware: Hardware
) -> list[EngineCandidate]:
    return [
        _candidate(runtime, bundle, precision, hardware)
        for precision in PLAN_PRECISIONS
        if precision in bundle.precisions
    ]


def _candidate(
    runtime: PlanRuntime, bundle: ModelBundle, precision: Precision, hardware: Hardware
) -> EngineCandidate:
    name, usable, automatic = EngineName(runtime, "cuda", precision), False, False
    folder, here = plans_directory(bundle), hardware.architecture
    try:
        specs = [
            plan.spec
            for plan in read_plans(folder)
            if (plan.spec.runtime, plan.spec.precision) == (runtime, precision)
        ]
        if not specs:
            reason = f"not compiled: {compile_command(bundle, runtime, precision, here or '')}"
        elif here is None:
            architectures = sorted({each for spec in specs for each in spec.architectures})
            reason = f"compiled for {', '.join(architectures)}; {hardware.cuda}"
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
            command = f"crl verify {bundle.path} --engine {name}"
            reason = (
                f"verified on {here}"
                if automatic
                else f"must be chosen by name until {command} has run here"
            )
    except CrlError as error:
        reason = str(error)
    return EngineCandidate(name=name, usable=usable, automatic=automatic, reason=reason)


def _open(
    runtime: PlanRuntime, bundle: ModelBundle, name: EngineName, _threads: int | None
) -> ImageEngine:
    precision = cast(Precision, name.precision)
    return TensorRTImageEngine.open(bundle, runtime=runtime, precision=precision)


def _open_baked(
    runtime: PlanRuntime, bundle: ModelBundle, pattern: EnginePattern, baked: Basis
) -> ImageEngine:
    precision = pattern.precision or "auto"
    if pattern.device not in (None, "cuda") or precision not in ("auto", *PLAN_PRECISIONS):
        raise InvalidInputError(
            f"expected {runtime}/cuda and one of {', '.join(PLAN_PRECISIONS)} to go with a baked "
            f"basis, such as {runtime}/cuda/fp16; got device {pattern.device!r} and precision "
            f"{pattern.precision!r}"
        )
    precision = cast("Precision | Literal['auto']", precision)
    return TensorRTImageEngine.open(bundle, runtime=runtime, precision=precision, baked=baked)


TENSORRT_RTX = _family("tensorrt-rtx", "tensorrt-rtx-cu12-libs")
TENSORRT = _family("tensorrt", "tensorrt")
