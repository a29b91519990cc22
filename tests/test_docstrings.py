"""The examples in the docstrings run and give what they show."""

from __future__ import annotations

import doctest
from importlib import import_module
from pathlib import Path

import pytest

import crl_sdk

ROOT = Path(crl_sdk.__file__).parent
MODULES = sorted(
    ".".join(("crl_sdk", *path.relative_to(ROOT).with_suffix("").parts))
    for path in ROOT.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


def test_public_docstrings_have_examples():
    assert len(MODULES) > 5


@pytest.mark.parametrize("module", MODULES)
def test_examples(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(import_module(module))
    assert result.attempted and not result.failed
