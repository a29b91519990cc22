"""The clustering measure on embeddings with known answers."""

from __future__ import annotations

import numpy as np
import pytest

from crl_export.demo.captions import NEUTRAL_PROMPT
from crl_export.demo.evaluate import (
    as_table,
    evaluate,
    kmeans_accuracy,
    own_words,
)
from crl_export.demo.lexicon import OFF_TOPIC
from crl_export.demo.world import CRITERIA, FACTORS
from crl_sdk.projection._projection import normalise_rows
from crl_sdk.tasks._metrics import clustering_accuracy

pytest.importorskip("sklearn")


def test_accuracy_ignores_how_clusters_are_numbered():
    labels = np.array([0, 0, 1, 1, 2, 2])
    assert clustering_accuracy(labels, np.array([2, 2, 0, 0, 1, 1])) == 1
    assert clustering_accuracy(labels, np.array([2, 2, 0, 0, 0, 1])) == pytest.approx(5 / 6)
    assert clustering_accuracy(labels, np.zeros(6, np.int64)) == pytest.approx(1 / 3)


def test_kmeans_finds_separate_groups():
    labels = np.repeat(np.arange(4), 20)
    rows = np.eye(4, dtype=np.float32)[labels]
    assert kmeans_accuracy(rows, labels, seeds=(0,)) == 1


def test_own_words_are_one_per_value():
    assert own_words("count")[:3] == ("one", "two", "three")
    assert own_words("colour")[0] == "red"
    assert all(len(own_words(name)) == len(FACTORS[name]) for name in CRITERIA)


def test_a_perfect_model_scores_one_and_its_random_basis_does_not():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 10, (400, 4))
    images = rng.standard_normal((400, 48)).astype(np.float32) * 0.02
    for column in range(4):
        images[np.arange(400), 10 * column + codes[:, column]] = 1

    def embed_texts(texts):
        rows = []
        for text in texts:
            word = text.removeprefix(NEUTRAL_PROMPT.format(""))
            row = np.zeros(48, np.float32)
            row[40:] = 0.5
            for column, name in enumerate(CRITERIA):
                if word in own_words(name):
                    row[10 * column + own_words(name).index(word)] = 1
            if word in OFF_TOPIC:
                row[40:] += np.random.default_rng(len(word)).standard_normal(8) * 0.01
            rows.append(row)
        return normalise_rows(np.array(rows), "l2")

    labels = {name: codes[:, column] for column, name in enumerate(CRITERIA)}
    rows = evaluate(normalise_rows(images, "l2"), embed_texts, labels, seeds=(0,))
    assert [row.criterion for row in rows] == list(CRITERIA)
    for row in rows:
        assert row.contrastive > 0.99
        assert row.mixed > 0.99
        assert row.random < 0.4
    assert as_table(rows).count("\n") == len(CRITERIA) + 1
