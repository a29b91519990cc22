"""Near-duplicates, strays and rounding errors of real text vectors, a part of `make eval-real`.

All of them depend on how texts of a real model lie: any two have a large cosine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crl_benchmarks.markdown import table
from crl_benchmarks.real_vector_sets import (
    ANIMALS,
    BANK_KINDS,
    CONDITIONS,
    WORDS,
    Case,
    Rows,
    read_word_bank,
)
from crl_benchmarks.real_vectors import Variant, make_map
from crl_sdk.basis import _generate as generation
from crl_sdk.basis._build import DEFAULT_MERGE_THRESHOLD
from crl_sdk.basis._generation_options import DEFAULT_OPTIONS
from crl_sdk.evaluation._vector_protocols import find_queries, retrieval_runs

MERGE_THRESHOLDS = (DEFAULT_MERGE_THRESHOLD, 0.99, 0.98, 0.97, 0.96, 0.95, 0.94)
COPY_COSINE = 0.98
"""Cosine of the near-copies that are added to half of the texts."""

NOUN_LISTS = {
    "animals": tuple(noun for nouns in ANIMALS.values() for noun in nouns),
    "food": ("pizza", "bread", "cake", "cheese", "apple", "banana", "carrot", "tomato", "egg",
             "sandwich", "hamburger", "pasta", "cookie", "rice", "sushi"),
    "vehicles": ("car", "bus", "truck", "bicycle", "motorcycle", "train", "airplane", "boat",
                 "ship", "helicopter", "tricycle", "scooter"),
    "furniture": ("chair", "desk", "bed", "couch", "bookcase", "cabinet", "bench", "stool",
                  "nightstand", "lamp", "mirror"),
    "instruments": ("guitar", "piano", "violin", "drum", "trumpet", "flute", "saxophone", "cello",
                    "harp", "trombone"),
    "buildings": ("house", "tower", "lighthouse", "castle", "skyscraper", "tent", "building"),
    "tools": ("hammer", "screwdriver", "wrench", "drill", "scissors", "ladder", "shovel",
              "pliers"),
}  # fmt: skip
"""Nouns of the word bank that belong to one criterion."""
DRAWS = 40
_GRID = tuple(product((1.5, 2.0, 2.5, 3.0), (0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3)))
MAX_FALSE_ALARMS = 0.02
"""Largest share of good texts that a rule for strays may drop, when it is chosen."""

BOUNDS = (0.99999, 0.9995, 0.999, 0.99)
"""Cosines with the exact embedding. The first two are the bounds of fp32 and fp16 graphs. The last
is the bound of the mean for int8."""
PERTURBED = (
    Variant("cosine"), Variant("orthogonal"), Variant("tangent"),
    Variant("contrastive", others=True),
)  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class StrayList:
    """A list of texts with strays in it.

    Attributes:
        criterion: Name of the criterion.
        strays: Kind of the strays.
        similarities: Similarity of each text to the others, shape (n,), with and without the
            background.
        own: Which texts belong to the criterion, shape (n,).
    """

    criterion: str
    strays: str
    similarities: Mapping[bool, NDArray[np.floating]]
    own: NDArray[np.bool_]


def stray_lists(folder: Path) -> Iterator[StrayList]:
    """Draw 6 to 15 texts of a criterion with 5 votes or so, and 1 to 3 strays with 2 votes."""
    bank = read_word_bank(folder / WORDS)
    lists = {name: bank.vectors[bank.kinds == name] for name in BANK_KINDS}
    lists |= {name: bank.vectors[bank.nouns(words)] for name, words in NOUN_LISTS.items()}
    for strays, (criterion, own) in product(("nouns", "other criteria"), lists.items()):
        if strays == "nouns":
            taken = NOUN_LISTS.get(criterion, ())
            pool = bank.vectors[(bank.kinds == "noun") & ~np.isin(bank.words, taken)]
        else:
            pool = np.concatenate([lists[other] for other in BANK_KINDS if other != criterion])
        for draw in range(DRAWS):
            rng = np.random.default_rng(draw)
            count = min(len(own), int(rng.integers(6, 16)))
            texts = own[rng.permutation(len(own))[:count]]
            added = pool[rng.permutation(len(pool))[: rng.integers(1, 4)]]
            rows = np.concatenate([texts, added])
            votes = np.full(len(rows), 2, np.float32)
            votes[:count] = rng.integers(2, 10, count)
            yield StrayList(
                criterion, strays,
                {
                    centred: generation.similarity_to_others(
                        rows, votes, bank.background if centred else None
                    )
                    for centred in (False, True)
                },
                np.arange(len(rows)) < count,
            )  # fmt: skip


def stray_table(lists: Sequence[StrayList]) -> str:
    """Write which share of strays and of good texts is dropped."""
    rows = []
    for centred, strays in product((False, True), ("nouns", "other criteria")):
        found = [each for each in lists if each.strays == strays]
        distance = generation.MIN_CENTRED_DISTANCE if centred else generation.MIN_DISTANCE
        shares = [
            *_dropped(found, centred, DEFAULT_OPTIONS.spread, distance),
            *_dropped_left_out(found, centred),
        ]
        name = "minus the background" if centred else "plain"
        rows.append([name, strays, f"{_above(found, centred):.3f}", *(f"{s:.1%}" for s in shares)])
    header = [
        "cosines", "strays", "a good text is above a stray", "strays dropped",
        "good texts dropped", "strays, list left out", "good texts, list left out",
    ]  # fmt: skip
    return table(header, rows)


def _above(lists: Sequence[StrayList], centred: bool) -> float:
    """Return how often a good text is more similar to the others than a stray of its list."""
    shares = []
    for each in lists:
        near = each.similarities[centred]
        shares.append((near[each.own, None] > near[None, ~each.own]).mean())
    return float(np.mean(shares))


def _dropped(
    lists: Sequence[StrayList], centred: bool, spread: float, distance: float
) -> tuple[float, float]:
    """Return the shares of strays and of good texts that a rule drops."""
    nears = [each.similarities[centred] for each in lists]
    below = [near < generation.outlier_cut(near, spread, distance) for near in nears]
    strays = np.concatenate([b[~each.own] for each, b in zip(lists, below, strict=True)])
    good = np.concatenate([b[each.own] for each, b in zip(lists, below, strict=True)])
    return float(strays.mean()), float(good.mean())


def _dropped_left_out(lists: Sequence[StrayList], centred: bool) -> tuple[float, float]:
    """Choose a rule on all criteria but one, use it on that one, and return the means."""
    shares = []
    for criterion in dict.fromkeys(each.criterion for each in lists):
        rest = [each for each in lists if each.criterion != criterion]
        tried = {rule: _dropped(rest, centred, *rule) for rule in _GRID}
        allowed = [rule for rule, (_, good) in tried.items() if good <= MAX_FALSE_ALARMS]
        best = max(allowed, key=lambda rule: tried[rule][0])
        own = [each for each in lists if each.criterion == criterion]
        shares.append(_dropped(own, centred, *best))
    strays, good = np.mean(shares, axis=0)
    return float(strays), float(good)


def merge_table(folder: Path) -> str:
    """Write how many pairs of nouns are merged at each threshold, and the least similar of them."""
    bank = read_word_bank(folder / WORDS)
    nouns = bank.kinds == "noun"
    words, vectors = bank.words[nouns], bank.vectors[nouns]
    first, second = np.triu_indices(len(vectors), 1)
    cosines = (vectors @ vectors.T)[first, second]
    order = np.argsort(-cosines)
    rows = []
    for threshold in MERGE_THRESHOLDS:
        merged = [i for i in order[:2000] if cosines[i] >= threshold]
        last = "; ".join(f"{words[first[i]]}, {words[second[i]]}" for i in merged[-4:])
        rows.append([f"{threshold:g}", str(len(merged)), last])
    return table(["cosine", "pairs of nouns", "the least similar of them"], rows)


def copies_table(cases: Sequence[Case]) -> str:
    """Write what near-copies of half of the texts change."""
    rows = []
    for variant in PERTURBED:
        cells = []
        for group in dict.fromkeys(case.group for case in cases):
            changes = []
            for case in (each for each in cases if each.group == group):
                own = case.texts[CONDITIONS[0]]
                copies = _turned(own[::2], COPY_COSINE, np.random.default_rng(case.split))
                changes.append(
                    _score(case, variant, texts=np.concatenate([own, copies]))
                    - _score(case, variant)
                )
            cells.append(_difference(np.mean(changes, axis=0)))
        rows.append([f"`{variant.name}`", *cells])
    return table(["", *dict.fromkeys(case.group for case in cases)], rows)


def bounds_table(cases: Sequence[Case], turned: str) -> str:
    """Write what errors of a model cost that stay within the bounds of the parity.

    Args:
        cases: The cases.
        turned: What has the errors, `images` or `texts`.
    """
    rows = []
    for group, variant in product(dict.fromkeys(case.group for case in cases), PERTURBED):
        own = [case for case in cases if case.group == group]
        exact = np.array([_score(case, variant) for case in own])
        cells = []
        for bound in BOUNDS:
            changed = []
            for case in own:
                rng = np.random.default_rng(case.split)
                if turned == "images":
                    given = {"images": _turned(case.images, bound, rng)}
                else:
                    given = {
                        "texts": _turned(case.texts[CONDITIONS[0]], bound, rng),
                        "background": _turned(case.background, bound, rng),
                    }
                changed.append(_score(case, variant, **given))
            cells.append(_difference(np.mean(np.array(changed) - exact, axis=0)))
        rows.append([group, f"`{variant.name}`", *cells])
    return table(["set", "", *(f"{bound:g}" for bound in BOUNDS)], rows)


def text_tables(folder: Path, cases: Sequence[Case]) -> str:
    """Write all tables of this module."""
    clean = [case for case in cases if case.split < 2]
    rule = f"{DEFAULT_OPTIONS.spread:g} robust standard deviations"
    return "\n".join(
        [
            "## Texts of real models\n",
            "### Strays\n",
            "`crl basis create` drops a text with few votes if its mean cosine with the others is "
            f"{rule}, and at least {generation.MIN_DISTANCE:g}, below the median; with a "
            f"background, {generation.MIN_CENTRED_DISTANCE:g} below it. Lists of 6 to 15 words of "
            f"one criterion with 1 to 3 strays, {len(BANK_KINDS) + len(NOUN_LISTS)} criteria of "
            f"the word bank with {DRAWS} draws each. Last two columns: both constants chosen on "
            "the other criteria, as those that drop most strays and at most "
            f"{MAX_FALSE_ALARMS:.0%} of the good texts.\n",
            stray_table(list(stray_lists(folder))) + "\n",
            "### Near-duplicates\n",
            f"`build_basis` merges texts from a cosine of {DEFAULT_MERGE_THRESHOLD:g}.\n",
            merge_table(folder) + "\n",
            f"Near-copies with a cosine of {COPY_COSINE:g} are added to half of the texts. Changes "
            "of mAP / 1-NN in percentage points:\n",
            copies_table(clean) + "\n",
            "### Errors within the bounds of the parity\n",
            "Each vector is turned in a random direction, until its cosine with the exact one is "
            "at the bound. An export refuses an fp32 graph with a cosine below 0.99999, fp16 below "
            "0.9995, and int8 with a mean below 0.99. Changes of mAP / 1-NN in percentage points. "
            "The errors of a real graph are not random, so this says what the bounds allow and "
            "not what a graph does.\n",
            "Images:\n", bounds_table(clean, "images") + "\n",
            "Texts, and the background:\n", bounds_table(clean, "texts") + "\n",
        ]
    )  # fmt: skip


def _turned(rows: Rows, cosine: float, rng: np.random.Generator) -> Rows:
    """Turn unit rows, shape (n, d), in random directions, to a cosine with themselves."""
    noise = rng.standard_normal(rows.shape)
    noise -= (noise * rows).sum(axis=1, keepdims=True) * rows
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    return np.asarray(cosine * rows + np.sqrt(1 - cosine**2) * noise, np.float32)


def _score(
    case: Case, variant: Variant, *,
    images: Rows | None = None, texts: Rows | None = None, background: Rows | None = None,
) -> NDArray[np.float64]:  # fmt: skip
    """Return mAP and 1-NN."""
    own = case.texts[CONDITIONS[0]] if texts is None else texts
    known = case if background is None else replace(case, background=background)
    made = make_map(known, variant, own)
    rows = made.apply(case.images if images is None else images)
    found = retrieval_runs(rows, case.codes, case.groups, find_queries(case.codes, case.groups))
    return np.array([found["mAP"].mean(), found["1-NN"].mean()])


def _difference(change: NDArray[np.float64]) -> str:
    return " / ".join(f"{round(100 * each, 1) + 0.0:+.1f}".replace("-", "−") for each in change)
