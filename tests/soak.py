"""A server under load while faults come and go: no call gets a status that it should not.

`make soak` runs it for ten minutes, `python tests/soak.py --seconds 30` for half a minute. Without
root it leaves out the faults of the disk.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from crl_sdk import Client, ClientOptions
from crl_sdk.errors import (
    BasisError,
    BasisStoreError,
    CrlError,
    DeadlineError,
    GenerationError,
    ImageTooLargeError,
    NotOfferedError,
    OverloadedError,
    UnknownCriterionError,
)

BUSY = (OverloadedError, DeadlineError)
"""Errors that every call may get while the machine is busy."""


def encoded(size: tuple[int, int], form: str = "PNG", mode: str = "RGB") -> bytes:
    """Return an encoded image of noise."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(data, form)
    return data.getvalue()


class Load:
    """Calls of one kind, made in a thread, and how they ended.

    Attributes:
        ended: Number of calls by what they ended with.
        wrong: Calls that ended with what they should not, in words.
    """

    def __init__(self, name: str, call: Callable[[Client], object], allowed: tuple[type, ...]):
        """Store what to call, and which errors may come."""
        self.name, self._call, self._allowed = name, call, allowed
        self.ended: Counter[str] = Counter()
        self.wrong: list[str] = []

    def run(self, address: str, stop: threading.Event) -> None:
        """Call until the event is set."""
        with Client(address, ClientOptions(timeout=20, retries=0)) as client:
            while not stop.is_set():
                try:
                    self._call(client)
                    self.ended["OK"] += 1
                except (*self._allowed, *BUSY) as error:
                    self.ended[type(error).__name__] += 1
                except (CrlError, AssertionError) as error:
                    self.ended[f"wrong: {type(error).__name__}"] += 1
                    self.wrong.append(f"{self.name}: {type(error).__name__}: {error}")


def loads() -> list[Load]:
    """Return all kinds of calls. Each checks what it gets."""
    good, large, broken = encoded((320, 240)), encoded((3000, 2000), mode="RGBA"), b"\x89PNG broken"
    rng = random.Random(0)

    def embed(client: Client) -> None:
        images = [good, broken, np.zeros((96, 96, 3), np.uint8), large]
        result = client.embed(images, ["color"], on_error="collect")
        assert 1 in result.errors and 2 not in result.errors
        # without memory, a large image may fail, and it alone
        assert set(result.errors) <= {0, 1, 3} and np.isfinite(result["color"][result.ok]).all()

    def texts(client: Client) -> None:
        rows = client.embed_text([f"text {i}" for i in range(rng.randint(1, 300))])
        assert np.isfinite(rows).all()

    def put(client: Client) -> None:
        client.create_basis(f"name {rng.randint(0, 3)}", ["red", "green", f"blue {rng.random()}"])

    def delete(client: Client) -> None:
        client.delete_basis(f"name {rng.randint(0, 3)}")
        time.sleep(0.05)

    def use(client: Client) -> None:
        client.embed([good], [f"name {rng.randint(0, 3)}"])

    def generate(client: Client) -> None:
        client.generate_basis("mood", timeout=20)
        time.sleep(1)

    disk = (BasisStoreError, BasisError)
    return [
        Load("embed", embed, (ImageTooLargeError,)),
        Load("embed_text", texts, ()),
        Load("create_basis", put, disk),
        Load("delete_basis", delete, (UnknownCriterionError, *disk)),
        Load("embed with changing bases", use, (UnknownCriterionError,)),
        Load("generate_basis", generate, (NotOfferedError, GenerationError, *disk)),
    ]


@contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """Fill the file system of a directory."""
    filler = folder / "filler"
    with contextlib.suppress(OSError), filler.open("wb") as file:
        while True:
            file.write(bytes(4096))
            file.flush()
    try:
        yield
    finally:
        filler.unlink(missing_ok=True)


@contextmanager
def little_memory(server: int) -> Iterator[None]:
    """Leave the server little address space beyond what it has."""
    process = psutil.Process(server)
    before = process.rlimit(resource.RLIMIT_AS)
    process.rlimit(resource.RLIMIT_AS, (process.memory_info().vms + (48 << 20), before[1]))
    try:
        yield
    finally:
        process.rlimit(resource.RLIMIT_AS, before)


@contextmanager
def busy_processors() -> Iterator[None]:
    """Run two processes that do nothing but compute."""
    with ExitStack() as stack:
        for _ in range(2):
            hog = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(hog.kill)
        yield


@contextmanager
def disk_of_its_own(folder: Path) -> Iterator[bool]:
    """Mount a small file system at a directory. Yields whether that was possible."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    done = os.geteuid() == 0 and subprocess.run(mount, check=False).returncode == 0
    try:
        yield done
    finally:
        if done:
            subprocess.run(["umount", str(folder)], check=True)


def soak(seconds: float, fault_seconds: float, generate: bool) -> list[str]:
    """Run a server under load and faults; print what came of it. Returns the wrong endings."""
    stop = threading.Event()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "bases").mkdir()
        small = stack.enter_context(disk_of_its_own(folder / "bases"))
        log = stack.enter_context((folder / "log").open("w+"))
        command = [sys.executable, "-m", "crl_sdk", "serve", "--address", "127.0.0.1:0"]
        command += ["--bases", str(folder / "bases"), "--cache-mb", "1"]
        command += ["--generate"] if generate else []
        server = stack.enter_context(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        )
        stack.callback(server.kill)
        assert server.stdout is not None
        address = json.loads(server.stdout.readline())["address"]
        with Client(address) as client:
            client.create_basis("color", ["red", "green", "blue"])
        running = loads()
        threads = [threading.Thread(target=each.run, args=(address, stop)) for each in running]
        for thread in threads:
            thread.start()
        faults: list[tuple[str, Callable[[], contextlib.AbstractContextManager[None]]]] = [
            ("busy processors", busy_processors),
            ("little memory", lambda: little_memory(server.pid)),
        ]
        if small:
            bases = folder / "bases"
            faults.append(("full disk", lambda: full_disk(bases)))
        ends, switched = time.monotonic() + seconds, Counter[str]()
        try:
            while time.monotonic() < ends and server.poll() is None:
                name, fault = faults[sum(switched.values()) % len(faults)]
                with fault():
                    stop.wait(fault_seconds)
                switched[name] += 1
                stop.wait(fault_seconds / 2)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        wrong = [text for each in running for text in each.wrong]
        if server.poll() is not None:
            log.seek(0)
            wrong.append(f"the server ended with {server.returncode}: {log.read()[-2000:]}")
        with contextlib.suppress(CrlError), Client(address) as client:
            rows = client.embed([encoded((320, 240))], ["color"])["color"]  # all faults are off
            assert np.isfinite(rows).all()
    for each in running:
        print(f"{each.name}: {', '.join(f'{what} {n}' for what, n in each.ended.most_common())}")
    print(f"faults: {', '.join(f'{name} {n}' for name, n in switched.items())}")
    print(f"wrong statuses: {len(wrong)}")
    return wrong


def main() -> None:
    """Run the soak, and exit with 1 after a wrong status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--fault-seconds", type=float, default=5.0)
    parser.add_argument("--generate", action="store_true", help="also generate bases")
    arguments = parser.parse_args()
    wrong = soak(arguments.seconds, arguments.fault_seconds, arguments.generate)
    print("\n".join(wrong[:20]))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
