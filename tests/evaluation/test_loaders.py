"""Readers of data sets: small data sets in the official layouts, and wrong layouts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crl_sdk.errors import CrlError
from crl_sdk.evaluation._cards import NUMBERS, SUITS, read_cards
from crl_sdk.evaluation._clevr4 import VALUES, read_clevr4
from crl_sdk.evaluation._dataset import DataSetError
from crl_sdk.evaluation._deepfashion import ATTRIBUTES, read_deepfashion
from crl_sdk.evaluation._genecis import read_genecis
from crl_sdk.evaluation._labels_csv import read_table


def paint(path: Path, colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), colour).save(path)
    return path


def write_clevr4(root: Path, count: int = 20) -> dict:
    annotations = {}
    for i in range(count):
        entry = {name: VALUES[name][(i + shift) % 10] for shift, name in enumerate(VALUES)}
        name = f"CLEVR_new_{i:06d}"
        annotations[name] = {**entry, "count": int(entry["count"]), "split": "train"}
        paint(root / "images" / f"{name}.png")
    (root / "clevr_4_annots.json").write_text(json.dumps(annotations))
    return annotations


def test_clevr4(tmp_path):
    write_clevr4(tmp_path / "clevr_4_10k_v1")
    for root in (tmp_path, tmp_path / "clevr_4_10k_v1"):  # around the archive's folder, or in it
        data = read_clevr4(root)
        assert [file.name for file in data.files[:2]] == [
            "CLEVR_new_000000.png",
            "CLEVR_new_000001.png",
        ]
        assert set(data.labels) == {"texture", "shape", "color", "count"}
        color, count = data.labels["color"], data.labels["count"]
        assert color.values[color.codes[0]] == VALUES["color"][2]
        assert count.values[count.codes[0]] == "4"
        assert color.files.tolist() == list(range(20))


def test_clevr4_in_a_wrong_layout(tmp_path):
    with pytest.raises(DataSetError, match=r"expected Clevr4.*found nothing there"):
        read_clevr4(tmp_path / "nowhere")
    with pytest.raises(DataSetError, match=r"found an empty directory.*EVAL\.md"):
        read_clevr4(tmp_path)
    with pytest.raises(DataSetError, match="found a file there"):
        read_clevr4(paint(tmp_path / "a.png"))
    assert issubclass(DataSetError, CrlError)
    root = tmp_path / "clevr"
    write_clevr4(root)
    (root / "images" / "CLEVR_new_000003.png").unlink()
    with pytest.raises(DataSetError, match=r"1 of 20 images are missing.*000003\.png"):
        read_clevr4(root)
    shutil.rmtree(root / "images")
    with pytest.raises(DataSetError, match=r"found clevr_4_annots\.json"):
        read_clevr4(root)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "expected JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "expected a JSON object"),
        ('{"a": {"color": "red"}}', "expected texture, shape, color, count for 'a'"),
        ('{"a": 1}', "for 'a', found 1"),
        ('{"../a": {"texture": "metal", "shape": "cube", "color": "red", "count": 1}}', "not the"),
        ('{"a": {"texture": "wool", "shape": "cube", "color": "red", "count": 1}}', "found wool"),
        ('{"a": {"texture": "metal", "shape": "cube", "color": "red", "count": 11}}', "found 11"),
        ('{"a": {}, "a": {}}', "'a' occurs twice"),
        ("\xff", "expected JSON"),
    ],
)
def test_clevr4_with_damaged_annotations(tmp_path, text, what):
    paint(tmp_path / "images" / "a.png")
    (tmp_path / "clevr_4_annots.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataSetError, match=what):
        read_clevr4(tmp_path)


def write_cards(root: Path, skip: str = "") -> None:
    for criterion, values in (("number", NUMBERS), ("suits", SUITS)):
        for value in values:
            for i in range(2):
                if f"{criterion}/{value}" != skip:
                    paint(root / criterion / value / f"{i}.jpg")


def write_kaggle(root: Path, splits: tuple[str, ...] = ("train", "valid", "test")) -> None:
    for split in splits:
        for number in NUMBERS:
            for suit in SUITS:
                paint(root / split / f"{number} of {suit}" / "1.jpg")
        paint(root / split / "joker" / "1.jpg")


def test_cards_as_the_authors_have_them(tmp_path):
    write_cards(tmp_path / "cards")
    for root in (tmp_path, tmp_path / "cards"):
        data = read_cards(root)
        assert len(data.files) == 2 * (13 + 4)
        for criterion, values in (("number", NUMBERS), ("suits", SUITS)):
            own = data.labels[criterion]
            assert own.values == values == tuple(sorted(values))
            assert [data.files[i].parent.name for i in own.files] == [
                own.values[code] for code in own.codes
            ]


def test_cards_as_kaggle_has_them(tmp_path):
    write_kaggle(tmp_path)
    data = read_cards(tmp_path)
    assert len(data.files) == 3 * 52 and not any("joker" in str(file) for file in data.files)
    for file, number, suit in zip(
        data.files, data.labels["number"].codes, data.labels["suits"].codes, strict=True
    ):
        assert file.parent.name == f"{NUMBERS[number]} of {SUITS[suit]}"
    assert any("3 jokers left out" in note for note in data.notes)
    write_kaggle(tmp_path / "some", ("train",))
    assert any("without test, valid" in note for note in read_cards(tmp_path / "some").notes)


def test_cards_in_a_wrong_layout(tmp_path):
    with pytest.raises(DataSetError, match=r"expected Cards.*found an empty directory"):
        read_cards(tmp_path)
    paint(tmp_path / "photo.jpg")
    with pytest.raises(DataSetError, match=r"found photo\.jpg"):
        read_cards(tmp_path)
    write_cards(tmp_path / "no class", skip="number/ace")
    with pytest.raises(DataSetError, match="none of ace"):
        read_cards(tmp_path / "no class")
    (tmp_path / "no class" / "number" / "ace").mkdir()
    with pytest.raises(DataSetError, match=r"ace: no image files.*\.jpg"):
        read_cards(tmp_path / "no class")
    write_cards(tmp_path / "odd")
    paint(tmp_path / "odd" / "suits" / "stars" / "1.jpg")
    with pytest.raises(DataSetError, match="found stars"):
        read_cards(tmp_path / "odd")
    paint(tmp_path / "kaggle" / "train" / "ace" / "1.jpg")
    with pytest.raises(DataSetError, match="named after a card"):
        read_cards(tmp_path / "kaggle")
    (tmp_path / "bare" / "train").mkdir(parents=True)
    with pytest.raises(DataSetError, match="a folder for each class"):
        read_cards(tmp_path / "bare")


def write_genecis(root: Path, task: str = "focus", queries: int = 3, gallery: int = 4) -> list:
    entries, number = [], 1
    for i in range(queries):
        ids = list(range(number, number + gallery + 1))
        number += gallery  # the last image is the next query's reference as well
        for each in ids:
            paint(root / "val2017" / f"{each:012d}.jpg")
        samples = [{"val_image_id": each, "instance_id": 5} for each in ids]
        entries.append(
            {
                "reference": samples[0],
                "target": samples[1],
                "gallery": samples[2:],
                "condition": ("table", "tree")[i % 2],
            }
        )
    (root / "genecis").mkdir(exist_ok=True)
    (root / "genecis" / f"{task}_object.json").write_text(json.dumps(entries))
    return entries


def test_genecis(tmp_path):
    write_genecis(tmp_path)
    data = read_genecis(tmp_path, "focus")
    assert len(data.files) == 13 and len(data.queries) == 3
    first, second = data.queries[:2]
    assert data.files[first.reference].name == "000000000001.jpg"
    assert [data.files[i].name for i in first.gallery[:2]] == [
        "000000000002.jpg",  # the target stands first
        "000000000003.jpg",
    ]
    assert second.reference == first.gallery[-1] and second.condition == "tree"
    part = data.sample(1)
    assert (
        len(part.queries) == 1
        and len(part.files) == 5
        and "not the whole benchmark" in part.notes[-1]
    )
    assert {part.files[i].name for i in part.queries[0].gallery} < {f.name for f in data.files}


def test_genecis_in_a_wrong_layout(tmp_path):
    with pytest.raises(DataSetError, match=r"expected GeneCIS.*change_object\.json"):
        read_genecis(tmp_path, "change")
    (tmp_path / "focus_object.pkl").write_bytes(b"cos\nsystem\n")  # never opened
    with pytest.raises(DataSetError, match="in pickle format, which is not read"):
        read_genecis(tmp_path, "focus")
    write_genecis(tmp_path)
    (tmp_path / "val2017" / "000000000004.jpg").unlink()
    with pytest.raises(DataSetError, match="1 of 13 images are missing"):
        read_genecis(tmp_path, "focus")
    shutil.rmtree(tmp_path / "val2017")
    with pytest.raises(DataSetError, match="expected GeneCIS"):
        read_genecis(tmp_path, "focus")


@pytest.mark.parametrize(
    "change",
    [
        {"condition": ""},
        {"condition": 3},
        {"gallery": []},
        {"gallery": {}},
        {"target": {}},
        {"target": {"val_image_id": "1"}},
        {"target": {"val_image_id": True}},
        {"reference": 7},
        {"reference": {"val_image_id": -1}},
        None,
    ],
)
def test_genecis_with_a_damaged_entry(tmp_path, change):
    entries = write_genecis(tmp_path)
    entries[1] = {**entries[1], **change} if change is not None else None
    (tmp_path / "genecis" / "focus_object.json").write_text(json.dumps(entries))
    with pytest.raises(DataSetError, match="entry 1"):
        read_genecis(tmp_path, "focus")
    for text in ("{}", "[]", "[", "\x00"):
        (tmp_path / "genecis" / "focus_object.json").write_text(text)
        with pytest.raises(DataSetError, match="expected"):
            read_genecis(tmp_path, "focus")


def write_deepfashion(root: Path, split: str = "test") -> None:
    """Write ten images: five candidates, then five queries, with a value of each attribute."""
    names = [f"img/Dress/img_{i:08d}.jpg" for i in range(10)]
    for name in names:
        paint(root / name)
    (root / f"filenames_{split}.txt").write_text("\n".join(names) + "\n")
    for kind, images in (("candidate", range(5)), ("query", range(5, 10))):
        lines = [f"{i} {a} {(i + a) % 2}" for i in images for a in range(len(ATTRIBUTES))]
        (root / f"{kind}_{split}.txt").write_text("\n".join(lines) + "\n")


def test_deepfashion(tmp_path):
    write_deepfashion(tmp_path / "DeepFashion")
    for root in (tmp_path, tmp_path / "DeepFashion"):
        data = read_deepfashion(root)
        assert len(data.files) == 10 and tuple(data.queries) == ATTRIBUTES
        assert data.queries["fabric"].files.tolist() == [5, 6, 7, 8, 9]
        assert data.candidates["fabric"].values.tolist() == [1, 0, 1, 0, 1]
        assert "25 queries, 25 candidates" in data.notes[0]
    with pytest.raises(DataSetError, match="query_valid"):
        read_deepfashion(tmp_path, "valid")


def test_deepfashion_counts_repeated_lines_twice_and_says_so(tmp_path):
    write_deepfashion(tmp_path)
    path = tmp_path / "query_test.txt"
    path.write_text(path.read_text() + "5 0 1\n5 0 1\n")
    data = read_deepfashion(tmp_path)
    assert len(data.queries["texture"].files) == 7
    assert data.notes[-1] == "2 lines occur twice and count twice"


@pytest.mark.parametrize(
    ("file", "text", "what"),
    [
        ("query_test.txt", "", "one entry per line"),
        ("query_test.txt", "5 0 1\n\n5 1 1\n", "no blank lines"),
        ("query_test.txt", "5 0\n", "line 1: expected three whole numbers"),
        ("query_test.txt", "5 0 red\n", "three whole numbers"),
        ("query_test.txt", "10 0 1\n", "image below 10"),
        ("query_test.txt", "5 5 1\n", "attribute below 5"),
        ("query_test.txt", "-1 0 1\n", "image below 10"),
        ("query_test.txt", "5 0 156\n", "a value below"),
        ("candidate_test.txt", "1 0 1\n", "none of fabric"),
        ("filenames_test.txt", "../a.jpg\n" * 10, "outside the directory"),
        ("filenames_test.txt", "img/a.jpg\n" * 10, "images are missing"),
        ("filenames_test.txt", "\xff", "UTF-8"),
    ],
)
def test_deepfashion_with_damaged_lists(tmp_path, file, text, what):
    write_deepfashion(tmp_path)
    (tmp_path / file).write_bytes(text.encode("latin-1"))
    with pytest.raises(DataSetError, match=what):
        read_deepfashion(tmp_path)


def test_deepfashion_in_part(tmp_path):
    write_deepfashion(tmp_path)
    data = read_deepfashion(tmp_path)
    part = data.sample(8)
    assert len(part.files) == 8 and "8 of 10" in part.notes[-1]
    for name in ATTRIBUTES:
        for side in (part.queries[name], part.candidates[name]):
            assert side.files.max() < 8
    with pytest.raises(DataSetError, match="take more"):
        data.sample(1)


COLUMNS = {"number": "rank", "suits": "suit"}


def write_table(root: Path, text: str) -> Path:
    paint(root / "a.jpg")
    paint(root / "b.jpg")
    (root / "labels.csv").write_text(text)
    return root


def test_table(tmp_path):
    write_table(tmp_path, "file,rank,suit,more\na.jpg,10,clubs,x\nb.jpg,9,clubs,\n")
    data = read_table(tmp_path, COLUMNS)
    assert [file.name for file in data.files] == ["a.jpg", "b.jpg"]
    assert data.labels["number"].values == ("9", "10")
    assert data.labels["number"].codes.tolist() == [1, 0]
    assert data.labels["suits"].values == ("clubs",)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "expected the columns file, rank, suit"),
        ("file,rank,suit\n", "0 lines"),
        ("file,rank\na.jpg,ace\n", "found the columns file, rank and"),
        ("file,rank,suit\na.jpg,ace\n", "line 2: a cell is empty"),
        ("file,rank,suit\na.jpg,ace,\n", "line 2: a cell is empty"),
        ("file,rank,suit\na.jpg,ace,clubs\na.jpg,two,clubs\n", "line 3: 'a.jpg' occurs twice"),
        ("file,rank,suit\n../a.jpg,ace,clubs\n", "outside"),
        ("file,rank,suit\n/etc/passwd,ace,clubs\n", "outside"),
        ("file,rank,suit\nc.jpg,ace,clubs\n", "1 of 1 images are missing"),
    ],
)
def test_table_that_is_damaged(tmp_path, text, what):
    with pytest.raises(DataSetError, match=what):
        read_table(write_table(tmp_path, text), COLUMNS)


def test_a_directory_without_a_table(tmp_path):
    with pytest.raises(DataSetError, match=r"expected labels\.csv"):
        read_table(tmp_path, COLUMNS)


def test_some_criteria_keep_their_own_images(tmp_path):
    write_cards(tmp_path)
    suits = read_cards(tmp_path).select(["suits"])
    assert set(suits.labels) == {"suits"} and len(suits.files) == 8
    own = suits.labels["suits"]
    assert [suits.files[i].parent.name for i in own.files] == [own.values[c] for c in own.codes]
    with pytest.raises(KeyError):
        suits.select(["number"])


def test_a_sample_keeps_the_labels_of_each_image(tmp_path):
    write_cards(tmp_path)
    data = read_cards(tmp_path)
    part = data.sample(20, seed=1)
    assert len(part.files) == 20 and data.sample(34) is data
    for own in part.labels.values():
        assert [part.files[i].parent.name for i in own.files] == [own.values[c] for c in own.codes]
    assert sum(len(own.files) for own in part.labels.values()) == 20
    assert part.files == data.sample(20, seed=1).files != data.sample(20, seed=2).files
    with pytest.raises(CrlError, match="at least one image"):
        data.sample(0)
    assert np.all(np.diff([data.files.index(file) for file in part.files]) > 0)
