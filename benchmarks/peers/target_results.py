"""Checks the targets of this project against the measurements."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from crl_benchmarks.peers.catalogue import CRL_AUTO, CRL_FP32, CRL_OPENVINO
from crl_benchmarks.peers.records import EngineRow, ServiceRow, ServiceRun, TargetResult, ratios
from crl_benchmarks.peers.services import PYTRITON

COMPARABLE = 0.002
"""Largest difference by which the mean cosine of a comparable peer may be lower than ours."""

ACCEPTED = 0.99
"""Mean cosine that crl requires of its int8 graphs. Peers that reach it are compared too."""

AUTO_OVER_FP32 = 3.0

SERVICE_OF_ENGINE = 0.95

OVERHEAD_MS = 1.5

START_SECONDS = 2.0

BATCHES = (1, 16)


def check_targets(
    engines: Sequence[EngineRow], services: Sequence[ServiceRow]
) -> list[TargetResult]:
    """Check all targets.

    Args:
        engines: Rows of engines. Rows that were skipped or are void are ignored.
        services: Rows of services. Rows that were skipped or are void are ignored.

    Returns:
        One result per target.
    """
    measured = {row.name: row for row in engines if row.counts}
    served = {row.name: row for row in services if row.counts}
    return [
        *_check_engine(measured),
        *_check_service(measured, served),
        *_check_pytriton(served),
        *_check_start(served),
        *_check_memory(measured, served),
    ]


def compared(ours: EngineRow, peer: EngineRow, batch: int) -> tuple[float, str] | None:
    """Return how many times as fast as a peer crl is: the median of the rounds' ratios.

    Runs on decoded pixels are compared if the peer can be timed so. Otherwise decoding is included
    on both sides.

    Args:
        ours: Row of crl.
        peer: Row to compare with.
        batch: Batch size of a run.

    Returns:
        The ratio and the kind of work compared, or None if one of them was not measured.
    """
    works = [f"run {batch}", "image" if batch == 1 else f"embed {batch}"]
    for work in works:
        if ours.rounds.get(work) and peer.rounds.get(work):
            return statistics.median(ratios(ours.rounds[work], peer.rounds[work])), work
    return None


def closest(ours: EngineRow, peers: Iterable[EngineRow], batch: int) -> tuple[float | None, str]:
    """Find the fastest peer.

    Args:
        ours: Row of crl.
        peers: Rows to compare with.
        batch: Batch size of a run.

    Returns:
        Our speed divided by that of the fastest peer (None without a peer), and the peer's name
        with the kind of work compared.
    """
    found = [
        (ratio[0], f"{peer.name}, {ratio[1]}")
        for peer in peers
        if (ratio := compared(ours, peer, batch)) is not None
    ]
    return min(found, default=(None, ""))


def _check_engine(measured: dict[str, EngineRow]) -> Iterable[TargetResult]:
    peers = [row for row in measured.values() if not row.ours]
    exact = [row for row in peers if row.precision == "fp32"]
    for name in (CRL_FP32, CRL_OPENVINO):
        for batch in BATCHES:
            target = f"engine {name}, batch {batch}: at least as fast as the best fp32 peer"
            ratio, against = _of(measured, name, partial(closest, peers=exact, batch=batch))
            yield TargetResult(target=target, measured=ratio, against=against)
    for batch in BATCHES:
        target = f"engine auto, batch {batch}: {AUTO_OVER_FP32:g} times the best fp32 peer"
        ratio, against = _of(measured, CRL_AUTO, partial(closest, peers=exact, batch=batch))
        yield TargetResult(target=target, measured=ratio, required=AUTO_OVER_FP32, against=against)
    auto = measured.get(CRL_AUTO)
    ours = (auto.cosine_mean or 0.0) if auto is not None else 1.0
    for least, description in (
        (ours - COMPARABLE, f"of comparable cosine (not lower by over {COMPARABLE:g})"),
        (ACCEPTED, f"with a mean cosine of {ACCEPTED:g}"),
    ):
        alike = [row for row in peers if (row.cosine_mean or 0.0) >= least]
        for batch in BATCHES:
            target = f"engine auto, batch {batch}: no slower than any peer {description}"
            ratio, against = _of(measured, CRL_AUTO, partial(closest, peers=alike, batch=batch))
            yield TargetResult(target=target, measured=ratio, against=against)


def _check_service(
    measured: dict[str, EngineRow], served: dict[str, ServiceRow]
) -> Iterable[TargetResult]:
    for name in (CRL_FP32, CRL_AUTO):
        engine, service = measured.get(name), served.get(name)
        target = f"service, {name}: throughput at saturation of the engine's own, decoding included"
        best = max((_rates(engine, "embed ") if engine else []), default=None)
        ratio = service.saturation / best if service and best else None
        yield TargetResult(
            target=target, measured=ratio, required=SERVICE_OF_ENGINE, against="its best batch"
        )
    for name in (CRL_FP32, CRL_AUTO):
        engine, service = measured.get(name), served.get(name)
        target = f"service, {name}: p50 of one caller, over decoding and engine"
        alone = service.find("closed", 1.0) if service else None
        decode = engine.ms("decode") if engine else None
        run = engine.ms("run 1") if engine else None
        extra = None
        if alone and alone.p50_ms is not None and decode is not None and run is not None:
            extra = round(alone.p50_ms - decode - run, 3)
        yield TargetResult(
            target=target, measured=extra, required=OVERHEAD_MS, at_least=False, unit="ms",
            against=f"{decode:.1f} + {run:.1f} ms" if decode and run else "",
        )  # fmt: skip


def _check_pytriton(served: dict[str, ServiceRow]) -> Iterable[TargetResult]:
    peer = served.get(PYTRITON)
    for name in (CRL_FP32, CRL_AUTO):
        ours = served.get(name)
        ratio = ours.saturation / peer.saturation if ours and peer and peer.saturation else None
        yield TargetResult(
            target=f"service, {name}: higher throughput than {PYTRITON}",
            measured=ratio,
            against="closed loops, the best of each",
        )
        shares = [run for run in peer.runs if run.share is not None] if peer else []
        for run in shares:
            mine = ours.find("open", run.load) if ours else None
            yield TargetResult(
                target=f"service, {name}: lower p99 than {PYTRITON} at {run.share:.0%} of its "
                "saturation",
                measured=_tail_ratio(mine, run),
                at_least=False,
                against=f"{run.load:g} calls/s",
            )
        if not shares:
            yield TargetResult(
                target=f"service, {name}: lower p99 than {PYTRITON}", missing="no run"
            )


def _check_start(served: dict[str, ServiceRow]) -> Iterable[TargetResult]:
    for name in (CRL_FP32, CRL_AUTO):
        ours = served.get(name)
        yield TargetResult(
            target=f"service, {name}: start to first served embedding",
            measured=statistics.median(ours.start_seconds) if ours else None,
            required=START_SECONDS, at_least=False, unit="s",
            against=f"median of {len(ours.start_seconds)} starts" if ours else "",
        )  # fmt: skip


def _check_memory(
    measured: dict[str, EngineRow], served: dict[str, ServiceRow]
) -> Iterable[TargetResult]:
    both: list[tuple[str, dict[str, EngineRow] | dict[str, ServiceRow]]]
    both = [("engine", measured), ("service", served)]
    for kind, rows in both:
        peers = [
            (row.peak_bytes, row.name)
            for row in rows.values()
            if not row.ours and row.peak_bytes is not None
        ]
        least = min(peers, default=None)
        for name in (CRL_FP32, CRL_AUTO):
            ours = rows[name].peak_bytes if name in rows else None
            yield TargetResult(
                target=f"{kind}, {name}: peak memory below every peer's",
                measured=ours / least[0] if ours and least else None,
                at_least=False,
                against=least[1] if least else "",
            )


def _of(
    measured: dict[str, EngineRow],
    name: str,
    find: Callable[[EngineRow], tuple[float | None, str]],
) -> tuple[float | None, str]:
    row = measured.get(name)
    return find(row) if row is not None else (None, "")


def _rates(row: EngineRow, kind: str) -> list[float]:
    rates = [row.per_second(work) for work in row.rounds if work.startswith(kind)]
    return [rate for rate in rates if rate is not None]


def _tail_ratio(ours: ServiceRun | None, theirs: ServiceRun) -> float | None:
    if ours is None or ours.p99_ms is None or theirs.p99_ms is None:
        return None
    return ours.p99_ms / theirs.p99_ms
