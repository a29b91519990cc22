"""A store whose package is not installed says which extra brings it."""

from __future__ import annotations

import sys

import pytest

from crl_sdk.errors import MissingDependencyError
from crl_sdk.vector_stores import open_store


@pytest.mark.parametrize(
    ("address", "package", "extra"),
    [
        ("qdrant://h/x", "qdrant_client", "qdrant"),
        ("lancedb:x", "lancedb", "lancedb"),
        ("postgresql://h/x", "psycopg", "pgvector"),
        ("milvus://h/x", "pymilvus", "milvus"),
    ],
)
def test_missing_packages(monkeypatch, tmp_path, address, package, extra):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=rf"crl-embeddings\[{extra}\]") as caught:
        open_store(address)
    assert caught.value.extra == extra and list(tmp_path.iterdir()) == []
