"""The notebooks of examples/ run, and the committed files show what they print."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook, new_output
from notebooks import (
    NOTEBOOKS,
    cleaned,
    code_cells,
    differences,
    faults,
    kinds_of,
    run,
    run_all,
    text_of,
)
from pages import FOR_USERS, blocks, commands

MAX_BYTES = 300_000


def test_the_tests_of_pages_read_the_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["first-steps", "your-own-pictures"]
    assert set(NOTEBOOKS) <= set(FOR_USERS)
    for path in NOTEBOOKS:
        cells = code_cells(nbformat.read(path, 4))
        assert len(blocks(path, "python")) == len(cells) > 10
        assert "crl demo-data" in [" ".join(words[:2]) for where, words in commands(path)]


@pytest.fixture(scope="module")
def runs() -> Iterator[Mapping[Path, Future[NotebookNode]]]:
    with run_all() as found:
        yield found


@pytest.mark.timeout(600)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_shows_what_is_committed(path, runs):
    committed = nbformat.read(path, 4)
    executed = runs[path].result()
    assert not faults(executed)
    assert not differences(committed, executed), "run: make notebooks"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_notebook_is_clean(path):
    committed = nbformat.read(path, 4)
    nbformat.validate(committed)
    assert not faults(committed), "run: make notebooks"
    assert committed == cleaned(nbformat.from_dict(committed)), "run: make notebooks"
    assert any("image/png" in kinds_of(cell) for cell in code_cells(committed))
    assert path.stat().st_size <= MAX_BYTES
    longest = max(len(cell.source.splitlines()) for cell in code_cells(committed))
    assert longest <= 20, "a cell is too long to be read at a glance"
    for check in (["format", "--check"], ["check"]):
        subprocess.run([sys.executable, "-m", "ruff", *check, str(path)], check=True)


def ran(source: str, directory: Path) -> NotebookNode:
    directory.mkdir(exist_ok=True)
    return run(new_notebook(cells=[new_code_cell(source)]), directory)


def test_an_error_in_a_cell_is_an_error(tmp_path):
    with pytest.raises(CellExecutionError, match="it broke"):
        ran("raise RuntimeError('it broke')", tmp_path)


def test_notebooks_and_their_commands_have_no_network(tmp_path):
    connect = "import socket; socket.create_connection(('192.0.2.1', 80))"
    command = f'import sys\n\n!{{sys.executable}} -c "{connect}"'
    refused = "notebooks run without a network, not with 192.0.2.1"
    assert refused in text_of(ran(command, tmp_path / "command").cells[0])
    with pytest.raises(CellExecutionError, match=refused):
        ran(connect, tmp_path / "notebook")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has other loopback addresses")
def test_sockets_that_python_does_not_open_are_seen(tmp_path):
    source = """
import zmq

context = zmq.Context()
socket = context.socket(zmq.PUB)
socket.bind_to_random_port("tcp://127.0.0.2")
"""
    with pytest.raises(AssertionError, match=r"127\.0\.0\.2"):
        ran(source, tmp_path)


def notebook_that_shows(*outputs: dict[str, Any], cell_tags: tuple[str, ...] = ()) -> NotebookNode:
    cell = new_code_cell(execution_count=1, metadata={"tags": list(cell_tags)})
    cell.outputs = [new_output(**output) for output in outputs]
    return new_notebook(cells=[cell])


def stream(text: str, name: str = "stdout") -> dict[str, Any]:
    return {"output_type": "stream", "name": name, "text": text}


@pytest.mark.parametrize(
    "shown",
    [
        stream("wrote /home/me/report.html"),
        stream("embedded in 1.2 s"),
        stream("rendering ━━━━ 0:00:05"),
        stream("\x1b[2m150 pictures\x1b[0m"),
        stream("<object at 0x7f0011223344>"),
        stream(f"on {platform.node()}"),
        stream("warning: no such text", name="stderr"),
        {"output_type": "error", "ename": "KeyError", "evalue": "1", "traceback": []},
    ],
)
def test_faults_of_outputs_are_found(shown):
    assert faults(notebook_that_shows(shown))


def test_an_intended_warning_is_no_fault_and_its_absence_is():
    warning = stream("the model has never seen images like these", name="stderr")
    assert not faults(notebook_that_shows(warning, cell_tags=("warns",)))
    assert faults(notebook_that_shows(cell_tags=("warns",)))


def test_cells_that_were_not_run_are_found():
    notebook = notebook_that_shows()
    assert not faults(notebook)
    notebook.cells[0].execution_count = None
    assert faults(notebook)


def test_differences_of_outputs_are_found():
    shown = notebook_that_shows(stream("red 0.97, 1,024 bytes"))
    for text in ("red 0.96, 1,025 bytes", "red 0.97, 1,024 bytes"):
        assert not differences(shown, notebook_that_shows(stream(text)))
    for text in ("red 0.87, 1,024 bytes", "blue 0.97, 1,024 bytes", "red 0.97, 1,424 bytes"):
        assert differences(shown, notebook_that_shows(stream(text)))
    picture = {"output_type": "display_data", "data": {"image/png": "AAAA"}}
    assert differences(shown, notebook_that_shows(stream("red 0.97, 1,024 bytes"), picture))
    answered = notebook_that_shows(stream("red, green"), cell_tags=("language-model",))
    otherwise = notebook_that_shows(stream("red, blue"), cell_tags=("language-model",))
    assert not differences(answered, otherwise)
