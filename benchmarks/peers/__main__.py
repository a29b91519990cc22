"""Measure crl and its peers in one run: `python -m crl_benchmarks.peers`.

Environments, weights and logs are kept under `build/peers`; results are written to
`benchmarks/results`. With `--readme`, the tables of the README are rewritten from the results.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crl_benchmarks.images import synthetic_jpegs
from crl_benchmarks.machine import describe_commit, describe_machine
from crl_benchmarks.peers import engines, services
from crl_benchmarks.peers.catalogue import ENGINES, EnginePeer, Inputs, Setup
from crl_benchmarks.peers.environments import (
    ENVIRONMENTS,
    OWN,
    interpreter,
    make_environment,
    own_environment,
)
from crl_benchmarks.peers.plot import write_plot
from crl_benchmarks.peers.records import (
    SCHEMA,
    Environment,
    Report,
    read_report,
    write_report,
)
from crl_benchmarks.peers.services import SERVICES, ServicePeer
from crl_benchmarks.peers.tables import markdown, update_readme
from crl_benchmarks.peers.target_results import check_targets
from crl_benchmarks.peers.weights import Weights, make_weights
from crl_sdk import Embedder
from crl_sdk._processors import count_cores
from crl_sdk.engines._selection import measure_engines
from crl_sdk.errors import CrlError, InvalidInputError
from crl_sdk.model import ModelBundle

SIZE = (640, 480)

IMAGES, CALIBRATION, CHECKED = 64, 32, 16

QUICK_ENGINES = engines.EngineSchedule(
    rounds=2, seconds=0.2, batches=(1, 16), embed_batches=(16,), images=32
)
QUICK_SERVICES = services.ServiceSchedule(
    starts=1, rounds=1, seconds=4.0, warm_up=1.0, callers=(1, 16), rates=(5.0,)
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="crl_benchmarks.peers", description=__doc__)
    parser.add_argument(
        "--only", default="", help="comma-separated names of peers; crl is always measured"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a short run, to see whether everything works"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/peers"))
    parser.add_argument("--build", type=Path, default=Path("build/peers"))
    parser.add_argument(
        "--readme", action="store_true", help="rewrite the README's tables from OUT.json"
    )
    parser.add_argument(
        "--check", action="store_true", help="fail if the README's tables differ from OUT.json"
    )
    parser.add_argument("--readme-file", type=Path, default=Path("README.md"))
    options = parser.parse_args(arguments)
    try:
        if options.readme or options.check:
            return _readme(
                options.readme_file, options.out.with_suffix(".json"), check=options.check
            )
        report = measure(_chosen(options.only), options.build.resolve(), quick=options.quick)
        write(report, options.out)
    except CrlError as error:
        print(error, file=sys.stderr)
        return 1
    print(markdown(report))
    return 0


def measure(only: frozenset[str], build: Path, *, quick: bool) -> Report:
    """Create missing environments and weights, and measure all peers.

    Args:
        only: Names of peers; empty for all of them. crl is always measured.
        build: Directory for environments, weights and logs.
        quick: Whether to make a short run, to see that everything works.

    Returns:
        The measurements and the results of the targets.
    """
    started = time.perf_counter()
    engine_peers = [each for each in ENGINES if _wanted(each, only)]
    service_peers = [each for each in SERVICES if _wanted(each, only)]
    peers: list[EnginePeer | ServicePeer] = [*engine_peers, *service_peers]
    environments, pythons = _environments({peer.environment for peer in peers}, build)
    _tell("weights and images")
    given, reference = _inputs(build)
    _tell("the engines of crl")
    bundle = ModelBundle.open(given.weights.bundle)
    ranking = measure_engines(bundle, seconds=0.2 if quick else 2.0, threads=given.threads)
    setup = Setup(environments, pythons, given, reference, logs=build / "logs", tell=_tell)
    engine_schedule = QUICK_ENGINES if quick else engines.EngineSchedule()
    service_schedule = QUICK_SERVICES if quick else services.ServiceSchedule()
    engine_rows = engines.measure_engines(engine_peers, setup, engine_schedule)
    service_rows = services.measure_services(service_peers, setup, service_schedule)
    return Report(
        schema=SCHEMA,
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        seconds=round(time.perf_counter() - started, 1),
        command=shlex.join(["python", "-m", "crl_benchmarks.peers", *sys.argv[1:]]),
        commit=describe_commit(),
        machine=describe_machine(),
        settings={
            "images": f"{IMAGES} synthetic JPEGs of {SIZE[0]}×{SIZE[1]}",
            "threads": f"{given.threads} for each engine and each service: the physical cores",
            "engines": f"{engine_schedule.rounds} rounds, {engine_schedule.seconds:g} s of each "
            "kind of work, the median of each round",
            "services": f"{service_schedule.rounds} rounds, {service_schedule.seconds:g} s of each "
            f"load after {service_schedule.warm_up:g} s of warm-up, the generator on the same "
            "cores",
        },
        environments=tuple(environments.values()),
        engines=tuple(engine_rows),
        services=tuple(service_rows),
        targets=tuple(check_targets(engine_rows, service_rows)),
        ranking=ranking.engines,
    )


def write(report: Report, out: Path) -> None:
    """Write OUT.json, OUT.md and OUT.png."""
    write_report(report, out.with_suffix(".json"))
    out.with_suffix(".md").write_text(markdown(report), encoding="utf-8")
    write_plot(report, out.with_suffix(".png"))


def _chosen(text: str) -> frozenset[str]:
    only = frozenset(part.strip() for part in text.split(",") if part.strip())
    peers: list[EnginePeer | ServicePeer] = [*ENGINES, *SERVICES]
    known = {peer.name for peer in peers}
    if unknown := only - known:
        raise InvalidInputError(
            f"--only: expected names among {', '.join(sorted(known))}; "
            f"got {', '.join(sorted(unknown))}"
        )
    return only


def _wanted(peer: EnginePeer | ServicePeer, only: frozenset[str]) -> bool:
    return not only or peer.environment == OWN or peer.name in only


def _environments(names: set[str], build: Path) -> tuple[dict[str, Environment], dict[str, Path]]:
    environments, pythons = {OWN: own_environment()}, {OWN: Path(sys.executable)}
    for name, spec in ENVIRONMENTS.items():
        if name in names:
            _tell(f"environment {name}")
            environments[name] = make_environment(spec, build / "venvs", build / "logs")
            pythons[name] = interpreter(build / "venvs" / name)
    return environments, pythons


def _inputs(build: Path) -> tuple[Inputs, NDArray[np.float32]]:
    """Create weights and images, and return them with the embeddings that all must agree with."""
    weights = make_weights(build / "weights")
    folder = build / "images"
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, data in enumerate(synthetic_jpegs(IMAGES + CALIBRATION, SIZE)):
        paths.append(folder / f"{number:03}.jpg")
        if not paths[-1].exists() or paths[-1].read_bytes() != data:
            paths[-1].write_bytes(data)
    given = Inputs(
        weights=weights,
        images=tuple(paths[:IMAGES]),
        calibration=tuple(paths[IMAGES:]),
        threads=count_cores(),
    )
    return given, _reference(weights, paths[:CHECKED])


def _reference(weights: Weights, images: Sequence[Path]) -> NDArray[np.float32]:
    """Return the embeddings of the fp32 graph, which the export has compared with torch."""
    with Embedder.open(weights.bundle, engine="onnx/cpu/fp32") as embedder:
        return embedder.embed(images).universal


def _readme(readme: Path, report: Path, *, check: bool) -> int:
    if update_readme(readme, read_report(report), check=check) or not check:
        return 0
    print(f"{readme}: tables differ from {report}; rewrite them with --readme", file=sys.stderr)
    return 1


def _tell(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
