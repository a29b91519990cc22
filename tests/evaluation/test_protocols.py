"""Protocols on planted data with known answers, and compared with NumPy and scikit-learn."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from crl_sdk.basis._build import build_basis
from crl_sdk.cli._sources import require_tasks
from crl_sdk.errors import (
    BasisMismatchError,
    CrlError,
    InvalidInputError,
    MissingDependencyError,
)
from crl_sdk.evaluation import _protocols as run
from crl_sdk.evaluation._attribute_retrieval import (
    average_over_attributes,
    reduce_texts,
    search_attribute,
)
from crl_sdk.evaluation._clustering import clustering
from crl_sdk.evaluation._criterion_texts import CriterionTexts, texts_from_basis, texts_from_list
from crl_sdk.evaluation._dataset import LabelledImages, Labels
from crl_sdk.evaluation._deepfashion import ATTRIBUTES, AttributeImages, DeepFashion
from crl_sdk.evaluation._few_shot import few_shot, rescale, rms_norm, splits, standardise_all
from crl_sdk.evaluation._gallery_retrieval import gallery_scores, recalls
from crl_sdk.evaluation._genecis import GeneCis, Query
from crl_sdk.evaluation._mean_std import MeanStd
from crl_sdk.projection._projection import normalise_rows
from crl_sdk.tasks._metrics import clustering_accuracy

sklearn = pytest.importorskip("sklearn")


def planted(classes: int = 4, each: int = 15, noise: float = 0.01, seed: int = 0):
    """Return rows near the corners of a simplex, and the corner of each row."""
    labels = np.repeat(np.arange(classes), each)
    rows = np.eye(classes, classes + 3)[labels]
    rows = rows + noise * np.random.default_rng(seed).standard_normal(rows.shape)
    return rows.astype(np.float32), labels


def test_clustering_finds_what_is_apart_and_nothing_in_permuted_labels():
    rows, labels = planted()
    found = clustering(rows * np.linspace(1, 9, len(rows))[:, None], labels, range(3))
    assert {name: figure.mean for name, figure in found.items()} == {
        "ACC": 1.0, "NMI": pytest.approx(1.0), "ARI": 1.0,
    }  # fmt: skip
    assert found["ACC"].std == 0
    shuffled = np.random.default_rng(0).permutation(labels)
    by_chance = clustering(rows, shuffled, range(3))
    assert 0.25 <= by_chance["ACC"].mean < 0.5
    assert by_chance["NMI"].mean < 0.2 and abs(by_chance["ARI"].mean) < 0.1


def test_clustering_is_scikit_learns_with_the_true_k_and_one_start():
    from sklearn.cluster import KMeans

    rows, labels = planted(5, 12, noise=0.6)
    found = clustering(rows, labels, (3, 4))
    accuracies = [
        clustering_accuracy(
            labels, KMeans(5, n_init=1, random_state=seed).fit_predict(normalise_rows(rows, "l2"))
        )
        for seed in (3, 4)
    ]
    assert found["ACC"] == MeanStd(float(np.mean(accuracies)), float(np.std(accuracies)))


def test_equal_rows_are_clustered_without_a_warning():
    labels = np.array([0, 0, 1, 1, 2, 2])
    assert clustering(np.ones((6, 3)), labels, (0,))["ACC"].mean == pytest.approx(1 / 3)


BAD = [
    (np.full((6, 3), np.nan), np.arange(6) % 2, "NaN"),
    (np.ones((6, 3)), np.zeros(6, np.int64), "two classes or more"),
    (np.ones((6, 3)), np.arange(5), "integer label for each of 6"),
    (np.ones((6, 3)), np.arange(6) / 2, "integer label"),
    (np.ones(6), np.arange(6) % 2, "expected rows"),
    (np.ones((0, 3)), np.zeros(0, np.int64), "expected rows"),
    (np.ones((6, 3), np.int64), np.arange(6) % 2, "float dtype"),
]


@pytest.mark.parametrize(("rows", "labels", "what"), BAD)
def test_rows_that_cannot_be_measured(rows, labels, what):
    with pytest.raises(InvalidInputError, match=what):
        clustering(rows, labels, (0,))
    with pytest.raises(InvalidInputError, match=what):
        few_shot(rows, labels, 1, standardise=True)


def test_clustering_needs_seeds():
    with pytest.raises(InvalidInputError, match="at least one seed"):
        clustering(*planted(), ())


def test_splits_are_those_of_numpys_legacy_generator():
    labels = np.array([2, 0, 1, 0, 2, 1, 0, 1, 2, 2])
    for seed, split in enumerate(splits(labels, 2, 3)):
        np.random.seed(seed)  # the very generator that the authors seed
        for i, each in enumerate((0, 1, 2)):
            members = np.where(labels == each)[0]
            np.random.shuffle(members)
            assert split.train[2 * i : 2 * i + 2].tolist() == members[:2].tolist()
        assert sorted([*split.train, *split.test]) == list(range(10))


def test_splits_that_leave_nothing_to_test():
    for shots in (3, 4):
        with pytest.raises(InvalidInputError, match="class 1 has 3: take fewer"):
            list(splits(np.array([0, 0, 0, 0, 0, 1, 1, 1]), shots))
    for shots, count in ((0, 1), (1, 0)):
        with pytest.raises(InvalidInputError, match="shots >= 1"):
            list(splits(np.array([0, 0, 1, 1]), shots, count))


def test_standardised_rows_against_numpy():
    rows = np.random.default_rng(0).normal(3, 2, (7, 5)).astype(np.float32)
    expected = (rows - rows.mean()) / rows.std(axis=1, ddof=1, keepdims=True)
    assert standardise_all(rows) == pytest.approx(expected, abs=1e-5)
    some = rows[:2]
    expected = (rows - some.mean()) / rows.std(axis=1, ddof=1, keepdims=True)
    assert standardise_all(rows, some) == pytest.approx(expected, abs=1e-5)
    assert not standardise_all(np.ones((2, 3), np.float32)).any()
    with pytest.raises(InvalidInputError, match="two columns"):
        standardise_all(np.ones((2, 1), np.float32))


def test_scales():
    rows = np.array([[3, 4], [0, 1]], np.float32)
    assert rms_norm(rows) == pytest.approx(np.sqrt((25 + 1) / 2))
    assert rms_norm(rescale(rows, 7)) == pytest.approx(7)
    assert rescale(rows, 7)[0] / rescale(rows, 7)[0, 0] == pytest.approx([1, 4 / 3])
    wide = np.random.default_rng(0).standard_normal((50, 101)).astype(np.float32)
    assert rms_norm(standardise_all(wide)) == pytest.approx(10, rel=0.02)  # about √k


def test_few_shot_learns_what_is_apart_and_nothing_of_permuted_labels():
    rows, labels = planted()
    shuffled = np.random.default_rng(0).permutation(labels)
    for transductive in (True, False):
        options = {"standardise": True, "transductive": transductive, "count": 4}
        assert few_shot(rows, labels, 2, **options) == MeanStd(1.0, 0.0)
        assert few_shot(rows, shuffled, 5, **options).mean < 0.45
    assert few_shot(rows, labels, 1, standardise=False, count=4).mean == 1.0


def test_few_shot_is_scikit_learns_regression_on_the_same_split():
    from sklearn.linear_model import LogisticRegression

    rows, labels = planted(noise=0.5)
    split = next(splits(labels, 3, 1))
    inputs = standardise_all(rows)
    model = LogisticRegression(max_iter=1000).fit(inputs[split.train], labels[split.train])
    expected = model.score(inputs[split.test], labels[split.test])
    assert few_shot(rows, labels, 3, standardise=True, count=1).mean == pytest.approx(expected)


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    for module in ("sklearn", "sklearn.cluster", "sklearn.linear_model", "sklearn.exceptions"):
        monkeypatch.setitem(sys.modules, module, None)
    for call in (
        lambda: clustering(*planted(), (0,)),
        lambda: few_shot(*planted(), 1, standardise=False),
        lambda: require_tasks("crl eval"),
    ):
        with pytest.raises(MissingDependencyError, match=r"pip install 'crl-embeddings\[tasks\]'"):
            call()
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(MissingDependencyError, match="'scipy'"):
        clustering_accuracy(np.zeros(2), np.zeros(2))


def test_gallery_scores_by_hand():
    reference = np.array([2.0, 0.0], np.float32)
    gallery = np.array([[1, 0], [0, 3], [1, 1]], np.float32)
    condition = np.array([0.1, 0.3, 0.2], np.float32)
    scene = np.array([1, 0, np.sqrt(0.5)])
    plain = gallery_scores(reference, gallery, condition, normalise=False)
    assert plain == pytest.approx(10 * scene + condition)
    papers = gallery_scores(reference, gallery, condition)
    expected = 10 * scene / np.linalg.norm(scene) + condition / np.linalg.norm(condition)
    assert papers == pytest.approx(expected)
    assert recalls([papers, plain, papers[::-1]]) == {
        "R@1": MeanStd(2 / 3), "R@2": MeanStd(1.0), "R@3": MeanStd(1.0),
    }  # fmt: skip
    assert recalls([np.zeros(3, np.float32)])["R@2"].mean == 0  # equal scores are no success


def test_gallery_scores_refuse_what_does_not_fit():
    rows = np.ones((3, 2), np.float32)
    with pytest.raises(InvalidInputError, match="each of 3 images"):
        gallery_scores(rows[0], rows, np.ones(2, np.float32))
    with pytest.raises(InvalidInputError, match="finite"):
        gallery_scores(rows[0], rows, np.full(3, np.nan, np.float32))
    with pytest.raises(InvalidInputError, match="NaN"):
        gallery_scores(rows[0] * np.nan, rows, np.ones(3, np.float32))
    with pytest.raises(InvalidInputError, match="at least one query"):
        recalls([])


def test_reduced_bases_are_scikit_learns_principal_components():
    from sklearn.decomposition import PCA

    texts = normalise_rows(
        np.random.default_rng(0).standard_normal((30, 12)).astype(np.float32) + 0.5, "l2"
    )
    theirs = PCA(5, svd_solver="full").fit_transform(texts.T.astype(np.float64)).T
    ours = reduce_texts(texts, 5)
    assert ours.shape == (5, 12) and ours.dtype == np.float32
    signs = np.sign((ours * theirs).sum(axis=1, keepdims=True))
    assert ours == pytest.approx(signs * theirs, abs=1e-5)
    assert reduce_texts(texts[:5], 5) is not None and np.array_equal(
        reduce_texts(texts[:5], 5), texts[:5]
    )
    for components in (0, 13):
        with pytest.raises(InvalidInputError, match="1 to 12 components"):
            reduce_texts(texts, components)


def test_attribute_map_uses_cosines_and_means_weigh_queries():
    queries = np.array([[5, 0.1], [0, 0.2]], np.float32)
    candidates = np.array([[1, 0], [9, 8], [0, 3]], np.float32)
    figure = search_attribute(queries, candidates, np.array([0, 1]), np.array([0, 1, 1]))
    assert figure.mean == pytest.approx((1 + 1) / 2)
    both = average_over_attributes({"a": MeanStd(1.0), "b": MeanStd(0.5)}, {"a": 1, "b": 3})
    assert both["all queries"].mean == pytest.approx(0.625)
    assert both["mean of attributes"].mean == pytest.approx(0.75)
    with pytest.raises(InvalidInputError, match="NaN"):
        search_attribute(queries * np.nan, candidates, np.array([0, 1]), np.array([0, 1, 1]))


def world(images: int = 120, values: int = 3, seed: int = 0):
    """Return labelled unit rows with a strong shape and a weak colour, and the texts of both."""
    rng = np.random.default_rng(seed)
    shape, colour = rng.integers(0, values, (2, images))
    rows = 0.02 * rng.standard_normal((images, 8))
    rows[np.arange(images), shape] += 1.0
    rows[np.arange(images), 3 + colour] += 0.3
    rows[:, 7] += 1.0
    own = np.eye(8, dtype=np.float32)
    texts = {
        "shape": CriterionTexts(("a", "b", "c"), own[0:3], ("{}",), "planted"),
        "color": CriterionTexts(("d", "e", "f"), own[3:6], ("{}",), "planted"),
    }
    every = np.arange(images)
    labels = {
        "shape": Labels(every, shape, ("a", "b", "c")),
        "color": Labels(every, colour, ("d", "e", "f")),
    }
    data = LabelledImages(tuple(map(str, every)), labels)  # type: ignore[arg-type]
    return data, normalise_rows(rows.astype(np.float32), "l2"), texts


def test_the_conditional_embedding_finds_what_the_universal_one_hides():
    data, universal, texts = world()
    told: list[str] = []
    rows = run.run_labelled(
        data, universal, texts, seeds=2, shots=(1, 3), splits=3, step=told.append
    )
    found = {(row.criterion, row.protocol, row.representation): row.scores for row in rows}
    assert len(rows) == len(found) == 2 * (2 + 4)
    assert found["color", "clustering", "conditional"]["ACC"].mean == 1
    assert found["color", "clustering", "universal"]["ACC"].mean < 0.6
    assert found["shape", "clustering", "universal"]["ACC"].mean == 1
    for way in ("conditional", "conditional, shots' mean"):
        assert found["color", "few-shot", way]["3 shots"].mean == 1
    assert list(found["color", "few-shot", "universal"]) == ["1 shot", "3 shots"]
    assert "color: clustering" in told


def test_a_subset_of_protocols_and_other_methods():
    data, universal, texts = world()
    only = run.run_labelled(data, universal, texts, protocols=("clustering",), seeds=1)
    assert {row.protocol for row in only} == {"clustering"}
    other = run.run_labelled(
        data, universal, texts, method="exclusive-orthogonal", protocols=("clustering",), seeds=1
    )
    assert len(other) == len(only)
    with pytest.raises(InvalidInputError, match="against"):
        run.run_labelled(data, universal, {"color": texts["color"]}, method="exclusive-orthogonal")
    with pytest.raises(InvalidInputError, match="protocols of"):
        run.run_labelled(data, universal, texts, protocols=("guessing",))
    with pytest.raises(InvalidInputError, match="seeds >= 1"):
        run.run_labelled(data, universal, texts, seeds=0)


def test_genecis_needs_scene_and_condition():
    rng = np.random.default_rng(0)
    queries, rows = [], []
    scenes, things = np.eye(12)[:6], np.eye(12)[6:]
    for i in range(30):  # the gallery: the target, same scene, same thing, neither
        scene, thing = i % 6, rng.integers(0, 2)
        kinds = [(scene, 5), (scene, thing), (scene, 4), ((scene + 1) % 6, thing), (5 - scene, 3)]
        start = len(rows)
        rows += [scenes[s] + 0.5 * things[t] for s, t in kinds]
        queries.append(Query(start, np.arange(start + 1, start + 5), ("table", "tree")[thing]))
    universal = normalise_rows(np.array(rows, np.float32), "l2")
    data = GeneCis(tuple(map(str, range(len(rows)))), tuple(queries))  # type: ignore[arg-type]

    def embed_text(given):
        return np.array([things[0 if "table" in text else 1] for text in given], np.float32)

    scene = CriterionTexts(tuple("uvwxyz"), scenes.astype(np.float32), ("{}",), "planted")
    found = {
        row.representation: row.scores["R@1"].mean
        for row in run.run_genecis(data, universal, scene, embed_text)
    }
    assert found["conditional, scene and condition"] == 1
    assert found["conditional, scene alone"] < 0.5 and found["condition alone"] < 0.5
    assert set(found) == {
        "universal, scene and condition",
        "universal, scene and condition, not divided by norms",
        "conditional, scene and condition",
        "conditional, scene and condition, not divided by norms",
        "universal, scene alone",
        "conditional, scene alone",
        "condition alone",
    }


def test_deepfashion_searches_each_attribute_in_its_own_space():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2, (60, 5))
    rows = np.zeros((60, 12), np.float32)
    for column in range(5):
        rows[np.arange(60), 2 * column + values[:, column]] = 1
    universal = normalise_rows(rows + 0.01, "l2")
    own = np.eye(12, dtype=np.float32)
    texts = {
        name: CriterionTexts(("p", "q"), own[2 * i : 2 * i + 2], ("{}",), "planted")
        for i, name in enumerate(ATTRIBUTES)
    }
    sides = [
        {name: AttributeImages(part, values[part, i]) for i, name in enumerate(ATTRIBUTES)}
        for part in (np.arange(20), np.arange(20, 60))
    ]
    data = DeepFashion(tuple(map(str, range(60))), *sides)  # type: ignore[arg-type]
    found = {
        (row.criterion, row.representation): row.scores["mAP"].mean
        for row in run.run_deepfashion(data, universal, texts)
    }
    for name in ATTRIBUTES:
        assert found[name, "conditional"] == pytest.approx(1)
        assert found[name, "universal"] < 0.9
    assert found["all queries", "conditional"] == pytest.approx(1)
    assert len(found) == 2 * (5 + 2)
    with pytest.raises(InvalidInputError, match="style"):
        run.run_deepfashion(data, universal, {n: t for n, t in texts.items() if n != "style"})


def test_lists_of_texts_keep_what_is_repeated(embedder):
    texts = texts_from_list(["Red", "red ", " blue"], "a {}", embedder.embed_text, "here")
    assert texts.texts == ("Red", "red", "blue") and texts.repeated == 1
    assert texts.embeddings[1] == pytest.approx(embedder.embed_text(["a red"])[0], abs=1e-6)
    for given, prompt in (([], "{}"), (["red", " "], "{}"), (["red"], "no place")):
        with pytest.raises(CrlError, match="expected"):
            texts_from_list(given, prompt, embedder.embed_text, "here")
    basis = build_basis("color", ["red", "blue"], embedder.embed_text, fingerprint="other")
    with pytest.raises(BasisMismatchError):
        texts_from_basis(basis, embedder.bundle.fingerprint, "file")


def test_an_image_that_cannot_be_read_stops_the_benchmark(embedder, image_files, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    with pytest.raises(CrlError, match=r"1 of 2 images cannot be read.*broken\.jpg"):
        run.embed_files(embedder, [image_files[0], broken])
    assert run.embed_files(embedder, image_files[:2]).shape == (2, embedder.bundle.embedding_dim)
