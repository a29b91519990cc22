"""The demo model says so when it meets images that are not its own."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from PIL import Image

from crl_export.bundle_files import put_file
from crl_export.demo.scenes import encode_scene, sample_scene
from crl_sdk import Client, Embedder, ModelBundle
from crl_sdk.errors import IntegrityError
from crl_sdk.model._familiar_images import (
    FAMILIAR_IMAGES_FILE,
    FamiliarImages,
    encode_familiar_images,
)


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    """Parts of two photographs."""
    datasets = pytest.importorskip("sklearn.datasets")
    rng = np.random.default_rng(0)
    parts = []
    for name in ("china.jpg", "flower.jpg"):
        whole = Image.fromarray(datasets.load_sample_image(name))
        for _ in range(6):
            x, y = rng.integers(0, 340), rng.integers(0, 127)
            parts.append(whole.crop((x, y, x + 300, y + 300)))
    return parts


@pytest.fixture(scope="module")
def scenes() -> list[bytes]:
    return [encode_scene(sample_scene(seed)) for seed in range(12)]


@pytest.mark.parametrize("count", [1, 4, 12])
def test_photographs_and_scenes_are_told_apart(bundle_copy, photographs, scenes, count, caplog):
    with caplog.at_level(logging.WARNING), Embedder.open(bundle_copy) as embedder:
        embedder.embed(scenes[:count])
        assert embedder.unfamiliar is None and not caplog.records
    with caplog.at_level(logging.WARNING), Embedder.open(bundle_copy) as embedder:
        for _ in range(2):
            embedder.embed(photographs[-count:])
        (record,) = caplog.records  # once, not at each call
    assert embedder.unfamiliar == record.getMessage()
    for words in ("the model crl-demo has never seen", "crl export ViT-B-32", "--bundle clip-b32"):
        assert words in record.getMessage()


def test_photographs_after_many_scenes_are_noticed_too(bundle_copy, photographs, scenes):
    with Embedder.open(bundle_copy) as embedder:
        embedder.embed(scenes * 3)
        assert embedder.unfamiliar is None
        embedder.embed(photographs)
        embedder.embed(photographs)
        assert embedder.unfamiliar is not None


def test_the_server_says_so_in_its_log(serve, bundle_copy, photographs, caplog):
    with Embedder.open(bundle_copy) as embedder:
        server = serve(embedder)
        with caplog.at_level(logging.WARNING), Client(server.address) as client:
            client.embed([*photographs, *(each.rotate(180) for each in photographs)])
    assert "has never seen images like these" in caplog.text


def test_statistics_of_another_model_are_refused(bundle_copy):
    rows = np.random.default_rng(0).standard_normal((50, 6)).astype(np.float32)
    familiar = FamiliarImages.fit(rows, subject="rows", limit=3.0)
    covariance = np.cov(rows.T.astype(np.float64))
    away = (rows - rows.mean(axis=0)).astype(np.float64)
    expected = np.sqrt(np.einsum("ij,jk,ik->i", away, np.linalg.inv(covariance), away))
    np.testing.assert_allclose(familiar.distances(rows), expected, rtol=1e-2)
    bundle = ModelBundle.open(bundle_copy)
    changed = put_file(bundle, FAMILIAR_IMAGES_FILE, encode_familiar_images(familiar))
    with pytest.raises(IntegrityError, match=r"expected mean \(128,\)"):
        _ = changed.familiar_images
    damaged = put_file(changed, FAMILIAR_IMAGES_FILE, b"no safetensors")
    with pytest.raises(IntegrityError, match="not a file of a model's own images"):
        _ = damaged.familiar_images
