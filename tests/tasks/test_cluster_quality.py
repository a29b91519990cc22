"""Checks of cluster quality, on planted data and on the demo world."""

from __future__ import annotations

import numpy as np
import pytest

from crl_export.demo.scenes import render_scene, sample_scene
from crl_sdk import Embedder, demo_bundle
from crl_sdk.errors import InvalidInputError
from crl_sdk.projection._projection import normalise_rows
from crl_sdk.tasks._cluster_quality import MIN_IMAGES, assess_clusters, separation_gain
from crl_sdk.tasks._kmeans import kmeans, silhouette

sklearn_silhouette = pytest.importorskip("sklearn.metrics").silhouette_score
D = 32


def planted(n=300, seed=0):
    """Return images in five groups along the first four axes, with noise along all others."""
    rng = np.random.default_rng(seed)
    rows = 0.05 * rng.standard_normal((n, D))
    rows[:, :4] += np.concatenate([np.eye(4), -np.ones((1, 4))])[rng.integers(0, 5, n)]
    return rows.astype(np.float32)


def test_separation_is_the_silhouette_minus_that_of_random_directions():
    rng = np.random.default_rng(1)
    noise = rng.standard_normal((300, D)).astype(np.float32)
    drawn = normalise_rows(noise @ rng.standard_normal((D, 5)).astype(np.float32), "l2")
    labels, _ = kmeans(drawn, 5, starts=3)
    assert abs(separation_gain(noise, drawn, labels, 5)) < 0.05  # these are random directions too
    images = planted()
    rows = normalise_rows(images[:, :4], "l2")
    labels, _ = kmeans(rows, 5, starts=3)
    own = sklearn_silhouette(rows, labels)
    gain = separation_gain(images, rows, labels, 5)
    assert 0.2 < gain < own and gain == separation_gain(images, rows, labels, 5)
    assert silhouette(rows, labels) == pytest.approx(own, abs=1e-6)
    assert silhouette(rows, np.zeros(300, np.int64)) == 0.0


def test_a_basis_along_the_differences_is_reliable_and_one_across_them_is_not():
    images, axes = planted(), np.eye(D, dtype=np.float32)
    good = assess_clusters(images, images @ axes[:, :4], axes[:4], k=5)
    assert good.reasons == () and good.separation > 0.2 and good.undescribed <= 0.2
    bad = assess_clusters(images, images @ axes[:, 8:14], axes[8:14])
    assert "may not see" in bad.reasons[0]
    lacking = assess_clusters(images, images @ axes[:, :4], axes[8:14])
    assert lacking.undescribed > 0.4 and "texts may be missing" in lacking.reasons[-1]


def test_the_demo_world():
    """Clusters by shape are reliable. Those by background, which the model hardly sees, are not."""
    with Embedder.open(demo_bundle(), engine="onnx/cpu/fp32") as embedder:
        side = embedder.bundle.preprocess.height
        scenes = np.stack([render_scene(sample_scene(seed), side) for seed in range(200)])
        universal = embedder.embed_pixels(scenes)
        shape = embedder.create_basis("shape", ["circle", "square", "star", "heart", "cross"])
        other = embedder.create_basis(
            "background",
            ["on grey", "on sand", "in the sky", "on grass", "on wood"],
            merge_threshold=1.0,  # it has nearly one embedding for all of them
        )
        reliable, unreliable = (
            assess_clusters(universal, embedder.project(universal, basis), basis.text_embeddings)
            for basis in (shape, other)
        )
    assert reliable.reasons == () and unreliable.reasons
    assert reliable.separation > unreliable.separation


def test_few_images_and_bad_input():
    images, axes = planted(MIN_IMAGES - 1), np.eye(D, dtype=np.float32)
    assert assess_clusters(images, images[:, :4], axes[:4]).reasons == ()  # too few
    images = planted(60)
    with pytest.raises(InvalidInputError, match="one conditional row for each of 60 images"):
        assess_clusters(images, images[:50, :4], axes[:4])
    two = assess_clusters(images, images[:, :2], axes[:2])
    assert two.separation is None and "has only 2 texts" in two.reasons[0]
    with pytest.raises(InvalidInputError, match="NaN"):
        assess_clusters(images, np.full((60, 4), np.nan, np.float32), axes[:4])
    same = np.tile(images[:1], (60, 1))
    assert assess_clusters(same, same[:, :4], axes[:4]).reasons
