"""Runs a foreign graph in a process of its own, with limits on its memory and time.

A graph can ask for any amount of memory in one node, loop for ever, or crash the runtime. Here it
runs once with the check inputs, before this process opens it.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crl_sdk.errors import ExportError
from crl_sdk.model._manifest import Precision

SECONDS = 600.0
"""How long the check inputs may take by default."""

_MEMORY = 4 << 30
"""What a run may take beside the weights, in bytes of address space. A ViT-L/14 of 336 pixels takes
less than a tenth of it for one image."""

_COPIES = 4
"""How often the weights may be in memory: ONNX Runtime arranges them anew when it loads them."""

_MAX_DIM = 1 << 16
"""Largest embedding that is read back."""

_THREADS = 4
"""Largest number of threads, each of which takes address space."""


class RowError(Exception):
    """The graph failed on one of its inputs.

    Attributes:
        row: Number of the input; -1 if the graph cannot be loaded.
    """

    def __init__(self, message: str, row: int) -> None:
        """Store the message and the number of the input."""
        super().__init__(message)
        self.row = row


def run_singly(
    graph: Path,
    output: str,
    feeds: Mapping[str, NDArray[Any]],
    *,
    name: Path,
    precision: Precision,
    weights: int,
    seconds: float,
) -> NDArray[np.float32]:
    """Run a graph on one input at a time.

    Args:
        graph: ONNX file of ours, with the foreign graph.
        output: Name of the output, of shape (1, d) for one input.
        feeds: Its inputs, each of shape (n, …).
        name: File that the graph comes from, for error messages.
        precision: Precision of the graph.
        weights: Number of bytes of its weights.
        seconds: How long all runs may take.

    Returns:
        The outputs, shape (n, d), float32.

    Raises:
        RowError: If ONNX Runtime cannot load the graph, or run one of the inputs.
        ExportError: If it needs too much memory or time, or crashes.
    """
    with tempfile.TemporaryDirectory(prefix="run.", dir=graph.parent) as folder:
        inputs, found = Path(folder) / "in.npz", Path(folder) / "out.npy"
        stored: dict[str, Any] = {f"input_{at}": rows for at, rows in enumerate(feeds.values())}
        np.savez(inputs, **stored)
        memory = _MEMORY + _COPIES * weights
        job = {
            "graph": str(graph), "output": output, "names": list(feeds), "inputs": str(inputs),
            "found": str(found), "precision": precision, "memory": memory, "seconds": seconds,
        }  # fmt: skip
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(each for each in sys.path if each),
            "MALLOC_ARENA_MAX": "2",  # each arena reserves address space
            "OPENBLAS_NUM_THREADS": "1",
        }
        try:
            done = subprocess.run(
                [sys.executable, "-m", "crl_export.imported.bounded_run"],
                input=json.dumps(job), text=True, capture_output=True, check=False,
                timeout=seconds, env=environment,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise ExportError(
                f"{name}: took more than {seconds:g} s for the check inputs; if the machine is "
                "slow, pass a longer --time-limit, otherwise do not use this model"
            ) from error
        answer = json.loads(done.stdout) if done.returncode == 0 else {}
        if "errno" in answer:
            raise OSError(answer["errno"], os.strerror(answer["errno"]))
        if "message" in answer:
            raise RowError(answer["message"], answer["row"])
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
            raise ExportError(
                f"{name}: ends the process that runs it ({last[0][:200]}): it needs more than "
                f"{memory >> 30} GiB of memory, or ONNX Runtime crashes; take another "
                "export"
            )
        return np.load(found, allow_pickle=False).astype(np.float32)


def _run(job: dict[str, Any]) -> dict[str, Any]:
    """Do a job in the child process; return what failed, if anything."""
    from crl_sdk._processors import count_cores
    from crl_sdk.engines._onnx_sessions import open_session
    from crl_sdk.errors import EngineError

    threads = min(count_cores(), _THREADS)
    _limit(job["memory"], job["seconds"] * threads)
    row = -1
    try:
        with np.load(job["inputs"], allow_pickle=False) as stored:
            feeds = {name: stored[f"input_{at}"] for at, name in enumerate(job["names"])}
        session = open_session(Path(job["graph"]), threads=threads, precision=job["precision"])
        rows = []
        for row in range(len(next(iter(feeds.values())))):
            one = {name: values[row : row + 1] for name, values in feeds.items()}
            (found,) = session.run([job["output"]], one)
            if found.ndim != 2 or found.shape[0] != 1 or found.shape[1] > _MAX_DIM:
                raise ValueError(
                    f"its output {job['output']!r} has the shape {found.shape}, expected (1, d)"
                )
            rows.append(found)
        np.save(job["found"], np.concatenate(rows))
    except OSError as error:
        return {"errno": error.errno or errno.EIO}
    except Exception as error:  # ONNX Runtime's exceptions have no common base class
        if isinstance(error, EngineError) and isinstance(error.__cause__, Exception):
            error = error.__cause__  # it names no temporary file
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        message = lines[0][:300] if lines else type(error).__name__
        return {"message": message, "row": row}
    return {}


def _limit(memory: int, seconds: float) -> None:
    """Limit the further address space and the processor time of this process, where possible."""
    try:
        import resource
    except ImportError:  # Windows
        return
    processor = int(seconds) + 1  # for a process whose parent was killed
    resource.setrlimit(resource.RLIMIT_CPU, (processor, processor))
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:  # macOS, which does not enforce the limit
        return
    limit = pages * resource.getpagesize() + memory
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    print(json.dumps(_run(json.loads(sys.stdin.read()))))
