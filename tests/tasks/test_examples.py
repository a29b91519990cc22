"""The examples in the docstrings run and give what they show."""

from __future__ import annotations

import doctest
from importlib import import_module

import pytest

pytest.importorskip("sklearn")


@pytest.mark.parametrize("module", ["_clustering", "_few_shot", "_metrics", "_retrieval"])
def test_examples(module):
    result = doctest.testmod(import_module(f"crl_sdk.tasks.{module}"))
    assert result.attempted and not result.failed
