"""The engines of a bundle, compared and timed on this machine, and the record of the result.

A record is kept beside the bundle or, where that cannot be written, in the user's cache directory.
It holds for one machine, one set of versions and one set of graphs. `auto` ignores all others.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import msgspec
import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from crl_sdk._processors import find_processors
from crl_sdk._version import __version__
from crl_sdk.engines import _registry as registry
from crl_sdk.engines._contract import ImageEngine
from crl_sdk.engines._family import EngineCandidate
from crl_sdk.engines._hardware import Gpu, Hardware
from crl_sdk.engines._machine import find_versions
from crl_sdk.engines._onnx import OnnxImageEngine
from crl_sdk.engines._processor import find_processor_name
from crl_sdk.errors import CrlError, EngineError
from crl_sdk.model import _parity as parity
from crl_sdk.model._bundle import ModelBundle, demo_bundle
from crl_sdk.model._manifest import Parity
from crl_sdk.storage._atomic_files import make_directory, read_record, write_record

SCHEMA = 1

BATCHES = (1, 16)
"""Batch sizes to time: a single caller, and a server under load."""

DIRECTORY = "engines"
"""Directory of the records inside a bundle."""

CACHE_VARIABLE = "CRL_CACHE"
"""Environment variable with the directory of records of bundles that cannot be written to."""

_MIN_RUNS = 5

_log = logging.getLogger(__name__)


class Conditions(msgspec.Struct, frozen=True, kw_only=True):
    """What a record holds for. If any of it changes, engines are to be measured again.

    Attributes:
        processor: Name of the processor.
        cores: Number of threads of a run on a CPU.
        features: Instruction sets of the processor.
        gpus: GPUs, in the driver's order.
        cuda: CUDA version of the driver, or why there is none.
        packages: Versions of this SDK and of the runtimes, by name.
        graphs: SHA-256 of the bundle's image graphs, by file.
    """

    processor: str
    cores: int
    features: tuple[str, ...]
    gpus: tuple[Gpu, ...]
    cuda: str
    packages: dict[str, str]
    graphs: dict[str, str]

    @property
    def key(self) -> str:
        """Short digest, the name of the record's file."""
        encoded = msgspec.json.encode(self, order="deterministic")
        return hashlib.sha256(encoded).hexdigest()[:16]


class RunTime(msgspec.Struct, frozen=True, kw_only=True):
    """Median duration of runs of one batch size.

    Attributes:
        batch: Number of images of a run.
        milliseconds: Median duration of a run.
    """

    batch: int
    milliseconds: float


class RankedEngine(msgspec.Struct, frozen=True, kw_only=True):
    """An engine that was tried.

    Attributes:
        engine: Name of the engine.
        agrees: Whether it ran and holds the parity that `auto` asks for.
        reason: What was measured, or why the engine is not to be used.
        failed: Whether it could not be opened or run.
        parity: Difference of its embeddings from those of the CPU's fp32 graph; None if it failed.
        times: Duration of its runs; empty if it failed.
    """

    engine: str
    agrees: bool
    reason: str
    failed: bool = False
    parity: Parity | None = None
    times: tuple[RunTime, ...] = ()

    @property
    def milliseconds_per_image(self) -> float:
        """Geometric mean over the batch sizes; infinity if the engine failed."""
        if not self.times:
            return math.inf
        per_image = [each.milliseconds / each.batch for each in self.times]
        return float(np.exp(np.mean(np.log(per_image))))


class Ranking(msgspec.Struct, frozen=True, kw_only=True):
    """The record of all engines of a bundle on a machine.

    Attributes:
        schema: Version of this record's format.
        time: Time of the measurement, ISO 8601, UTC.
        conditions: What it holds for.
        engines: Engines that were tried: those that agree, fastest first, and then the others.
    """

    schema: int
    time: str
    conditions: Conditions
    engines: tuple[RankedEngine, ...]

    @property
    def agrees(self) -> bool:
        """Whether at least one engine agrees with the reference, so that `auto` has a choice."""
        return any(each.agrees for each in self.engines)


def rank_engines(
    bundle: ModelBundle,
    candidates: Sequence[EngineCandidate],
    hardware: Hardware,
    *,
    seconds: float = 2.0,
    threads: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Ranking:
    """Compare all engines that can run here with the CPU's fp32 graph, and time them in turns.

    Args:
        bundle: Model bundle.
        candidates: Its engines.
        hardware: Hardware of this machine.
        seconds: Time to spend on each engine and batch size.
        threads: Number of threads of a run on a CPU; None for one per physical core.
        progress: Function that is called with a description of each step.

    Returns:
        The record, which is not written yet.

    Raises:
        EngineError: If not even the CPU's graph runs.
    """
    report = progress or (lambda _: None)
    pixels = _pixels(bundle)
    report("running the reference on the CPU")
    expected = _reference(bundle, pixels, threads)
    opened: dict[str, ImageEngine] = {}
    tried: dict[str, RankedEngine] = {}
    try:
        for candidate in candidates:
            if not candidate.usable or candidate.starts_slowly:
                continue
            name = str(candidate.name)
            report(f"trying {name}")
            try:
                engine = registry.family_of(candidate.name).open(bundle, candidate.name, threads)
                opened[name] = engine
                tried[name] = _compare(engine, expected, pixels)
            except CrlError as error:
                tried[name] = RankedEngine(
                    engine=name,
                    agrees=False,
                    failed=True,
                    reason=f"failed here: {error}; crl verify {bundle.path} --all tries again",
                )
        timed = {name: each for name, each in opened.items() if tried[name].parity is not None}
        for batch in BATCHES:
            report(f"timing {len(timed)} engines on batches of {batch}")
            times = _time_in_turns(
                timed, pixels, bundle.embedding_dim, batch=batch, seconds=seconds
            )
            for name, time_of_run in times.items():
                before = tried[name]
                tried[name] = structs.replace(before, times=(*before.times, time_of_run))
    finally:
        for engine in opened.values():
            engine.close()
    return Ranking(
        schema=SCHEMA,
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        conditions=find_conditions(bundle, hardware),
        engines=tuple(
            sorted(tried.values(), key=lambda each: (not each.agrees, each.milliseconds_per_image))
        ),
    )


def check_engine(bundle: ModelBundle, engine: ImageEngine) -> None:
    """Run an engine on blank and fixed pictures, and compare it with the CPU's graph.

    A runtime may list a device that it has no code for, and fail or be wrong at its first run.

    Raises:
        EngineError: If a run fails, or the embeddings differ too much.
    """
    pixels = _pixels(bundle)[:4]
    expected = _reference(bundle, pixels, None)
    found = _compare(engine, expected, pixels)
    if not found.agrees:
        raise EngineError(f"{engine.name} does not agree with the CPU: {found.reason}")


def find_conditions(bundle: ModelBundle, hardware: Hardware) -> Conditions:
    """Return what a record of this bundle on this machine holds for."""
    runtimes = [package for family in registry.FAMILIES for package in family.packages]
    files = bundle.manifest.files
    return Conditions(
        processor=find_processor_name(),
        cores=find_processors().cores,
        features=hardware.features,
        gpus=hardware.gpus,
        cuda=hardware.cuda,
        packages={"crl-embeddings": __version__, **find_versions(runtimes)},
        graphs={graph.file: files[graph.file].sha256 for graph in bundle.manifest.images},
    )


def write_ranking(bundle: ModelBundle, ranking: Ranking) -> Path:
    """Keep a record, beside the bundle or in the user's cache directory.

    Returns:
        Path of the file.

    Raises:
        EngineError: If neither can be written.
    """
    failure: EngineError | None = None
    for directory in _directories(bundle):
        path = directory / f"{ranking.conditions.key}.json"
        try:
            make_directory(directory, EngineError)
            write_record(path, ranking, EngineError)
        except EngineError as error:
            failure = error
        else:
            return path
    raise EngineError(
        f"the record of the engines cannot be kept ({failure or 'this user has no home'}): set "
        f"{CACHE_VARIABLE} to a directory that can be written to"
    ) from failure


def read_ranking(bundle: ModelBundle, hardware: Hardware) -> Ranking | None:
    """Return the record that holds for this bundle on this machine; None if there is none.

    A record that cannot be read is reported in the log and ignored.
    """
    if not has_records(bundle):
        return None
    conditions = find_conditions(bundle, hardware)
    for directory in _directories(bundle):
        path = directory / f"{conditions.key}.json"
        if not path.is_file():
            continue
        remedy = f"measure again with crl verify {bundle.path} --all"
        try:
            found = read_record(path, Ranking, SCHEMA, EngineError, remedy)
        except EngineError as error:
            _log.warning("the record of the engines is ignored: %s", error)
            continue
        if found.conditions == conditions:
            return found
    return None


def apply_ranking(candidates: Sequence[EngineCandidate], ranking: Ranking) -> list[EngineCandidate]:
    """Return candidates in the order of a record, with what was measured as their reasons.

    Engines that were not tried follow in their order. `auto` no longer chooses those that do not
    agree.
    """
    by_name = {str(each.name): each for each in candidates}
    ordered = []
    for each in ranking.engines:
        candidate = by_name.pop(each.engine, None)
        if candidate is None:
            continue
        if not candidate.usable:
            ordered.append(candidate)
            continue
        reason = each.reason
        if each.agrees:
            times = ", ".join(
                f"{one.milliseconds:.1f} ms for a batch of {one.batch}" for one in each.times
            )
            reason = f"measured here: {times}; {reason}"
        measured = replace(candidate, automatic=each.agrees, reason=reason, measured=True)
        ordered.append(replace(measured, usable=not each.failed))
    return [*ordered, *by_name.values()]


def has_records(bundle: ModelBundle) -> bool:
    """Return whether there is a record of any machine or version."""
    return any(path for directory in _directories(bundle) for path in directory.glob("*.json"))


def _directories(bundle: ModelBundle) -> Iterator[Path]:
    """Yield where records of a bundle may be. The bundle of the package itself is not changed."""
    if bundle.path.resolve() != demo_bundle().resolve():
        yield bundle.path / DIRECTORY
    if cache := os.environ.get(CACHE_VARIABLE):
        yield Path(cache) / DIRECTORY / bundle.fingerprint
        return
    # in a container, the user may be a number that nothing knows
    with suppress(RuntimeError):
        yield Path("~/.cache/crl").expanduser() / DIRECTORY / bundle.fingerprint


def _pixels(bundle: ModelBundle) -> NDArray[np.uint8]:
    """Return a blank picture and fixed ones."""
    fixed = parity.images(bundle.preprocess)
    return np.concatenate([np.zeros_like(fixed[:1]), fixed])


def _reference(
    bundle: ModelBundle, pixels: NDArray[np.uint8], threads: int | None
) -> NDArray[np.float32]:
    """Return the embeddings of ONNX Runtime on the CPU: in fp32 if the bundle has such a graph."""
    precision = "fp32" if "fp32" in bundle.precisions else bundle.precisions[0]
    engine = OnnxImageEngine.open(bundle, precision=precision, device="cpu", threads=threads)
    try:
        return _embed(engine, pixels, bundle.embedding_dim)
    finally:
        engine.close()


def _embed(engine: ImageEngine, pixels: NDArray[np.uint8], dim: int) -> NDArray[np.float32]:
    nothing = np.zeros((dim, 0), np.float32), np.zeros(0, np.float32)
    return parity.batched(lambda part: engine.run(part, *nothing)[0], pixels)


def _compare(
    engine: ImageEngine, expected: NDArray[np.float32], pixels: NDArray[np.uint8]
) -> RankedEngine:
    """Compare the embeddings of an engine with those of the reference.

    Raises:
        EngineError: If a run fails, or gives no numbers.
    """
    measured = _embed(engine, pixels, expected.shape[1])
    if not np.isfinite(measured).all():
        raise EngineError("its embeddings hold NaN or infinity")
    found = parity.compare(expected, measured)
    family = registry.family_of(engine.name)
    missed = parity.failures(found, family.automatic_tolerance(engine.name.precision))
    return RankedEngine(
        engine=str(engine.name),
        agrees=not missed,
        reason=", ".join(missed) or f"cosine with the CPU's fp32 graph {found.cosine_mean:.5f}",
        parity=found,
    )


def _time_in_turns(
    engines: Mapping[str, ImageEngine],
    pixels: NDArray[np.uint8],
    dim: int,
    *,
    batch: int,
    seconds: float,
) -> dict[str, RunTime]:
    """Return the median duration of a run of each engine. The engines take turns."""
    rows = pixels[np.arange(batch) % len(pixels)]
    nothing = np.zeros((dim, 0), np.float32), np.zeros(0, np.float32)
    times: dict[str, list[float]] = {name: [] for name in engines}
    for engine in engines.values():
        engine.run(rows, *nothing)  # the first run of a shape does extra work
    ends = time.perf_counter() + seconds * len(engines)
    rounds = 0
    while rounds < _MIN_RUNS or time.perf_counter() < ends:
        for name, engine in engines.items():
            started = time.perf_counter()
            engine.run(rows, *nothing)
            times[name].append(time.perf_counter() - started)
        rounds += 1
    return {
        name: RunTime(batch=batch, milliseconds=round(1e3 * float(np.median(each)), 3))
        for name, each in times.items()
    }
