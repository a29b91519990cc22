"""How often `assess_clusters` is right on real vectors, a part of `make eval-real`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from crl_benchmarks.markdown import table
from crl_benchmarks.real_vector_sets import CONDITIONS, Case, Rows
from crl_benchmarks.real_vectors import Variant, make_map
from crl_sdk.evaluation._clustering import clustering_runs
from crl_sdk.projection._projection import normalise_rows
from crl_sdk.tasks._cluster_quality import MAX_UNDESCRIBED, MIN_SEPARATION, assess_clusters

USEFUL = 0.02
"""Smallest gain in accuracy over the universal embedding for which a basis is worth it."""

SETTINGS = tuple(
    Variant("contrastive", others=others, sharpened=sharpened)
    for others in (False, True)
    for sharpened in ("", "scored")
)
MAX_SPLITS = 2
"""Number of splits or draws of each criterion that are assessed."""

_GRID = [*product((-1.0, 0.0, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1),
                  (0.15, 0.2, 0.25, 0.3, 0.34, 0.4, 0.5, 0.6, 1.0))]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Assessed:
    """One basis, with what is measured with and without labels.

    Attributes:
        group: Name of the set.
        basis: Kind of the basis.
        gain: Clustering accuracy minus that of the universal embedding.
        separation: See `crl_sdk.tasks.ClusterQuality`.
        undescribed: See `crl_sdk.tasks.ClusterQuality`.
    """

    group: str
    basis: str
    gain: float
    separation: float
    undescribed: float

    @property
    def bad(self) -> bool:
        """Whether the basis is no better than the universal embedding."""
        return self.gain <= 0.0

    @property
    def good(self) -> bool:
        """Whether the basis is worth it. In between, a basis is neither bad nor good."""
        return self.gain > USEFUL

    def warned(self, smallest: float = MIN_SEPARATION, largest: float = MAX_UNDESCRIBED) -> bool:
        """Whether a warning is given with these thresholds."""
        return self.separation < smallest or self.undescribed > largest


def assess(cases: Sequence[Case]) -> Iterator[Assessed]:
    """Measure and assess good and bad bases of every criterion."""
    for case in cases:
        if case.split >= MAX_SPLITS:
            continue
        plain = np.mean(clustering_runs(case.images, case.codes, case.seeds)["ACC"])
        for name, texts in bases_of(case).items():
            for variant in SETTINGS:
                if name == "texts of other criteria" and variant.others:
                    continue  # they would be weighted against themselves
                rows = make_map(case, variant, texts).apply(case.images)
                quality = assess_clusters(case.images, rows, texts)
                if quality.separation is None or quality.undescribed is None:
                    continue
                accuracy = np.mean(clustering_runs(rows, case.codes, case.seeds)["ACC"])
                yield Assessed(
                    case.group, name, float(accuracy - plain), quality.separation,
                    quality.undescribed,
                )  # fmt: skip


def bases_of(case: Case) -> Mapping[str, Rows]:
    """Return the texts of good and of bad bases."""
    rng = np.random.default_rng(case.split)
    own, others = case.texts[CONDITIONS[0]], np.concatenate(case.against)

    def some(rows: Rows, count: int) -> Rows:
        return rows[rng.permutation(len(rows))[:count]]

    drawn = rng.standard_normal(own.shape).astype(np.float32)
    return {
        "all texts": own,
        "… and half off-topic": case.texts[CONDITIONS[1]],
        "… and half of other criteria": case.texts[CONDITIONS[2]],
        "three of the texts": some(own, 3),
        "four of the texts": some(own, 4),
        "texts of other criteria": some(others, len(own)),
        "generic texts": some(case.background, len(own)),
        "random directions": normalise_rows(drawn, "l2"),
    }


def warning_tables(found: Sequence[Assessed]) -> str:
    """Write the section on the warning."""
    groups = [g for g in dict.fromkeys(each.group for each in found)
              if any(e.good for e in found if e.group == g)]  # fmt: skip
    left_out = []
    for group in groups:
        rest = [each for each in found if each.group != group]
        smallest, largest = best_thresholds(rest)
        own = [each for each in found if each.group == group]
        left_out.append([group, f"{smallest:g} / {largest:g}", *_shares(own, smallest, largest)])
    kinds = [
        [kind, f"{100 * np.mean([e.gain for e in own]):+.1f}", *_shares(own)]
        for kind in dict.fromkeys(each.basis for each in found)
        for own in ([each for each in found if each.basis == kind],)
    ]
    head = ["no better than universal", "of these warned of", "worth it", "of these warned of"]
    every = ["all", "", *_shares(found)]
    best = best_thresholds(found)
    return "\n".join(
        [
            "## The warning\n",
            "`crl_sdk.tasks.assess_clusters` warns, without labels, if the separation is below "
            f"{MIN_SEPARATION} or the share of groups without a fitting text is above "
            f"{MAX_UNDESCRIBED}. The bases are made by `contrastive` with and without others and "
            f"sharpening, on {MAX_SPLITS} splits. A basis is worth it if its accuracy is more than "
            f"{100 * USEFUL:.0f} points above that of the universal embedding.\n",
            table(["basis", "gain, points", *head], [*kinds, every]) + "\n",
            "With thresholds from the other sets (the pair with the best Youden's J; all sets "
            f"together give {best[0]:g} / {best[1]:g}). Man or woman has no basis worth it, "
            "because the universal embedding separates the two.\n",
            table(["set left out", "thresholds", *head], left_out) + "\n",
        ]
    )


def best_thresholds(found: Sequence[Assessed]) -> tuple[float, float]:
    """Return the pair of thresholds with the best Youden's J: hit rate less false alarms."""

    def youden(pair: tuple[float, float]) -> float:
        hits = [each.warned(*pair) for each in found if each.bad]
        false = [each.warned(*pair) for each in found if each.good]
        return float(np.mean(hits) - np.mean(false)) if hits and false else 0.0

    return max(_GRID, key=youden)


def _shares(
    found: Sequence[Assessed],
    smallest: float = MIN_SEPARATION,
    largest: float = MAX_UNDESCRIBED,
) -> list[str]:
    cells = []
    for own in ([e for e in found if e.bad], [e for e in found if e.good]):
        cells += [f"{len(own)} of {len(found)}"]
        cells += [
            f"{100 * np.mean([e.warned(smallest, largest) for e in own]):.0f} %" if own else ""
        ]
    return cells
