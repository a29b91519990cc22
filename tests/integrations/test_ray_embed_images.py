"""The class for `map_batches`, without Ray: what it does with a batch."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest

from crl_sdk import Basis, demo_bundle
from crl_sdk.errors import BasisMismatchError, InvalidInputError, MissingDependencyError
from crl_sdk.integrations.ray import EmbedImages, connect

pa = pytest.importorskip("pyarrow")


@pytest.fixture(scope="module")
def color(embedder):
    return embedder.create_basis("color", ["red", "green", "blue"], load=False)


@pytest.fixture(scope="module")
def embed(color):
    made = EmbedImages(demo_bundle(), [color], engine="onnx/cpu/fp32")
    yield made
    made.embedder.close()


def test_numpy_batches_and_arrow_tables_have_the_rows_of_the_embedder(
    embed, embedder, color, image_files
):
    data = [path.read_bytes() for path in image_files]
    expected = embedder.embed(data, [color])
    batch = {"image": np.array(data, dtype=object), "id": np.arange(9)}
    result = embed(batch)
    assert list(result) == ["id", "universal", "color", "error"]
    assert np.array_equal(result["universal"], expected.universal)
    assert np.array_equal(result["color"], expected["color"])
    assert list(result["error"]) == [None] * 9
    table = embed(pa.table({"id": range(9), "image": data}))
    assert table.column_names == ["id", "universal", "color", "error"]
    assert np.array_equal(np.stack(table["color"].to_numpy()), expected["color"])
    assert table["error"].null_count == 9 and table["universal"].type == pa.list_(pa.float32(), 128)


def test_paths_are_kept_and_bad_pictures_are_rows_with_reasons(embed, image_files, tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no picture")
    paths = [str(image_files[0]), str(bad), str(tmp_path / "missing.jpg"), str(image_files[1])]
    table = embed(pa.table({"path": paths}))
    assert table["path"].to_pylist() == paths
    reasons = table["error"].to_pylist()
    assert [reason is None for reason in reasons] == [True, False, False, True]
    for name in ("universal", "color"):
        assert [row is None for row in table[name].to_pylist()] == [False, True, True, False]
    result = embed({"path": np.array(paths, dtype=object)})
    assert list(result["error"]) == reasons
    assert list(np.isnan(result["universal"]).all(1)) == [False, True, True, False]


def test_null_and_all_bad_and_no_rows(embed):
    table = embed(pa.table({"image": pa.array([None, b""], pa.binary())}))
    assert table["error"].null_count == 0 and table["color"].null_count == 2
    empty = embed(pa.table({"image": pa.array([], pa.binary())}))
    assert empty.num_rows == 0 and empty.schema == table.schema
    assert embed({"image": np.array([], dtype=object)})["universal"].shape == (0, 128)


def test_pixels_are_images_too(embed, embedder, image_files):
    pixels = np.zeros((2, 40, 50, 3), np.uint8)
    assert np.array_equal(
        embed({"image": pixels})["universal"], embedder.embed(list(pixels)).universal
    )


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"picture": np.zeros(1)}, "column=…"),
        ({"path": np.array(["a"], object), "color": np.zeros(1)}, "rename_columns"),
        ([b"x"], "batch_format"),
    ],
)
def test_wrong_batches_are_said(embed, batch, message):
    with pytest.raises(InvalidInputError, match=message):
        embed(batch)


def test_a_criterion_must_not_hide_a_column(color):
    with pytest.raises(InvalidInputError, match="'path'"):
        EmbedImages(demo_bundle(), [replace(color, criterion="path")])


def test_another_model_is_refused(color):
    with pytest.raises(BasisMismatchError, match="copy the bundle"):
        EmbedImages(demo_bundle(), [color], fingerprint="0" * 64)


def test_a_basis_goes_to_other_processes_as_it_is(color):
    copy = pickle.loads(pickle.dumps(color))
    assert isinstance(copy, Basis) and copy.sha256() == color.sha256()


def test_without_ray_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with (
        pytest.raises(MissingDependencyError, match=r"crl-embeddings\[ray\]"),
        connect("127.0.0.1:6379"),
    ):
        pass
