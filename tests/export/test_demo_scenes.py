"""Scenes: equal seeds give equal pixels, and the image shows what the description says."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest
from PIL import Image

from crl_export.demo import paint
from crl_export.demo.dataset import render_arrays, scene_seed, write_dataset
from crl_export.demo.scenes import IMAGE_SIDE, encode_scene, render_scene, sample_scene
from crl_export.demo.world import COLOURS, COUNTS, CRITERIA, FACTORS, SHAPES, TEXTURES


def test_four_criteria_of_ten_values_each():
    assert [len(FACTORS[criterion]) for criterion in CRITERIA] == [10, 10, 10, 10]


def test_same_seed_same_bytes():
    assert encode_scene(sample_scene(7)) == encode_scene(sample_scene(7))
    assert encode_scene(sample_scene(7)) != encode_scene(sample_scene(8))


def test_values_agree_with_what_is_placed():
    for seed in range(300):
        scene = sample_scene(seed)
        assert str(len(scene.placements)) == scene.values["count"]
        assert set(scene.values) == set(FACTORS)
        assert all(
            0 <= code < len(FACTORS[f]) for f, code in zip(FACTORS, scene.codes(), strict=True)
        )


def test_objects_stay_in_the_picture_and_never_hide_each_other():
    for seed in range(60):
        placed = sample_scene(seed, count="10").placements
        for i, one in enumerate(placed):
            assert one.radius <= one.x <= 1 - one.radius
            assert one.radius <= one.y <= 1 - one.radius
            for other in placed[:i]:
                distance = np.hypot(one.x - other.x, one.y - other.y)
                assert distance > 1.4 * (one.radius + other.radius) / 2


def test_factors_are_uniform_and_independent():
    codes = np.array([sample_scene(seed).codes() for seed in range(4000)])
    for column, criterion in enumerate(CRITERIA):
        shares = np.bincount(codes[:, column], minlength=10) / len(codes)
        assert shares.min() > 0.08, criterion
        assert shares.max() < 0.12, criterion
        for other in range(column):
            correlation = np.corrcoef(codes[:, column], codes[:, other])[0, 1]
            assert abs(correlation) < 0.05


def test_fixed_values_are_held():
    scene = sample_scene(3, shape="star", count="7", colour="pink")
    assert (scene.values["shape"], scene.values["count"]) == ("star", "7")
    assert scene.values["colour"] == "pink"
    with pytest.raises(KeyError, match="expected one of shape"):
        sample_scene(3, weight="heavy")


@pytest.mark.parametrize("shape", SHAPES)
def test_every_outline_has_the_same_area(shape: str):
    x, y = paint.outline(shape).astype(float).T
    area = 0.5 * abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))
    assert area == pytest.approx(paint.OUTLINE_AREA, rel=1e-3)


def test_unknown_shape_names_what_came():
    with pytest.raises(ValueError, match="'blob'"):
        paint.outline("blob")


@pytest.mark.parametrize("texture", TEXTURES)
def test_patterns_mark_a_part_of_the_object(texture: str):
    axis = np.linspace(-1, 1, 64, dtype=np.float32)
    u, v = np.meshgrid(axis, axis)
    marked = paint.pattern(texture, u, v, np.random.default_rng(0))
    assert marked.shape == u.shape
    assert marked.min() >= 0
    assert marked.max() <= 1
    if texture == "plain":
        assert marked.max() == 0
    else:
        assert 0.2 < marked.mean() < 0.7


@pytest.mark.parametrize("colour", COLOURS)
def test_colour_is_seen_at_the_middle_of_a_plain_object(colour: str):
    scene = sample_scene(11, colour=colour, texture="plain", shape="circle", count="1")
    pixels = render_scene(scene)
    assert pixels.shape == (IMAGE_SIDE, IMAGE_SIDE, 3)
    assert pixels.dtype == np.uint8
    place = scene.placements[0]
    seen = pixels[int(place.y * IMAGE_SIDE), int(place.x * IMAGE_SIDE)].astype(float) / 255
    tints = {name: paint.tints(name, np.random.default_rng(0))[0] for name in COLOURS}
    nearest = min(tints, key=lambda name: float(np.abs(tints[name] - seen).sum()))
    assert nearest == colour


def test_count_is_the_number_of_separate_blobs():
    ndimage = pytest.importorskip("scipy.ndimage")
    hits = 0
    for count in COUNTS:
        scene = sample_scene(
            int(count), count=count, shape="circle", colour="white", texture="plain",
            background="concrete",
        )  # fmt: skip
        bright = render_scene(scene).min(axis=2) > 190
        hits += ndimage.label(ndimage.binary_erosion(bright))[1] == int(count)
    assert hits >= 8  # circles may overlap


def test_dataset_is_files_and_a_table(tmp_path):
    seen: list[int] = []
    table = write_dataset(tmp_path / "a", 5, seed=4, workers=1, on_progress=seen.append)
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["file", *FACTORS]
    assert len(rows) == 5
    assert seen == [1, 2, 3, 4, 5]
    for index, row in enumerate(rows):
        scene = sample_scene(scene_seed(4, index))
        assert {name: row[name] for name in FACTORS} == scene.values
        data = (table.parent / row["file"]).read_bytes()
        assert data == encode_scene(scene)
        assert Image.open(io.BytesIO(data)).size == (IMAGE_SIDE, IMAGE_SIDE)


def test_dataset_is_not_written_over(tmp_path):
    write_dataset(tmp_path, 1, workers=1)
    with pytest.raises(FileExistsError, match=r"labels\.csv exists already"):
        write_dataset(tmp_path, 1, workers=1)


def test_dataset_refuses_a_size_it_cannot_seed(tmp_path):
    with pytest.raises(ValueError, match="1 to 1,000,000"):
        write_dataset(tmp_path, 0)
    with pytest.raises(ValueError, match="index < 1,000,000"):
        scene_seed(0, 1_000_000)


def test_arrays_are_the_same_scenes_as_the_files():
    pixels, codes = render_arrays(3, 4, 96, workers=1)
    assert pixels.shape == (3, 96, 96, 3)
    assert [tuple(row) for row in codes] == [
        sample_scene(scene_seed(4, i)).codes() for i in (0, 1, 2)
    ]
