"""Signals of whether a basis tells pictures apart: on planted data, and on the demo world."""

from __future__ import annotations

import numpy as np
import pytest

from crl_export.demo.scenes import render_scene, sample_scene
from crl_sdk import Embedder, demo_bundle
from crl_sdk.errors import InvalidInputError
from crl_sdk.projection._projection import normalise_rows
from crl_sdk.tasks._cluster_quality import FEWEST, examine, separation_gain
from crl_sdk.tasks._kmeans import kmeans, silhouette

sklearn_silhouette = pytest.importorskip("sklearn.metrics").silhouette_score
D = 32


def planted(n=300, seed=0):
    """Pictures in five groups along the first four axes, noise along all others."""
    rng = np.random.default_rng(seed)
    rows = 0.05 * rng.standard_normal((n, D))
    rows[:, :4] += np.concatenate([np.eye(4), -np.ones((1, 4))])[rng.integers(0, 5, n)]
    return rows.astype(np.float32)


def test_separation_is_the_silhouette_over_that_of_directions_that_say_nothing():
    rng = np.random.default_rng(1)
    noise = rng.standard_normal((300, D)).astype(np.float32)
    drawn = normalise_rows(noise @ rng.standard_normal((D, 5)).astype(np.float32), "l2")
    labels, _ = kmeans(drawn, 5, starts=3)
    assert abs(separation_gain(noise, drawn, labels, 5)) < 0.05  # it says no more than they do
    pictures = planted()
    rows = normalise_rows(pictures[:, :4], "l2")
    labels, _ = kmeans(rows, 5, starts=3)
    own = sklearn_silhouette(rows, labels)
    gain = separation_gain(pictures, rows, labels, 5)
    assert 0.2 < gain < own and gain == separation_gain(pictures, rows, labels, 5)
    assert silhouette(rows, labels) == pytest.approx(own, abs=1e-6)
    assert silhouette(rows, np.zeros(300, np.int64)) == 0.0


def test_a_basis_along_what_differs_is_not_doubted_and_one_across_it_is():
    pictures, axes = planted(), np.eye(D, dtype=np.float32)
    good = examine(pictures, pictures @ axes[:, :4], axes[:4], k=5)
    assert good.doubts == () and good.separation > 0.2 and good.stability > 0.95
    bad = examine(pictures, pictures @ axes[:, 8:14], axes[8:14])
    assert len(bad.doubts) == 2 and "may not see" in bad.doubts[0]


def test_the_demo_world():
    """Shapes are trusted; backgrounds, which the model hardly sees, are not."""
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
        trusted, doubted = (
            examine(universal, embedder.project(universal, basis), basis.text_embeddings)
            for basis in (shape, other)
        )
    assert trusted.doubts == () and doubted.doubts
    assert trusted.separation > doubted.separation


def test_few_pictures_and_bad_input():
    pictures, axes = planted(FEWEST - 1), np.eye(D, dtype=np.float32)
    assert examine(pictures, pictures[:, :4], axes[:4]).doubts == ()  # too few to say anything
    pictures = planted(60)
    with pytest.raises(InvalidInputError, match="one conditional row for each of 60 pictures"):
        examine(pictures, pictures[:50, :4], axes[:4])
    two = examine(pictures, pictures[:, :2], axes[:2])
    assert two.separation is None and "2 texts cannot say more than yes or no" in two.doubts[0]
    with pytest.raises(InvalidInputError, match="NaN"):
        examine(pictures, np.full((60, 4), np.nan, np.float32), axes[:4])
    same = np.tile(pictures[:1], (60, 1))
    assert examine(same, same[:, :4], axes[:4]).doubts
