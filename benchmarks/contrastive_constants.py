"""`make eval-constants`: the constants of the method `contrastive`, chosen with one set left out.

For each set, the constants that are best on the other sets are applied to it. Sets are the real
vectors of `make eval-real` and the demo world. The score of a setting on a set is its mean gain
over `cosine` in clustering accuracy and mAP, over clean and noisy texts, with and without other
criteria. The score of a setting is the mean over the sets.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from crl_benchmarks.demo_world_set import read_demo_cases
from crl_benchmarks.markdown import table
from crl_benchmarks.real_vector_sets import Case, MissingVectors, read_cases
from crl_benchmarks.real_vectors import Variant, make_map
from crl_sdk import __version__
from crl_sdk.basis import _contrastive
from crl_sdk.errors import InvalidInputError
from crl_sdk.evaluation._clustering import clustering_runs
from crl_sdk.evaluation._vector_protocols import find_queries, retrieval_runs
from crl_sdk.storage._atomic_files import write_atomically

RIDGES, POWERS, FLOORS = (1.0, 3.0, 10.0, 30.0), (0.0, 0.1, 0.2, 0.3, 0.5), (0.001, 0.1, 1e3)
"""Values that are tried. The largest floor gives all texts the same weight."""

SPLITS = 2
"""Number of splits or draws of each set that are measured."""


@dataclass(frozen=True, slots=True)
class Setting:
    """Values of the constants of `crl_sdk.basis._contrastive`."""

    ridge: float
    power: float
    floor: float

    def __str__(self) -> str:
        """Return the values in the order of the table."""
        return f"{self.ridge:g} / {self.power:g} / {self.floor:g}"


SHIPPED = Setting(_contrastive.RIDGE, _contrastive.POWER, _contrastive.SIBLING_FLOOR)
SETTINGS = tuple(Setting(*values) for values in product(RIDGES, POWERS, FLOORS))

Scores = dict[tuple[str, Setting | None, bool], list[tuple[float, float]]]
"""Accuracy and mAP of each run by set, setting (None for `cosine`) and use of other criteria."""


def measure(cases: Sequence[Case], settings: Sequence[Setting] = SETTINGS) -> Scores:
    """Measure `cosine` and all settings on all cases."""
    found: Scores = {}
    for case in cases:
        is_query = find_queries(case.codes, case.groups)
        for texts in case.texts.values():
            paper = make_map(case, Variant("cosine"), texts).apply(case.images)
            base = _score(case, paper, is_query)
            for others in (False, True):
                found.setdefault((case.group, None, others), []).append(base)
                for setting in settings:
                    with _constants(setting):
                        made = make_map(case, Variant("contrastive", others=others), texts)
                    scores = _score(case, made.apply(case.images), is_query)
                    found.setdefault((case.group, setting, others), []).append(scores)
    return found


def gain(found: Scores, group: str, setting: Setting, others: bool) -> NDArray[np.float64]:
    """Return the mean gain over `cosine` in accuracy and mAP, in points, shape (2,)."""
    ours, base = found[group, setting, others], found[group, None, others]
    return np.asarray(100 * (np.mean(ours, axis=0) - np.mean(base, axis=0)))


def best(found: Scores, groups: Sequence[str], settings: Sequence[Setting] = SETTINGS) -> Setting:
    """Return the setting with the largest mean gain over sets, measures and uses of others."""
    return max(
        settings,
        key=lambda s: np.mean([gain(found, g, s, o) for g in groups for o in (False, True)]),
    )


def markdown(found: Scores, seconds: float) -> str:
    """Write the tables."""
    groups = list(dict.fromkeys(group for group, _, _ in found))
    rows = []
    for group in groups:
        chosen = best(found, [other for other in groups if other != group])
        cells = [
            " / ".join(f"{value:+.1f}" for value in gain(found, group, setting, others))
            for setting in (chosen, SHIPPED)
            for others in (False, True)
        ]
        rows.append([group, str(chosen), *cells])
    ranked = sorted(
        SETTINGS,
        key=lambda s: -np.mean([gain(found, g, s, o) for g in groups for o in (False, True)]),
    )
    every = [
        [str(s), *(f"{np.mean([gain(found, g, s, o) for o in (False, True)]):+.1f}"
                   for g in groups)]
        for s in dict.fromkeys((*ranked[:8], SHIPPED))
    ]  # fmt: skip
    return "\n".join(
        [
            "# Constants of `contrastive`, one set left out\n",
            f"`make eval-constants`, crl_sdk {__version__}, {seconds:.0f} s. Settings are ridge / "
            "power / floor of the texts' weights. Gains over `cosine` in points of accuracy / mAP, "
            "means over clean texts, off-topic texts and texts of other criteria.\n",
            table(
                ["set left out", "best on the others", "its gain, without others", "with others",
                 f"{SHIPPED} (ships), without others", "with others"],
                rows,
            )
            + "\n",
            "The best settings over all sets, and the one that ships: mean of accuracy and mAP, "
            "with and without others.\n",
            table(["setting", *groups], every) + "\n",
        ]
    )  # fmt: skip


def _score(
    case: Case, rows: NDArray[np.float32], is_query: NDArray[np.bool_]
) -> tuple[float, float]:
    accuracy = np.mean(clustering_runs(rows, case.codes, case.seeds[:2])["ACC"])
    precision = retrieval_runs(rows, case.codes, case.groups, is_query)["mAP"].mean()
    return float(accuracy), float(precision)


def _constants(setting: Setting) -> ExitStack:
    stack = ExitStack()
    for name, value in (
        ("RIDGE", setting.ridge), ("POWER", setting.power), ("SIBLING_FLOOR", setting.floor),
    ):  # fmt: skip
        stack.enter_context(patch.object(_contrastive, name, value))
    return stack


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="directory of the real vectors")
    parser.add_argument("--out", type=Path, help="file to write, .md")
    parsed = parser.parse_args(arguments)
    started = time.perf_counter()
    try:
        with threadpool_limits(1):
            cases = [*read_cases(parsed.data), *read_demo_cases()]
            found = measure([case for case in cases if case.split < SPLITS])
    except MissingVectors as missing:
        print(missing)
        return
    text = markdown(found, time.perf_counter() - started)
    print(text)
    if parsed.out is not None:
        write_atomically(parsed.out, text.encode(), InvalidInputError)


if __name__ == "__main__":
    main()
