"""Clustering: planted clusters are found, counted and named, and bad input is refused."""

from __future__ import annotations

import numpy as np
import pytest

from crl_sdk import Basis
from crl_sdk.basis._build import build_basis
from crl_sdk.basis._methods import PROJECTION_METHODS
from crl_sdk.errors import InvalidInputError
from crl_sdk.projection._projection import normalise_rows
from crl_sdk.tasks import _kmeans as kmeans_module
from crl_sdk.tasks import choose_k, cluster
from crl_sdk.tasks._clustering import cohesion
from crl_sdk.tasks._kmeans import kmeans, mean_silhouette
from crl_sdk.tasks._naming import MIN_STRENGTH, name_clusters, text_scores, text_strengths

pytest.importorskip("sklearn")

COLOURS = ["red", "green", "blue", "black"]
FINGERPRINT = "f" * 64


def planted(k: int, each: int, noise: float = 0.1, dim: int = 8, seed: int = 0):
    """Return rows (k·each, dim) in k clusters around unit vectors, and their true clusters."""
    truth = np.repeat(np.arange(k), each)
    rows = np.eye(dim, dtype=np.float32)[truth]
    rows += np.random.default_rng(seed).normal(0, noise, rows.shape).astype(np.float32)
    return normalise_rows(rows, "l2"), truth


def basis_of(texts: list[str], dim: int = 8, **options: object) -> Basis:
    unit = np.eye(dim, dtype=np.float32)[: len(texts)]
    return build_basis("color", texts, lambda _: unit, fingerprint=FINGERPRINT, **options)


@pytest.mark.parametrize("k", [2, 6])
def test_planted_clusters_are_counted_with_certainty(k):
    rows, truth = planted(k, 20)
    choice = choose_k(rows, 9)
    assert choice.k == k and choice.agreement == 1.0
    assert choice.margin > 0.05 and choice.runner_up != k and not choice.weak
    assert set(choice.silhouettes) == set(range(2, 10))
    found = cluster(rows, max_k=9)
    assert found.choice.k == found.k == len(found.clusters) == k
    assert found.stability > 0.99
    assert len(set(zip(found.labels.tolist(), truth.tolist(), strict=True))) == k


def test_without_clusters_it_says_so():
    rows = np.random.default_rng(0).normal(size=(150, 8)).astype(np.float32)
    choice = choose_k(rows, 9)
    assert choice.weak and choice.agreement < 0.8 and choice.margin < 0.05
    assert cluster(rows, choice.k).stability < 0.7


def test_equal_seeds_give_equal_clusters():
    rows, _ = planted(5, 15, noise=0.4)
    one, two = (cluster(rows, max_k=7, seed=3) for _ in range(2))
    np.testing.assert_array_equal(one.labels, two.labels)
    assert one.choice == two.choice


def test_the_silhouette_is_that_of_scikit_learn():
    from scipy.spatial.distance import cdist
    from sklearn.metrics import silhouette_score

    rows, _ = planted(3, 10, noise=0.5)
    labels = np.random.default_rng(1).integers(0, 5, len(rows))
    labels[:6] = [0, 1, 2, 3, 4, 5]  # the last is alone in its cluster
    ours = mean_silhouette(cdist(rows, rows), labels)
    assert ours == pytest.approx(silhouette_score(rows.astype(np.float64), labels), abs=1e-6)


def test_many_rows_are_clustered_from_the_best_start_of_a_sample(monkeypatch):
    rows, truth = planted(4, 50)
    monkeypatch.setattr(kmeans_module, "_MAX_START_ROWS", 60)
    labels, centres = kmeans(rows, 4)
    assert len(set(zip(labels.tolist(), truth.tolist(), strict=True))) == 4
    means = np.stack([rows[labels == i].mean(axis=0) for i in range(4)])
    np.testing.assert_allclose(centres, means, atol=1e-5)


def test_clusters_are_numbered_by_size_and_described():
    rows, _ = planted(3, 12)
    rows = np.concatenate([rows[:4], rows[12:24], rows[24:32]])  # 4, 12 and 8
    found = cluster(rows, 3, basis=basis_of(COLOURS), universal=rows, typical=6)
    assert [each.size for each in found.clusters] == [12, 8, 4]
    assert [each.name.text for each in found.clusters] == ["green", "blue", "red"]
    for number, each in enumerate(found.clusters):
        members = np.flatnonzero(found.labels == number)
        centre = rows[members].mean(axis=0)
        away = np.linalg.norm(rows[members] - centre, axis=1)
        assert each.typical[0] == members[away.argmin()]
        assert found.typicality[each.typical[0]] == 1.0
        if len(members) > 6:
            assert each.edge[0] == members[away.argmax()]
        assert not set(each.edge) & set(each.typical) and len(each.typical) <= 6
        assert found.typicality[members[away.argmax()]] == pytest.approx(1 / len(members))
        np.testing.assert_allclose(found.distances[members], away, atol=1e-5)
        pairs = rows[members] @ rows[members].T
        mean = pairs[~np.eye(len(members), dtype=bool)].mean()
        assert each.cohesion == pytest.approx(mean, abs=1e-5)


def test_strength_is_the_standardised_difference_to_outside():
    rng = np.random.default_rng(2)
    labels, scores = rng.integers(0, 3, 40), rng.normal(size=(40, 5)).astype(np.float32)
    standard = (scores - scores.mean(0)) / scores.std(0)
    slow = [standard[labels == i].mean(0) - standard[labels != i].mean(0) for i in range(3)]
    np.testing.assert_allclose(text_strengths(labels, scores), slow, rtol=1e-4, atol=1e-5)
    scores[:, 2] = 0.3
    assert not text_strengths(labels, scores)[:, 2].any()


def test_what_all_images_share_is_no_name():
    labels = np.repeat([0, 1], 10)
    scores = np.zeros((20, 3), np.float32)
    scores[:, 0] = 0.9  # the text that is near everything
    scores[:10, 1] = scores[10:, 2] = 0.1
    scores += np.random.default_rng(0).normal(0, 0.01, scores.shape).astype(np.float32)
    assert [n.text for n in name_clusters(labels, scores, ["photo", "cat", "dog"])] == [
        "cat", "dog",
    ]  # fmt: skip


def test_clusters_of_one_name_get_the_next_text():
    labels = np.repeat([0, 1, 2], 10)
    scores = np.zeros((30, 3), np.float32)
    scores[:20, 0] = 1.0  # both are red
    scores[:10, 1] = scores[10:20, 2] = 0.5
    scores += np.random.default_rng(0).normal(0, 0.01, scores.shape).astype(np.float32)
    names = [name.text for name in name_clusters(labels, scores, ["red", "dark", "light"])]
    assert names[0] != names[1] and len(set(names)) == 3
    same = name_clusters(np.repeat([0, 1], 10), np.zeros((20, 1), np.float32), ["red"])
    assert [name.text for name in same] == ["no matching text (1)", "no matching text (2)"]


def test_a_cluster_that_no_text_describes_is_named_so():
    labels = np.repeat([0, 1, 2], 10)
    scores = np.zeros((30, 2), np.float32)
    scores[:10, 0] = scores[10:20, 1] = 1.0  # no text describes the third cluster
    scores += np.random.default_rng(0).normal(0, 0.01, scores.shape).astype(np.float32)
    names = name_clusters(labels, scores, ["cat", "dog"])
    assert [name.fits for name in names] == [True, True, False]
    assert names[2].text == "no matching text" and names[2].strengths[0] < MIN_STRENGTH
    (alone,) = name_clusters(np.zeros(30, np.int64), scores, ["cat", "dog"])
    assert alone.fits and alone.text in ("cat", "dog")  # there is no other cluster to compare with


@pytest.mark.parametrize(
    "method", [m.name for m in PROJECTION_METHODS if not m.needs_against and m.texts_describe]
)
def test_names_do_not_depend_on_the_method(method):
    universal, truth = planted(4, 15)
    basis = basis_of(COLOURS, method=method)
    rows = basis.projection.apply(universal)
    found = cluster(rows, 4, basis=basis, universal=universal)
    for number, each in enumerate(found.clusters):
        assert each.name.text == COLOURS[np.bincount(truth[found.labels == number]).argmax()]


def test_texts_of_what_is_disregarded_name_nothing():
    universal, _ = planted(4, 15)
    basis = basis_of(COLOURS, method="ignore")
    found = cluster(basis.projection.apply(universal), 4, basis=basis, universal=universal)
    assert [each.name for each in found.clusters] == [None] * 4


def test_rows_name_clusters_only_where_their_columns_are_texts():
    universal, _ = planted(3, 8)
    basis = basis_of(COLOURS, method="cosine")
    found = cluster(basis.projection.apply(universal), 3, basis=basis)
    assert {each.name.text for each in found.clusters} == {"red", "green", "blue"}
    other = basis_of(COLOURS, method="orthogonal")
    with pytest.raises(InvalidInputError, match="pass universal="):
        cluster(other.projection.apply(universal), 3, basis=other)
    with pytest.raises(InvalidInputError, match="shape"):
        text_scores(basis, universal=universal[:, :5])


def test_copies_are_shown_once_and_take_no_time():
    rows, _ = planted(2, 6)
    rows = np.concatenate([rows, np.repeat(rows[:1], 2500, axis=0)])
    found = cluster(rows, 2)
    big = found.clusters[0]
    copies = {0, *range(12, len(rows))}
    assert big.size == 2506 and len(copies & set(big.typical)) == 1 and len(big.typical) == 6
    same = cluster(np.repeat(rows[:1], 9, axis=0))
    assert len(same.clusters) == same.k == 1 and same.choice.agreement is None
    assert same.clusters[0].typical == (0,) and same.clusters[0].cohesion == pytest.approx(1)
    fewer = cluster(np.repeat(rows[[0, 6]], 5, axis=0), 4)
    assert fewer.k == 4 and len(fewer.clusters) == 2


def test_one_cluster_and_one_row():
    rows, _ = planted(2, 5)
    whole = cluster(rows, 1, basis=basis_of(COLOURS), universal=rows)
    assert whole.clusters[0].size == 10 and whole.stability is None
    assert whole.clusters[0].name.strengths == (0.0,)
    for n in (1, 2):
        few = cluster(rows[:n], basis=basis_of(COLOURS), universal=rows[:n])
        assert len(few.clusters) == 1 and few.choice.k == 1 and few.choice.silhouettes == {}
        assert few.clusters[0].name.text == "red"
    assert cohesion(rows[:1]) == 1.0
    assert len(cluster(rows[[0, 1, 5]]).clusters) == 2


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        (np.zeros((0, 3), np.float32), {}, "at least one row"),
        (np.zeros(3, np.float32), {}, "expected rows"),
        (np.zeros((3, 3), np.int64), {}, "float dtype"),
        (np.full((3, 3), np.nan, np.float32), {}, "NaN"),
        (np.eye(3, dtype=np.float32), {"k": 4}, "from 1 to the 3 rows, got 4"),
        (np.eye(3, dtype=np.float32), {"k": 0}, "got 0"),
        (np.eye(3, dtype=np.float32), {"max_k": 1}, "max_k >= 2"),
        (np.eye(3, dtype=np.float32), {"universal": np.eye(2, dtype=np.float32)}, "same images"),
    ],
)
def test_what_cannot_be_clustered(rows, options, words):
    with pytest.raises(InvalidInputError, match=words):
        cluster(rows, **options)
