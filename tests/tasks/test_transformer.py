"""scikit-learn transformer: scikit-learn's own checks, pipelines, names, errors."""

from __future__ import annotations

import pickle
import subprocess
import sys

import numpy as np
import pytest

from crl_sdk import Basis
from crl_sdk.basis._build import build_basis
from crl_sdk.basis._methods import make_projection
from crl_sdk.errors import InvalidInputError
from crl_sdk.projection._projection import normalise_rows

pytest.importorskip("sklearn")

from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import check_estimator

from crl_sdk.tasks import ConditionalTransformer, sharpen
from support import save_basis

DIM, FINGERPRINT = 16, "f" * 64


def unit(n: int, d: int = DIM, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)
    return normalise_rows(rows, "l2")


def basis_of(criterion: str, texts: list[str], **options: object) -> Basis:
    seed = sum(map(ord, criterion))
    return build_basis(
        criterion, texts, lambda all_of: unit(len(all_of), seed=seed), fingerprint=FINGERPRINT,
        **options,
    )  # fmt: skip


class AnyWidth(ConditionalTransformer):
    """Transformer with random texts for X of any width, as scikit-learn's checks need."""

    def _source(self, dim):
        return (
            unit(3, dim),
            ("a", "b", "c"),
            None,
            self.method or "contrastive",
            self.post or "none",
        )


def test_scikit_learns_own_checks():
    # nothing is expected to fail: the one thing they cannot bring is X of the basis' width
    results = check_estimator(AnyWidth(), on_skip=None)
    failed = [each for each in results if each["status"] == "failed"]
    assert not failed and sum(each["status"] == "passed" for each in results) > 30


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_named(wrong):
    x = unit(7, seed=5)
    x[4, 2] = wrong
    made = ConditionalTransformer(basis_of("color", ["red", "green", "blue"]))
    with pytest.raises(InvalidInputError, match="hold NaN or infinity, the first at row 4"):
        made.fit(x)
    made.fit(unit(7, seed=5))
    with pytest.raises(InvalidInputError, match="hold NaN or infinity, the first at row 4"):
        made.transform(x)
    for malformed in (x[0], x[:, :3], [["a"]], np.zeros((0, DIM))):
        with pytest.raises(InvalidInputError):
            made.transform(malformed)


def test_rows_are_those_of_the_basis():
    basis, x = basis_of("color", ["red", "green", "blue"]), unit(7, seed=5)
    made = ConditionalTransformer(basis).fit(x)
    np.testing.assert_array_equal(made.transform(x), basis.projection.apply(x))
    assert made.transform(x.astype(np.float64)).dtype == np.float32
    assert made.get_feature_names_out().tolist() == ["crl0", "crl1"]
    assert made.n_features_in_ == DIM
    other = ConditionalTransformer(basis, post="standardise").fit_transform(x)
    np.testing.assert_allclose(other.std(axis=1, ddof=1), 1, rtol=1e-5)


def test_a_basis_of_a_directory_and_pickling(tmp_path):
    for name in ("color", "animal habitat"):
        save_basis(basis_of(name, ["a", "b", "c"]), tmp_path)
    x = unit(5)
    made = ConditionalTransformer(tmp_path, criterion="Animal Habitat").fit(x)
    expected = basis_of("animal habitat", ["a", "b", "c"]).projection.apply(x)
    np.testing.assert_array_equal(made.transform(x), expected)
    again = pickle.loads(pickle.dumps(made))
    np.testing.assert_array_equal(again.transform(x), expected)
    held = ConditionalTransformer(basis_of("color", ["a", "b"])).fit(x)
    np.testing.assert_array_equal(
        pickle.loads(pickle.dumps(clone(held).fit(x))).transform(x), held.transform(x)
    )
    with pytest.raises(InvalidInputError, match="criterion="):
        ConditionalTransformer(tmp_path).fit(x)


def test_texts_with_their_embeddings():
    x, texts = unit(6, seed=3), unit(4, seed=1)
    made = ConditionalTransformer(texts=["a", "b", "c", "d"], text_embeddings=texts).fit(x)
    np.testing.assert_array_equal(made.transform(x), make_projection(texts).apply(x))
    named = ConditionalTransformer(
        texts=["a", "b", "c", "d"], text_embeddings=texts, method="cosine"
    )
    assert named.fit(x).get_feature_names_out().tolist() == ["a", "b", "c", "d"]
    generic = unit(60, seed=9)
    made = ConditionalTransformer(text_embeddings=texts, background=generic).fit(x)
    expected = make_projection(texts, background=generic).apply(x)
    np.testing.assert_array_equal(made.transform(x), expected)
    unnamed = ConditionalTransformer(text_embeddings=texts, method="cosine", post="none").fit(x)
    assert unnamed.get_feature_names_out().tolist() == ["crl0", "crl1", "crl2", "crl3"]
    np.testing.assert_allclose(unnamed.transform(x), x @ texts.T, rtol=1e-5, atol=1e-6)


def test_columns_that_are_not_texts_are_numbered():
    made = ConditionalTransformer(basis_of("color", list("abcdef"), method="orthogonal"))
    names = made.fit(unit(4)).get_feature_names_out()
    assert names.tolist() == [f"crl{i}" for i in range(made.projection_.output_dim)]


def test_sharpen_learns_from_x_and_from_labels():
    basis, x = basis_of("color", ["red", "green", "blue"]), unit(90, seed=2)
    labels = np.repeat([0, 1, 2], 30)
    for y in (None, labels):
        made = ConditionalTransformer(basis, sharpen=True).fit(x, y)
        expected = sharpen(basis, x, y).basis.projection.apply(x)
        np.testing.assert_array_equal(made.transform(x), expected)
    with pytest.raises(InvalidInputError, match="at least 50 images"):
        ConditionalTransformer(basis, sharpen=True).fit(x[:20])
    with pytest.raises(InvalidInputError, match="expected the method 'contrastive'"):
        ConditionalTransformer(basis, sharpen=True, method="cosine").fit(x)


def test_criteria_methods_and_posts_are_searched_in_a_pipeline(tmp_path):
    texts = unit(3, seed=8)
    labels = np.repeat(np.arange(3), 12)
    noise = np.random.default_rng(4).normal(0, 0.3, (36, DIM)).astype(np.float32)
    x = normalise_rows(texts[labels] + noise, "l2")
    good = build_basis("good", list("abc"), lambda _: texts, fingerprint=FINGERPRINT)
    save_basis(good, tmp_path)
    save_basis(basis_of("bad", ["p", "q"]), tmp_path)
    steps = make_pipeline(ConditionalTransformer(tmp_path), LogisticRegression())
    grid = {
        "conditionaltransformer__criterion": ["bad", "good"],
        "conditionaltransformer__method": [None, "cosine", "orthogonal"],
        "conditionaltransformer__post": ["l2", "standardise"],
    }
    found = GridSearchCV(steps, grid, cv=3).fit(x, labels)
    assert found.best_params_["conditionaltransformer__criterion"] == "good"
    assert found.best_score_ > 0.9
    assert found.best_estimator_[:-1].get_feature_names_out() is not None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "got neither"),
        ({"basis": "b", "text_embeddings": unit(2)}, "got both"),
        ({"basis": basis_of("color", ["a", "b"]), "texts": ["a", "b"]}, "a basis has its own"),
        ({"basis": basis_of("color", ["a", "b"]), "criterion": "mood"}, "got a basis of 'color'"),
        ({"text_embeddings": unit(2, 8)}, "as wide as X"),
        ({"text_embeddings": unit(2), "texts": ["a"]}, "one distinct text"),
        ({"text_embeddings": unit(2), "texts": ["a", "a"]}, "one distinct text"),
        ({"text_embeddings": unit(2), "method": "magic"}, "expected a method"),
        ({"text_embeddings": unit(2), "post": "magic"}, "expected post"),
    ],
)
def test_parameters_are_checked_by_fit(options, words):
    with pytest.raises(InvalidInputError, match=words):
        ConditionalTransformer(**options).fit(unit(4))


def test_embeddings_of_another_model_are_refused():
    basis = basis_of("color", ["red", "blue"])
    with pytest.raises(InvalidInputError, match="16 columns"):
        ConditionalTransformer(basis).fit(unit(4, 8))
    made = ConditionalTransformer(basis).fit(unit(4))
    with pytest.raises(ValueError, match="features"):
        made.transform(unit(4, 8))
    with pytest.raises(ValueError, match="NaN"):
        made.transform(np.full((2, DIM), np.nan, np.float32))


def test_without_scikit_learn_its_extra_is_named():
    code = (
        "import sys; sys.modules['sklearn'] = None\n"
        "import numpy as np, crl_sdk.tasks as t\n"
        "from crl_sdk import CrlError\n"
        "rows = np.eye(6, dtype=np.float32)\n"
        "for f in (lambda: t.ConditionalTransformer, lambda: t.cluster(rows, 2),\n"
        "          lambda: t.FewShotClassifier().fit(rows, list('aabbcc'))):\n"
        "    try: f()\n"
        "    except CrlError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("pip install 'crl-embeddings[tasks]'") == 3
