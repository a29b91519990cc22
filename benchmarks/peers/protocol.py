"""Starts a worker (see `workers/loop.py`), sends it commands, and ends it in all cases."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crl_sdk.errors import CrlError

WORKERS = Path(__file__).parent / "workers"


class WorkerError(CrlError):
    """A worker reported a failure, ended, or did not answer in time."""


class Worker:
    """A worker process. Use as a context manager: leaving it ends the process."""

    def __init__(
        self,
        python: Path,
        script: str,
        options: Mapping[str, Any],
        *,
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start the process.

        Args:
            python: Interpreter of the peer's environment.
            script: File name in `workers/`.
            options: Options of the engine.
            log: File for the output of its libraries.
            environment: Environment variables, added to those of this process.
        """
        self.started = time.perf_counter()
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file:
            self._process = subprocess.Popen(
                [str(python), str(WORKERS / script), json.dumps(options)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, bufsize=0,
                env={**os.environ, **(environment or {})}, start_new_session=True,
            )  # fmt: skip
        assert self._process.stdout is not None
        self._unread = b""
        self._ready = selectors.DefaultSelector()
        self._ready.register(self._process.stdout, selectors.EVENT_READ)

    def __enter__(self) -> Worker:
        """Return the worker itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self.close()

    def ask(self, do: str, *, patience: float = 300.0, **command: object) -> dict[str, Any]:
        """Send a command and wait for its reply.

        Args:
            do: Name of the command.
            patience: Seconds to wait for the reply.
            **command: Arguments of the command.

        Returns:
            The reply.

        Raises:
            WorkerError: If the command failed, the process ended, or no reply came in time. The
                worker cannot be used any more.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **command}).encode() + b"\n")
        except OSError as error:
            raise WorkerError(self._last_words(f"ended ({error.strerror})")) from error
        reply: dict[str, Any] = json.loads(self._line(patience))
        if "error" in reply:
            raise WorkerError(str(reply["error"]))
        return reply

    def close(self) -> None:
        """End the process. Idempotent."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._ready.close()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()

    def _line(self, seconds: float) -> bytes:
        assert self._process.stdout is not None
        gives_up = time.monotonic() + seconds
        while b"\n" not in self._unread:
            if not self._ready.select(max(gives_up - time.monotonic(), 0)):
                raise WorkerError(self._last_words(f"no reply in {seconds:.0f} s"))
            read = os.read(self._process.stdout.fileno(), 1 << 20)
            if not read:
                raise WorkerError(self._last_words("ended"))
            self._unread += read
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _last_words(self, what: str) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return f"{what}: {lines[-1][:300]}" if lines else what


def median_ms(seconds: Sequence[float]) -> float:
    """Return the median in milliseconds."""
    ordered = sorted(seconds)
    half = len(ordered) // 2
    middle = ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
    return middle * 1e3
