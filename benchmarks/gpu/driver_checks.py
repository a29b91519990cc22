"""Checks of `crl_sdk.engines._cuda`: memory, copies, graphs and errors of the real driver."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from crl_sdk.engines import _cuda as cuda
from crl_sdk.errors import ClosedError, EngineError


def check_copies(megabytes: int = 64) -> dict[str, Any]:
    """Copy to the GPU and back, from page-locked and from ordinary memory.

    Raises:
        AssertionError: If a byte differs.
    """
    gpu = cuda.CudaDevice.open()
    try:
        rng = np.random.default_rng(0)
        size = megabytes << 20
        pinned = gpu.pinned((size,), np.uint8)
        assert not pinned.any(), "page-locked memory is not zeroed"
        pinned[...] = rng.integers(0, 256, size, np.uint8)
        back, plain = gpu.pinned((size,), np.uint8), np.empty(size, np.uint8)
        address = gpu.allocate(size, "a test")
        gpu.upload(address, pinned)
        gpu.download(back, address)
        gpu.download(plain, address)
        gpu.wait()
        np.testing.assert_array_equal(back, pinned)
        np.testing.assert_array_equal(plain, pinned)
        gpu.free(address)
        return {"bytes": size}
    finally:
        gpu.close()


def check_graphs(runs: int = 50) -> dict[str, Any]:
    """Record copies as a graph and launch it again and again with other data.

    Raises:
        AssertionError: If a launch returns the data of another one.
    """
    gpu = cuda.CudaDevice.open()
    try:
        source, target = gpu.pinned((1 << 16,), np.float32), gpu.pinned((1 << 16,), np.float32)
        address = gpu.allocate(source.nbytes, "a test")

        def work() -> None:
            gpu.upload(address, source)
            gpu.download(target, address)

        launch = gpu.capture(work)
        for number in range(1, runs + 1):
            source[...] = number
            launch()
            gpu.wait()
            assert (target == number).all(), f"launch {number} returned {target[0]}"
        return {"launches": runs}
    finally:
        gpu.close()


def check_threads(count: int = 4) -> dict[str, Any]:
    """Use one GPU from several threads in turn, each of which enters the context.

    Raises:
        AssertionError: If a thread fails.
    """
    gpu, failures, turn = cuda.CudaDevice.open(), [], threading.Lock()

    def work(number: int) -> None:
        try:
            with turn:
                gpu.enter()
                address = gpu.allocate(4096, "a test")
                given, got = np.full(1024, number, np.float32), np.empty(1024, np.float32)
                gpu.upload(address, given)
                gpu.download(got, address)
                gpu.wait()
                gpu.free(address)
            assert (got == number).all()
        except Exception as error:
            failures.append(repr(error))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    try:
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    finally:
        gpu.close()
    assert not failures, failures
    return {"threads": count}


def check_errors() -> dict[str, Any]:
    """Ask for what the driver must refuse.

    Raises:
        AssertionError: If an error is missing or says something else.
    """
    gpu = cuda.CudaDevice.open()
    refused: dict[str, str] = {}
    try:
        for name, attempt in (
            ("more memory than there is", lambda: gpu.allocate(1 << 45, "a test")),
            ("a kernel that is none", lambda: gpu.function(b"not a kernel\0", "none")),
        ):
            try:
                attempt()
            except EngineError as error:
                refused[name] = str(error)
            else:
                raise AssertionError(f"{name} was not refused")
        assert "memory is full" in refused["more memory than there is"], refused
    finally:
        gpu.close()
    gpu.close()  # may be called twice
    try:
        gpu.enter()
    except ClosedError as error:
        refused["a closed GPU"] = str(error)
    else:
        raise AssertionError("a closed GPU was not refused")
    return refused


def check_memory_is_returned(rounds: int = 5, megabytes: int = 256) -> dict[str, Any]:
    """Open and close the GPU repeatedly; the free memory must not shrink from round to round.

    Raises:
        AssertionError: If the last round leaves less free memory than the first.
    """
    import torch

    free = []
    for _ in range(rounds):
        gpu = cuda.CudaDevice.open()
        gpu.allocate(megabytes << 20, "a test")
        gpu.pinned((1 << 20,), np.uint8)
        gpu.close()
        free.append(torch.cuda.mem_get_info()[0])
    assert free[-1] >= free[0], free
    return {"free_bytes": free}
