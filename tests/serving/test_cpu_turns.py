"""Decoding and the engine take turns: never both at once, and neither waits for ever."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from crl_sdk.serving._cpu_turns import CpuTurns


class Watched:
    """Wraps `CpuTurns`, and checks and logs each use."""

    def __init__(self, max_images: int) -> None:
        self.turns = CpuTurns(max_images, patience=60)
        self.decoding = 0
        self.most_decoding = 0
        self.running = False
        self.log: list[str] = []
        self.lock = threading.Lock()

    def decode(self, seconds: float = 0.0) -> None:
        with self.turns.decoding():
            with self.lock:
                assert not self.running, "decoding while the engine runs"
                self.decoding += 1
                self.most_decoding = max(self.most_decoding, self.decoding)
            time.sleep(seconds)
            with self.lock:
                self.decoding -= 1
                self.log.append("decode")

    def run(self, seconds: float = 0.0) -> None:
        with self.turns.engine():
            with self.lock:
                assert not self.decoding, "the engine runs while something is decoded"
                self.running = True
            time.sleep(seconds)
            with self.lock:
                self.running = False
                self.log.append("run")


@pytest.fixture
def pool():
    with ThreadPoolExecutor(8) as threads:
        yield threads


def test_never_both_at_once(pool):
    watched = Watched(max_images=3)
    runs = pool.submit(lambda: [watched.run(0.0005) for _ in range(50)])
    watched.turns.announce(200)
    decodes = [pool.submit(watched.decode, 0.0002) for _ in range(200)]
    for each in (runs, *decodes):
        each.result(timeout=30)
    assert watched.log.count("run") == 50 and watched.log.count("decode") == 200


def test_images_are_decoded_in_parallel(pool):
    watched = Watched(max_images=8)
    meet = threading.Barrier(3)

    def decode() -> None:
        with watched.turns.decoding():
            meet.wait(timeout=10)  # all three are inside, or this fails

    watched.turns.announce(3)
    for each in [pool.submit(decode) for _ in range(3)]:
        each.result(timeout=30)


def test_the_engine_waits_for_what_is_expected(pool):
    watched = Watched(max_images=8)
    watched.turns.announce(2)
    engine = pool.submit(watched.run)
    time.sleep(0.05)
    assert not engine.done()
    for _ in range(2):
        pool.submit(watched.decode).result(timeout=30)
    engine.result(timeout=30)
    assert watched.log == ["decode", "decode", "run"]


def test_the_engine_gets_its_turn_however_much_is_expected(pool):
    watched = Watched(max_images=4)
    watched.turns.announce(1000)
    engine = pool.submit(watched.run)
    time.sleep(0.05)  # now the engine waits
    decodes = [pool.submit(watched.decode) for _ in range(6)]
    engine.result(timeout=30)
    for each in decodes:
        each.result(timeout=30)
    assert watched.log == ["decode"] * 4 + ["run"] + ["decode"] * 2


def test_a_failure_ends_the_turn(pool):
    turns = CpuTurns(2)
    turns.announce(1)
    with pytest.raises(ValueError), turns.decoding():
        raise ValueError
    with pytest.raises(ValueError), turns.engine():
        raise ValueError
    turns.announce(1)
    with turns.decoding():
        pass
    with turns.engine():
        pass


def test_an_idle_engine_delays_nobody(pool):
    watched = Watched(max_images=1)
    watched.turns.announce(20)
    for each in [pool.submit(watched.decode) for _ in range(20)]:
        each.result(timeout=30)
    assert watched.log == ["decode"] * 20


def test_one_slow_image_does_not_hold_up_the_engine(pool):
    turns = CpuTurns(8, patience=0.01)
    release = threading.Event()
    inside = threading.Event()

    def decode() -> None:
        with turns.decoding():
            inside.set()
            assert release.wait(timeout=30)

    turns.announce(1)
    slow = pool.submit(decode)
    assert inside.wait(timeout=30)
    with turns.engine():  # the engine runs nevertheless
        assert not slow.done()
    release.set()
    slow.result(timeout=30)
