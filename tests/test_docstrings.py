"""Docstrings: their examples run, and they have the form that CONTRIBUTING.md describes."""

from __future__ import annotations

import ast
import doctest
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [
    path
    for folder in ("crl_sdk", "export", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "pb" not in path.relative_to(ROOT).parts
]
WITH_EXAMPLES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in FILES
    if path.is_relative_to(ROOT / "crl_sdk") and ">>> " in path.read_text(encoding="utf-8")
]

SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields):$")
ENTRY = re.compile(r"\*{0,2}[A-Za-z_][\w.]*(?:, \*{0,2}[A-Za-z_][\w.]*)*: (.*)$")
BEGINNING = re.compile(r"[A-Z0-9`'\"(]|gRPC|mTLS")
BAD_OPENINGS = {"Give", "Gives", "Tell", "Tells"}


def docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """Yield each docstring of a file, with where it is."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(
            node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        ) and (docstring := ast.get_docstring(node)):
            yield f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}", docstring


def entries(docstring: str) -> Iterator[str]:
    """Yield the text after `name:` of each entry in the sections, joined to one line."""
    inside, entry = False, ""
    for line in [*docstring.splitlines(), ""]:
        indent = len(line) - len(line.lstrip())
        if entry and line.strip() and indent > 4:
            entry += " " + line.strip()
            continue
        if entry:
            yield entry
            entry = ""
        if not indent and line:
            inside = bool(SECTION.match(line))
        elif inside and indent == 4 and (found := ENTRY.match(line.strip())):
            entry = found[1]


def test_docstrings_have_the_form_of_the_guide():
    wrong = []
    for where, docstring in (each for path in FILES for each in docstrings(path)):
        if docstring.split()[0] in BAD_OPENINGS:
            wrong.append(f"{where}: expected an opening such as 'Return', got {docstring[:60]!r}")
        for entry in entries(docstring):
            if not BEGINNING.match(entry):
                wrong.append(f"{where}: expected a capital letter: {entry[:60]!r}")
            if not entry.endswith("."):
                wrong.append(f"{where}: expected a period at the end: {entry[-60:]!r}")
    assert not wrong, "\n".join(wrong)


def test_the_rules_find_what_is_wrong():
    (first, second) = entries(
        "Do it.\n\nArgs:\n    rows: of it\n        and more\n    name: A name.\n\nNote: x"
    )
    assert (first, second) == ("of it and more", "A name.")
    assert not BEGINNING.match(first) and BEGINNING.match(second)


def test_public_docstrings_have_examples():
    assert len(WITH_EXAMPLES) > 5


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_examples(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(import_module(module))
    assert result.attempted and not result.failed
