"""Dtypes of stored embeddings: what each keeps, and what is refused.

Tolerances: int8 rounds to steps of max / 127, so that the length of the error of a row is at most
max / 254 · √m. float16 has 11 bits.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crl_sdk.errors import InvalidInputError
from crl_sdk.projection import Projection, decode_rows, encode_rows, project_rows
from crl_sdk.projection._row_dtypes import ROW_DTYPES, failed_rows, is_row_dtype


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(0, 20),
    m=st.integers(1, 64),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    outlier=st.sampled_from([0.0, 20.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_int8_keeps_directions(n, m, scale, outlier, seed):
    rows = np.random.default_rng(seed).standard_normal((n, m)).astype(np.float32)
    rows[:, 0] += outlier
    stored = encode_rows(rows * np.float32(scale), "int8")
    assert stored.dtype == np.int8 and stored.shape == rows.shape
    assert (np.abs(stored.astype(int)).max(axis=1) == 127).all()
    found = decode_rows(stored)
    bound = np.abs(rows).max(axis=1) / np.linalg.norm(rows, axis=1) / 254 * np.sqrt(m)
    away = np.linalg.norm(found - unit(rows), axis=1) if n else np.zeros(0)
    assert (away <= 2.1 * bound + 1e-6).all()
    np.testing.assert_array_equal(encode_rows(found, "int8"), stored)  # and then it is stable


def test_floats_are_rounded_and_float32_is_not_copied():
    rows = unit(np.random.default_rng(0).standard_normal((5, 7)))
    assert encode_rows(rows, "float32") is rows and decode_rows(rows) is rows
    half = encode_rows(rows, "float16")
    np.testing.assert_array_equal(half, rows.astype(np.float16))
    np.testing.assert_array_equal(decode_rows(half), half.astype(np.float32))


@pytest.mark.parametrize("dtype", ROW_DTYPES)
def test_rows_of_failed_images_stay_recognisable(dtype):
    rows = np.array([[0.6, 0.8], [np.nan, np.nan], [0.6, np.inf]], np.float32)[
        : 2 + (dtype == "int8")
    ]
    stored = encode_rows(rows, dtype)
    np.testing.assert_array_equal(stored[1], failed_rows((1, 2), dtype)[0])
    found = decode_rows(stored)
    assert np.isnan(found[1:]).all()
    np.testing.assert_allclose(found[0], rows[0], atol=3e-3)


def test_what_is_refused():
    rows = np.array([[1e6, 1.0]], np.float32)
    with pytest.raises(InvalidInputError, match="does not fit float16: use float32"):
        encode_rows(rows, "float16")
    with pytest.raises(InvalidInputError, match="float32, float16, int8, got 'int4'"):
        encode_rows(rows, "int4")
    for dtype in ("uint8", "int32", "bool", "complex64", "longdouble"):
        assert not is_row_dtype(dtype)
        with pytest.raises(InvalidInputError, match=f"or int8, got {np.dtype(dtype)}"):
            decode_rows(np.ones((1, 2), dtype))


@pytest.mark.parametrize("post", ["l2", "standardise"])
@pytest.mark.parametrize("source", [np.float32, np.int8])
def test_project_rows_reads_and_writes_int8(post, source):
    rng = np.random.default_rng(1)
    maps = [
        Projection(rng.standard_normal((64, m), dtype=np.float32), np.ones(m, np.float32), post)
        for m in (5, 40)
    ]
    rows = unit(rng.standard_normal((3001, 64)))
    given = rows if source == np.float32 else encode_rows(rows, "int8")
    out = [np.zeros((len(rows), each.output_dim), np.int8) for each in maps]
    project_rows(given, maps, out, threads=2)
    for made, each in zip(out, maps, strict=True):
        expected = encode_rows(each.apply(given), "int8")
        # sums in another order may round to the next step, and seldom do
        assert np.abs(made.astype(int) - expected).max() <= 1
        assert (made != expected).mean() < 1e-3


def test_project_rows_refuses_failed_rows_and_lengths_as_int8():
    rng = np.random.default_rng(2)
    rows = encode_rows(unit(rng.standard_normal((300, 16))), "int8")
    rows[217] = 0
    made = Projection(np.eye(16, dtype=np.float32), np.ones(16, np.float32))
    for call in (lambda: project_rows(rows, [made]), lambda: made.apply(rows)):
        with pytest.raises(InvalidInputError, match=r"row 217: leave out the rows of images"):
            call()
    bare = Projection(made.weight, made.bias, "none")
    with pytest.raises(InvalidInputError, match=r"int8 keeps the direction .* float16"):
        project_rows(rows[:5], [bare], [np.zeros((5, 16), np.int8)])
