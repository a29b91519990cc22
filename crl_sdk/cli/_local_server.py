"""Run `crl serve` as a child process on this machine, and end it in all cases."""

from __future__ import annotations

import json
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
from typing import Any

from crl_sdk.errors import ServiceError

START_SECONDS = 180.0
"""Time that the server may take to start. Large models need less, even on one core."""

STOP_SECONDS = 15.0
"""Time that the server may take to stop after SIGTERM. Then it is killed."""

_POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class LocalServer:
    """A running `crl serve` process.

    Attributes:
        address: Address that clients connect to.
        model: Name of the model it serves.
        engine: Name of its engine, such as `onnx/cpu/fp32`.
        metrics: `host:port` of its metrics page, or None.
        pid: Process id.
    """

    address: str
    model: str
    engine: str
    metrics: str | None
    pid: int


def parse_ready_line(output: str) -> LocalServer | None:
    """Find the line that `crl serve` prints on stdout when it serves.

    Args:
        output: What the server has printed so far. Other lines are ignored, because some runtimes
            print to stdout as well.

    Returns:
        The facts in that line, or None if it is not there yet.
    """
    *lines, _ = output.split("\n")  # the last line has no end yet; `splitlines` splits at more
    for line in lines:
        try:
            ready: Any = json.loads(line)
        except ValueError:
            continue
        if isinstance(ready, dict) and ready.pop("event", None) == "serving":
            return LocalServer(**ready)
    return None


@contextmanager
def local_server(bundle: Path, log: Path, *options: str) -> Iterator[LocalServer]:
    """Serve a bundle on a free local port, with a temporary directory of bases.

    The process receives SIGTERM when the context ends: normally, by an exception, by Ctrl-C, or
    because this process receives SIGTERM or SIGHUP.

    Args:
        bundle: Directory of the bundle.
        log: File for the server's log.
        options: Further options of `crl serve`.

    Raises:
        ServiceError: If the server ends, or does not serve within `START_SECONDS`. The message
            holds the end of its log, or names the log file.
    """
    with (
        tempfile.TemporaryDirectory(prefix="crl-bases-") as directory,
        log.open("w", encoding="utf-8") as log_file,
        (Path(directory) / "stdout").open("w+", encoding="utf-8") as stdout,
        _exit_on_signals(),
    ):
        process = subprocess.Popen(
            [sys.executable, "-m", "crl_sdk", "serve", "--address", "127.0.0.1:0",
             "--bases", str(Path(directory) / "bases"), "--bundle", str(bundle), *options],
            stdin=subprocess.DEVNULL, stdout=stdout, stderr=log_file,
        )  # fmt: skip
        try:
            yield _wait_until_ready(process, Path(stdout.name), log)
        finally:
            _stop(process)


def _wait_until_ready(process: subprocess.Popen[bytes], stdout: Path, log: Path) -> LocalServer:
    ends = time.monotonic() + START_SECONDS
    while time.monotonic() < ends:
        ended = process.poll() is not None
        server = parse_ready_line(stdout.read_text(encoding="utf-8", errors="replace"))
        if server is not None:
            return server
        if ended:
            message = log.read_text(encoding="utf-8", errors="replace").strip()[-800:]
            raise ServiceError(f"crl serve ended with status {process.returncode}: {message}")
        time.sleep(_POLL_SECONDS)
    raise ServiceError(
        f"crl serve did not serve within {START_SECONDS:.0f} s; see its log in {log}"
    )


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextmanager
def _exit_on_signals() -> Iterator[None]:
    """Raise SystemExit on SIGTERM and SIGHUP, so that the child process is ended as well."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set signal handlers
        return

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
