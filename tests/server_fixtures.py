"""Fixtures: a server in this process on a free local port, and what it serves."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest

from crl_sdk import Client, Embedder, ModelBundle, demo_bundle
from crl_sdk.cli._local_server import parse_ready_line
from crl_sdk.engines._engine_name import EngineName
from crl_sdk.serving._pipeline import Pipeline
from crl_sdk.serving._server import ServerSettings, run_server

COLOR_TEXTS = ["red", "green", "blue", "yellow"]


class Server:
    """A server that runs in an event loop in another thread."""

    def __init__(self, embedder: Embedder, settings: ServerSettings) -> None:
        self._context = run_server(embedder, settings)
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="server")
        self._thread.start()
        try:
            running_server = self.wait(self._context.__aenter__())
        except BaseException:
            self._end()
            raise
        self.address: str = running_server.address
        self.pipeline: Pipeline = running_server.pipeline
        self.metrics_address: str = running_server.metrics_address

    def wait(self, work):
        """Run a coroutine in the server's event loop and return its result."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout=60)

    def stop(self) -> None:
        """Drain and stop the server. It may be called more than once."""
        if self._thread.is_alive():
            self.wait(self._context.__aexit__(None, None, None))
            self._end()

    def _end(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


@pytest.fixture
def serve(tmp_path):
    """Start servers with `serve(embedder, limits=…)`; all stop at the end of the test."""
    with ExitStack() as stack:

        def start(embedder: Embedder, **settings: object) -> Server:
            options = {"address": "127.0.0.1:0", "bases": tmp_path / "bases", "drain_seconds": 2}
            server = Server(embedder, ServerSettings(**{**options, **settings}))
            stack.callback(server.stop)
            return server

        yield start


@pytest.fixture
def server(serve, embedder) -> Server:
    """A server of the demo model with two bases."""
    running_server = serve(embedder)
    with Client(running_server.address) as client:
        client.create_basis("color", COLOR_TEXTS)
        client.create_basis("shape", ["circle", "square", "star"])
    return running_server


@pytest.fixture
def client(server) -> Iterator[Client]:
    with Client(server.address) as connected:
        yield connected


class FakeEngine:
    """An image engine with settable duration and failure, which records its batches."""

    name = EngineName("fake", "gpu", "fp32")  # on a GPU: decoding and the engine take no turns

    def __init__(self, dim: int, seconds: float = 0.0) -> None:
        self.dim, self.seconds, self.fails = dim, seconds, False
        self.entered: list[int] = []
        self.batches: list[int] = []
        self.gate = threading.Event()
        self.gate.set()

    max_columns = None

    def close(self):
        self.closed = True

    def run(self, pixels, weight, bias):
        self.entered.append(len(pixels))
        self.gate.wait(30)
        time.sleep(self.seconds)
        if self.fails:
            raise RuntimeError("the accelerator fell off the bus")
        self.batches.append(len(pixels))
        rows = pixels[:, 0, 0, :1].astype(np.float32) + np.zeros((1, self.dim), np.float32) + 1
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        return rows, rows @ weight + bias


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(ModelBundle.open(demo_bundle()).embedding_dim)


@pytest.fixture
def faked(engine) -> Iterator[Embedder]:
    """The demo bundle with the fake engine."""
    with Embedder(ModelBundle.open(demo_bundle()), engine, lambda: None) as embedder:
        yield embedder


@pytest.fixture
def crl_serve(tmp_path):
    """Start `crl serve` with arguments; return the process and its address."""
    processes = []

    def start(*arguments: object, **variables: str) -> tuple[subprocess.Popen[str], str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("CRL_")}
        process = subprocess.Popen(
            [sys.executable, "-m", "crl_sdk", "serve", *map(str, arguments)],
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**kept, **variables},
        )  # fmt: skip
        processes.append(process)
        timer = threading.Timer(30, process.kill)  # ends the reading below
        timer.start()
        line = process.stdout.readline()
        timer.cancel()
        server = parse_ready_line(line)
        if server is None:
            _, stderr = process.communicate()
            raise AssertionError(f"it ended with {process.returncode}: {line}{stderr}")
        assert (server.model, server.engine) == ("crl-demo", "onnx/cpu/fp32")
        assert server.pid == process.pid and (server.metrics is None or "--metrics" in arguments)
        return process, server.address

    yield start
    for process in processes:
        process.kill()
        process.communicate()
