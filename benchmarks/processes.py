"""Servers under measurement: processes of their own, ready when they say so, ended afterwards."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def process(arguments: list[str], ready: str, *, stream: str) -> Iterator[tuple[str, int]]:
    """Start a process, wait for the line that says it is ready, and end it afterwards.

    Args:
        arguments: of the process.
        ready: what that line contains.
        stream: where it is said, `stdout` or `stderr`; read to its end, so that it never blocks.

    Yields:
        The line, and the number of the process.
    """
    pipes: dict[str, Any] = {stream: subprocess.PIPE}
    with subprocess.Popen(arguments, text=True, **pipes) as running:
        lines = getattr(running, stream)
        try:
            line = next((line for line in lines if ready in line), None)
            if line is None:
                raise RuntimeError(f"{arguments[:4]} ended before it was ready")
            threading.Thread(target=lambda: [None for _ in lines], daemon=True).start()
            yield line, running.pid
        finally:
            running.terminate()
            running.wait()


def serve_command(*options: str) -> list[str]:
    """Give the command of `crl serve` on a free port of the loopback."""
    return [sys.executable, "-m", "crl_sdk", "serve", "--address", "127.0.0.1:0", *options]
