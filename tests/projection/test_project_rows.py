"""`project_rows` compared with `Projection.apply`: results, bad arguments, threads.

The tolerance is 1e-5 for values of about 1, because products are summed in another order. It is
1e-4 for random shapes, where cancellation may cost digits, and 2e-3 for float16.
"""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_info

from crl_sdk.basis._build import build_basis
from crl_sdk.errors import InvalidInputError, UnknownCriterionError
from crl_sdk.projection import _project_rows as reproject
from crl_sdk.projection._project_rows import project_rows
from crl_sdk.projection._projection import Projection

POSTS = ("l2", "standardise", "none")


def unit_rows(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    rows = rng.standard_normal((n, d), dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def projection(rng: np.random.Generator, d: int, m: int, post: str, bias: bool = True):
    return Projection(
        rng.standard_normal((d, m), dtype=np.float32),
        rng.standard_normal(m, dtype=np.float32) * np.float32(bias),
        post,
    )


@pytest.fixture
def small_blocks(monkeypatch):
    """Use small blocks, so that small arrays are divided like large ones."""
    monkeypatch.setattr(reproject, "_BLOCK_BYTES", 1)
    monkeypatch.setattr(reproject, "_PART_BYTES", 1)
    monkeypatch.setattr(reproject, "_FEW_BLOCKS", 0)


def blas_threads() -> list[int]:
    return [each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"]


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(0, 300),
    d=st.integers(1, 80),
    sizes=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    seed=st.integers(0, 2**32 - 1),
    bias=st.booleans(),
)
def test_equals_the_reference(n, d, sizes, seed, bias):
    rng = np.random.default_rng(seed)
    projections = [projection(rng, d, m, POSTS[i % 3], bias) for i, m in enumerate(sizes)]
    embeddings = unit_rows(rng, n, d)
    results = project_rows(embeddings, projections, threads=seed % 3 or None)
    for each, result in zip(projections, results, strict=True):
        expected = each.apply(embeddings)
        assert result.shape == expected.shape and result.dtype == np.float32
        if each.post != "none":  # rows that nearly vanish are scaled rounding errors
            raw = embeddings @ each.weight + each.bias
            if each.post == "standardise":
                raw = raw - raw.mean(axis=1, keepdims=True)
            good = np.linalg.norm(raw, axis=1) > 0.05
        else:
            good = np.ones(n, bool)
        np.testing.assert_allclose(result[good], expected[good], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 1000, 1024, 9001])
@pytest.mark.parametrize("columns", [1, 8, 40, 300])
def test_every_way_a_block_is_cut(small_blocks, rows, columns):
    rng = np.random.default_rng(rows)
    embeddings = unit_rows(rng, rows, 512)
    projections = [projection(rng, 512, columns, post) for post in POSTS]
    for each, result in zip(projections, project_rows(embeddings, projections), strict=True):
        if columns > 1:
            np.testing.assert_allclose(result, each.apply(embeddings), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stored", ["float16", "float32", "float64", ">f4", "unaligned", "columns"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_dtypes_and_layouts(tmp_path, small_blocks, stored, dtype):
    rng = np.random.default_rng(1)
    embeddings = unit_rows(rng, 1000, 96)
    if stored == "unaligned":
        raw = np.zeros(embeddings.nbytes + 1, np.uint8)
        raw[1:] = embeddings.view(np.uint8).ravel()
        given_ = np.frombuffer(raw.data, np.float32, offset=1).reshape(embeddings.shape)
        assert not given_.flags.aligned
    elif stored == "columns":
        given_ = np.asfortranarray(embeddings)
    else:
        given_ = embeddings.astype(stored)
    np.save(tmp_path / "in.npy", given_)
    mapped = np.load(tmp_path / "in.npy", mmap_mode="r")
    projections = [projection(rng, 96, m, post) for m, post in zip((9, 40, 3), POSTS, strict=True)]
    for source in (given_, mapped):
        out = [
            np.lib.format.open_memmap(tmp_path / f"{i}.npy", "w+", dtype, (1000, p.output_dim))
            for i, p in enumerate(projections)
        ]
        assert project_rows(source, projections, out) == out
        tolerance = 2e-3 if "float16" in (stored, dtype) else 1e-5
        for i, each in enumerate(projections):
            written = np.load(tmp_path / f"{i}.npy")
            expected = each.apply(embeddings.astype(given_.dtype).astype(np.float32))
            np.testing.assert_allclose(written, expected, atol=tolerance, rtol=tolerance)


def test_one_array_may_take_all_results(small_blocks):
    rng = np.random.default_rng(2)
    embeddings = unit_rows(rng, 500, 32)
    projections = [projection(rng, 32, 5, post) for post in POSTS]
    whole = np.zeros((500, 15), np.float32)
    project_rows(embeddings, projections, [whole[:, i : i + 5] for i in (0, 5, 10)])
    expected = np.concatenate([each.apply(embeddings) for each in projections], axis=1)
    np.testing.assert_allclose(whole, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("post", POSTS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_row_that_is_not_finite_is_named(small_blocks, post, bad, weight):
    """The products are checked instead of the rows. This works even for weights of 0."""
    each = Projection(np.full((48, 7), weight, np.float32), np.zeros(7, np.float32), post)
    for dtype in ("float16", "float32", "float64"):
        for n, first in [(300, 0), (300, 299), (300, 130), (1, 0)]:
            embeddings = np.full((n, 48), 0.1, dtype)
            embeddings[first:, 11] = bad
            with pytest.raises(
                InvalidInputError, match=f"NaN or infinity, the first at row {first}:"
            ):
                project_rows(embeddings, [each])


def test_the_first_bad_row_is_named_whatever_the_threads(small_blocks):
    embeddings = unit_rows(np.random.default_rng(3), 20000, 16)
    embeddings[[777, 5000, 5001, 19999]] = np.nan
    each = projection(np.random.default_rng(3), 16, 4, "l2")
    for _ in range(20):
        with pytest.raises(InvalidInputError, match="the first at row 777:"):
            project_rows(embeddings, [each], threads=4)


def test_what_does_not_fit_a_dtype():
    each = Projection(np.full((4, 2), 300, np.float32), np.zeros(2, np.float32), "none")
    rows = np.full((3, 4), 100, np.float32)
    with pytest.raises(
        InvalidInputError, match=r"rows 0 to 2: a value does not fit float16: use float32"
    ):
        project_rows(rows, [each], [np.zeros((3, 2), np.float16)])
    with pytest.raises(InvalidInputError, match="row 0 is so long"):
        project_rows(np.full((3, 4), 3e38, np.float32), [each])
    with pytest.raises(InvalidInputError, match="row 0 is so long"):
        project_rows(np.full((3, 4), 1e300), [each])


def test_wrong_arguments():
    each = Projection(np.ones((4, 2), np.float32), np.zeros(2, np.float32))
    other = Projection(np.ones((5, 2), np.float32), np.zeros(2, np.float32))
    rows, out = np.ones((3, 4), np.float32), np.zeros((3, 2), np.float32)
    locked = out.copy()
    locked.flags.writeable = False
    for arguments, words in [
        ((rows, []), "one input dimension"),
        ((rows, [each, other]), "one input dimension"),
        ((rows[:, :3], [each]), r"shape \(n, 4\), got \(3, 3\)"),
        ((rows[0], [each]), "shape"),
        ((rows.astype(np.int32), [each]), "float dtype"),
        ((rows.astype(np.longdouble), [each]), "float dtype"),
        ((rows, [each], []), "one output for each of 1"),
        ((rows, [each], [out[:2]]), r"an output \(3, 2\)"),
        ((rows, [each], [out.astype(np.float64)]), "float32, float16, int8, got 'float64'"),
        ((rows, [each], [locked]), "read-only"),
        ((rows, [each], [rows[:, :2]]), "shares memory with the embeddings"),
    ]:
        with pytest.raises(InvalidInputError, match=words):
            project_rows(*arguments)
    with pytest.raises(InvalidInputError, match="threads >= 1"):
        project_rows(rows, [each], threads=0)


def test_rows_with_nothing_to_scale_become_zero():
    zeros = np.zeros((3, 4), np.float32)
    equal = Projection(np.ones((4, 5), np.float32), np.full(5, 7, np.float32), "standardise")
    long = Projection(np.ones((4, 5), np.float32), np.zeros(5, np.float32), "l2")
    single = Projection(np.ones((4, 1), np.float32), np.ones(1, np.float32), "standardise")
    for result in project_rows(zeros, [equal, long, single]):
        assert (result == 0).all()


def test_no_rows():
    (result,) = project_rows(
        np.zeros((0, 4), np.float32), [Projection(np.ones((4, 2), np.float32), np.ones(2, "f4"))]
    )
    assert result.shape == (0, 2)


def test_embedder_projects_onto_one_or_several(embedder, tmp_path):
    rng = np.random.default_rng(5)
    made = [
        build_basis(name, texts, embedder.embed_text, fingerprint=embedder.bundle.fingerprint)
        for name, texts in [("color", ["red", "green", "blue"]), ("shape", ["circle", "square"])]
    ]
    embeddings = unit_rows(rng, 50, embedder.bundle.embedding_dim)
    results = embedder.project(embeddings, made)
    assert list(results) == ["color", "shape"]
    for basis in made:
        expected = basis.projection.apply(embeddings)
        alone = embedder.project(embeddings, basis)
        for found in (alone, results[basis.criterion]):
            np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-4)
    maps = {
        basis.criterion: np.lib.format.open_memmap(
            tmp_path / basis.criterion, "w+", np.float16, (50, basis.projection.output_dim)
        )
        for basis in made
    }
    embedder.project(embeddings, made, out=maps)
    np.testing.assert_allclose(maps["shape"], results["shape"], atol=2e-3)
    one = np.zeros((50, made[0].projection.output_dim), np.float32)
    assert embedder.project(embeddings, made[0], out=one) is one and one.any()
    for arguments, out, words in [
        ([made[0], made[0]], None, "each once"),
        ([], None, "expected criteria"),
        (made, {"color": one}, r"a mapping of \['color', 'shape'\]"),
        (made, one, "a mapping"),
        (made[1], one[:, :1], r"an output \(50, 2\)"),
    ]:
        with pytest.raises(InvalidInputError, match=words):
            embedder.project(embeddings, arguments, out=out)
    with pytest.raises(UnknownCriterionError):
        embedder.project(embeddings, ["color", "mood"])


def test_the_limit_on_blas_is_taken_back(small_blocks):
    """The BLAS limit applies to the process. If calls overlap, the last one removes it."""
    before = blas_threads()
    first, second = reproject.single_threaded_blas, reproject.single_threaded_blas
    first.__enter__()
    assert set(blas_threads()) <= {1}
    second.__enter__()
    first.__exit__(None, None, None)
    assert set(blas_threads()) <= {1}
    second.__exit__(None, None, None)
    assert blas_threads() == before

    rng = np.random.default_rng(4)
    embeddings, each = unit_rows(rng, 20000, 64), projection(rng, 64, 10, "l2")
    expected, results = each.apply(embeddings), []
    callers = [
        threading.Thread(
            target=lambda: results.append(project_rows(embeddings, [each], threads=2)[0])
        )
        for _ in range(4)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 4 and blas_threads() == before
    for result in results:
        np.testing.assert_allclose(result, expected, atol=1e-5, rtol=1e-5)
    embeddings[5] = np.nan
    with pytest.raises(InvalidInputError):
        project_rows(embeddings, [each], threads=2)
    assert blas_threads() == before


def test_an_error_in_a_thread_reaches_the_caller(small_blocks, monkeypatch):
    before = blas_threads()
    monkeypatch.setattr(reproject, "_finish", lambda *_: 1 / 0)
    rows = np.ones((2000, 4), np.float32)
    each = Projection(np.ones((4, 2), np.float32), np.zeros(2, np.float32))
    with pytest.raises(ZeroDivisionError):
        project_rows(rows, [each], threads=2)
    assert blas_threads() == before


def test_progress_and_interruption(small_blocks):
    rows = np.ones((2000, 4), np.float32)
    each = Projection(np.ones((4, 2), np.float32), np.zeros(2, np.float32))
    for threads in (1, 2):
        seen: list[int] = []
        project_rows(rows, [each], threads=threads, progress=seen.append)
        assert seen[-1] == 2000 and seen == sorted(seen)

    def interrupt(done: int) -> None:
        raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        project_rows(rows, [each], threads=2, progress=interrupt)
    assert threading.active_count() == before
