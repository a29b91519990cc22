"""Choice of the engine that runs a bundle on this machine, with reasons, and opening it by name."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from crl_sdk.basis._basis import Basis
from crl_sdk.engines import _registry as registry
from crl_sdk.engines._contract import ImageEngine, TextEngine
from crl_sdk.engines._engine_name import EngineName, EnginePattern
from crl_sdk.engines._family import EngineCandidate
from crl_sdk.engines._hardware import Hardware, inspect_hardware
from crl_sdk.engines._onnx import OnnxTextEngine
from crl_sdk.engines._onnx_providers import Device
from crl_sdk.engines._ranking import (
    Ranking,
    apply_ranking,
    check_engine,
    rank_engines,
    read_ranking,
    write_ranking,
)
from crl_sdk.errors import EngineError, ForkError, InvalidInputError
from crl_sdk.model._bundle import ModelBundle

_log = logging.getLogger(__name__)

FASTEST = "fastest"
"""Name that stands for the fastest engine by measurement, see `open_engine`."""

_ONNX_CUDA = EnginePattern("onnx", "cuda")


def list_candidates(bundle: ModelBundle) -> list[EngineCandidate]:
    """Return the engines of a bundle; `auto` chooses the first that is usable and automatic.

    If the engines were measured on this machine (`crl verify BUNDLE --all`), those that agree with
    the CPU's fp32 graph come first, fastest first.

    Otherwise `auto` prefers, on a GPU, TensorRT plans that `crl verify` found correct on its
    architecture, then ONNX Runtime's CUDA provider. On a CPU it chooses ONNX Runtime: in int8 if
    the processor multiplies bytes fast and the export recorded a good enough parity, else in fp32.
    The other engines must be asked for by name. ONNX Runtime's TensorRT providers compile for
    minutes at their first start, plans that nobody verified may be wrong, and a bundle records
    how far from fp32 its graphs are in ONNX Runtime only.
    """
    hardware = inspect_hardware()
    found = _list_unmeasured(bundle, hardware)
    ranking = read_ranking(bundle, hardware)
    return found if ranking is None else apply_ranking(found, ranking)


def measure_engines(
    bundle: ModelBundle,
    *,
    seconds: float = 2.0,
    threads: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Ranking:
    """Compare and time all engines of a bundle on this machine, and keep the record for `auto`.

    Args:
        bundle: Verified bundle.
        seconds: Time to spend on each engine and batch size.
        threads: Number of threads of a run on a CPU; None for one per physical core.
        progress: Function that is called with a description of each step.

    Raises:
        EngineError: If not even the CPU's graph runs, or the record cannot be kept.
    """
    hardware = inspect_hardware()
    candidates = _list_unmeasured(bundle, hardware)
    ranking = rank_engines(
        bundle, candidates, hardware, seconds=seconds, threads=threads, progress=progress
    )
    _log_skipped(ranking)
    _log.info("the engines were measured, see %s", write_ranking(bundle, ranking))
    return ranking


def _list_unmeasured(bundle: ModelBundle, hardware: Hardware) -> list[EngineCandidate]:
    return [
        candidate
        for family in registry.FAMILIES
        for candidate in family.list_candidates(bundle, hardware)
    ]


def choose_engine(engines: Sequence[EngineCandidate], wanted: str) -> EngineCandidate:
    """Return the engine that a name selects.

    Args:
        engines: Candidates, from `list_candidates`.
        wanted: `auto`, an engine name, or the beginning of one, such as `onnx/cuda` or
            `tensorrt-rtx`. If it selects several, an engine that `auto` may choose comes first.

    Raises:
        InvalidInputError: If no engine of this bundle has such a name.
        EngineError: If no engine with such a name can run here. The message says why.
    """
    if wanted == "auto":
        selected = [each for each in engines if each.automatic]
    else:
        pattern = _parse(wanted)
        selected = [each for each in engines if pattern is not None and pattern.matches(each.name)]
        if not selected:
            raise InvalidInputError(
                f"expected an engine of {', '.join(str(each.name) for each in engines)}, the "
                f"beginning of a name, or auto; got {wanted!r}"
            )
    usable = [each for each in selected if each.usable]
    if not usable:
        reasons = "; ".join(f"{each.name}: {each.reason}" for each in selected)
        raise EngineError(
            f"engine {wanted!r} cannot run here ({reasons}); `crl doctor` lists what can"
        )
    return next((each for each in usable if each.automatic), usable[0])


def open_engine(
    bundle: ModelBundle,
    engine: str = "auto",
    *,
    threads: int | None = None,
    baked: Basis | None = None,
) -> ImageEngine:
    """Open the image engine that a name selects, and log which one and why.

    `auto` skips an engine that does not load, with a warning, if there is another. On a GPU it also
    runs blank and fixed pictures first and compares them with the CPU, unless the engine was
    measured here.

    Args:
        bundle: Verified bundle.
        engine: Name of the engine, its beginning, or `auto`; see `choose_engine`. `fastest` first
            measures all engines, unless that was done on this machine.
        threads: Number of threads of a run on a CPU; None for one per physical core.
        baked: Basis that must be compiled into the engine. Only TensorRT plans have one.

    Raises:
        InvalidInputError: If no engine of this bundle has such a name.
        EngineError: If the engine cannot run here or does not load.
        PlanError: If a compiled plan is missing, damaged or out of date.
        MissingDependencyError: If a package that the engine needs is not installed.
    """
    if baked is not None:
        return _open_baked(bundle, engine, baked)
    hardware = inspect_hardware()
    candidates = _list_unmeasured(bundle, hardware)
    ranking = read_ranking(bundle, hardware)
    if engine == FASTEST:
        if ranking is None:
            ranking = rank_engines(bundle, candidates, hardware, threads=threads)
            _keep(bundle, ranking)
        engine = "auto"
    if ranking is not None:
        candidates = apply_ranking(candidates, ranking)
    while True:
        chosen = choose_engine(candidates, engine)
        try:
            opened = _open(bundle, chosen, threads, check=engine == "auto")
        except (EngineError, ForkError) as error:
            candidates = [each for each in candidates if each is not chosen]
            if engine != "auto" or not any(each.usable and each.automatic for each in candidates):
                raise
            _log.warning("engine %s is skipped: %s", chosen.name, error)
        else:
            _log.info("engine %s: %s (%s)", engine, chosen.name, chosen.reason)
            return opened


def _open(
    bundle: ModelBundle, chosen: EngineCandidate, threads: int | None, *, check: bool
) -> ImageEngine:
    """Open an engine, and check it if it is on a GPU and was not measured here."""
    opened = registry.family_of(chosen.name).open(bundle, chosen.name, threads)
    if check and chosen.name.device != "cpu" and not chosen.measured:
        try:
            check_engine(bundle, opened)
        except EngineError:
            opened.close()
            raise
    return opened


def _keep(bundle: ModelBundle, ranking: Ranking) -> None:
    """Keep a record if that is possible, and log which engines are skipped."""
    try:
        _log.info("the engines were measured, see %s", write_ranking(bundle, ranking))
    except EngineError as error:
        _log.warning("%s", error)
    _log_skipped(ranking)


def _log_skipped(ranking: Ranking) -> None:
    for each in ranking.engines:
        if not each.agrees:
            _log.warning("engine %s is skipped: %s", each.engine, each.reason)


def open_text_engine(
    bundle: ModelBundle, image_engine: EngineName, *, threads: int | None = None
) -> TextEngine:
    """Open the text engine that goes with an image engine.

    ONNX Runtime runs every text tower: on CUDA if it runs the image tower there, else on the CPU.

    Raises:
        BundleError: If the bundle has no text tower.
        EngineError: If the graph does not load.
        MissingDependencyError: If ONNX Runtime is not installed.
    """
    device: Device = "cuda" if _ONNX_CUDA.matches(image_engine) else "cpu"
    return OnnxTextEngine.open(bundle, device=device, threads=threads)


def _open_baked(bundle: ModelBundle, engine: str, baked: Basis) -> ImageEngine:
    openers = {each.runtime: each.open_baked for each in registry.FAMILIES if each.open_baked}
    pattern = _parse(engine)
    if pattern is None or pattern.runtime not in openers:
        raise InvalidInputError(
            f"expected an engine of {', '.join(openers)} to go with a baked basis, such as "
            f"tensorrt-rtx/cuda/fp16; got {engine!r}"
        )
    return openers[pattern.runtime](bundle, pattern, baked)


def _parse(wanted: str) -> EnginePattern | None:
    try:
        return EnginePattern.parse(wanted)
    except InvalidInputError:
        return None  # the callers' errors are better: they list the possible names
