"""Retrieval compared with a brute-force loop: cosines, weights, ties, blocks, bad input."""

from __future__ import annotations

import numpy as np
import pytest

from crl_sdk.basis._build import build_basis
from crl_sdk.errors import BasisMismatchError, CriterionError, InvalidInputError
from crl_sdk.projection._projection import normalise_rows
from crl_sdk.tasks import Index
from crl_sdk.tasks import _retrieval as retrieval_module
from crl_sdk.tasks._retrieval import condition_captions, top_positions

N = 300


def rows_of(m: int, seed: int, n: int = N) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, m)).astype(np.float32)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(retrieval_module, "_BLOCK_BYTES", 1000)


def slow_cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_it_finds_what_a_loop_finds(dtype):
    rows = {"color": rows_of(5, 0).astype(dtype), "shape": rows_of(9, 1).astype(dtype)}
    query = {"color": rows_of(5, 2, 1), "shape": rows_of(9, 3, 1)[0]}
    weights = {"color": 2.0, "shape": -0.5}
    found = Index(rows).nearest(query, weights, 12)
    scores = [
        sum(
            weights[name] * slow_cosine(rows[name][i].astype(np.float64), np.ravel(query[name]))
            for name in rows
        )
        for i in range(N)
    ]
    order = sorted(range(N), key=lambda i: -scores[i])[:12]
    assert found.positions.tolist() == order
    np.testing.assert_allclose(found.scores, [scores[i] for i in order], atol=1e-5)
    for name in rows:
        slow = [slow_cosine(rows[name][i].astype(np.float64), np.ravel(query[name])) for i in order]
        np.testing.assert_allclose(found.parts[name], slow, atol=1e-5)
    assert found.weights == weights


def test_an_image_of_the_index_is_left_out_of_its_own_results():
    rows = {"color": rows_of(4, 0)}
    index = Index(rows)
    by_place, by_row = index.nearest(7, n=5), index.nearest({"color": rows["color"][7]}, n=6)
    assert by_row.positions[0] == 7 and by_row.scores[0] == pytest.approx(1)
    assert by_place.positions.tolist() == by_row.positions[1:].tolist()
    assert len(index.nearest(7, n=10_000).positions) == N - 1


def test_copies_tie_in_the_order_of_the_index():
    rows = np.repeat(rows_of(7, 0, 3), 40, axis=0)
    index = Index({"color": rows})
    for n in (1, 5, 39, 41, 120, 500):
        found = index.nearest({"color": rows[0]}, n=n)
        assert found.positions[: min(n, 40)].tolist() == list(range(min(n, 40)))
    assert index.nearest(3, n=3).positions.tolist() == [0, 1, 2]


def test_top_against_a_full_sort():
    scores = np.random.default_rng(0).integers(0, 9, 200).astype(np.float64)
    full = sorted(range(200), key=lambda i: (-scores[i], i))
    for n in (1, 2, 50, 199, 200, 201):
        assert top_positions(scores, n).tolist() == full[:n]
    assert top_positions(scores[:0], 3).tolist() == []


def test_but_with_is_the_papers_score():
    scene, universal = rows_of(6, 0), normalise_rows(rows_of(8, 1), "l2")
    condition = normalise_rows(rows_of(8, 2, 5), "l2")
    index = Index({"scene": scene}, universal=universal)
    found = index.but_with(scene[4], condition, n=20)
    scores = [
        10 * slow_cosine(scene[i], scene[4]) + np.mean([universal[i] @ c for c in condition])
        for i in range(N)
    ]
    order = sorted(range(N), key=lambda i: -scores[i])[:20]
    assert found.positions.tolist() == order and order[0] == 4
    np.testing.assert_allclose(found.scores, [scores[i] for i in order], atol=1e-4)
    assert index.but_with(4, condition, n=19).positions.tolist() == order[1:]
    alike = index.but_with(4, condition, weight=None, n=N)
    parts = {name: values.std() * alike.weights[name] for name, values in alike.parts.items()}
    assert parts["scene"] == pytest.approx(parts["condition"], rel=0.1)  # without the query itself
    only = index.but_with(4, condition, weight=0.0, n=3).positions
    assert only.tolist() == np.argsort(-(universal @ condition.mean(0)))[:3].tolist()


def test_captions_are_the_papers():
    assert condition_captions(" dog ") == [
        f"a photo with a dog on the {place}" for place in ("left", "right", "top", "lower", "mid")
    ]
    assert condition_captions("an old car")[0] == "a photo with an old car on the left"
    with pytest.raises(InvalidInputError, match="condition in words"):
        condition_captions("  ")


def test_an_index_of_universal_embeddings(tmp_path):
    universal = normalise_rows(rows_of(8, 0), "l2")
    texts = normalise_rows(rows_of(8, 5, 4), "l2")
    color, shape = (
        build_basis(name, list("abcd")[:k], lambda t: texts[: len(t)], fingerprint="f" * 64)
        for name, k in (("color", 3), ("shape", 4))
    )
    path = tmp_path / "u.npy"
    np.save(path, universal.astype(np.float16))
    index = Index.project(np.load(path, mmap_mode="r"), [color, shape])
    assert len(index) == N and index.criteria == ("color", "shape")
    rows = color.projection.apply(universal)
    np.testing.assert_allclose(index.cosines("Color", rows[3]), rows @ rows[3], atol=2e-2)
    other = build_basis("mood", ["a", "b"], lambda t: texts[: len(t)], fingerprint="0" * 64)
    with pytest.raises(BasisMismatchError, match="made for model"):
        Index.project(universal, [color, other])
    with pytest.raises(InvalidInputError, match="each criterion once"):
        Index.project(universal, [color, color])
    with pytest.raises(InvalidInputError, match="at least one basis"):
        Index.project(universal, [])


def test_rows_of_zeros_are_like_nothing():
    rows = rows_of(3, 0)
    rows[5] = 0
    index = Index({"color": rows})
    assert index.cosines("color", rows[1])[5] == 0
    assert not index.cosines("color", np.zeros(3, np.float32)).any()


GOOD = {"color": rows_of(3, 0)}


@pytest.mark.parametrize(
    ("rows", "universal", "words"),
    [
        ({}, None, "same n images"),
        ({"color": rows_of(3, 0), "shape": rows_of(3, 0, 4)}, None, "same n images"),
        ({"color": rows_of(3, 0)}, rows_of(3, 0, 4), "same n images"),
        ({"color": np.zeros(3, np.float32)}, None, "same n images"),
        ({"color": np.zeros((3, 3), np.int64)}, None, "float dtype"),
        ({"color": np.full((300, 3), np.nan, np.float32)}, None, "row 0 holds NaN"),
        ({"color": rows_of(3, 0), "Color ": rows_of(3, 0)}, None, "each criterion once"),
        ({"../x": rows_of(3, 0)}, None, "expected a criterion"),
    ],
)
def test_what_is_no_index(rows, universal, words):
    with pytest.raises(InvalidInputError, match=words):
        Index(rows, universal=universal)


@pytest.mark.parametrize(
    ("query", "weights", "n", "words"),
    [
        ({"mood": rows_of(3, 0, 1)}, None, 5, "no criterion 'mood' in this index"),
        ({"color": rows_of(3, 0, 1)}, {"mood": 1.0}, 5, "the query has no criterion 'mood'"),
        ({"color": rows_of(4, 0, 1)}, None, 5, r"shape \(n, 3\)"),
        ({"color": rows_of(3, 0, 2)}, None, 5, "one query row, got 2"),
        ({"color": np.full(3, np.nan, np.float32)}, None, 5, "NaN"),
        ({"color": rows_of(3, 0, 1)}, {"color": 0.0}, 5, "other than 0"),
        ({"color": rows_of(3, 0, 1)}, {"color": float("nan")}, 5, "other than 0"),
        ({}, None, 5, "other than 0"),
        (0, None, 0, "n >= 1"),
        (300, None, 5, "from 0 to 299"),
        (-1, None, 5, "from 0 to 299"),
    ],
)
def test_what_cannot_be_asked(query, weights, n, words):
    with pytest.raises(InvalidInputError, match=words):
        Index(GOOD).nearest(query, weights, n)


def test_what_but_with_needs():
    condition = rows_of(3, 0, 5)
    with pytest.raises(InvalidInputError, match="no universal embeddings"):
        Index(GOOD).but_with(0, condition)
    index = Index(GOOD, universal=rows_of(3, 1))
    with pytest.raises(CriterionError, match="no criterion 'scene'"):
        index.but_with(0, condition)
    with pytest.raises(InvalidInputError, match="a weight that is a number"):
        index.but_with(0, condition, scene="color", weight=float("inf"))
    with pytest.raises(InvalidInputError, match="shape"):
        index.but_with(0, rows_of(4, 0, 5), scene="color")
