"""Texts of calls: limits, turns, deadlines and callers that go away."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from crl_sdk import Basis, Client, ClientOptions
from crl_sdk.errors import DeadlineError, InvalidInputError, OverloadedError
from crl_sdk.serving._admission import ServerLimits


def test_two_thousand_texts_of_a_basis_are_made(client):
    texts = [f"text number {i}" for i in range(2000)]
    info = client.create_basis("number", texts, method="cosine")
    assert len(info.texts) + len(Basis.from_bytes(client.get_basis("number").file).merged) == 2000


@pytest.mark.parametrize(
    ("texts", "prompts", "words"),
    [
        (["a"] * 2049, [], "at most 2,048 texts in one call, got 2,049"),
        (["a"], ["{}"] * 129, "at most 128 prompts"),
        (["a", "b" * 4097], [], "texts: expected at most 4,096 characters, item 1 has 4,097"),
        (["a"] * 300, ["{}"] * 100, "300 × 100 = 30,000: send fewer prompts"),
    ],
)
def test_limits_are_checked_before_any_text_is_embedded(client, monkeypatch, texts, prompts, words):
    monkeypatch.setattr(
        "crl_sdk._embedder.Embedder.embed_text", lambda *_, **__: pytest.fail("embedded")
    )
    if not prompts:
        with pytest.raises(InvalidInputError, match=words):
            client.embed_text(texts, truncate=True)
    with pytest.raises(InvalidInputError, match=words):
        client.create_basis("size", texts, prompts=prompts or ["{}"])


def test_an_empty_list_and_blank_texts_are_refused(client):
    for texts in ([], [""], ["a", " "]):
        with pytest.raises(InvalidInputError):
            client.embed_text(texts)


class SlowTexts:
    """A text engine whose batches wait for a gate, and are recorded."""

    def __init__(self, dim):
        self.dim, self.batches = dim, []
        self.gate = threading.Semaphore(0)

    def run(self, tokens):
        assert self.gate.acquire(timeout=60)
        self.batches.append(len(tokens))
        rows = np.zeros((len(tokens), self.dim), np.float32)
        rows[:, 0] = 1
        return rows


@pytest.fixture
def slow(embedder, monkeypatch):
    engine = SlowTexts(embedder.bundle.embedding_dim)
    monkeypatch.setattr(embedder, "_text_engine", engine)
    yield engine
    engine.gate.release(1000)


def in_thread(work):
    outcome = []

    def run():
        try:
            outcome.append(work())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, outcome


def wait_for(condition, seconds=60):
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "waited in vain"
        time.sleep(0.01)


def test_a_short_call_does_not_wait_for_a_long_one(server, slow):
    with Client(server.address) as client, Client(server.address) as other:
        long, long_result = in_thread(lambda: client.embed_text(["a"] * 64 * 6))
        wait_for(lambda: server.pipeline.embedder._text_turn.used == 1)
        short, short_result = in_thread(lambda: other.embed_text(["b"] * 3))
        wait_for(lambda: server.pipeline.embedder._text_turn._waiting or short_result)
        assert not short_result, short_result
        slow.gate.release(2)  # the first batch of the long call, and then the short one
        short.join(60)
        assert slow.batches == [64, 3] and short_result[0].shape[0] == 3 and not long_result
        slow.gate.release(100)
        long.join(60)
        assert long_result[0].shape[0] == 384


def test_a_deadline_ends_the_work_between_batches(server, slow):
    with Client(server.address, ClientOptions(timeout=1.0, retries=0)) as client:
        with pytest.raises(DeadlineError):
            client.embed_text(["a"] * 64 * 6)
        with pytest.raises(DeadlineError):
            client.create_basis("size", [f"text {i}" for i in range(200)])
    wait_for(lambda: server.pipeline.texts._admission.in_progress == 0)  # the server knows it too
    slow.gate.release(100)
    wait_for(lambda: server.pipeline.embedder._text_turn.used == 0)
    assert len(slow.batches) <= 2  # what had begun, and nothing after it
    assert "size" not in server.pipeline.bases.snapshot


def test_a_queue_that_is_full_refuses_at_once(serve, embedder, slow):
    limits = ServerLimits(max_text_queue=100)
    served = serve(embedder, limits=limits)
    options = ClientOptions(retries=0, timeout=60)
    with Client(served.address, options) as client, Client(served.address, options) as other:
        first, result = in_thread(lambda: client.embed_text(["a"] * 90))
        wait_for(lambda: served.pipeline.texts._admission.in_progress == 90)
        with pytest.raises(OverloadedError, match="90 texts are in progress, at most 100 may be"):
            other.embed_text(["b"] * 20)
        slow.gate.release(100)
        first.join(60)
        assert result[0].shape[0] == 90
