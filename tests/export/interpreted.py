"""Script that compares the kernel with NumPy in Triton's interpreter (TRITON_INTERPRET=1)."""

from __future__ import annotations

import os

assert os.environ.get("TRITON_INTERPRET") == "1", "set it before triton is imported"

import numpy as np  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from crl_export.kernels.jitted import launch_jitted  # noqa: E402
from crl_sdk.basis._methods import PROJECTION_METHODS, make_projection  # noqa: E402
from crl_sdk.engines._kernels import POST_NUMBERS  # noqa: E402
from crl_sdk.projection._projection import EPSILON, normalise_rows  # noqa: E402

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def run(x, weight, bias, sizes, posts, *, unit, out_dtype=torch.float32):
    out = torch.full((len(x), sum(sizes)), 7.0, dtype=out_dtype)
    launch_jitted(x, weight, bias, sizes, posts, unit=unit, out=out)
    return out.float().numpy()


def expected(x, weight, bias, sizes, posts, *, unit):
    rows = x.float().numpy()
    if unit:
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        rows = rows / np.maximum(norms, EPSILON)
    columns = rows @ weight.float().numpy() + bias.numpy()
    parts = np.split(columns, np.cumsum(sizes)[:-1], axis=1)
    return np.concatenate(
        [normalise_rows(part, post) for part, post in zip(parts, posts, strict=True)], axis=1
    )


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    n=st.integers(1, 40),
    d=st.sampled_from([1, 7, 32, 63, 128]),
    segments=st.lists(
        st.tuples(
            st.integers(1, 40) | st.sampled_from([64, 65, 130]),
            st.sampled_from(sorted(POST_NUMBERS)),
        ),
        min_size=1,
        max_size=5,
    ),
    dtype=st.sampled_from(sorted(DTYPES)),
    unit=st.booleans(),
    seed=st.integers(0, 2**31),
)
def check_parity(*, n, d, segments, dtype, unit, seed):
    """Compare with float32 NumPy on the same rounded inputs, to 2e-5 absolute and relative."""
    rng = np.random.default_rng(seed)
    sizes, posts = zip(*segments, strict=True)
    x = torch.from_numpy(rng.standard_normal((n, d)).astype(np.float32))
    if not unit:
        x /= x.norm(dim=1, keepdim=True)
    if n > 2:
        x[1] = 0
    x = x.to(DTYPES[dtype])
    weight = torch.from_numpy(rng.standard_normal((d, sum(sizes))).astype(np.float32) / d**0.5)
    bias = torch.from_numpy(rng.standard_normal(sum(sizes)).astype(np.float32))
    measured = run(x, weight, bias, sizes, posts, unit=unit)
    exact = expected(x, weight, bias, sizes, posts, unit=unit)
    for column, (size, post) in zip(np.cumsum((0, *sizes[:-1])), segments, strict=True):
        own = slice(column, column + size)
        if post == "standardise" and size <= 2:
            continue  # with two values or fewer, a rounding error is divided by itself
        np.testing.assert_allclose(measured[:, own], exact[:, own], atol=2e-5, rtol=2e-5)


def check_that_bad_rows_do_not_affect_others():
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((20, 32)).astype(np.float32))
    weight = torch.from_numpy(rng.standard_normal((32, 24)).astype(np.float32))
    bias, sizes = torch.zeros(24), (4, 20)
    clean = run(x, weight, bias, sizes, ("l2", "standardise"), unit=True)
    x[3, 5], x[4] = float("nan"), 0.0
    marred = run(x, weight, bias, sizes, ("l2", "standardise"), unit=True)
    assert np.isnan(marred[3]).all() and not marred[4].any()
    others = np.delete(np.arange(20), [3, 4])
    np.testing.assert_array_equal(marred[others], clean[others])


def check_half_precision():
    """Compare with fp16 weights and output, to 4e-3: inputs and output are rounded."""
    rng = np.random.default_rng(1)
    x = torch.from_numpy(rng.standard_normal((33, 64)).astype(np.float32)).half()
    weight = torch.from_numpy(rng.standard_normal((64, 30)).astype(np.float32) / 8).half()
    bias, sizes, posts = torch.zeros(30), (9, 21), ("l2", "standardise")
    measured = run(x, weight, bias, sizes, posts, unit=True, out_dtype=torch.float16)
    exact = expected(x, weight, bias, sizes, posts, unit=True)
    np.testing.assert_allclose(measured, exact, atol=4e-3)


def check_every_method():
    """Compare bases of all methods in one launch with each projection's `apply`, to 2e-5."""
    rng = np.random.default_rng(2)
    texts, other, images = (
        normalise_rows(rng.standard_normal((count, 64)).astype(np.float32) + 0.5, "l2")
        for count in (9, 5, 33)
    )
    made = [
        make_projection(
            texts, method.name, against=[other] if method.needs_against else [],
            reference=images[:20] if method.takes_reference else None,
        )
        for method in PROJECTION_METHODS
    ]  # fmt: skip
    weight = torch.from_numpy(np.concatenate([each.weight for each in made], axis=1))
    bias = torch.from_numpy(np.concatenate([each.bias for each in made]))
    sizes, posts = zip(*((each.output_dim, each.post) for each in made), strict=True)
    measured = run(torch.from_numpy(images), weight, bias, sizes, posts, unit=False)
    exact = np.concatenate([each.apply(images) for each in made], axis=1)
    np.testing.assert_allclose(measured, exact, atol=2e-5)


if __name__ == "__main__":
    check_parity()
    check_every_method()
    check_that_bad_rows_do_not_affect_others()
    check_half_precision()
    print("agrees")
