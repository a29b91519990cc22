"""A server under load while faults come and go: no call gets a status that it should not.

`make soak` runs it for ten minutes, `python tests/soak.py --seconds 30` for half a minute. A call
may fail only in the way in which a fault during it explains, and between two faults calls of every
kind must succeed. Without root it leaves out the full disk.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import psutil
from PIL import Image

from crl_sdk import Client, ClientOptions
from crl_sdk.basis._llm_files import find_model
from crl_sdk.errors import (
    BasisError,
    CrlError,
    DeadlineError,
    EngineError,
    GenerationError,
    ImageError,
    NotOfferedError,
    OverloadedError,
    UnknownCriterionError,
)

RECOVERY = 300.0
"""Seconds after a fault within which a call of every kind must succeed."""


@dataclass(frozen=True)
class Fault:
    """Something that is switched on for a while.

    Attributes:
        name: Its name.
        switch: Return a context in which it is on.
        explains: Errors that calls may get meanwhile.
    """

    name: str
    switch: Callable[[], AbstractContextManager[None]]
    explains: tuple[type[CrlError], ...]


class Faults:
    """Which faults are on, and which errors they explain. Threads share it."""

    def __init__(self) -> None:
        """Begin with no fault."""
        self._explained: dict[int, tuple[type[CrlError], ...]] = {}
        self._count = 0
        self.switched: Counter[str] = Counter()

    @contextmanager
    def on(self, fault: Fault) -> Iterator[None]:
        """Switch a fault on for the block."""
        self._count += 1
        self._explained[self._count] = fault.explains
        with fault.switch():
            yield
        self.switched[fault.name] += 1
        self._explained[self._count + 1] = ()
        self._count += 1

    @property
    def now(self) -> int:
        """The number of switches so far."""
        return self._count

    def explain(self, error: CrlError, since: int) -> bool:
        """Return whether a fault that was on after a number of switches explains an error."""
        kinds = [kind for i in range(since, self._count + 1) for kind in self._explained.get(i, ())]
        return isinstance(error, tuple(kinds))


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
        calm: The last number of switches of faults during which a whole call succeeded.
    """

    def __init__(
        self, name: str, call: Callable[[Client], object], allowed: tuple[type[CrlError], ...] = ()
    ) -> None:
        """Store what to call, and which errors may come without any fault."""
        self.name, self._call, self._allowed = name, call, allowed
        self.ended: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.calm = -1

    def run(self, address: str, faults: Faults, stop: threading.Event, pause: float) -> None:
        """Call until the event is set, with a pause in seconds after each call."""
        with Client(address, ClientOptions(timeout=60, retries=0)) as client:
            while not stop.wait(pause):
                began = faults.now
                try:
                    self._call(client)
                    self.ended["OK"] += 1
                    if faults.now == began:
                        self.calm = began
                except (CrlError, AssertionError) as error:
                    expected = isinstance(error, CrlError) and (
                        isinstance(error, self._allowed) or faults.explain(error, began)
                    )
                    kind = type(error).__name__
                    self.ended[kind if expected else f"wrong: {kind}"] += 1
                    if not expected:
                        self.wrong.append(f"{self.name}: {kind}: {error}")


def loads(generate: bool) -> list[Load]:
    """Return all kinds of calls. Each checks what it gets."""
    good, large, broken = encoded((320, 240)), encoded((3000, 2000), mode="RGBA"), b"\x89PNG broken"
    rng = random.Random(0)

    def embed(client: Client) -> None:
        images = [good, broken, np.zeros((96, 96, 3), np.uint8), large]
        result = client.embed(images, ["color"], on_error="collect")
        assert 1 in result.errors and 2 not in result.errors
        assert np.isfinite(result["color"][result.ok]).all()
        for failed in set(result.errors) - {1}:  # without memory, a large image fails alone
            raise result.errors[failed]

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

    def write(client: Client) -> None:
        try:
            client.generate_basis("mood", timeout=300)
        except NotOfferedError:
            assert not generate
        time.sleep(0.2)

    return [
        Load("embed", embed),
        Load("embed_text", texts),
        Load("create_basis", put),
        Load("delete_basis", delete, (UnknownCriterionError,)),
        Load("embed with changing bases", use, (UnknownCriterionError,)),
        Load("generate_basis", write),
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
def read_only(folder: Path) -> Iterator[None]:
    """Forbid changes of a directory."""
    folder.chmod(0o500)
    try:
        yield
    finally:
        folder.chmod(0o700)


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
def lost_model(model: Path) -> Iterator[None]:
    """Take the file of the language model away."""
    hidden = model.with_suffix(".hidden")
    model.rename(hidden)
    try:
        yield
    finally:
        hidden.rename(model)


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


def obeying_modes() -> list[str] | None:
    """Return a command that runs another one so that directories can be closed to it, or None."""
    if os.geteuid() != 0:
        return []
    command = ["setpriv", "--bounding-set", "-dac_override"]
    works = (
        shutil.which("setpriv") and not subprocess.run([*command, "true"], check=False).returncode
    )
    return command if works else None


def start(
    stack: ExitStack, obeying: list[str], bases: Path, model: Path | None, log: IO[str]
) -> tuple[subprocess.Popen[str], str]:
    """Start a server, which is killed with the stack; return it and its address."""
    command = [*obeying, sys.executable, "-m", "crl_sdk", "serve"]
    command += ["--address", "127.0.0.1:0", "--bases", str(bases), "--cache-mb", "1"]
    command += ["--generate", "--llm", str(model)] if model is not None else []
    server = stack.enter_context(
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    )
    stack.callback(server.kill)
    assert server.stdout is not None
    return server, json.loads(server.stdout.readline())["address"]


def soak(seconds: float, fault_seconds: float, generate: bool) -> list[str]:
    """Run a server under load and faults; print what came of it.

    Args:
        seconds: Least number of seconds. Every fault comes at least once.
        fault_seconds: Seconds that a fault lasts.
        generate: Whether the server has a language model.

    Returns:
        Calls that ended with what they should not, in words.
    """
    stop, faults = threading.Event(), Faults()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bases, model = folder / "bases", folder / "model.gguf"
        bases.mkdir()
        small = stack.enter_context(disk_of_its_own(bases))
        log = stack.enter_context((folder / "log").open("w+"))
        obeying = obeying_modes()
        if generate:
            shutil.copyfile(find_model(None), model)
        server, address = start(stack, obeying or [], bases, model if generate else None, log)
        with Client(address) as client:
            client.create_basis("color", ["red", "green", "blue"])
        slow = (OverloadedError, DeadlineError)
        known = [
            Fault("busy processors", busy_processors, slow),
            Fault(
                "little memory",
                lambda: little_memory(server.pid),
                (*slow, ImageError, EngineError, GenerationError, BasisError),
            ),
        ]
        if small:
            known.append(Fault("full disk", lambda: full_disk(bases), (BasisError,)))
        if obeying is not None:
            known.append(Fault("read-only directory", lambda: read_only(bases), (BasisError,)))
        if generate:
            known.append(Fault("lost model", lambda: lost_model(model), (GenerationError,)))
        running = loads(generate)
        pause = 0.1 if generate else 0.0  # the language model needs a processor
        threads = [
            threading.Thread(target=each.run, args=(address, faults, stop, pause))
            for each in running
        ]
        for thread in threads:
            thread.start()
        wrong: list[str] = []
        ends = time.monotonic() + seconds
        while server.poll() is None and (
            time.monotonic() < ends or faults.switched.total() < len(known)
        ):
            fault = known[faults.switched.total() % len(known)]
            with faults.on(fault):
                time.sleep(fault_seconds)
            missing = wait_for_success(running, faults.now, server)
            if missing:
                wrong.append(f"no success of {', '.join(missing)} after the fault: {fault.name}")
                break
        stop.set()
        for thread in threads:
            thread.join()
        wrong += [text for each in running for text in each.wrong]
        if server.poll() is not None:
            log.seek(0)
            wrong.append(f"the server ended with {server.returncode}: {log.read()[-2000:]}")
    for each in running:
        print(f"{each.name}: {', '.join(f'{what} {n}' for what, n in each.ended.most_common())}")
    print(f"faults: {', '.join(f'{name} {n}' for name, n in faults.switched.items())}")
    print(f"wrong statuses: {len(wrong)}")
    return wrong


def wait_for_success(running: list[Load], now: int, server: subprocess.Popen[str]) -> list[str]:
    """Wait until a call of every kind succeeded; return the names of those of which none did."""
    ends = time.monotonic() + RECOVERY
    while missing := [each.name for each in running if each.calm < now]:
        if time.monotonic() > ends or server.poll() is not None:
            return missing
        time.sleep(0.05)
    return []


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
