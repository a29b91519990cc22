"""The projection kernel as it is launched: real machine code on a simulated driver."""

from __future__ import annotations

import gc
import re

import msgspec
import numpy as np
import pytest
from simulated_gpu import CUresult, Driver

from crl_export.kernels.ahead import KINDS, compile_kernels
from crl_sdk.engines import _cuda as cuda
from crl_sdk.engines import _kernels as kernels
from crl_sdk.engines._kernels import (
    POST_NUMBERS,
    ProjectionKernel,
    best_block,
    columns_computed,
    read_kernels,
)
from crl_sdk.errors import ClosedError, EngineError, InvalidInputError, PlanError
from crl_sdk.projection._projection import Projection, normalise_rows

SIZES = {"u64": 8, "u32": 4}


def numpy_kernel(driver, launch):
    """Compute in NumPy what the kernel computes, and check the arguments against the PTX."""
    record = {each.sha256: each for each in driver.kernels.variants}
    variant = next(each for each in record.values() if launch.image in driver.images[each.file])
    parameters = re.findall(r"^\s*\.param \.(u\d+)", driver.ptx[variant.file], re.MULTILINE)
    import ctypes

    sizes = [ctypes.sizeof(each) for _, each in launch.arguments]
    assert sizes == [SIZES[each] for each in parameters]
    x, weight, bias, starts, posts, n, d, k, out, *scratch = (v for v, _ in launch.arguments)
    assert scratch == [0, 0] and launch.threads == 256
    segments = launch.grid[1]
    assert launch.grid[0] == -(-n // 32) and launch.shared == variant.shared
    dtype = {"fp32": np.float32, "fp16": np.float16}[variant.embeddings]
    rows = driver.view(x, (n, d), dtype).astype(np.float32)
    if variant.unit:
        rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    result = rows @ driver.view(weight, (d, k), np.float32) + driver.view(bias, (k,), np.float32)
    ends = driver.view(starts, (segments + 1,), np.int32)
    names = {number: post for post, number in POST_NUMBERS.items()}
    for i, post in enumerate(driver.view(posts, (segments,), np.int32)):
        assert not variant.single or ends[i + 1] - ends[i] <= variant.columns
        part = slice(ends[i], ends[i + 1])
        result[:, part] = normalise_rows(result[:, part], names[int(post)])
    own = slice(ends[0], ends[-1])
    driver.view(out, (n, k), np.float32)[:, own] = result[:, own]
    driver.widths.append((variant.columns, variant.single, segments))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    directory = tmp_path_factory.mktemp("kernels")
    compile_kernels(directory, ["sm86", "sm89"])
    return directory


@pytest.fixture
def driver(folder, monkeypatch):
    simulated = Driver(kernel=numpy_kernel)
    simulated.kernels, simulated.widths = read_kernels(folder), []
    simulated.images = {
        each.file: ((folder / each.file).read_bytes(), (folder / each.ptx).read_bytes() + b"\0")
        for each in simulated.kernels.variants
    }
    simulated.ptx = {
        each.file: (folder / each.ptx).read_text() for each in simulated.kernels.variants
    }
    monkeypatch.setattr(cuda, "driver", lambda: simulated)
    yield simulated
    gc.collect()
    assert simulated.nothing_left()


def some(n, d, sizes, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((n, d)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    posts = ["l2", "standardise", "none"]
    return rows.astype(dtype), [
        Projection(
            rng.standard_normal((d, m)).astype(np.float32),
            rng.standard_normal(m).astype(np.float32),
            posts[i % 3],
        )
        for i, m in enumerate(sizes)
    ]


@pytest.mark.parametrize("sizes", [[3], [5, 64, 2], [65, 7], [200, 1, 9, 30], [20, 17, 33, 20]])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_it_agrees_with_its_specification(driver, folder, sizes, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "_ROWS_AT_ONCE", 50)
    kernel = ProjectionKernel.open(folder)
    for n in (1, 49, 50, 121):  # less than a part, one part, several parts
        rows, projections = some(n, 64, sizes, dtype, seed=n)
        results = kernel.apply(rows, projections)
        exact = rows.astype(np.float32)
        for got, projection in zip(results, projections, strict=True):
            expected = normalise_rows(exact @ projection.weight + projection.bias, projection.post)
            assert got.shape == expected.shape and got.dtype == np.float32
            np.testing.assert_allclose(got, expected, atol=2e-5, rtol=2e-5)
    scaled = kernel.apply(rows * dtype(3), projections, unit=True)
    np.testing.assert_allclose(scaled[0], results[0], atol=4e-3)
    assert kernel.apply(rows[:0], projections)[0].shape == (0, sizes[0])
    kernel.close()


def test_each_basis_gets_the_smallest_block_that_holds_it(driver, folder):
    kernel = ProjectionKernel.open(folder)
    kernel.apply(*some(3, 64, [20, 64, 7, 150, 16, 21]))
    assert driver.widths == [(16, True, 2), (32, True, 2), (64, True, 1), (64, False, 1)]
    kernel.close()
    computed = [columns_computed(20, width, single=True) for width in (16, 32, 64)]
    assert computed == [32, 32, 64]  # blocks of 64 columns computed 3.2 times what was needed
    assert best_block(20, KINDS) == (32, True) and best_block(65, KINDS) == (64, False)


def test_memory_is_reused_and_grows(driver, folder):
    kernel = ProjectionKernel.open(folder)
    kernel.apply(*some(10, 64, [4]))
    count = len(driver.buffers)
    kernel.apply(*some(5, 64, [4]))
    kernel.apply(*some(1000, 64, [40, 9]))
    assert len(driver.buffers) == count == 6
    kernel.close()
    kernel.close()
    with pytest.raises(ClosedError, match="the engine is closed: make a new one"):
        kernel.apply(*some(1, 64, [4]))


def test_a_newer_gpu_uses_the_ptx_of_the_newest_older_architecture(driver, folder):
    driver.capability = (9, 0)
    kernel = ProjectionKernel.open(folder)
    rows, projections = some(3, 64, [4])
    expected = projections[0].apply(rows)
    np.testing.assert_allclose(kernel.apply(rows, projections)[0], expected, atol=2e-5)
    (image,) = driver.modules.values()
    assert b".target sm_89" in image and image.endswith(b"\0")
    kernel.close()
    driver.capability = (7, 5)
    with pytest.raises(PlanError, match=r"for sm75 or an older .*sm86, sm89.*--arch sm75"):
        ProjectionKernel.open(folder)


def test_wrong_input_is_refused(driver, folder):
    kernel = ProjectionKernel.open(folder)
    rows, projections = some(3, 64, [4])
    for wrong in (
        (rows[0], projections),
        (rows.astype(np.float64), projections),
        (rows, []),
        (rows[:, 1:], projections),
    ):
        with pytest.raises(InvalidInputError, match="expected embeddings"):
            kernel.apply(*wrong)
    kernel.close()


def test_missing_and_changed_files_are_errors(driver, folder, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    kernel = ProjectionKernel.open(copy)
    for file in copy.glob("sm89-fp32*.cubin"):
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(PlanError, match=r"cut off or changed.*--kernel"):
        kernel.apply(*some(3, 64, [4]))
    for file in copy.glob("sm89-fp32*.cubin"):
        file.unlink()
    with pytest.raises(PlanError, match="missing"):
        kernel.apply(*some(3, 64, [4]))
    kernel.close()
    record = copy / "kernels.json"
    text = record.read_text()
    for edited, words in [
        (text.replace('"schema": 2', '"schema": 9'), "schema 9"),
        (text[:200], "not a readable record"),
        (text.replace('"file": "sm86', '"file": "../sm86'), "leaves the directory"),
    ]:
        record.write_text(edited)
        with pytest.raises(PlanError, match=words):
            read_kernels(copy)
    with pytest.raises(PlanError, match=r"No such file.*crl compile BUNDLE --kernel"):
        ProjectionKernel.open(tmp_path)
    fewer = msgspec.structs.replace(driver.kernels, variants=driver.kernels.variants[-1:])
    kernels.write_kernels(copy, fewer, {})
    kernel = ProjectionKernel.open(copy)
    with pytest.raises(PlanError, match="no kernel for fp32"):
        kernel.apply(*some(3, 64, [4]))
    kernel.close()


def test_a_failed_launch_is_a_typed_error(driver, folder):
    kernel = ProjectionKernel.open(folder)
    driver.fail["cuLaunchKernel"] = CUresult.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(EngineError, match=r"launching a kernel failed \(CUDA_ERROR_INVALID_VALUE"):
        kernel.apply(*some(3, 64, [4]))
    driver.fail.clear()
    assert len(kernel.apply(*some(3, 64, [4]))) == 1
    kernel.close()


def test_errors_of_writing_and_compiling(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PlanError, match="cannot be created"):
        kernels.write_kernels(tmp_path / "file" / "x", None, {})
    with pytest.raises(InvalidInputError, match="got sm70"):
        compile_kernels(tmp_path, ["sm70"])


def test_verification_finds_a_wrong_kernel(driver, folder, bundle_copy, capsys, monkeypatch):
    import json
    import shutil

    import typer

    from crl_sdk import ModelBundle
    from crl_sdk.cli._verify import verify as command
    from crl_sdk.engines import _verify as verify

    bundle = ModelBundle.open(bundle_copy)
    shutil.copytree(folder, kernels.kernels_directory(bundle))
    record = verify.verify_kernel(bundle, rows=300)
    assert record.agrees and [each.embeddings for each in record.checks] == ["float32", "float16"]
    assert all(each.max_abs < 1e-4 and each.p50_ms > 0 for each in record.checks)
    run = verify.verify_kernel
    monkeypatch.setattr("crl_sdk.cli._verify.verify_kernel", lambda each: run(each, rows=300))
    options = {
        "engine": None,
        "batches": "1",
        "seconds": 1,
        "out_file": None,
        "kernel": True,
        "baked": None,
    }
    command(bundle_copy, **options, as_json=False)
    assert "agrees with NumPy" in capsys.readouterr().out

    def wrong_kernel(driver, launch):
        numpy_kernel(driver, launch)
        n, k, out = (launch.arguments[i][0] for i in (5, 7, 8))
        driver.view(out, (n, k), np.float32)[-1, -1] += added[0]  # in the last basis

    driver.kernel = wrong_kernel
    added = [0.0]
    for added[0] in (1e-3, np.nan):
        with pytest.raises(typer.Exit):
            command(bundle_copy, **options, as_json=True)
        assert json.loads(capsys.readouterr().out)["agrees"] is False
