"""The sets of real vectors of `make eval-real`: their classes, texts, noise and splits.

The vectors are not part of this project; docs/PROJECTIONS.md says what they are. Classes, words,
splits, seeds and noise of the sets `clothes` and `dress` are those of the `measure.py` that lies
beside the vectors, so that its figures can be compared with these.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crl_export.background import generic_texts
from crl_sdk.errors import InvalidInputError
from crl_sdk.evaluation._vectors import VectorFile, read_images

CLOTHES, WORDS = "hm-fashionclip-686.npz", "openai-b32-words.npz"
DRESS, IMAGENET = "openai-b32-dress.npz", "openai-b32-imagenet4.npz"
FILES = (CLOTHES, WORDS, DRESS, IMAGENET)

CONDITIONS = ("clean", "half off-topic", "half of other criteria")
SPLITS = 4
"""Number of splits of the clothes, and number of draws of the noise for two other sets."""
SEEDS = range(5)
"""Seeds of k-means. Split i of the sets with several draws takes the i-th next five."""
SMALLEST_CLASS = 10
_SMALLEST_WORD = 3
"""Smallest number of captions that a word of the clothes must occur in."""
_OFF_TOPIC = 12
"""Number of nouns from which the off-topic texts of a word bank are taken."""

CLOTHES_CRITERIA = {
    "colour": ("perceived_colour_master_name",
               "black white grey blue navy red pink green beige brown cream yellow purple orange"),
    "type": ("product_type_name",
             "dress shirt t-shirt blouse skirt jeans trousers shorts leggings sweater cardigan "
             "hoodie jacket top"),
    "pattern": ("graphical_appearance_name",
                "floral striped checked plaid lace denim graphic ribbed melange embroidered solid"),
}  # fmt: skip
"""Label column and words of each criterion of the clothes."""
CLOTHES_OFF_TOPIC = (
    "casual perfect comfortable versatile everyday stylish relaxed classic lightweight soft"
)
DRESS_CRITERIA = {"colour": "first_colour", "garment": "garment"}
BANK_KINDS = ("colour", "garment", "pattern", "material", "style", "occasion")
"""Criteria of the word bank."""
PEOPLE = ("man", "woman", "boy", "girl")
ANIMALS = {
    "dog": ("dog", "dalmatian", "bulldog", "shepherd dog", "puppy"),
    "cat": ("cat", "kitten"),
    "bird": ("bird", "duck", "owl", "parrot", "seabird"),
    "fish": ("fish", "shark", "goldfish"),
    "reptile/amphibian": ("reptile", "snake", "lizard", "frog", "turtle"),
    "invertebrate": ("invertebrate", "insect", "spider", "beetle", "snail", "crab (animal)"),
    "other mammal": ("bear", "monkey", "elephant", "wolf", "horse", "rabbit", "marine mammal"),
}
"""Nouns of the word bank for each kind of animal in ImageNet, chosen before any measurement."""

Rows = NDArray[np.float32]
Names = NDArray[Any]


class MissingVectors(Exception):
    """A file of vectors is absent."""


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """One criterion of one split.

    Attributes:
        group: Name of the set.
        criterion: Name of the criterion.
        split: Number of the split or draw.
        seeds: Seeds of k-means.
        images: Image vectors, shape (n, d), float32, unit rows.
        codes: Class of each image, shape (n,), int64.
        groups: Group of each image, shape (n,), int64. Members of a group are not compared.
        texts: Text vectors for each of `CONDITIONS`, shape (k, d), float32, unit rows.
        against: Text vectors of each other criterion, shape (j, d), float32, unit rows.
        background: Vectors of generic texts, shape (b, d), float32, unit rows.
        unseen: Vectors of other images of the same kind, shape (o, d), float32, unit rows; None if
            there are none.
    """

    group: str
    criterion: str
    split: int
    seeds: Sequence[int]
    images: Rows
    codes: NDArray[np.int64]
    groups: NDArray[np.int64]
    texts: Mapping[str, Rows]
    against: Sequence[Rows]
    background: Rows
    unseen: Rows | None


@dataclass(frozen=True, slots=True, eq=False)
class WordBank:
    """Words with their text vectors.

    Attributes:
        path: File that they come from.
        words: The words, shape (n,).
        kinds: Kind of each word, shape (n,).
        vectors: Text vectors, shape (n, d), float32, unit rows.
        background: Vectors of the nouns that `crl export` has in its list of generic texts, shape
            (b, d), float32, unit rows.
    """

    path: Path
    words: Names
    kinds: Names
    vectors: Rows
    background: Rows

    def nouns(self, wanted: Sequence[str]) -> NDArray[np.bool_]:
        """Return which words are these nouns.

        Raises:
            InvalidInputError: If a noun is missing.
        """
        found: NDArray[np.bool_] = (self.kinds == "noun") & np.isin(self.words, wanted)
        if missing := sorted(set(wanted) - set(self.words[found])):
            raise InvalidInputError(f"{self.path}: expected the nouns {', '.join(missing)}")
        return found


def read_word_bank(path: Path) -> WordBank:
    """Read a word bank."""
    file = VectorFile(path)
    vectors = _unit(file.read("text", "word vectors").astype(np.float64))
    words, kinds = (file.read(name, "words") for name in ("word", "kind"))
    shipped = [text.split(" ", 1)[1] for text in generic_texts() if text.startswith(("a ", "an "))]
    generic = (kinds == "noun") & np.isin(words, shipped)
    return WordBank(path, words, kinds, vectors, vectors[generic])


def read_cases(folder: Path) -> Iterator[Case]:
    """Read the vectors and yield all cases.

    Raises:
        MissingVectors: If a file is absent.
    """
    for name in FILES:
        if not (folder / name).is_file():
            raise MissingVectors(
                f"{folder / name} is missing, nothing was measured. The real vectors are not part "
                f"of this project: {folder / 'README.md'} describes them. Pass --data DIR (with "
                "make: DATA=DIR) if they are elsewhere."
            )
    yield from _clothes(VectorFile(folder / CLOTHES))
    bank = read_word_bank(folder / WORDS)
    yield from _bank_cases(bank, *(VectorFile(folder / name) for name in (DRESS, IMAGENET)))


def _clothes(file: VectorFile) -> Iterator[Case]:
    images, text = _images(file), file.read("text", "caption vectors").astype(np.float64)
    captions = [str(caption).lower() for caption in file.read("caption", "captions")]
    products = file.read("product_code", "groups")
    for split in range(SPLITS):
        rng = np.random.default_rng(split)
        shuffled = rng.permutation(np.unique(products))
        half = np.isin(products, shuffled[: len(shuffled) // 2])

        def word_vectors(words: str, half: NDArray[np.bool_] = half) -> Rows:
            rows = []
            for word in words.split():
                pattern = re.compile(rf"\b{re.escape(word)}(s|es)?\b")
                holds = half & np.array([pattern.search(each) is not None for each in captions])
                if holds.sum() >= _SMALLEST_WORD:
                    rows.append(text[holds].mean(axis=0))
            return _unit(np.array(rows))

        bank = {name: word_vectors(words) for name, (_, words) in CLOTHES_CRITERIA.items()}
        off_topic = word_vectors(CLOTHES_OFF_TOPIC)
        for name, (column, _) in CLOTHES_CRITERIA.items():
            labels = file.read(column, "labels")
            others = [rows for other, rows in bank.items() if other != name]
            yield _case(
                "clothes", name, split, images=images[~half], labels=labels[~half],
                groups=products[~half], own=bank[name], others=others, off_topic=off_topic, rng=rng,
                background=_unit(text[half]), unseen=images[half],
            )  # fmt: skip


def _bank_cases(bank: WordBank, dress: VectorFile, imagenet: VectorFile) -> Iterator[Case]:
    text, nouns = bank.vectors, bank.kinds == "noun"
    of_kind = {name: text[bank.kinds == name] for name in BANK_KINDS}

    def off_topic(rng: np.random.Generator, own: NDArray[np.bool_] | None = None) -> Rows:
        rows: Rows = text[nouns if own is None else nouns & ~own]
        return np.asarray(rows[rng.permutation(len(rows))[:_OFF_TOPIC]])

    images = _images(dress)
    groups = dress.read("group", "groups")
    rng = np.random.default_rng(0)
    strange = off_topic(rng)
    for name, column in DRESS_CRITERIA.items():
        others = [rows for other, rows in of_kind.items() if other != name]
        labels = dress.read(column, "labels")
        yield _case(
            "dress", name, images=images, labels=labels, groups=groups, own=of_kind[name],
            others=others, off_topic=strange, rng=rng, background=bank.background,
        )  # fmt: skip
    sets: list[tuple[str, VectorFile, str, tuple[str, ...], Callable[[Names], Names]]] = [
        ("gender", dress, "gender", PEOPLE, lambda labels: labels),
        (
            "animals", imagenet, "kind", tuple(n for each in ANIMALS.values() for n in each),
            lambda labels: np.where(np.isin(labels, list(ANIMALS)), labels, ""),
        ),
    ]  # fmt: skip
    for name, file, column, wanted, select in sets:
        own = bank.nouns(wanted)
        images = _images(file)
        for draw in range(SPLITS):
            rng = np.random.default_rng(draw)
            # The clean texts are the same in each draw, so the draws differ in their starts.
            seeds = [draw * len(SEEDS) + seed for seed in SEEDS]
            yield _case(
                name, name, draw, seeds, images=images, labels=select(file.read(column, "labels")),
                groups=file.read("group", "groups"), own=text[own], others=list(of_kind.values()),
                off_topic=off_topic(rng, own), rng=rng, background=bank.background,
            )  # fmt: skip


def _case(
    group: str, criterion: str, split: int = 0, seeds: Sequence[int] = SEEDS, *,
    images: Rows, labels: Names, groups: Names, own: Rows,
    others: Sequence[Rows], off_topic: Rows, rng: np.random.Generator,
    background: Rows, unseen: Rows | None = None,
) -> Case:  # fmt: skip
    """Leave small classes out and draw the noise."""
    classes, sizes = np.unique(labels, return_counts=True)
    kept = np.isin(labels, classes[(sizes >= SMALLEST_CLASS) & (classes != "")])
    every, count = np.concatenate(others), max(2, len(own) // 2)
    added = {
        CONDITIONS[0]: own[:0],
        CONDITIONS[1]: off_topic[:count],
        CONDITIONS[2]: every[rng.permutation(len(every))[:count]],
    }
    return Case(
        group, criterion, split, seeds, images[kept],
        np.unique(labels[kept], return_inverse=True)[1].reshape(-1).astype(np.int64),
        groups[kept].astype(np.int64),
        {name: np.concatenate([own, rows]).astype(np.float32) for name, rows in added.items()},
        [rows.astype(np.float32) for rows in others],
        background.astype(np.float32),
        unseen,
    )  # fmt: skip


def _images(file: VectorFile) -> Rows:
    return read_images(file)[0]


def _unit(rows: NDArray[np.floating]) -> Rows:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)
