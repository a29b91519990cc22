"""Few-shot classifier: normalisation of the paper, probabilities, file, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, save

from crl_sdk import Basis
from crl_sdk.basis._build import build_basis
from crl_sdk.errors import (
    BasisMismatchError,
    IntegrityError,
    InvalidInputError,
    UnsupportedSchemaError,
)
from crl_sdk.projection._projection import normalise_rows
from crl_sdk.tasks import FewShotClassifier
from crl_sdk.tasks._classifier_file import ClassifierState, encode_classifier
from crl_sdk.tasks._few_shot import standardise_rows

pytest.importorskip("sklearn")

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_BASIS = Path(__file__).parents[1] / "basis" / "golden" / "basis.safetensors"
FINGERPRINT = "f" * 64
NAMES = ("blue", "green", "red")


def labelled(each: int = 5, classes: int = 3, noise: float = 0.2, seed: int = 0):
    codes = np.repeat(np.arange(classes), each)
    rows = np.eye(6, dtype=np.float32)[codes]
    rows += np.random.default_rng(seed).normal(0, noise, rows.shape).astype(np.float32)
    return normalise_rows(rows, "l2"), [NAMES[code] for code in codes]


@pytest.fixture
def basis() -> Basis:
    unit = np.eye(6, dtype=np.float32)
    return build_basis(
        "color", list("abcdef"), lambda _: unit, fingerprint=FINGERPRINT, method="cosine"
    )


@pytest.fixture
def fitted(basis) -> FewShotClassifier:
    rows, labels = labelled()
    return FewShotClassifier(basis).fit(rows, labels)


def test_rows_are_standardised_as_the_paper_does():
    rows = np.random.default_rng(0).normal(2, 3, (7, 9)).astype(np.float32)
    mean = float(rows.mean())
    slow = np.stack([(row - mean) / np.std(row, ddof=1) for row in rows])
    np.testing.assert_allclose(standardise_rows(rows, mean), slow, rtol=1e-5, atol=1e-6)
    assert not standardise_rows(np.full((2, 4), 0.3, np.float32), 0.1).any()


def test_it_learns_and_predicts():
    rows, labels = labelled()
    made = FewShotClassifier().fit(rows, labels)
    assert made.classes == NAMES and made.counts == dict.fromkeys(NAMES, 5)
    others, truth = labelled(each=30, seed=1)
    assert np.mean([a == b for a, b in zip(made.predict(others), truth, strict=True)]) > 0.95
    chances = made.predict_proba(others)
    assert chances.dtype == np.float32
    np.testing.assert_allclose(chances.sum(axis=1), 1, atol=1e-6)
    assert made.predict(others[:0]) == []


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("standardise", [True, False])
def test_probabilities_are_scikit_learns(classes, standardise):
    from sklearn.linear_model import LogisticRegression

    rows, labels = labelled(classes=classes)
    others, _ = labelled(each=20, seed=1)
    made = FewShotClassifier(standardise=standardise, regularisation=0.5).fit(rows, labels)
    if standardise:
        mean = rows.mean(dtype=np.float64)
        rows, others = (
            (each - mean) / each.std(axis=1, ddof=1, keepdims=True) for each in (rows, others)
        )
    slow = LogisticRegression(C=0.5, max_iter=1000).fit(rows, labels)
    given, _ = labelled(each=20, seed=1)
    np.testing.assert_allclose(made.predict_proba(given), slow.predict_proba(others), atol=1e-3)


def test_unlabelled_rows_take_part_in_the_mean_alone():
    rows, labels = labelled()
    others = rows + 0.5
    inductive = FewShotClassifier().fit(rows, labels)
    transductive = FewShotClassifier().fit(rows, labels, unlabelled=others)
    means = [each._fitted().mean for each in (inductive, transductive)]
    assert means[0] == pytest.approx(rows.mean(), abs=1e-6)
    assert means[1] == pytest.approx(np.concatenate([rows, others]).mean(), abs=1e-6)
    assert transductive.counts == inductive.counts
    # a prediction does not depend on the other rows
    alone = np.concatenate([inductive.predict_proba(others[i : i + 1]) for i in range(4)])
    np.testing.assert_allclose(alone, inductive.predict_proba(others)[:4], atol=1e-6)


def test_one_image_of_a_class_works_and_is_logged(caplog):
    rows, labels = labelled()
    made = FewShotClassifier().fit(rows[:11], labels[:11])
    assert made.singletons == ("red",) and "only one labelled image of: red" in caplog.text
    assert made.cross_validate(rows[:11], labels[:11]) is None


def test_cross_validation_holds_images_out(caplog):
    rows, labels = labelled(each=10)
    made = FewShotClassifier()
    assert made.cross_validate(rows, labels) > 0.9
    shuffled = [str(label) for label in np.random.default_rng(0).permutation(labels)]
    assert made.cross_validate(rows, shuffled) < 0.65
    assert made.cross_validate(rows[::5], labels[::5]) is not None  # two of each
    assert not caplog.text


def test_the_file_has_it_all(fitted, basis, tmp_path):
    path, (others, _) = tmp_path / "model.safetensors", labelled(each=9, seed=2)
    fitted.save(path)
    again = FewShotClassifier.load(path, fingerprint=FINGERPRINT)
    np.testing.assert_array_equal(again.predict_proba(others), fitted.predict_proba(others))
    assert again.classes == NAMES and again.counts == fitted.counts
    assert again.basis.sha256() == basis.sha256() and again.to_bytes() == path.read_bytes()
    universal = normalise_rows(np.random.default_rng(0).normal(size=(4, 6)), "l2")
    np.testing.assert_array_equal(
        again.project(universal.astype(np.float32)),
        basis.projection.apply(universal.astype(np.float32)),
    )
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    told = json.loads(header["crl_classifier"])
    assert told["schema"] == 1 and told["criterion"] == "color" and len(told["sha256"]) == 64
    assert told["fingerprint"] == FINGERPRINT and told["basis_sha256"] == basis.sha256()
    with pytest.raises(BasisMismatchError, match=r"fffffffffff.*the model of this bundle is aaaa"):
        FewShotClassifier.load(path, fingerprint="a" * 64)


def test_the_format_is_that_of_the_golden_file():
    made = ClassifierState(
        classes=("blue", "red"), counts=(2, 1), standardise=True, mean=0.125, mean_of=3,
        regularisation=1.0, coefficients=np.array([[0, 0, 0], [1, -2, 0.5]], np.float32),
        intercepts=np.array([0, 0.25], np.float32), basis=Basis.load(GOLDEN_BASIS),
    )  # fmt: skip
    golden = GOLDEN / "classifier.safetensors"
    assert encode_classifier(made) == golden.read_bytes()
    loaded = FewShotClassifier.load(golden)
    assert loaded.classes == ("blue", "red") and loaded.counts == {"blue": 2, "red": 1}
    rows = np.array([[0.5, 0.1, 0.2], [-0.3, 0.4, 0.1]], np.float32)
    spread = (rows - np.float32(0.125)) / rows.std(axis=1, ddof=1, keepdims=True)
    chance = 1 / (1 + np.exp(-(spread @ [1, -2, 0.5] + 0.25)))
    np.testing.assert_allclose(loaded.predict_proba(rows)[:, 1], chance, rtol=1e-5)


def test_without_a_basis_it_takes_rows_alone(tmp_path):
    rows, labels = labelled()
    made = FewShotClassifier(standardise=False).fit(rows, labels)
    made.save(tmp_path / "m.safetensors")
    again = FewShotClassifier.load(tmp_path / "m.safetensors", fingerprint=FINGERPRINT)
    assert again.basis is None and again.predict(rows) == made.predict(rows)
    with pytest.raises(InvalidInputError, match="no basis"):
        again.project(rows)


def changed(data: bytes, key: str, value: object) -> bytes:
    """Return the file with one field of its header changed."""
    head = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    told = json.loads(head["__metadata__"]["crl_classifier"])
    told[key] = value
    return save(load(data), {"crl_classifier": json.dumps(told)})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mean", 0.5),
        ("classes", ["a", "b", "c"]),
        ("classes", ["a", "b"]),
        ("classes", ["red", "green", "blue"]),
        ("counts", [1, 1, 1]),
        ("criterion", "shape"),
        ("fingerprint", "0" * 64),
        ("basis_sha256", "0" * 64),
        ("basis_sha256", ""),
        ("standardise", False),
        ("regularisation", 2.0),
        ("regularisation", -1.0),
        ("sha256", "0" * 64),
        ("more", 1),
    ],
)
def test_a_changed_header_is_refused(fitted, key, value):
    with pytest.raises(IntegrityError, match="not a valid classifier file"):
        FewShotClassifier.from_bytes(changed(fitted.to_bytes(), key, value))


def test_damage_and_other_files_are_refused(fitted, basis, tmp_path):
    data = fitted.to_bytes()
    rng = np.random.default_rng(0)
    for position in rng.integers(0, len(data), 60):
        hurt = bytearray(data)
        hurt[position] ^= 1 << int(rng.integers(8))
        with pytest.raises((IntegrityError, UnsupportedSchemaError)):
            FewShotClassifier.from_bytes(bytes(hurt))
    for cut in (0, 7, 100, len(data) - 1):
        with pytest.raises(IntegrityError):
            FewShotClassifier.from_bytes(data[:cut])
    with pytest.raises(IntegrityError):
        FewShotClassifier.from_bytes(basis.to_bytes())
    swapped = {**load(data), "intercepts": np.zeros(3, np.float32)}
    head = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    with pytest.raises(IntegrityError, match="SHA-256"):
        FewShotClassifier.from_bytes(save(swapped, head))
    with pytest.raises(UnsupportedSchemaError, match="upgrade crl-embeddings"):
        FewShotClassifier.from_bytes(changed(data, "schema", 2))
    with pytest.raises(InvalidInputError, match="cannot be read"):
        FewShotClassifier.load(tmp_path / "nowhere")
    with pytest.raises(InvalidInputError, match="cannot be written"):
        fitted.save(tmp_path / "no" / "m.safetensors")


GOOD = np.eye(6, dtype=np.float32)


@pytest.mark.parametrize(
    ("rows", "labels", "options", "words"),
    [
        (GOOD, ["a"] * 6, {}, "two classes or more, got only 'a'"),
        (GOOD, list("ababa"), {}, "one label for each of 6 rows, got 5"),
        (GOOD, list("ababab"), {"classes": ["a", "b", "c"]}, "there is none of c"),
        (GOOD, list("ababac"), {"classes": ["a", "b"]}, "expected labels of a, b, got 'c'"),
        (GOOD, [0, 1, 0, 1, 0, 1], {}, "labels that are names"),
        (GOOD, ["a", "b", " ", "a", "b", "a"], {}, "labels that are names"),
        (GOOD, "ababab", {}, "a list of labels"),
        (GOOD * np.nan, list("ababab"), {}, "NaN"),
        (GOOD[:0], [], {}, "at least one row"),
        (GOOD[:, :1], list("ababab"), {}, "two columns or more"),
        (GOOD, list("ababab"), {"unlabelled": np.ones((2, 5), np.float32)}, "of 6 columns, got 5"),
    ],
)
def test_what_cannot_be_learned(rows, labels, options, words):
    with pytest.raises(InvalidInputError, match=words):
        FewShotClassifier().fit(rows, labels, **options)


def test_misuse_is_told(basis, fitted):
    with pytest.raises(InvalidInputError, match="call fit"):
        FewShotClassifier().predict(GOOD)
    with pytest.raises(InvalidInputError, match="call fit"):
        FewShotClassifier().to_bytes()
    with pytest.raises(InvalidInputError, match=r"shape \(n, 6\)"):
        fitted.predict(GOOD[:, :5])
    with pytest.raises(InvalidInputError, match="6 columns, got 4"):
        FewShotClassifier(basis).fit(GOOD[:, :4], list("ababab"))
    with pytest.raises(InvalidInputError, match="regularisation > 0"):
        FewShotClassifier(regularisation=0)


def test_small_problems_have_one_thread():
    from threadpoolctl import threadpool_info

    from crl_sdk.tasks._few_threads import SINGLE_THREAD_VALUES, few_threads

    before = [each["num_threads"] for each in threadpool_info()]
    with few_threads(np.zeros((10, 8))):
        assert {each["num_threads"] for each in threadpool_info()} == {1}
    with few_threads(np.zeros(SINGLE_THREAD_VALUES)):
        assert [each["num_threads"] for each in threadpool_info()] == before
