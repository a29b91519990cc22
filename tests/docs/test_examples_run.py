"""The examples of README.md and docs/TASKS.md run as they are printed, on rendered scenes."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest
import typer.main
from pages import ROOT, blocks

from crl_sdk import Embedder, demo_bundle
from crl_sdk.cli import app

# The language model lists colours: half a minute, or many on a machine that does other work.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def crl(*words: str) -> None:
    typer.main.get_command(app).main(list(words), prog_name="crl", standalone_mode=False)


@pytest.fixture
def scenes(tmp_path, monkeypatch):
    """A working directory with 300 scenes, as the pages make it."""
    monkeypatch.chdir(tmp_path)
    crl("demo-data", "scenes", "-n", "300")


def test_readme_from_a_criterion_to_named_clusters(scenes, capsys):
    example = blocks(ROOT / "README.md", "python")[0].text
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    exec(compile(example, "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) > 5
    assert any(line.endswith(" red") for line in printed)


def test_readme_with_a_model_and_a_directory_of_the_reader(scenes, capsys, monkeypatch):
    def generate_basis(self, criterion, *, prompts):  # the test above asks the language model
        return self.create_basis(criterion, ["forest", "desert", "ocean"], prompts=prompts)

    monkeypatch.setattr(Embedder, "generate_basis", generate_basis)
    shutil.copytree(demo_bundle(), "clip-b32")
    Path("scenes/images").rename("photos")
    example, other_lines = (block.text for block in blocks(ROOT / "README.md", "python")[:2])
    lines = example.splitlines()
    start, end = (
        next(i for i, line in enumerate(lines) if line.startswith(word))
        for word in ("images =", "found =")
    )
    changed = "\n".join([*lines[:start], other_lines, *lines[end:]])
    exec(compile(changed, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) > 1


def test_the_commands_and_the_first_example_of_tasks(scenes, capsys):
    page = ROOT / "docs/TASKS.md"
    setup, *rest = blocks(page, "")
    for line in setup.text.splitlines()[1:]:
        words = shlex.split(line)
        if words[0] == "printf":
            Path(words[-1]).write_text("\n".join(words[2:-2]) + "\n")
        else:
            crl(*words[1:])
    for block in rest:
        for line in block.text.splitlines():
            words = shlex.split(line, comments=True) if line.startswith(("crl", "head")) else [""]
            if words[0] == "head":
                lines = Path(words[2]).read_text().splitlines()[: int(words[1][1:])]
                Path(words[-1]).write_text("\n".join(lines) + "\n")
            elif words[0] == "crl":
                crl(*words[1:])
    names: dict[str, object] = {}
    exec(compile(blocks(page, "python")[0].text, "TASKS.md", "exec"), names)
    found = names["found"]
    assert (found.choice.k, found.clusters[0].name.text) == (10, "brown")
