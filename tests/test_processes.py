"""Processes that are forked or spawned: each object works in them, or says at once why not."""

from __future__ import annotations

import asyncio
import os
import pickle
import threading

import numpy as np
import pytest
import torch
from child_processes import (
    IMAGE,
    SECONDS,
    Embedded,
    ask_with,
    ask_with_a_new_client,
    ask_with_several_threads,
    ask_with_the_parents,
    embed_by,
    embed_here,
    embed_with,
    embed_with_the_parents,
    in_child,
    log_likelihoods_of_the_parents,
    shared,
)
from msgspec import structs

from crl_sdk import AsyncClient, Client, Embedder, demo_bundle
from crl_sdk._lifetime import ForkGuard, Lifetime
from crl_sdk.basis import LanguageModel
from crl_sdk.engines import open_engine
from crl_sdk.engines._ranking import write_ranking
from crl_sdk.engines._selection import measure_engines
from crl_sdk.errors import ClosedError, ForkError, InvalidInputError
from crl_sdk.model import ModelBundle


@pytest.fixture
def address(server):
    return server.address


@pytest.fixture
def used_embedder():
    with Embedder.open(demo_bundle()) as embedder:
        embedder.embed([IMAGE])
        embedder.embed_text(["red"])
        shared["embedder"] = embedder
        yield embedder
    shared.clear()


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_an_embedder_made_in_a_child_works(used_embedder, method):
    assert in_child(method, embed_here) == (1, 128)


def test_openvino_in_a_child_that_was_forked_after_the_parent_used_it():
    """Compiling a model there would wait for ever for threads that only the parent has."""
    bundle = ModelBundle.open(demo_bundle())
    found = measure_engines(bundle, seconds=0.01)
    first = sorted(found.engines, key=lambda each: each.engine, reverse=True)
    write_ranking(bundle, structs.replace(found, engines=tuple(first)))
    with Embedder.open(bundle) as embedder:
        assert embedder.engine == "openvino/cpu/fp32"
        embedder.embed([IMAGE])
        said = in_child("fork", embed_by, "openvino/cpu")
        assert said.startswith("ForkError: OpenVINO was used before this process was forked")
        engine, shape = in_child("fork", embed_by, "auto")
        assert engine == "onnx/cpu/fp32" and shape == (1, 128)
        assert in_child("forkserver", embed_by, "openvino/cpu")[1] == (1, 128)


def test_an_embedder_of_the_parent_says_at_once_that_it_does_not_work(used_embedder):
    said = in_child("fork", embed_with_the_parents)
    assert said.startswith("ForkError: the embedder was made before this process was forked")
    assert "spawn" in said and "forkserver" in said
    assert used_embedder.embed([IMAGE]).universal.shape == (1, 128)  # the parent's still works


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_a_data_loader_whose_workers_make_their_embedder(used_embedder, method):
    loader = torch.utils.data.DataLoader(
        Embedded(), batch_size=2, num_workers=1, multiprocessing_context=method, timeout=SECONDS
    )
    assert [tuple(batch.shape) for batch in loader] == [(2, 128), (2, 128)]


def test_a_data_loader_with_the_embedder_of_the_parent(used_embedder):
    loader = torch.utils.data.DataLoader(
        Embedded(used_embedder), num_workers=1, multiprocessing_context="fork", timeout=SECONDS
    )
    with pytest.raises(ForkError, match="multiprocessing_context='forkserver'"):
        next(iter(loader))


def test_a_data_loader_that_is_given_the_embedder_of_the_parent_opens_it_again(used_embedder):
    loader = torch.utils.data.DataLoader(
        Embedded(used_embedder), batch_size=2, num_workers=1, timeout=SECONDS,
        multiprocessing_context="forkserver",
    )  # fmt: skip
    (first, _), expected = loader, used_embedder.embed([IMAGE]).universal[0]
    np.testing.assert_array_equal(first[0], expected)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_an_embedder_and_a_client_that_are_sent_to_a_child(address, method):
    engine = "openvino/cpu/fp32"
    with Embedder.open(demo_bundle(), engine=engine, threads=1, decode="fast") as embedder:
        basis = embedder.create_basis("color", ["red", "green", "blue"])
        found, decode, rows = in_child(method, embed_with, embedder)
        assert (found, decode) == (engine, "fast")
        np.testing.assert_allclose(rows, embedder.embed([IMAGE], [basis])["color"], atol=1e-5)
    with Client(address) as client:
        assert in_child(method, ask_with, client) == client.model().name


def test_what_cannot_be_sent_to_another_process():
    with Embedder.open(demo_bundle()) as whole:
        parts = Embedder(whole.bundle, whole._image_engine, lambda: None)
        with pytest.raises(InvalidInputError, match=r"made from its parts .* use Embedder.open"):
            pickle.dumps(parts)
        parts.decode_pool.shutdown()
    with pytest.raises(ClosedError):
        pickle.dumps(whole)
    client = Client("127.0.0.1:1")
    client.close()
    with pytest.raises(ClosedError):
        pickle.dumps(client)


def test_clients_in_children(address):
    with Client(address) as client:
        name = client.model().name
        shared["client"] = client
        try:
            said = in_child("fork", ask_with_the_parents)
        finally:
            shared.clear()
        assert said.startswith("ForkError: the client was made before this process was forked")
        said = in_child("fork", ask_with_a_new_client, address)
        assert said.startswith("ForkError: gRPC was used before this process was forked")
        for method in ("spawn", "forkserver"):
            assert in_child(method, ask_with_a_new_client, address) == name
        assert client.model().name == name


def test_a_language_model_of_the_parent():
    with LanguageModel.open() as llm:
        shared["llm"] = llm
        said = in_child("fork", log_likelihoods_of_the_parents)
        shared.clear()
    assert said.startswith("ForkError: the language model was made before")
    with pytest.raises(ClosedError, match="the language model is closed: make a new one"):
        llm.log_likelihoods("A:", ["b"])
    llm.close()  # again


def test_a_language_model_with_several_threads_in_a_child_of_a_parent_that_had_one():
    """OpenMP's threads are not in the child, and it would wait for them for ever.

    The parent is a fresh process, because other tests may have used OpenMP in this one.
    """
    said = in_child("spawn", ask_with_several_threads)
    refused = said.pop("forked")
    assert refused.startswith("ForkError: llama.cpp with several threads was used before this")
    assert "threads=1" in refused and "forkserver" in refused
    for each in said.values():
        assert each == pytest.approx(said["here"], abs=0.5)


ENGINES = ("onnx/cpu/fp32", "openvino/cpu/fp32")


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_of_the_parent_or_a_closed_one(name):
    engine = open_engine(ModelBundle.open(demo_bundle()), name)
    inputs = IMAGE[None], np.zeros((128, 0), np.float32), np.zeros(0, np.float32)

    def run():
        return engine.run(*inputs)[0].shape

    assert run() == (1, 128)
    assert in_child("fork", run).startswith("ForkError: the engine was made before this process")
    engine.close()
    engine.close()
    with pytest.raises(ClosedError, match="the engine is closed: make a new one"):
        run()


def test_an_embedder_that_is_closed_while_it_embeds():
    embedder = Embedder.open(demo_bundle())
    with pytest.raises(ClosedError, match="the embedder is closed"):
        embedder.embed([IMAGE] * 9, batch_size=1, progress=lambda done: embedder.close())


def test_an_embedder_whose_decoding_ends_with_close():
    """`close` cancels the images that wait for a thread."""
    embedder = Embedder.open(demo_bundle())
    busy = [embedder.decode_pool.submit(threading.Event().wait, 1) for _ in range(64)]
    batches = embedder._decoded_batches([IMAGE] * 2, 1)
    closing = threading.Timer(0.1, embedder.close)
    closing.start()
    with pytest.raises(ClosedError, match="the embedder is closed"):
        next(batches)
    closing.join()
    assert any(each.cancelled() for each in busy)


def test_use_after_close():
    embedder = Embedder.open(demo_bundle())
    embedder.close()
    embedder.close()
    for use in (
        lambda: embedder.embed([IMAGE]),
        lambda: embedder.embed([]),
        lambda: embedder.embed_text(["red"]),
        lambda: embedder.embed_pixels(np.zeros((1, 96, 96, 3), np.uint8)),
        lambda: embedder.create_basis("color", ["red", "green"]),
        lambda: embedder.generate_texts("color", llm="not read"),
        lambda: embedder.generate_basis("color", llm="not read"),
    ):
        with pytest.raises(ClosedError, match="the embedder is closed: make a new one"):
            use()
    assert issubclass(ClosedError, RuntimeError)


def test_clients_after_close(address):
    client = Client(address)
    client.close()
    client.close()
    with pytest.raises(ClosedError, match="the client is closed"):
        client.model()
    with pytest.raises(ClosedError, match="the client is closed"):
        next(client.embed_batches([IMAGE]))

    async def use():
        client = AsyncClient(address)
        await client.close()
        await client.close()
        await client.model()

    with pytest.raises(ClosedError, match="the client is closed"):
        asyncio.run(use())


def test_an_async_client_belongs_to_the_loop_of_its_first_call(address):
    client = AsyncClient(address)  # outside a loop

    async def ask():
        return (await client.model()).name

    async def close():
        await client.close()

    first = asyncio.new_event_loop()
    try:
        name = first.run_until_complete(ask())
        with pytest.raises(InvalidInputError, match="make one AsyncClient for each event loop"):
            asyncio.run(ask())
        assert first.run_until_complete(ask()) == name
        first.run_until_complete(close())
    finally:
        first.close()


def test_a_lifetime_ends_with_close_and_does_not_cross_a_fork(monkeypatch):
    life, guard = Lifetime("thing"), ForkGuard("library", "fork first")
    life.require()
    guard.use()
    guard.use()
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert life.forked
    with pytest.raises(ForkError, match="make the thing in this process"):
        life.require()
    with pytest.raises(ForkError, match=r"library was used before .*: fork first, or start"):
        guard.use()
    life.closed = True
    with pytest.raises(ClosedError):
        life.require()
