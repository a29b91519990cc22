"""Tests with real Ray clusters and vector stores: `make test-scale` installs what they need.

Elsewhere they are skipped.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

MISSING = [name for name in ("ray", "lancedb", "qdrant_client", "pymilvus") if not find_spec(name)]
"""What `make test-scale` installs and is not here."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests of this folder, unless they have an environment of their own."""
    here = Path(__file__).parent
    for item in items:
        if MISSING and here in item.path.parents and here / "triton" not in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="make test-scale installs what it needs"))
