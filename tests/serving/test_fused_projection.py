"""On a GPU engine, the server's bases go through the run that embeds the images."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from server_fixtures import COLOR_TEXTS

from crl_sdk import AsyncClient, Client
from crl_sdk.projection import Projection
from crl_sdk.serving._bases import StoredBasis
from crl_sdk.serving._projection_pack import BasesInUse, EngineRow, ProjectionPack
from support import unseen_image

TOLERANCE = 1e-5
"""Largest difference of a fused embedding from the NumPy definition, in float32."""


@pytest.fixture
def applied(monkeypatch):
    """Numbers of rows that NumPy projected, call by call."""
    rows: list[int] = []
    apply = Projection.apply

    def counted(self, embeddings):
        rows.append(len(embeddings))
        return apply(self, embeddings)

    monkeypatch.setattr(Projection, "apply", counted)
    return rows


@pytest.fixture
def widths(engine):
    """Numbers of columns of the engine's runs."""
    found: list[int] = []
    run = engine.run

    def recorded(pixels, weight, bias):
        found.append(weight.shape[1])
        return run(pixels, weight, bias)

    engine.run = recorded
    return found


@pytest.fixture
def make(embedder):
    """A function that makes a basis of the demo model."""

    def basis(criterion, texts, **options):
        return embedder.create_basis(criterion, texts, load=False, **options)

    return basis


def test_the_engine_projects_and_numpy_only_what_comes_from_the_cache(
    serve, faked, make, widths, applied
):
    server = serve(faked)
    images = [unseen_image() for _ in range(3)]
    with Client(server.address) as client:
        client.put_basis(make("color", COLOR_TEXTS).to_bytes())
        client.put_basis(make("shape", ["disc", "square", "star"], post="standardise").to_bytes())
        alone = client.embed(images[:1], ["color"])
        del applied[:]
        both = client.embed(images[1:], ["shape", "color"])
        assert not applied and widths[-1] == both["color"].shape[1] + both["shape"].shape[1]
        again = client.embed(images, ["shape", "color"])
        assert applied == [3, 3]  # all three come from the cache
        assert alone["color"].shape[1] in widths[:-1]  # before, only what was in use
    for name in ("color", "shape"):
        np.testing.assert_allclose(both[name], again[name][1:], atol=TOLERANCE)
    np.testing.assert_allclose(alone["color"], again["color"][:1], atol=TOLERANCE)


def test_a_basis_that_changes_while_images_wait(serve, faked, engine, make, applied):
    """The image that waited gets the version that its call saw; the next one gets the new one."""
    server = serve(faked)
    old, new = make("color", COLOR_TEXTS), make("color", ["red thing", "blue", "a green thing"])

    async def swap():
        async with AsyncClient(server.address) as client:
            await client.put_basis(old.to_bytes())
            engine.gate.clear()
            busy = asyncio.create_task(client.embed([unseen_image()]))
            while not server.pipeline.batcher.running_seconds:
                await asyncio.sleep(0.01)
            waits = asyncio.create_task(client.embed([unseen_image()], ["color"]))
            while server.pipeline.batcher.depth < 1:
                await asyncio.sleep(0.01)
            await client.put_basis(new.to_bytes())
            later = asyncio.create_task(client.embed([unseen_image()], ["color"]))
            while server.pipeline.batcher.depth < 2:
                await asyncio.sleep(0.01)
            engine.gate.set()
            await busy
            return await waits, await later

    waited, later = asyncio.run(asyncio.wait_for(swap(), 60))
    assert applied == [1]  # the run had the new version, so NumPy projected the image that waited
    for reply, basis in ((waited, old), (later, new)):
        assert reply.basis_sha256["color"] == basis.sha256()
        expected = basis.projection.apply(reply.universal)
        np.testing.assert_allclose(reply["color"], expected, atol=TOLERANCE)


def stored(name: str, columns: int, dim: int = 8, seed: int = 0) -> StoredBasis:
    """Return a basis with a given number of columns."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((dim, columns)).astype(np.float32)
    projection = Projection(weight, np.zeros(columns, np.float32), "none")

    class OfSize:
        criterion = name

    basis = OfSize()
    basis.projection = projection
    return StoredBasis(basis, f"{name} {columns} {seed}")


def test_the_bases_in_use_are_those_named_last():
    bases = {name: stored(name, 4) for name in "abcde"}
    in_use = BasesInUse(8, max_columns=10)
    assert in_use.pack.weight.shape == (8, 0)
    in_use.use([bases["b"], bases["a"]], bases)
    first = in_use.pack
    assert list(first.columns) == ["a 4 0", "b 4 0"] and first.weight.shape == (8, 8)
    in_use.use([bases["a"]], bases)
    assert in_use.pack is first  # nothing is copied to the GPU again
    in_use.use([bases["c"]], bases)
    assert list(in_use.pack.columns) == ["a 4 0", "c 4 0"]  # 12 columns are too many
    in_use.use([stored("d", 11)], bases | {"d": stored("d", 11)})
    assert not in_use.pack.columns  # too wide for a run: NumPy projects
    in_use.use([bases["a"], bases["e"]], {"e": bases["e"]})  # a was deleted meanwhile
    assert list(in_use.pack.columns) == ["e 4 0"]


def test_a_plan_with_a_basis_compiled_in_projects_onto_no_other():
    bases = {name: stored(name, 4) for name in "ab"}
    in_use = BasesInUse(8, max_columns=4, only="b 4 0")
    in_use.use(list(bases.values()), bases)
    assert list(in_use.pack.columns) == ["b 4 0"]


def test_columns_of_another_version_are_not_taken():
    old, new = stored("a", 3, seed=1), stored("a", 3, seed=2)
    row = EngineRow(
        np.ones(8, np.float32), np.arange(3, dtype=np.float32), ProjectionPack.of([new], 8)
    )
    assert row.columns_of(old) is None
    assert row.columns_of(new).tolist() == [0, 1, 2]
