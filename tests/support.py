"""Helpers for tests of the server: wait for a condition, make images that no cache has seen."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc
from numpy.typing import NDArray

from crl_sdk import Basis
from crl_sdk.basis import BasisDirectory, GeneratedTexts, RankedText

_numbers = count()


def unseen_image() -> NDArray[np.uint8]:
    """Return pixels, shape (96, 96, 3), uint8, that differ from those of every call before."""
    number = next(_numbers)
    pixels = np.full((96, 96, 3), 100, np.uint8)
    pixels[0, :2] = [[number % 256, number // 256 % 256, 0], [number // 65536, 1, 2]]
    return pixels


def health_of(address: str, service: str = "") -> int:
    """Return the status that a server's health service reports."""
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return int(stub.Check(health_pb2.HealthCheckRequest(service=service)).status)


def wait_until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Wait until the condition holds; fail if it does not within so many seconds."""
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "it did not happen in time"
        time.sleep(0.01)


def generated_texts(criterion: str, texts: Sequence[str]) -> GeneratedTexts:
    """What a language model gives that names the same texts in both of its answers."""
    return GeneratedTexts(
        criterion,
        tuple(RankedText(text, 2) for text in texts),
        (),
        2,
        {
            "texts": "generated",
            "model": {"name": "scripted"},
            "seeds": [0, 1],
            "votes": dict.fromkeys(texts, 2),
            "dropped": [],
        },
    )


def basis_file(directory: str | os.PathLike[str], criterion: str) -> Path:
    """Return the file of a criterion in a directory with bases of one model."""
    (path,) = BasisDirectory(directory).files(criterion)
    return path


def save_basis(basis: Basis, directory: str | os.PathLike[str]) -> Path:
    """Save a basis in a directory of bases, and return its file."""
    path = BasisDirectory(directory).path_of(basis.criterion, basis.fingerprint)
    path.parent.mkdir(parents=True, exist_ok=True)
    basis.save(path)
    return path


def log_likelihoods(
    prefix: str, texts: Sequence[str], irrelevant: Sequence[str] = ()
) -> list[float]:
    """What `LanguageModel.log_likelihoods` gives for a model that knows which texts belong."""
    if prefix == "Examples of things:":
        return [-9.0] * len(texts)
    return [-12.0 if text in irrelevant else -4.0 for text in texts]


class Scripted:
    """A model that repeats the given answers in a cycle."""

    name, chats, tells_likelihoods = "scripted", False, True
    tokens, seconds = 0, 0.0

    def __init__(self, *answers: str, irrelevant: Sequence[str] = ()) -> None:
        self.answers, self.asked, self.irrelevant = answers, [], irrelevant

    def complete(self, prompt, grammar, sampling, on_token=None):
        self.asked.append((prompt, sampling))
        if on_token is not None:
            on_token(len(self.asked), 0.5)
        return self.answers[(len(self.asked) - 1) % len(self.answers)]

    chat = complete

    def log_likelihoods(self, prefix, texts):
        return log_likelihoods(prefix, texts, self.irrelevant)

    def describe(self):
        return {"name": self.name}
