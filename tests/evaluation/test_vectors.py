"""Stored vectors: how they are read and checked, and the protocols on planted vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from crl_sdk.basis._methods import METHODS, find_method
from crl_sdk.errors import BasisMismatchError, InvalidInputError
from crl_sdk.evaluation import _vector_protocols as run
from crl_sdk.evaluation._few_shot import splits
from crl_sdk.evaluation._vectors import (
    VectorFile,
    read_images,
    read_labels,
    read_text_vectors,
    require_one_space,
)

pytest.importorskip("sklearn")

DIM, COLOURS, SHAPES = 12, ("blue", "green", "red"), ("cone", "cube", "ball", "ring")


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def planted(count: int = 72, seed: int = 0) -> dict[str, np.ndarray]:
    """Return images in which shape is strong and colour weak, and texts that share a direction."""
    rng = np.random.default_rng(seed)
    colour, shape = rng.permutation(np.arange(count)) % 3, np.arange(count) % 4
    axes = np.eye(DIM)
    images = axes[colour] + 3.0 * axes[3 + shape] + 0.15 * rng.standard_normal((count, DIM))
    return {
        "image": unit(images),
        "colour": np.array(COLOURS)[colour],
        "shape": np.array(SHAPES)[shape],
        "text:colour": unit(axes[:3] + 4.0 * axes[11]),
        "words:colour": np.array(COLOURS),
        "text:shape": unit(axes[3:7] + 4.0 * axes[11]),
    }


def write(path: Path, arrays: dict[str, np.ndarray]) -> VectorFile:
    np.savez(path, **arrays)
    return VectorFile(path)


def read(file: VectorFile, *columns: str, group: str | None = None, smallest: int = 2):
    return read_labels(file, read_images(file)[0], columns, group, smallest)


def test_vectors_labels_and_texts_are_read(tmp_path):
    file = write(tmp_path / "data.npz", planted())
    data = read(file, "colour", "shape")
    assert data.images.shape == (72, DIM) and data.images.dtype == np.float32
    assert data.labels["colour"].values == COLOURS and not data.grouped and not data.notes
    texts, notes = read_text_vectors([file], {}, DIM)
    assert set(texts) == {"colour", "shape"} and notes == []
    assert texts["colour"].texts == COLOURS and texts["shape"].texts[0] == "text 1"


def test_parquet_holds_the_same(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    arrays = planted(24)
    labels = [None, "", *arrays["colour"][2:]]
    for name, kind in (("list", pa.list_(pa.float32())), ("fixed", pa.list_(pa.float32(), DIM))):
        path = tmp_path / f"{name}.parquet"
        column = pa.array(arrays["image"].tolist(), kind)
        groups = pa.array([None, *range(23)], pa.int64())
        parquet.write_table(pa.table({"image": column, "colour": labels, "group": groups}), path)
        data = read(VectorFile(path), "colour")
        np.testing.assert_allclose(data.images, arrays["image"], atol=1e-6)
        assert len(data.labels["colour"].files) == 22
        assert any("2 of 24 images have an empty label" in note for note in data.notes)
        assert any("1 of 24 images have no group" in note for note in data.notes)
    bank = tmp_path / "bank.parquet"
    texts = pa.array(arrays["text:colour"].tolist(), pa.list_(pa.float32()))
    parquet.write_table(pa.table({"text": texts, "word": list(COLOURS)}), bank)
    found, _ = read_text_vectors([VectorFile(bank)], {"hue": ["Red", "blue"]}, DIM)
    assert found["hue"].texts == ("blue", "red")
    uneven = tmp_path / "uneven.parquet"
    parquet.write_table(pa.table({"image": pa.array([[1.0], [1.0, 2.0]])}), uneven)
    with pytest.raises(InvalidInputError, match="a list of one length in every row"):
        read_images(VectorFile(uneven))
    uneven.write_bytes(b"PAR1 no")
    with pytest.raises(InvalidInputError, match=r"not a valid \.parquet file"):
        VectorFile(uneven)


def test_a_bank_gives_its_kinds_or_the_words_that_are_asked_for(tmp_path):
    arrays = planted()
    bank = write(
        tmp_path / "bank.npz",
        {
            "text": np.concatenate([arrays["text:colour"], arrays["text:shape"]]),
            "word": np.array([*COLOURS, *SHAPES]),
            "kind": np.array(["colour"] * 3 + ["shape"] * 4),
        },
    )
    found, _ = read_text_vectors([bank], {}, DIM)
    assert found["colour"].texts == COLOURS and found["shape"].texts == SHAPES
    found, _ = read_text_vectors([bank], {"colour": ["red", "green"]}, DIM)
    assert found["colour"].texts == ("green", "red") and found["shape"].texts == SHAPES
    with pytest.raises(InvalidInputError, match=r"--words: colour: pink not found in the bank"):
        read_text_vectors([bank], {"colour": ["red", "pink"]}, DIM)
    with pytest.raises(InvalidInputError, match=r"not found in any bank: pass --texts FILE"):
        read_text_vectors([], {"colour": ["red"]}, DIM)
    captions = write(tmp_path / "captions.npz", arrays | {"text": arrays["image"]})
    assert set(read_text_vectors([captions], {}, DIM)[0]) == {"colour", "shape"}
    other = write(tmp_path / "other.npz", {"text": arrays["text:shape"]})
    with pytest.raises(InvalidInputError, match=r"expected an array 'word' with words \(4,\)"):
        read_text_vectors([other], {}, DIM)
    with pytest.raises(InvalidInputError, match="expected text vectors: arrays text:CRITERION"):
        read_text_vectors([write(tmp_path / "none.npz", {"label": np.arange(3)})], {}, DIM)
    data = write(tmp_path / "data.npz", arrays)
    with pytest.raises(InvalidInputError, match="the texts of colour are already given by"):
        read_text_vectors([data, bank], {}, DIM)


def test_arrays_may_have_other_names(tmp_path):
    arrays = planted()
    arrays["clip"] = arrays.pop("image")
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(InvalidInputError, match=r"'image' with the image .*--array image=NAME"):
        read_images(VectorFile(tmp_path / "data.npz"))
    assert len(read_images(VectorFile(tmp_path / "data.npz", {"image": "clip"}))[0]) == 72


def test_rows_are_scaled_to_unit_length_and_that_is_said(tmp_path):
    arrays = planted()
    half = write(tmp_path / "half.npz", {"image": arrays["image"].astype(np.float16)})
    assert read_images(half)[1] == []
    long = write(tmp_path / "long.npz", {"image": arrays["image"] * 3})
    images, notes = read_images(long)
    np.testing.assert_allclose(images, arrays["image"], atol=1e-6)
    assert "72 of 72 vectors do not have unit length (norms 3 to 3); they were scaled" in notes[0]


def test_bad_vectors_and_labels_say_what_to_do(tmp_path):
    def refused(what: str, **changes: np.ndarray) -> None:
        file = write(tmp_path / "bad.npz", planted() | changes)
        with pytest.raises(InvalidInputError, match=what):
            read_text_vectors([file], {}, read_images(file)[0].shape[1])
            read(file, "colour")

    image = planted()["image"]
    broken, zero = image.copy(), image.copy()
    broken[3, 1], zero[5] = np.nan, 0
    refused("1 of 72 embeddings hold NaN or infinity, the first at row 3", image=broken)
    refused("1 of 72 vectors are zero, the first at row 5: leave out", image=zero)
    refused(r"expected vectors \(n, d\) of a float dtype", image=image[0])
    refused("of a float dtype", image=np.ones((72, DIM), int))
    refused(r"expected text vectors of 12 dim.*got 5", **{"text:shape": np.eye(5)})
    refused(r"words:colour: expected texts \(3,\)", **{"words:colour": np.array(["a", "b"])})
    refused(r"colour: expected labels \(72,\) of strings.*got \(9,\)", colour=np.array(["a"] * 9))
    refused("got .72,. float64", colour=np.ones(72))
    refused("found 1 of 1: pass fewer --shots", colour=np.array(["red"] * 72))
    refused(r"group: expected groups \(72,\)", group=np.arange(5))
    refused("the array 'colour' cannot be read .*dtype=str", colour=np.array(["a"] * 72, object))
    refused("not ASCII", colour=np.array(["\xe9".encode()] * 72))
    file = write(tmp_path / "data.npz", planted())
    with pytest.raises(
        InvalidInputError, match=r"an array 'mood' with labels.*found image, colour"
    ):
        read(file, "mood")
    (tmp_path / "no.npz").write_bytes(b"no")
    for name, what in (
        ("no.npz", "not a valid"),
        ("none.npz", "check the path"),
        ("a.csv", ".npz"),
    ):
        with pytest.raises(InvalidInputError, match=what):
            VectorFile(tmp_path / name)


def test_empty_labels_and_small_classes_are_left_out_and_counted(tmp_path):
    arrays = planted()
    labels = arrays["colour"].astype("U8")
    labels[:4], labels[4] = " ", "pink"
    data = read(write(tmp_path / "data.npz", arrays | {"colour": labels}), "colour")
    assert len(data.labels["colour"].files) == 67 and data.labels["colour"].values == COLOURS
    assert "4 of 72 images have an empty label" in data.notes[0]
    assert "1 images of 1 classes with fewer than 2 images are left out: pink (1)" in data.notes[1]
    groups = np.where(arrays["colour"] == "red", 0, np.arange(72))
    data = read(write(tmp_path / "data.npz", arrays | {"group": groups}), "colour")
    assert "24 images of 1 classes with fewer than 2 groups are left out: red" in data.notes[0]


def test_vectors_of_two_models_are_refused(tmp_path):
    marks = [{"fingerprint": np.array(each * 64)} for each in "ab"]
    files = [write(tmp_path / f"{i}.npz", planted() | mark) for i, mark in enumerate(marks)]
    require_one_space([files[0], files[0], write(tmp_path / "2.npz", planted())])
    with pytest.raises(BasisMismatchError, match="vectors of different models"):
        require_one_space(files)


def test_splits_keep_groups_together_and_are_the_papers_without_them():
    labels, groups = np.repeat([0, 1, 2], 20), np.arange(60) // 2
    for ours, papers in zip(splits(labels, 3, 5, np.arange(60)), splits(labels, 3, 5), strict=True):
        assert np.array_equal(ours.train, papers.train) and np.array_equal(ours.test, papers.test)
    for split in splits(labels, 3, 5, groups):
        assert len(np.unique(groups[split.train])) == len(split.train) == 9
        assert not np.isin(groups[split.test], groups[split.train]).any()
        assert len(split.test) == 60 - 2 * 9
    with pytest.raises(InvalidInputError, match="10 shots need at least 11 groups of each class"):
        next(splits(labels, 10, 1, groups))
    with pytest.raises(InvalidInputError, match="no image is left to test"):
        list(splits(np.array([0, 0, 1, 1]), 1, 9, np.array([0, 1, 1, 0])))


def test_every_method_and_control_is_compared_with_cosine(tmp_path):
    file = write(tmp_path / "data.npz", planted())
    texts, _ = read_text_vectors([file], {}, DIM)
    options = run.VectorOptions(seeds=3, shots=(1, 3), splits=3)
    rows, notes = run.run_vectors(read(file, "colour"), {"colour": "colour"}, texts, options)
    assert notes == []
    by = {(row.protocol, row.representation): row.scores for row in rows}
    methods = dict.fromkeys(("cosine", *run.DESCRIBING))
    for protocol in run.VECTOR_PROTOCOLS:
        names = [name for kind, name in by if kind == protocol]
        scaled = ["universal, same scale"] * (protocol == "few-shot")
        assert names == ["universal", *scaled, "random directions", *methods]
    acc = {name: scores["ACC"] for (kind, name), scores in by.items() if kind == "clustering"}
    assert acc["universal"].score.mean < 0.6 and acc["contrastive"].score.mean > 0.95
    assert acc["cosine"].difference is None and acc["contrastive"].difference is not None
    low, high = acc["universal"].low, acc["universal"].high
    assert low is not None and high is not None and low <= acc["universal"].difference <= high
    near = by["retrieval", "contrastive"]
    assert near["mAP"].score.mean > 0.95 and near["1-NN"].score.mean > 0.95
    assert near["mAP"].score.std is None and set(by["few-shot", "tangent"]) == {"1 shot", "3 shots"}
    again, _ = run.run_vectors(read(file, "colour"), {"colour": "colour"}, texts, options)
    assert again == rows


def test_methods_without_other_criteria_are_left_out_and_one_text_is_refused(tmp_path):
    file = write(tmp_path / "data.npz", planted())
    texts, _ = read_text_vectors([file], {}, DIM)
    options = run.VectorOptions(protocols=("clustering",), seeds=1)
    only = {"colour": texts["colour"]}
    rows, notes = run.run_vectors(read(file, "colour"), {"colour": "colour"}, only, options)
    needy = [name for name in METHODS if find_method(name).needs_against]
    assert len(notes) == len(needy) and all(name in " ".join(notes) for name in needy)
    assert {row.representation for row in rows}.isdisjoint(needy)
    assert rows[0].scores["ACC"].low is None  # one seed has no interval
    arrays = planted()
    arrays["text:colour"], arrays["words:colour"] = arrays["text:colour"][:1], np.array(["blue"])
    one, _ = read_text_vectors([write(tmp_path / "one.npz", arrays)], {}, DIM)
    with pytest.raises(InvalidInputError, match="colour: expected two texts or more, got 1"):
        run.run_vectors(read(file, "colour"), {"colour": "colour"}, one, options)


def test_retrieval_leaves_a_querys_own_group_out(tmp_path):
    """Every image has a twin of its group and class. Without groups, 1-NN only finds the twin."""
    rng = np.random.default_rng(0)
    rows = unit(rng.standard_normal((40, 8)))
    arrays = {
        "image": np.repeat(rows, 2, axis=0),
        "label": np.repeat(rng.permutation(np.arange(40) % 4), 2),
        "text:label": np.eye(8, dtype=np.float32),
        "twin": np.repeat(np.arange(40), 2),
    }
    file = write(tmp_path / "data.npz", arrays)
    texts, _ = read_text_vectors([file], {}, 8)
    options = run.VectorOptions(methods=("cosine",), protocols=("retrieval",))
    scores = {}
    for group in (None, "twin"):
        found, _ = run.run_vectors(
            read(file, "label", group=group), {"label": "label"}, texts, options
        )
        scores[group] = next(r.scores for r in found if r.representation == "universal")
    assert scores[None]["1-NN"].score.mean == 1.0
    assert scores["twin"]["1-NN"].score.mean < 0.5
    # the reference: every pair compared one by one
    images, labels = arrays["image"].astype(float), arrays["label"]
    expected = []
    for i in range(80):
        others = np.flatnonzero(arrays["twin"] != arrays["twin"][i])
        order = others[np.argsort(-(images[others] @ images[i]), kind="stable")]
        right = labels[order] == labels[i]
        ranks = np.flatnonzero(right) + 1
        expected.append(np.mean(np.arange(1, len(ranks) + 1) / ranks))
    assert scores["twin"]["mAP"].score.mean == pytest.approx(np.mean(expected), abs=0.01)


def test_intervals_are_students_and_count_groups_not_queries():
    values = np.array([0.5, 0.7, 0.6, 0.9])
    papers = np.array([0.4, 0.4, 0.5, 0.5])
    found = run.compare(values, papers)
    from scipy.stats import t

    half = t.ppf(0.975, 3) * np.std(values - papers, ddof=1) / 2
    assert found.difference == pytest.approx(0.225)
    assert found.low == pytest.approx(0.225 - half) and found.high == pytest.approx(0.225 + half)
    single = run.compare(values, papers, groups=np.arange(4))
    assert single.low == pytest.approx(found.low) and single.score.std is None
    twice = run.compare(values.repeat(2), papers.repeat(2), groups=np.arange(4).repeat(2))
    assert (twice.low, twice.high) == (pytest.approx(found.low), pytest.approx(found.high))
