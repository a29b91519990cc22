"""Projections: the NumPy specification of every kernel, and bad arguments."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crl_sdk.errors import InvalidInputError
from crl_sdk.projection._projection import Projection, normalise_rows, pack


def random_projection(rng: np.random.Generator, d: int, m: int, post: str) -> Projection:
    return Projection(
        rng.standard_normal((d, m)).astype(np.float32),
        rng.standard_normal(m).astype(np.float32),
        post,
    )


@given(
    n=st.integers(0, 20),
    d=st.integers(1, 40),
    m=st.integers(1, 30),
    seed=st.integers(0, 2**32 - 1),
    post=st.sampled_from(["l2", "standardise", "none"]),
)
def test_apply_equals_a_loop_in_double_precision(n, d, m, seed, post):
    rng = np.random.default_rng(seed)
    projection = random_projection(rng, d, m, post)
    embeddings = rng.standard_normal((n, d)).astype(np.float32)
    result = projection.apply(embeddings)
    assert result.shape == (n, m) and result.dtype == np.float32
    for row, embedding in zip(result, embeddings, strict=True):
        expected = embedding.astype(np.float64) @ projection.weight + projection.bias
        if post == "l2":
            expected = expected / np.linalg.norm(expected)
        elif post == "standardise":
            if m == 1:
                continue
            expected = (expected - expected.mean()) / expected.std(ddof=1)
            # a row whose values nearly agree is scaled by rounding errors
            if np.ptp(embedding.astype(np.float64) @ projection.weight + projection.bias) < 1e-3:
                continue
        np.testing.assert_allclose(row, expected, rtol=2e-3, atol=2e-4)


def test_rows_with_nothing_to_scale_become_zero():
    zeros = np.zeros((2, 3), np.float32)
    equal = np.full((2, 3), 7.5, np.float32)
    assert (normalise_rows(zeros, "l2") == 0).all()
    assert (normalise_rows(equal, "standardise") == 0).all()
    assert (normalise_rows(equal, "none") == equal).all()
    assert (normalise_rows(np.ones((2, 1), np.float32), "standardise") == 0).all()


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 999))
def test_packed_columns_equal_each_projection_alone(sizes, seed):
    rng = np.random.default_rng(seed)
    posts = ["l2", "standardise", "none"]
    projections = [random_projection(rng, 12, m, posts[i % 3]) for i, m in enumerate(sizes)]
    embeddings = rng.standard_normal((5, 12)).astype(np.float32)
    weight, bias, columns = pack(projections)
    assert weight.shape == (12, sum(sizes)) and bias.shape == (sum(sizes),)
    together = embeddings @ weight + bias
    for projection, own in zip(projections, columns, strict=True):
        alone = projection.apply(embeddings)
        np.testing.assert_allclose(
            normalise_rows(together[:, own], projection.post), alone, rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize(
    ("weight", "bias", "post", "words"),
    [
        (np.zeros((4, 3)), np.zeros(3, np.float32), "l2", "float32"),
        (np.zeros((4, 3), np.float32), np.zeros(4, np.float32), "l2", r"\(4, 3\) and \(4,\)"),
        (np.zeros((0, 3), np.float32), np.zeros(3, np.float32), "l2", "d, m >= 1"),
        (np.zeros(3, np.float32), np.zeros(3, np.float32), "l2", "weight"),
        (np.full((4, 3), np.nan, np.float32), np.zeros(3, np.float32), "l2", "finite"),
        (np.zeros((4, 3), np.float32), np.zeros(3, np.float32), "softmax", "post"),
    ],
)
def test_malformed_projections(weight, bias, post, words):
    with pytest.raises(InvalidInputError, match=words):
        Projection(weight, bias, post)


def test_malformed_embeddings():
    projection = Projection(np.ones((4, 2), np.float32), np.zeros(2, np.float32))
    bad_row = np.ones((5, 4), np.float32)
    bad_row[3, 1] = np.nan
    for embeddings, words in [
        (bad_row, "the first at row 3"),
        (np.full((1, 4), np.inf), "infinity"),
        (np.ones((5, 3), np.float32), r"expected embeddings of shape \(n, 4\), got \(5, 3\)"),
        (np.ones(4, np.float32), "shape"),
        (np.ones((5, 4), np.int64), "float dtype"),
    ]:
        with pytest.raises(InvalidInputError, match=words):
            projection.apply(embeddings)
    with pytest.raises(InvalidInputError, match="one input dimension"):
        pack([])


def test_half_precision_embeddings_are_taken():
    projection = Projection(np.eye(4, dtype=np.float32), np.zeros(4, np.float32), "none")
    stored = np.array([[0.5, 0.25, 0, 1]], np.float16)
    np.testing.assert_array_equal(projection.apply(stored), stored.astype(np.float32))
