"""`python -m crl_benchmarks.peers`: crl and its peers in one run, or the README's part of it.

Environments, weights and logs are kept under `build/peers`; results go to `benchmarks/results`.
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
from crl_benchmarks.peers import engines, machine, services
from crl_benchmarks.peers.catalogue import ENGINES, EnginePeer, Inputs, Setup
from crl_benchmarks.peers.environments import (
    OWN,
    RECIPES,
    make_environment,
    own_environment,
    python_of,
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
from crl_benchmarks.peers.verdicts import judge
from crl_benchmarks.peers.weights import Weights, make_weights
from crl_sdk import Embedder
from crl_sdk.errors import CrlError, InvalidInputError

SIZE = (640, 480)

PICTURES, CALIBRATION, CHECKED = 64, 32, 16

QUICK_ENGINES = engines.Plan(
    rounds=2, seconds=0.2, batches=(1, 16), embed_batches=(16,), pictures=32
)
QUICK_SERVICES = services.Plan(
    starts=1, rounds=1, seconds=4.0, warm_up=1.0, callers=(1, 16), rates=(5.0,)
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="crl_benchmarks.peers", description=__doc__)
    parser.add_argument("--only", default="", help="names of peers, comma-separated; ours stay")
    parser.add_argument("--quick", action="store_true", help="little of everything: does it work?")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/peers"))
    parser.add_argument("--build", type=Path, default=Path("build/peers"))
    parser.add_argument("--readme", action="store_true", help="rewrite its part from OUT.json")
    parser.add_argument("--check", action="store_true", help="fail if the README is stale")
    parser.add_argument("--readme-file", type=Path, default=Path("README.md"))
    told = parser.parse_args(arguments)
    try:
        if told.readme or told.check:
            return _readme(told.readme_file, told.out.with_suffix(".json"), check=told.check)
        report = measure(_chosen(told.only), told.build.resolve(), quick=told.quick)
        write(report, told.out)
    except CrlError as error:
        print(error, file=sys.stderr)
        return 1
    print(markdown(report))
    return 0


def measure(only: frozenset[str], build: Path, *, quick: bool) -> Report:
    """Make environments and weights where they are missing, and measure all peers.

    Args:
        only: names of peers; empty for all. Ours are always measured.
        build: directory of what is made.
        quick: little of everything, to see that it works.
    """
    started = time.perf_counter()
    engine_peers = [each for each in ENGINES if _wanted(each, only)]
    service_peers = [each for each in SERVICES if _wanted(each, only)]
    peers: list[EnginePeer | ServicePeer] = [*engine_peers, *service_peers]
    environments, pythons = _environments({peer.environment for peer in peers}, build)
    _tell("weights and pictures")
    given, reference = _inputs(build)
    setup = Setup(environments, pythons, given, reference, logs=build / "logs", tell=_tell)
    engine_plan = QUICK_ENGINES if quick else engines.Plan()
    service_plan = QUICK_SERVICES if quick else services.Plan()
    engine_rows = engines.measure_engines(engine_peers, setup, engine_plan)
    service_rows = services.measure_services(service_peers, setup, service_plan)
    return Report(
        schema=SCHEMA,
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        seconds=round(time.perf_counter() - started, 1),
        command=shlex.join(["python", "-m", "crl_benchmarks.peers", *sys.argv[1:]]),
        commit=machine.commit(),
        machine=machine.describe(),
        settings={
            "pictures": f"{PICTURES} synthetic JPEGs of {SIZE[0]}×{SIZE[1]}",
            "threads": f"{given.threads} for each engine and each service: the physical cores",
            "engines": f"{engine_plan.rounds} rounds, {engine_plan.seconds:g} s of each kind of "
            "work, the median of each round",
            "services": f"{service_plan.rounds} rounds, {service_plan.seconds:g} s of each load "
            f"after {service_plan.warm_up:g} s of warm-up, the generator on the same cores",
        },
        environments=tuple(environments.values()),
        engines=tuple(engine_rows),
        services=tuple(service_rows),
        verdicts=tuple(judge(engine_rows, service_rows)),
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
            f"expected --only of {', '.join(sorted(known))}; got {', '.join(sorted(unknown))}"
        )
    return only


def _wanted(peer: EnginePeer | ServicePeer, only: frozenset[str]) -> bool:
    return not only or peer.environment == OWN or peer.name in only


def _environments(names: set[str], build: Path) -> tuple[dict[str, Environment], dict[str, Path]]:
    environments, pythons = {OWN: own_environment()}, {OWN: Path(sys.executable)}
    for name, options in RECIPES.items():
        if name in names:
            _tell(f"environment {name}")
            environments[name] = make_environment(options, build / "venvs", build / "logs")
            pythons[name] = python_of(build / "venvs" / name)
    return environments, pythons


def _inputs(build: Path) -> tuple[Inputs, NDArray[np.float32]]:
    """Make weights and pictures; give them, and the embeddings that all must agree with."""
    weights = make_weights(build / "weights")
    folder = build / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, data in enumerate(synthetic_jpegs(PICTURES + CALIBRATION, SIZE)):
        paths.append(folder / f"{number:03}.jpg")
        if not paths[-1].exists() or paths[-1].read_bytes() != data:
            paths[-1].write_bytes(data)
    given = Inputs(
        weights=weights,
        pictures=tuple(paths[:PICTURES]),
        calibration=tuple(paths[PICTURES:]),
        threads=machine.physical_cores(),
    )
    return given, _reference(weights, paths[:CHECKED])


def _reference(weights: Weights, pictures: Sequence[Path]) -> NDArray[np.float32]:
    """Embed with the fp32 graph, which the export has compared with torch."""
    with Embedder.open(weights.bundle, engine="onnx/cpu/fp32") as embedder:
        return embedder.embed(pictures).universal


def _readme(readme: Path, report: Path, *, check: bool) -> int:
    if update_readme(readme, read_report(report), check=check) or not check:
        return 0
    print(f"{readme} is not as {report} has it: make it so with --readme", file=sys.stderr)
    return 1


def _tell(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
