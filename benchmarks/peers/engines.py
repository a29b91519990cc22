"""Engines in processes of their own: in every round, all peers do the same work in turn."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from crl_benchmarks.peers.catalogue import EnginePeer, Inputs, Setup
from crl_benchmarks.peers.environments import OWN
from crl_benchmarks.peers.protocol import Worker, WorkerError, median_ms
from crl_benchmarks.peers.records import EngineRow
from crl_sdk.model import _parity as parity
from crl_sdk.model._manifest import Parity

AGREES = 0.999
"""Required cosine of every image with the reference in fp32. Otherwise the row is void."""

AGREES_LOW = 0.98
"""Required cosine in bf16 and int8, which approximate."""


@dataclass(frozen=True, slots=True)
class EngineSchedule:
    """What is measured, and for how long.

    Attributes:
        rounds: Number of rounds.
        seconds: Duration of one kind of work in one round.
        batches: Batch sizes for runs on decoded pixels.
        embed_batches: Batch sizes for embedding JPEGs, decoding included.
        images: Number of JPEGs to embed.
    """

    rounds: int = 5
    seconds: float = 1.0
    batches: tuple[int, ...] = (1, 8, 16, 32)
    embed_batches: tuple[int, ...] = (16, 32)
    images: int = 64


@dataclass(slots=True)
class _Running:
    """A worker whose embeddings agree with the reference, and its measurements so far."""

    peer: EnginePeer
    worker: Worker
    row: EngineRow
    whole: bool
    rounds: dict[str, list[float]] = field(default_factory=dict)


def measure_engines(
    peers: Sequence[EnginePeer], setup: Setup, schedule: EngineSchedule
) -> list[EngineRow]:
    """Start all peers, check that they agree, and time them in turn.

    Args:
        peers: Engines to measure.
        setup: Environments and input of the engines.
        schedule: What is measured, and for how long.

    Returns:
        One row per peer, in the order of `peers`.
    """
    rows: dict[str, EngineRow] = {}
    with ExitStack() as stack:
        running: list[_Running] = []
        for peer in peers:
            skipped = setup.environments[peer.environment].skipped
            if not skipped:
                setup.tell(f"opening {peer.name}")
                try:
                    if peer.prepares:
                        with _start(peer, setup) as before:
                            before.ask("open")
                except WorkerError as error:
                    rows[peer.name] = _row(peer, skipped=str(error))
                    continue
                worker = stack.enter_context(_start(peer, setup))
                try:
                    running.append(_open(peer, worker, setup))
                    continue
                except WorkerError as error:
                    worker.close()
                    skipped = str(error)
            rows[peer.name] = _row(peer, skipped=skipped)
        for number in range(schedule.rounds):
            for work in _works(schedule):
                turn = number % max(len(running), 1)  # a different peer comes first in each round
                setup.tell(f"engines, round {number + 1} of {schedule.rounds}: {work}")
                for each in [*running[turn:], *running[:turn]]:
                    warm = number == 0 or not work.startswith("embed")
                    _time(each, work, setup.given, schedule, warm=warm)
        for each in running:
            rows[each.peer.name] = msgspec.structs.replace(
                each.row,
                peak_bytes=None if each.row.skipped else _peak(each.worker),
                rounds={name: tuple(values) for name, values in each.rounds.items()},
            )
    return [rows[peer.name] for peer in peers]


def compare(
    rows: NDArray[np.float32], reference: NDArray[np.float32], precision: str
) -> tuple[Parity, str]:
    """Compare embeddings of any norm with the reference.

    Args:
        rows: Embeddings of a peer, shape (n, d), float32.
        reference: Unit embeddings of the same images, shape (n, d), float32.
        precision: Precision of the peer, which decides the required cosine.

    Returns:
        The measured agreement, and the reason why it is not sufficient (empty if it is).
    """
    if rows.shape != reference.shape:
        nothing = parity.compare(reference, np.zeros_like(reference))
        return nothing, f"expected rows of shape {reference.shape}, got {rows.shape}"
    norms = np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
    found = parity.compare(reference, rows / norms)
    least = AGREES if precision == "fp32" else AGREES_LOW
    if not found.cosine_min >= least:  # NaN too
        return found, f"cosine {found.cosine_min:.5f}, at least {least} is required"
    return found, ""


def _start(peer: EnginePeer, setup: Setup) -> Worker:
    given = setup.given
    return Worker(
        setup.pythons[peer.environment],
        peer.script,
        {"threads": given.threads, **peer.options(given)},
        log=setup.logs / f"{peer.name.replace(' ', '-')}.log",
        environment={**_offline(given.threads), **peer.variables(given)},
    )


def _offline(threads: int) -> dict[str, str]:
    count = str(threads)
    return {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count}


def _open(peer: EnginePeer, worker: Worker, setup: Setup) -> _Running:
    """Wait for a worker's first embedding, and compare its embeddings with the reference."""
    reference = setup.reference
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "rows.npy")
        files = [str(path) for path in setup.given.images[: len(reference)]]
        worker.ask("embed", files=files[:1], batch=1, out=out)
        started = time.perf_counter() - worker.started
        opened = worker.ask("open")
        worker.ask("embed", files=files, batch=16, out=out)
        found, void = compare(np.load(out), reference, peer.precision)
    row = _row(
        peer,
        settings=opened["settings"],
        cosine_mean=found.cosine_mean,
        cosine_min=found.cosine_min,
        centred_cosine_min=found.centred_cosine_min,
        void=void,
        start_seconds=round(started, 3),
    )
    return _Running(peer, worker, row, bool(opened["whole"]))


def _row(peer: EnginePeer, **known: object) -> EngineRow:
    return msgspec.convert(
        {
            "name": peer.name,
            "environment": peer.environment,
            "ours": peer.environment == OWN,
            "precision": peer.precision,
            **known,
        },
        EngineRow,
    )


def _works(schedule: EngineSchedule) -> list[str]:
    runs = [f"run {batch}" for batch in schedule.batches]
    return ["decode", "image", *runs, *(f"embed {batch}" for batch in schedule.embed_batches)]


def _time(
    each: _Running, work: str, given: Inputs, schedule: EngineSchedule, *, warm: bool
) -> None:
    """Time one kind of work. A peer that fails is not measured further; its row says why."""
    if each.row.skipped or (each.whole and work.startswith(("decode", "run"))):
        return
    what, _, size = work.partition(" ")
    batch = int(size or 1)
    files = [str(path) for path in given.images[: schedule.images]]
    seconds = schedule.seconds * {"embed": 0.0, "decode": 0.3}.get(what, 1.0)
    try:
        reply = each.worker.ask(
            "time", what=what, files=files, batch=batch, warm=warm, least=1, seconds=seconds
        )
    except WorkerError as error:
        each.worker.close()
        each.row = msgspec.structs.replace(each.row, skipped=f"{work}: {error}")
        return
    ms = median_ms(reply["seconds"]) / (len(files) if what == "embed" else 1)
    each.rounds.setdefault(work, []).append(round(ms, 4))


def _peak(worker: Worker) -> int | None:
    try:
        peak: int | None = worker.ask("status")["peak_bytes"]
    except WorkerError:
        return None
    return peak
