"""`crl_benchmarks.real_vectors` on small synthetic files of the same layout."""

from __future__ import annotations

import json

import numpy as np
import pytest

from crl_benchmarks import (
    demo_world_set,
    picture_votes,
    real_vector_dtypes,
    real_vector_sets,
    real_vector_texts,
    real_vectors,
)

DIM = 24
COLOURS = ("Black", "White", "Blue", "Red")
TYPES = ("Dress", "Shirt", "Skirt")
PATTERNS = ("Striped", "Lace", "Solid")


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


class World:
    """Each word has a direction. Images and texts are sums of directions, and texts share one."""

    def __init__(self):
        self.rng = np.random.default_rng(0)
        self.directions = {}
        self.shared = self.rng.standard_normal(DIM)

    def direction(self, word):
        if word not in self.directions:
            self.directions[word] = self.rng.standard_normal(DIM)
        return self.directions[word]

    def images(self, rows):
        clean = np.array([sum(self.direction(word) for word in row) for row in rows])
        return unit(clean + 0.3 * self.rng.standard_normal(clean.shape))

    def texts(self, rows):
        clean = np.array([sum(self.direction(word) for word in row) for row in rows])
        return unit(clean + 2 * self.shared)


@pytest.fixture
def folder(tmp_path):
    world = World()
    draw = world.rng.choice
    count = 160
    off_topic = real_vector_sets.CLOTHES_OFF_TOPIC.split()
    clothes = [
        (draw(COLOURS), draw(TYPES), draw(PATTERNS), draw(off_topic), draw(off_topic))
        for _ in range(count)
    ]
    words = [tuple(word.lower() for word in row) for row in clothes]
    columns = np.array(clothes).T
    np.savez(
        tmp_path / real_vector_sets.CLOTHES,
        image=world.images([row[:3] for row in words]).astype(np.float32),
        text=world.texts(words).astype(np.float32), caption=[" ".join(row) for row in words],
        product_code=np.arange(count) // 2, perceived_colour_master_name=columns[0],
        product_type_name=columns[1], graphical_appearance_name=columns[2],
    )  # fmt: skip
    bank = [(kind, f"{kind} {i}") for kind in real_vector_sets.BANK_KINDS for i in range(4)]
    listed = [noun for nouns in real_vector_texts.NOUN_LISTS.values() for noun in nouns]
    nouns = [*real_vector_sets.PEOPLE, *listed, *(f"thing {i}" for i in range(15))]
    bank += [("noun", noun) for noun in nouns]
    np.savez(
        tmp_path / real_vector_sets.WORDS,
        text=world.texts([[word] for _, word in bank]).astype(np.float32),
        word=[word for _, word in bank], kind=[kind for kind, _ in bank],
    )  # fmt: skip
    people = [
        (draw(["man", "woman"]), f"colour {draw(3)}", f"garment {draw(3)}") for _ in range(80)
    ]
    columns = np.array(people).T
    unknown = np.arange(80) < 3
    np.savez(
        tmp_path / real_vector_sets.DRESS, image=world.images(people).astype(np.float16),
        group=np.arange(80), gender=columns[0], first_colour=np.where(unknown, "", columns[1]),
        garment=columns[2],
    )  # fmt: skip
    kinds = ["dog", "bird", "fish", "food"] * 18
    np.savez(
        tmp_path / real_vector_sets.IMAGENET,
        image=world.images([[kind] for kind in kinds]).astype(np.float16), group=np.arange(72),
        kind=kinds,
    )  # fmt: skip
    return tmp_path


def test_tables_plot_and_record(folder, tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    for module in (real_vectors, real_vector_sets):
        monkeypatch.setattr(module, "SPLITS", 2)
    monkeypatch.setattr(real_vectors, "COUNT_DRAWS", 1)
    monkeypatch.setattr(real_vector_texts, "DRAWS", 1)
    monkeypatch.setattr(demo_world_set, "SCENES", 60)
    out = tmp_path / "out"
    real_vectors.main(["--data", str(folder), "--out", str(out)])
    text = out.with_suffix(".md").read_text()
    unseen = [each for each in real_vectors.VARIANTS if each.sharpened == "unseen"]
    methods = text[: text.index("## The warning")]
    for variant in real_vectors.VARIANTS:
        # sets, and criteria of three sets; only the clothes have unseen images
        expected = 1 + 3 if variant in unseen else 5 + 3 + 2 + 4
        assert methods.count(f"| `{variant.name}` | ") == expected
    for plot in (out.with_suffix(".png"), tmp_path / "out-texts.png"):
        assert plot.read_bytes().startswith(b"\x89PNG")
    document = json.loads(out.with_suffix(".json").read_bytes())
    runs, counts = document["runs"], document["counts"]
    cases, variants = 3 * 2 + 2 + 2 + 2 + 4 * 2, len(real_vectors.VARIANTS)
    conditions = len(real_vector_sets.CONDITIONS)
    assert len(runs) == (cases * (1 + variants) - len(unseen) * (2 + 2 + 2 + 4 * 2)) * conditions
    assert {each["count"] for each in counts} >= {3, 4}
    clean = {
        (run["set"], run["criterion"], run["split"], run["method"]): run
        for run in runs
        if run["condition"] == "clean"
    }
    for group, criterion in (("clothes", "colour"), ("dress", "garment")):
        universal = clean[group, criterion, 0, "universal"]
        assert (
            clean[group, criterion, 0, "contrastive: others + generic"]["mAP"]
            > universal["mAP"] + 0.2
        )


def test_what_dtypes_of_stored_rows_cost(folder):
    pytest.importorskip("sklearn")
    case = next(real_vector_sets.read_cases(folder))
    costs = {(cost.what, cost.dtype): cost for cost in real_vector_dtypes.measure_dtypes([case])}
    universal, conditional, projected = real_vector_dtypes.STORED
    for what in (universal, conditional, projected):
        full = np.array(costs[what, "float32"].scores)
        for dtype in ("float16", "int8"):
            assert np.abs(np.array(costs[what, dtype].scores) - full).max() < 0.05, (what, dtype)
    assert costs[conditional, "signs"].scores[1] < costs[conditional, "float32"].scores[1] - 0.05
    dim, columns = case.images.shape[1], costs[conditional, "signs"].bits
    assert (costs[universal, "float32"].bits, costs[universal, "int8"].bits) == (32 * dim, 8 * dim)
    assert costs[conditional, "int8"].bits == 8 * columns < len(case.texts["clean"]) * 8
    text = real_vector_dtypes.dtype_tables(list(costs.values()), str.title)
    assert text.count("| int8 |") == 3 and "### Clothes" in text


def test_texts_that_share_a_direction(folder, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(real_vector_texts, "DRAWS", 3)
    lists = list(real_vector_texts.stray_lists(folder))
    criteria = len(real_vector_sets.BANK_KINDS) + len(real_vector_texts.NOUN_LISTS)
    assert len(lists) == 2 * criteria * 3
    assert all(0 < (~each.own).sum() < 4 and each.own.sum() >= 4 for each in lists)
    cases = [case for case in real_vector_sets.read_cases(folder) if case.split == 0]
    text = real_vector_texts.text_tables(folder, cases)
    assert text.count("| plain |") == text.count("| minus the background |") == 2
    assert "| clothes | `contrastive: others + generic` |" in text
    own = cases[0].texts["clean"]
    turned = real_vector_texts._turned(own, 0.98, np.random.default_rng(0))
    np.testing.assert_allclose((turned * own).sum(axis=1), 0.98, atol=1e-5)


def test_classes_groups_and_noise(folder):
    cases = {
        (case.group, case.criterion, case.split): case
        for case in real_vector_sets.read_cases(folder)
    }
    assert len(cases) == 3 * 4 + 2 + 4 + 4
    colour = cases["dress", "colour", 0]
    assert len(colour.images) == 77  # three have no label
    clean, off_topic, others = (colour.texts[name] for name in real_vector_sets.CONDITIONS)
    assert [len(clean), len(off_topic), len(others)] == [4, 6, 6]
    known = np.concatenate(colour.against)
    assert all((row == known).all(axis=1).any() for row in others[4:])
    assert not any((row == known).all(axis=1).any() for row in off_topic[4:])
    assert len(cases["animals", "animals", 0].images) == 54  # food is no animal
    first, second = (cases["animals", "animals", draw] for draw in (0, 1))
    assert not set(first.seeds) & set(second.seeds)
    assert np.isin(cases["clothes", "type", 0].groups, cases["clothes", "colour", 0].groups).all()


def test_own_group_is_never_retrieved(folder):
    pytest.importorskip("sklearn")
    case = next(real_vector_sets.read_cases(folder))
    run = next(real_vectors.measure(case, ()))
    near = case.images.astype(np.float64) @ case.images.T
    for query, expected in enumerate(run.precisions):
        kept = case.groups != case.groups[query]
        right = (case.codes == case.codes[query])[kept][np.argsort(-near[query][kept])]
        precision = np.cumsum(right) / np.arange(1, len(right) + 1)
        assert expected == pytest.approx(precision[right].mean())


def test_each_run_counts_equally():
    def run(precisions, groups):
        return real_vectors.Run(
            "s", "c", 0, "m", "clean", np.zeros(1), np.array(precisions), np.array(groups)
        )

    runs = [run([0.5, 0.7], [0, 1]), run([0.9, 0.9, 0.9, 0.5], [0, 1, 2, 3])]
    paper = [run([0.4, 0.4], [0, 1]), run([0.4, 0.4, 0.4, 0.4], [0, 1, 2, 3])]
    found = real_vectors.compare_precisions(runs, paper)
    assert found.difference == pytest.approx((0.2 + 0.4) / 2)
    assert found.low < found.difference < found.high


def test_absent_files_are_named(folder, capsys):
    (folder / real_vector_sets.DRESS).unlink()
    out = folder / "out"
    real_vectors.main(["--data", str(folder), "--out", str(out)])
    message = capsys.readouterr().out
    assert message.count("\n") == 1
    assert f"{folder / real_vector_sets.DRESS} is missing" in message
    assert str(folder / "README.md") in message
    assert not list(folder.glob("out*"))


def test_an_absent_noun_is_named(folder):
    path = folder / real_vector_sets.WORDS
    with np.load(path) as bank:
        kept = bank["word"] != "kitten"
        arrays = {name: bank[name][kept] for name in bank.files}
    np.savez(path, **arrays)
    with pytest.raises(real_vectors.InvalidInputError, match="kitten"):
        list(real_vector_sets.read_cases(folder))


def test_pictures_vote(folder):
    table = picture_votes.markdown(real_vector_sets.read_cases(folder))
    rows = [line.split(" | ") for line in table.splitlines()[2:]]
    assert {row[1] for row in rows} == set(real_vector_sets.CONDITIONS)
    assert all(row[3] == "0%" for row in rows if row[1] == "clean")


def test_pictures_vote_without_the_files(tmp_path, capsys):
    picture_votes.main(["--data", str(tmp_path)])
    assert "is missing, nothing was measured" in capsys.readouterr().out
