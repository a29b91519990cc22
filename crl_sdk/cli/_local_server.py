"""A `crl serve` process of our own on this machine: started, waited for, and ended in all cases."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from crl_sdk.errors import ServiceError

START_SECONDS = 180.0
"""A large model is read and warmed up in less, even on one core."""

STOP_SECONDS = 15.0
"""How long the server may drain before it is killed."""

_READY = re.compile(
    r"serving (?P<model>.+) \((?P<engine>[^)]+)\) on (?P<address>[^\s,]+), .*"
    r"metrics: (?P<metrics>\S+)\n"
)


@dataclass(frozen=True, slots=True)
class LocalServer:
    """A running server.

    Attributes:
        address: what a client connects to.
        model: name of the model it serves.
        engine: what runs it, such as `onnx/cpu/fp32`.
        metrics: `host:port` of its metrics page, or `none`.
        pid: of its process.
    """

    address: str
    model: str
    engine: str
    metrics: str
    pid: int


@contextmanager
def local_server(bundle: Path, log: Path, *options: str) -> Iterator[LocalServer]:
    """Serve a bundle on a free port of the loopback, with a directory of bases that goes with it.

    The process is ended with SIGTERM when the block is left: at its end, by an error, by Ctrl-C,
    and by SIGTERM or SIGHUP of this process.

    Args:
        bundle: the model to serve.
        log: file that takes the server's log.
        options: further ones of `crl serve`.

    Raises:
        ServiceError: it ended, or said nothing for `START_SECONDS`; the end of its log is named.
    """
    with (
        tempfile.TemporaryDirectory(prefix="crl-bases-") as bases,
        log.open("w", encoding="utf-8") as log_file,
        _signals_end_the_block(),
    ):
        process = subprocess.Popen(
            [sys.executable, "-m", "crl_sdk", "serve", "--address", "127.0.0.1:0",
             "--bases", bases, "--bundle", str(bundle), *options],
            stdin=subprocess.DEVNULL, stdout=log_file, stderr=log_file,
        )  # fmt: skip
        try:
            yield _wait_until_ready(process, log)
        finally:
            _end(process)


def _wait_until_ready(process: subprocess.Popen[bytes], log: Path) -> LocalServer:
    gives_up = time.monotonic() + START_SECONDS
    while time.monotonic() < gives_up:
        ended = process.poll() is not None
        said = log.read_text(encoding="utf-8", errors="replace")
        if ready := _READY.search(said):
            return LocalServer(
                ready["address"], ready["model"], ready["engine"], ready["metrics"], process.pid
            )
        if ended:
            raise ServiceError(
                f"crl serve ended with status {process.returncode}: {said.strip()[-800:]}"
            )
        time.sleep(0.05)
    raise ServiceError(f"crl serve was not ready after {START_SECONDS:.0f} s; its log is {log}")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextmanager
def _signals_end_the_block() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise SystemExit here, so that what was started is ended."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
