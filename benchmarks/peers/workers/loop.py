"""The main loop of every worker.

A worker reads one JSON command per line from standard input and writes one JSON reply per line to
standard output, until the input ends. Its script calls `loop.run(Engine)`; the first command-line
argument holds the engine's options as JSON. What libraries print to standard output is redirected
to standard error, since standard output carries the replies.

This module runs in the environments of the peers and needs only NumPy.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np


class Engine(ABC):
    """An engine to measure.

    Attributes:
        whole: Whether it decodes and runs in one call, so that a run without decoding cannot be
            timed.
        settings: Settings chosen for speed, in words.
    """

    whole = False
    settings = ""

    @abstractmethod
    def __init__(self, options: dict[str, Any]) -> None:
        """Load the model.

        Args:
            options: `threads`, and the paths and the precision that this engine needs.
        """

    def decode(self, data: bytes) -> Any:
        """Return one row of a batch from a JPEG: the JPEG itself if the engine decodes."""
        return data

    def stack(self, rows: list[Any]) -> Any:
        """Return a batch made from rows."""
        return np.stack(rows)

    @abstractmethod
    def run(self, batch: Any) -> np.ndarray:
        """Return the embeddings of a batch, shape (n, d), of any norm."""

    def embed(self, images: Sequence[bytes], batch: int, threads: int) -> np.ndarray:
        """Embed JPEGs in batches; threads decode while the previous batch runs."""
        if self.whole:
            starts = range(0, len(images), batch)
            return np.concatenate([self.run(list(images[i : i + batch])) for i in starts])
        with ThreadPoolExecutor(threads) as pool:
            rows = pool.map(self.decode, images)
            batches = iter(lambda: list(islice(rows, batch)), [])
            return np.concatenate([self.run(self.stack(each)) for each in batches])


def run(make: Callable[[dict[str, Any]], Engine]) -> None:
    """Answer commands until standard input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    options = json.loads(sys.argv[1])
    engine: Engine | None = None
    for line in sys.stdin:
        command = json.loads(line)
        try:
            if engine is None:
                engine = make(options)
            reply = _Commands(engine, options["threads"]).do(command)
        except Exception as error:  # every failure goes into the reply
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"[:500]}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


class _Commands:
    def __init__(self, engine: Engine, threads: int) -> None:
        self._engine, self._threads = engine, threads

    def do(self, command: dict[str, Any]) -> dict[str, Any]:
        """Run the command named by `do`."""
        name = command.pop("do")
        commands: dict[str, Callable[..., dict[str, Any]]] = {
            "open": self.open,
            "embed": self.embed,
            "time": self.time,
            "status": self.status,
        }
        return commands[name](**command)

    def open(self) -> dict[str, Any]:
        """Describe the engine. Any first command opens it."""
        return {
            "whole": self._engine.whole,
            "settings": self._engine.settings,
        }

    def embed(self, files: list[str], batch: int, out: str) -> dict[str, Any]:
        """Embed files and write the embeddings to a `.npy` file."""
        images = [Path(file).read_bytes() for file in files]
        rows = self._engine.embed(images, batch, self._threads)
        np.save(out, np.asarray(rows, np.float32))
        return {"rows": len(rows)}

    def time(
        self, *, what: str, files: list[str], batch: int, seconds: float, least: int, warm: bool
    ) -> dict[str, Any]:
        """Time one kind of work repeatedly.

        Args:
            what: `decode` (one image), `image` (decode and run one image), `run` (a batch of
                decoded images) or `embed` (all files, decoding included).
            files: JPEG files.
            batch: Number of images in a batch.
            seconds: Time to measure for.
            least: Smallest number of runs.
            warm: Whether to make one run first that is not timed.

        Returns:
            `seconds`: Duration of each run.
        """
        engine = self._engine
        images = [Path(file).read_bytes() for file in files]
        turns = cycle(images)

        def image() -> None:
            engine.run(
                [next(turns)] if engine.whole else engine.stack([engine.decode(next(turns))])
            )

        work: Callable[[], Any]
        if what == "image":
            work = image
        elif what == "embed":
            work = lambda: engine.embed(images, batch, self._threads)  # noqa: E731
        elif what == "decode":
            work = lambda: engine.decode(next(turns))  # noqa: E731
        else:
            pixels = engine.stack([engine.decode(data) for data in islice(turns, batch)])
            work = lambda: engine.run(pixels)  # noqa: E731
        if warm:
            work()  # the first run of a shape may compile or allocate
        taken: list[float] = []
        ends = time.perf_counter() + seconds
        while len(taken) < least or time.perf_counter() < ends:
            started = time.perf_counter()
            work()
            taken.append(time.perf_counter() - started)
        return {"seconds": taken}

    def status(self) -> dict[str, Any]:
        """Return the peak memory of this process."""
        return {"peak_bytes": peak_bytes()}


def peak_bytes(pid: int | str = "self") -> int | None:
    """Return the peak memory of a process in bytes, or None if it cannot be read.

    Linux keeps it in /proc. psutil does not report it, and `resource.getrusage` may include the
    memory of the process that started this one.

    Args:
        pid: Id of the process; this process by default.
    """
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
    except OSError:  # the process ended, or this is not Linux
        return None
    found = re.search(r"^VmHWM:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None
