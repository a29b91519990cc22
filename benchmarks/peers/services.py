"""Services: each is started and checked; then all get the same load in turn, in every round."""

from __future__ import annotations

import math
import os
import signal
import socket
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import psutil

from crl_benchmarks.load import Run
from crl_benchmarks.peers.catalogue import CRL_AUTO, CRL_FP32, Inputs, Setup
from crl_benchmarks.peers.engines import compare
from crl_benchmarks.peers.environments import OWN
from crl_benchmarks.peers.protocol import WORKERS
from crl_benchmarks.peers.records import ServiceRow, ServiceRun
from crl_benchmarks.peers.traffic import Endpoint, Generator, Job, embed, wait_until_served
from crl_benchmarks.peers.workers.loop import peak_bytes
from crl_benchmarks.quantiles import percentile

PYTRITON = "PyTriton"

START_SECONDS = 150.0

STOP_SECONDS = 40.0


@dataclass(frozen=True, slots=True)
class ServicePeer:
    """A service.

    Attributes:
        name: Name in the tables.
        environment: Name of its virtual environment.
        api: Protocol, see `traffic.Endpoint`.
        command: Function that returns the command that starts the service. It gets the
            interpreter, a port, a scratch directory and the input of all peers.
        settings: Settings chosen for speed, in words.
        precision: Precision, as in `EnginePeer`.
        variables: Function that returns additional environment variables of the process.
    """

    name: str
    environment: str
    api: str
    command: Callable[[Path, int, Path, Inputs], Sequence[str]]
    settings: str
    precision: str = "fp32"
    variables: Callable[[Inputs], Mapping[str, str]] = field(default=lambda _: {})


def _crl(name: str, engine: str) -> ServicePeer:
    def command(python: Path, port: int, scratch: Path, given: Inputs) -> Sequence[str]:
        return [
            str(python), "-m", "crl_sdk", "serve", "--address", f"127.0.0.1:{port}",
            "--bundle", str(given.weights.bundle), "--engine", engine, "--cache-mb", "0",
            "--bases", str(scratch / "bases"),
        ]  # fmt: skip

    return ServicePeer(
        name, OWN, "crl", command,
        f"crl serve --engine {engine} --cache-mb 0", precision=name.split()[1],
    )  # fmt: skip


def _pytriton(python: Path, port: int, _: Path, given: Inputs) -> Sequence[str]:
    return [
        str(python), str(WORKERS / "pytriton_server.py"), "--onnx", str(given.weights.onnx),
        "--threads", str(given.threads), "--grpc-port", str(port), "--http-port", str(free_port()),
    ]  # fmt: skip


def _pytriton_variables(_: Inputs) -> dict[str, str]:
    # PyTriton's stub loads libpython; without this path it may load that of another Python
    return {"LD_LIBRARY_PATH": str(sysconfig.get_config_var("LIBDIR"))}


def _infinity(python: Path, port: int, _: Path, given: Inputs) -> Sequence[str]:
    return [
        str(python.with_name("infinity_emb")), "v2",
        "--model-id", str(given.weights.hugging_face), "--served-model-name", "clip",
        "--engine", "torch", "--device", "cpu", "--dtype", "float32", "--batch-size", "32",
        "--no-model-warmup", "--no-vector-disk-cache", "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip


def _clip_server(python: Path, port: int, scratch: Path, _: Inputs) -> Sequence[str]:
    flow = scratch / "flow.yml"
    flow.write_text(
        f"jtype: Flow\nversion: '1'\nwith:\n  port: {port}\n  protocol: http\nexecutors:\n"
        "  - name: clip_t\n    uses:\n      jtype: LocalEncoder\n      with:\n"
        "        device: cpu\n        num_worker_preprocess: 2\n      metas:\n"
        f"        py_modules:\n          - {WORKERS / 'clip_server_executor.py'}\n"
        "    timeout_ready: 3000000\n    replicas: 1\n"
    )
    return [str(python), "-m", "clip_server", str(flow)]


SERVICES: tuple[ServicePeer, ...] = (
    _crl(CRL_FP32, "onnx/cpu/fp32"),
    _crl(CRL_AUTO, "auto"),
    ServicePeer(
        PYTRITON, "pytriton", "kserve", _pytriton,
        "the same graph in ONNX Runtime inside its Python callable, dynamic batching up to 32, "
        "Pillow in a pool of as many threads as cores; asked over gRPC",
        variables=_pytriton_variables,
    ),
    ServicePeer(
        "infinity", "infinity", "infinity", _infinity,
        "torch engine, float32, batches up to 32; asked over HTTP",
        variables=lambda given: {
            "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": str(given.threads)
        },
    ),
    ServicePeer(
        "clip-server", "clip-server", "clip-server", _clip_server,
        "torch, float32, as many preprocessing workers as cores; asked over HTTP",
        variables=lambda given: {
            "PEERS_WEIGHTS": str(given.weights.open_clip_pickle),
            "OMP_NUM_THREADS": str(given.threads), "JINA_OPTOUT_TELEMETRY": "1",
            "NO_VERSION_CHECK": "1",
        },
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ServiceSchedule:
    """What is measured, and for how long.

    Attributes:
        starts: Number of starts of each service; the last one is kept for the loads.
        rounds: Number of rounds.
        seconds: Duration of one load.
        warm_up: Seconds of each load before anything counts.
        callers: Numbers of callers of the closed loops, beginning with 1.
        rates: Rates of the open loops, in calls per second.
        shares: Rates of further open loops, as shares of PyTriton's saturation.
    """

    starts: int = 3
    rounds: int = 2
    seconds: float = 15.0
    warm_up: float = 1.5
    callers: tuple[int, ...] = (1, 8, 32)
    rates: tuple[float, ...] = (4.0, 8.0)
    shares: tuple[float, ...] = (0.5, 0.8, 1.0)


@dataclass(slots=True)
class _Running:
    """A running service whose embeddings agree with the reference, and its measurements so far."""

    peer: ServicePeer
    endpoint: Endpoint
    process: subprocess.Popen[bytes]
    row: ServiceRow
    runs: dict[tuple[str, float, float | None], list[Run]] = field(default_factory=dict)


def measure_services(
    peers: Sequence[ServicePeer], setup: Setup, schedule: ServiceSchedule
) -> list[ServiceRow]:
    """Start all services, check that they agree, and put load on them in turn.

    Args:
        peers: Services to measure.
        setup: Environments and input of the services.
        schedule: What is measured, and for how long.

    Returns:
        One row per service, in the order of `peers`.
    """
    rows: dict[str, ServiceRow] = {}
    with ExitStack() as stack:
        running: list[_Running] = []
        for peer in peers:
            skipped = setup.environments[peer.environment].skipped
            if not skipped:
                setup.tell(f"starting {peer.name}")
                try:
                    running.append(_open(stack, peer, setup, schedule))
                    continue
                except (OSError, TimeoutError) as error:
                    skipped = str(error)
            rows[peer.name] = _row(peer, skipped=skipped)
        loads = _Loads(setup, schedule, stack.enter_context(Generator()))
        loads.in_turn(running, [("closed", float(callers), None) for callers in schedule.callers])
        loads.in_turn(running, [("open", rate, None) for rate in schedule.rates])
        saturation = next(
            (_finished(each).saturation for each in running if each.peer.name == PYTRITON), 0.0
        )
        if saturation:
            shares = [("open", round(share * saturation, 2), share) for share in schedule.shares]
            both = [each for each in running if each.peer.name in (PYTRITON, CRL_FP32, CRL_AUTO)]
            loads.in_turn(both, shares)
        for each in running:
            rows[each.peer.name] = msgspec.structs.replace(
                _finished(each), peak_bytes=peak_of_tree(each.process.pid)
            )
    return [rows[peer.name] for peer in peers]


def summarise(mode: str, load: float, share: float | None, runs: Sequence[Run]) -> ServiceRun:
    """Summarise the rounds of a load. The latency of a failed call counts as infinite.

    Args:
        mode: `closed` or `open`.
        load: Number of callers (closed) or calls per second (open).
        share: The rate as a share of PyTriton's saturation, if it was chosen so.
        runs: Measurements, one per round.
    """
    served = [each for run in runs for each in run.latencies.get("ok", [])]
    offered = sum(run.offered for run in runs)
    failed = offered - len(served)
    waits = sorted(served) + [math.inf] * failed
    latency: dict[str, float | None] = dict.fromkeys(("p50", "p99", "low", "high"))
    if waits:
        tail = percentile(waits, 99.0) if not failed else None
        latency = {
            "p50": _ms(waits[len(waits) // 2]),
            "p99": _ms(tail.value if tail else waits[min(int(0.99 * len(waits)), len(waits) - 1)]),
            "low": _ms(tail.low if tail else None),
            "high": _ms(tail.high if tail else None),
        }
    lags = [lag for run in runs for lag in run.lags]
    return ServiceRun(
        mode=mode,
        load=load,
        share=share,
        offered=offered,
        failed=failed,
        per_second=round(statistics.median(run.calls_per_second for run in runs), 3),
        p50_ms=latency["p50"],
        p99_ms=latency["p99"],
        p99_low_ms=latency["low"],
        p99_high_ms=latency["high"],
        rounds_p50_ms=tuple(
            _ms(statistics.median(run.latencies["ok"])) if run.latencies.get("ok") else None
            for run in runs
        ),
        generator_cpu=round(max(run.cpu for run in runs), 3),
        generator_lag_ms=round(float(np.percentile(lags, 90)) * 1e3, 3) if lags else 0.0,
    )


def peak_of_tree(pid: int) -> int | None:
    """Return the sum of the peak memory of a process and its descendants in bytes, or None."""
    try:
        top = psutil.Process(pid)
        processes = [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return None
    return sum(peak_bytes(process.pid) or 0 for process in processes) or None


def free_port() -> int:
    """Return a free port of the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _open(stack: ExitStack, peer: ServicePeer, setup: Setup, schedule: ServiceSchedule) -> _Running:
    """Start a service several times, keep the last one running, and compare its embeddings."""
    images = [path.read_bytes() for path in setup.given.images[: len(setup.reference)]]
    taken: list[float] = []
    for number in range(schedule.starts):
        with ExitStack() as own:
            started = time.perf_counter()
            endpoint, process = own.enter_context(_started(peer, setup, images[0]))
            taken.append(round(time.perf_counter() - started, 3))
            if number == schedule.starts - 1:
                stack.push(own.pop_all())
    found, void = compare(embed(endpoint, images), setup.reference, peer.precision)
    row = _row(
        peer,
        settings=peer.settings,
        cosine_min=found.cosine_min,
        void=void,
        start_seconds=tuple(taken),
    )
    return _Running(peer, endpoint, process, row)


@contextmanager
def _started(
    peer: ServicePeer, setup: Setup, image: bytes
) -> Iterator[tuple[Endpoint, subprocess.Popen[bytes]]]:
    """Start a service and wait for its first embedding; at the end, kill all its processes."""
    port, log = free_port(), setup.logs / f"{peer.name.replace(' ', '-')}.service.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, log.open("w") as file:
        python = setup.pythons[peer.environment]
        process = subprocess.Popen(
            peer.command(python, port, Path(scratch), setup.given),
            stdin=subprocess.DEVNULL, stdout=file, stderr=file, cwd=scratch,
            env={**os.environ, **peer.variables(setup.given)}, start_new_session=True,
        )  # fmt: skip
        endpoint = Endpoint(peer.api, f"127.0.0.1:{port}")

        def ended() -> str:
            if process.poll() is None:
                return ""
            lines = log.read_text(errors="replace").strip().splitlines()
            return f"ended ({process.returncode}): {lines[-1][:300] if lines else ''}"

        try:
            wait_until_served(endpoint, image, ended, START_SECONDS)
            yield endpoint, process
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Interrupt a process, and kill what is left of its process group after a while."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            print(f"{process.args!r} did not end in {STOP_SECONDS:.0f} s: killed", file=sys.stderr)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class _Loads:
    """Puts the same loads on all services in turn."""

    def __init__(self, setup: Setup, schedule: ServiceSchedule, generator: Generator) -> None:
        self._setup, self._schedule, self._generator = setup, schedule, generator

    def in_turn(
        self, running: Sequence[_Running], loads: Sequence[tuple[str, float, float | None]]
    ) -> None:
        schedule, images = self._schedule, self._setup.given.images
        for number in range(schedule.rounds):
            turn = number % max(len(running), 1)  # a different service comes first in each round
            for mode, load, share in loads:
                unit = "callers" if mode == "closed" else "calls/s"
                self._setup.tell(
                    f"services, round {number + 1} of {schedule.rounds}: {load:g} {unit}"
                )
                for each in [*running[turn:], *running[:turn]]:
                    job = Job(
                        each.endpoint,
                        images,
                        mode,
                        load,
                        schedule.warm_up,
                        schedule.seconds,
                        number,
                    )
                    run = self._generator.measure(job)
                    each.runs.setdefault((mode, load, share), []).append(run)


def _finished(each: _Running) -> ServiceRow:
    runs = tuple(summarise(*load, runs) for load, runs in each.runs.items())
    return msgspec.structs.replace(each.row, runs=runs)


def _row(peer: ServicePeer, **known: object) -> ServiceRow:
    return msgspec.convert(
        {
            "name": peer.name,
            "environment": peer.environment,
            "ours": peer.environment == OWN,
            "precision": peer.precision,
            **known,
        },
        ServiceRow,
    )


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None or math.isinf(seconds) else round(seconds * 1e3, 3)
