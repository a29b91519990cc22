"""Run the notebooks of examples/, and check their outputs: make notebooks.

`python tests/notebooks.py` runs each from top to bottom and saves it with its outputs. A notebook
runs in a directory of its own, without a network, on one CPU. A cell may have these tags:

- `warns`: the cell prints a warning. No other cell may.
- `language-model`: what the cell prints depends on the answers of the language model, which may
  differ on another processor.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import re
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nbformat
import psutil
from jupyter_client.kernelspec import NATIVE_KERNEL_NAME
from nbclient import NotebookClient
from nbformat import NotebookNode
from pages import ROOT

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
TOLERANCE = 0.05
"""Largest difference of a printed number from the committed one, absolute or relative."""

NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")
TELLTALE = re.compile(
    r"(?<![\w.])/(?:tmp|root|home|Users|work|usr|opt|mnt|private|var)/|[A-Z]:\\|Traceback|\x1b"
    r"|\b\d+(?:\.\d+)? ?(?:ms|s|sec|seconds|minutes)\b|\b\d+:\d\d:\d\d\b|\b0x[0-9a-f]{6,}"
)
"""What no output contains: paths, errors, codes of a terminal, durations, addresses in memory."""

PROGRESS = re.compile(r"^(?:rendering|embedding|grouping).*\n", re.MULTILINE)
"""Lines that commands print every ten seconds."""

OFFLINE = """
import ipaddress, os, sys

def refuse(event, arguments):
    if event in ("socket.connect", "socket.bind", "socket.sendto"):
        host = arguments[1][0] if isinstance(arguments[1], tuple) else None
    elif event == "socket.getaddrinfo":
        host = arguments[0]
    else:
        return
    if host in (None, "localhost"):
        return
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    if not local:
        raise PermissionError(f"notebooks run without a network, not with {host}")

sys.addaudithook(refuse)
if hasattr(os, "sched_setaffinity"):  # on several busy CPUs, the threads of llama.cpp mostly wait
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpus[NUMBER % len(cpus)]})
"""
"""The module `sitecustomize` of the kernel and of the commands that a notebook starts."""


def run(notebook: NotebookNode, directory: Path, cpu: int = 0) -> NotebookNode:
    """Return a copy of a notebook with the outputs of a run on one CPU.

    Args:
        notebook: The notebook.
        directory: Empty directory. The notebook runs in its directory `run`.
        cpu: Number of the CPU.

    Raises:
        CellExecutionError: If a cell raises an error.
        AssertionError: If the kernel, or a command that it started, has a socket to elsewhere.
    """
    executed: NotebookNode = nbformat.from_dict(notebook)
    working = directory / "run"
    working.mkdir()
    (directory / "sitecustomize.py").write_text(OFFLINE.replace("NUMBER", str(cpu)))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CRL_")}
    environment |= {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join(
            [str(directory), str(ROOT), os.environ.get("PYTHONPATH", "")]
        ),
        "IPYTHONDIR": str(directory / "ipython"),
        "TTY_COMPATIBLE": "0",  # commands print neither colours nor moving bars
    }

    def check_sockets(**_: Any) -> None:
        kernel = psutil.Process(client.km.provisioner.pid)
        for process in [kernel, *kernel.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                for used in process.net_connections("inet"):
                    ends = {end.ip for end in (used.laddr, used.raddr) if end}
                    assert ends <= {"127.0.0.1", "::1"}, used

    client = NotebookClient(
        executed,
        timeout=500,
        kernel_name=NATIVE_KERNEL_NAME,
        resources={"metadata": {"path": str(working)}},
        extra_arguments=["--IPKernelApp.log_level=ERROR"],  # it warns that TCP is not encrypted
        record_timing=False,
        coalesce_streams=True,
        on_cell_executed=check_sockets,
    )
    asyncio.run(client.async_execute(env=environment))
    return cleaned(executed)


@contextlib.contextmanager
def run_all() -> Iterator[dict[Path, Future[NotebookNode]]]:
    """Run the notebooks at the same time, each on its own CPU."""
    with tempfile.TemporaryDirectory() as root, ThreadPoolExecutor(len(NOTEBOOKS)) as pool:
        runs = {}
        for cpu, path in enumerate(NOTEBOOKS):
            directory = Path(root, path.stem)
            directory.mkdir()
            runs[path] = pool.submit(run, nbformat.read(path, 4), directory, cpu)
        yield runs


def cleaned(notebook: NotebookNode) -> NotebookNode:
    """Return the notebook without what depends on the machine or on the editor."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = nbformat.from_dict(
        {"kernelspec": kernel, "language_info": {"name": "python"}}
    )
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({k: v for k, v in cell.metadata.items() if k == "tags"})
        for output in cell.get("outputs", []):
            if "metadata" in output:
                output.metadata = nbformat.from_dict({})
    return notebook


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tags(cell: NotebookNode) -> list[str]:
    return list(cell.metadata.get("tags", []))


def text_of(cell: NotebookNode, stream: str = "") -> str:
    """Return the text that a cell printed, or what it printed on one stream."""
    texts = (
        output.get("text") or output.get("data", {}).get("text/plain", "")
        for output in cell.outputs
        if not stream or output.get("name") == stream
    )
    return PROGRESS.sub("", "".join(texts).replace("\r\n", "\n"))


def kinds_of(cell: NotebookNode) -> list[str]:
    """Return the kinds of a cell's outputs, such as `stdout` and `image/png`."""
    return [
        kind for o in cell.outputs for kind in [o.get("name"), *sorted(o.get("data", {}))] if kind
    ]


def same_text(text: str, other: str) -> bool:
    """Return whether two texts are the same up to small differences of numbers."""
    pairs = zip(NUMBER.findall(text), NUMBER.findall(other), strict=False)
    values = [[float(number.replace(",", "")) for number in pair] for pair in pairs]
    return NUMBER.sub("#", text) == NUMBER.sub("#", other) and all(
        abs(one - two) <= TOLERANCE * max(1, abs(one)) for one, two in values
    )


def faults(notebook: NotebookNode) -> list[str]:
    """Return what is wrong with the outputs of a notebook."""
    found = []
    for number, cell in enumerate(code_cells(notebook), 1):
        if cell.execution_count != number:
            found.append(f"[{number}] was not run in order: {cell.execution_count}")
        if any(output.output_type == "error" for output in cell.outputs):
            found.append(f"[{number}] shows an error")
        if bool(text_of(cell, "stderr")) != ("warns" in tags(cell)):
            found.append(f"[{number}] prints on stderr: {text_of(cell, 'stderr')!r}")
        text = text_of(cell)
        telltales = [
            *TELLTALE.findall(text),
            *re.findall(rf"\b{re.escape(platform.node())}\b", text),
        ]
        found += [f"[{number}] shows {telltale!r}" for telltale in telltales if telltale]
    return found


def differences(committed: NotebookNode, executed: NotebookNode) -> list[str]:
    """Return where the committed outputs are not those of a run.

    If the language model answered otherwise, the cells after that are not compared.
    """
    found = []
    pairs = zip(code_cells(committed), code_cells(executed), strict=True)
    for number, (old, new) in enumerate(pairs, 1):
        if kinds_of(old) != kinds_of(new):
            found.append(f"[{number}] {kinds_of(old)} is now {kinds_of(new)}")
        if not same_text(text_of(old), text_of(new)):
            if "language-model" in tags(new):
                break
            found.append(f"[{number}] {text_of(old)!r} is now {text_of(new)!r}")
    return found


def main() -> None:
    """Run the notebooks and save them. One with faults is not saved."""
    with run_all() as runs:
        for path, notebook in runs.items():
            if wrong := faults(notebook.result()):
                sys.exit(f"{path.name}: {wrong}")
            text = nbformat.writes(notebook.result(), indent=1) + "\n"
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
