"""What tests run in child processes, which import it by this name however they are started."""

from __future__ import annotations

import multiprocessing

import numpy as np
import torch

from crl_sdk import Client, Embedder, demo_bundle
from crl_sdk.basis import LanguageModel
from crl_sdk.errors import CrlError

IMAGE = np.full((96, 96, 3), 120, np.uint8)
SECONDS = 120

shared: dict[str, object] = {}


def in_child(method, work, *arguments):
    """Return what a function returns in a child process, or the text of its `CrlError`."""
    context = multiprocessing.get_context(method)
    receiving, sending = context.Pipe(duplex=False)
    child = context.Process(target=answer, args=(sending, work, arguments))
    child.start()
    sending.close()  # a child that dies is then seen at once
    try:
        assert receiving.poll(SECONDS), f"no answer from a child of the method {method}"
        return receiving.recv()
    except EOFError:
        raise AssertionError(f"a child of the method {method} died") from None
    finally:
        child.kill()
        child.join()


def answer(pipe, work, arguments):
    try:
        pipe.send(work(*arguments))
    except CrlError as error:
        pipe.send(f"{type(error).__name__}: {error}")


def embed_here():
    with Embedder.open(demo_bundle()) as embedder:
        return embedder.embed([IMAGE]).universal.shape


def embed_by(engine):
    with Embedder.open(demo_bundle(), engine=engine) as embedder:
        return embedder.engine, embedder.embed([IMAGE]).universal.shape


def embed_with_the_parents():
    return shared["embedder"].embed([IMAGE]).universal.shape


def embed_with(embedder):
    result = embedder.embed([IMAGE], ["color"])
    return embedder.engine, embedder.decode, result["color"]


def ask_with(client):
    return client.model().name


def ask_with_the_parents():
    return shared["client"].model().name


def ask_with_a_new_client(address):
    with Client(address) as client:
        return client.model().name


def log_likelihoods_of_the_parents():
    return shared["llm"].log_likelihoods("A:", ["b"])


def log_likelihoods_here(threads):
    with LanguageModel.open(context=256, threads=threads) as llm:
        return llm.log_likelihoods("A:", ["b"])


class Embedded(torch.utils.data.Dataset):
    """A data set that embeds its items: with the parent's embedder, or with one of its own."""

    def __init__(self, embedder=None):
        self.embedder = embedder

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if self.embedder is None:
            self.embedder = Embedder.open(demo_bundle())
        return torch.from_numpy(self.embedder.embed([IMAGE]).universal[0])


def ask_with_several_threads():
    """Ask with two threads in forked children before and after this process has done so."""
    return {
        "first": in_child("fork", log_likelihoods_here, 2),
        "here": log_likelihoods_here(2),
        "forked": in_child("fork", log_likelihoods_here, 2),
        "one thread": in_child("fork", log_likelihoods_here, 1),
        "forkserver": in_child("forkserver", log_likelihoods_here, 2),
    }
