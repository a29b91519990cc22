"""What every worker does: a JSON command a line in, a JSON reply a line out, until the input ends.

A worker is `loop.run(Engine)`; the options of its engine are the first argument, as JSON. What
libraries print goes to the log, since standard output is the protocol's.
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
    """What a worker measures.

    Attributes:
        whole: decodes and runs in one call, so that a run without decoding cannot be timed.
        settings: what was chosen for speed, in words.
    """

    whole = False
    settings = ""

    @abstractmethod
    def __init__(self, options: dict[str, Any]) -> None:
        """Load the model.

        Args:
            options: `threads`, and what this engine needs of paths and precisions.
        """

    def decode(self, data: bytes) -> Any:
        """Make of a JPEG what a row of a batch is: itself, where the engine decodes."""
        return data

    def stack(self, rows: list[Any]) -> Any:
        """Make a batch of rows."""
        return np.stack(rows)

    @abstractmethod
    def run(self, batch: Any) -> np.ndarray:
        """Give the embeddings of a batch, (n, d), of any norm."""

    def embed(self, images: Sequence[bytes], batch: int, threads: int) -> np.ndarray:
        """Embed JPEGs in batches, decoding in threads while the batch before is run."""
        if self.whole:
            starts = range(0, len(images), batch)
            return np.concatenate([self.run(list(images[i : i + batch])) for i in starts])
        with ThreadPoolExecutor(threads) as pool:
            rows = pool.map(self.decode, images)
            batches = iter(lambda: list(islice(rows, batch)), [])
            return np.concatenate([self.run(self.stack(each)) for each in batches])


def run(make: Callable[[dict[str, Any]], Engine]) -> None:
    """Be a worker."""
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
        except Exception as error:  # whatever it is, it is told
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"[:500]}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


class _Commands:
    def __init__(self, engine: Engine, threads: int) -> None:
        self._engine, self._threads = engine, threads

    def do(self, command: dict[str, Any]) -> dict[str, Any]:
        """Do a command; its name is that of a method here."""
        name = command.pop("do")
        commands: dict[str, Callable[..., dict[str, Any]]] = {
            "open": self.open,
            "embed": self.embed,
            "time": self.time,
            "status": self.status,
        }
        return commands[name](**command)

    def open(self) -> dict[str, Any]:
        """Tell what was opened; whatever the first command is, it opens the engine."""
        return {
            "whole": self._engine.whole,
            "settings": self._engine.settings,
        }

    def embed(self, files: list[str], batch: int, out: str) -> dict[str, Any]:
        """Embed files and write the rows to a `.npy`."""
        images = [Path(file).read_bytes() for file in files]
        rows = self._engine.embed(images, batch, self._threads)
        np.save(out, np.asarray(rows, np.float32))
        return {"rows": len(rows)}

    def time(
        self, *, what: str, files: list[str], batch: int, seconds: float, least: int, warm: bool
    ) -> dict[str, Any]:
        """Time one kind of work again and again.

        Args:
            what: `decode` (one image), `image` (decode one image and run it), `run` (a batch whose
                pixels are ready) or `embed` (all files, from JPEGs to rows).
            files: JPEGs.
            batch: images of a run.
            seconds: to go on for.
            least: runs that are made in any case.
            warm: make a run before, which is not timed.

        Returns:
            `seconds`: of each run.
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
            work()  # whatever is made at the first run of a shape is made now
        taken: list[float] = []
        ends = time.perf_counter() + seconds
        while len(taken) < least or time.perf_counter() < ends:
            started = time.perf_counter()
            work()
            taken.append(time.perf_counter() - started)
        return {"seconds": taken}

    def status(self) -> dict[str, Any]:
        """Give the most memory this process has held, in bytes."""
        text = Path("/proc/self/status").read_text(encoding="ascii")
        found = re.search(r"^VmHWM:\s+(\d+) kB", text, re.MULTILINE)
        return {"peak_bytes": int(found[1]) * 1024 if found else None}
