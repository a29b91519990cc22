"""Triton's own server from PyTriton's wheel, which has the python backend alone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunningTriton:
    """A server that is ready.

    Attributes:
        grpc: Address of its gRPC port.
        http: Address of its HTTP port.
        pid: Process id. Each `model.py` runs in a child of it.
    """

    grpc: str
    http: str
    pid: int


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _link_backends(packages: Path, folder: Path) -> Path:
    """Make a directory of backends with the stub of this Python, which the wheel has elsewhere."""
    shipped = packages / "pytriton" / "tritonserver"
    python = folder / "backends" / "python"
    python.mkdir(parents=True)
    for file in (shipped / "backends" / "python").iterdir():
        if file.is_file():
            (python / file.name).symlink_to(file)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = shipped / "python_backend_stubs" / version / "triton_python_backend_stub"
    (python / stub.name).symlink_to(stub)
    return python.parent


@contextmanager
def run_triton(
    repository: Path, folder: Path, *, models: Sequence[str] = ("*",), seconds: float = 120.0
) -> Iterator[RunningTriton]:
    """Run a server on free ports of the loopback interface, and stop it.

    Args:
        repository: Model repository.
        folder: Directory for the log; must exist.
        models: Models to load at the start; the others on request.
        seconds: Time limit of the start.
    """
    packages = Path(sysconfig.get_path("purelib"))
    grpc, http = _free_ports(2)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        command = [
            str(packages / "pytriton" / "tritonserver" / "bin" / "tritonserver"),
            f"--model-repository={repository}", "--model-control-mode=explicit",
            *(f"--load-model={each}" for each in models),
            f"--backend-directory={_link_backends(packages, Path(work))}",
            f"--backend-config=python,shm-region-prefix-name=crl-{os.getpid()}-{grpc}",
            "--grpc-address=127.0.0.1", f"--grpc-port={grpc}",
            "--http-address=127.0.0.1", f"--http-port={http}",
            "--allow-metrics=false", "--exit-timeout-secs=10",
        ]  # fmt: skip
        environment = {
            "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",  # for the stub's python3
            "LD_LIBRARY_PATH": str(packages / "nvidia_pytriton.libs"),
            "PYTHONDONTWRITEBYTECODE": "1",  # else Triton takes __pycache__ for a changed model
        }
        log = folder / "tritonserver.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        try:
            _wait_until_ready(process, f"127.0.0.1:{http}", log, seconds)
            yield RunningTriton(f"127.0.0.1:{grpc}", f"127.0.0.1:{http}", process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _wait_until_ready(
    process: subprocess.Popen[bytes], address: str, log: Path, seconds: float
) -> None:
    ends = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(f"http://{address}/v2/health/ready", timeout=5) as reply:
                if reply.status == 200:
                    return
        except OSError:
            pass
        if process.poll() is not None or time.monotonic() > ends:
            raise RuntimeError(f"tritonserver did not become ready:\n{log.read_text()[-4000:]}")
        time.sleep(0.05)
