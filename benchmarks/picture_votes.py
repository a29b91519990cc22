"""What it does to a list of texts when pictures vote on it, on sets of real vectors.

`python -m crl_benchmarks.picture_votes --data DIR` mixes texts into the lists of the sets of
`make eval-real`, lets the pictures vote, and prints which texts are dropped, and the mAP of the
contrastive basis before and after.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from crl_benchmarks.markdown import table
from crl_benchmarks.real_vector_sets import Case, MissingVectors, Rows, read_cases
from crl_benchmarks.real_vectors import Variant, make_map
from crl_sdk.basis._picture_votes import vote
from crl_sdk.evaluation._vector_protocols import find_queries, retrieval_runs

_CONTRASTIVE = Variant("contrastive")


def measure(case: Case) -> dict[str, tuple[float, float, float, float]]:
    """Return for each condition the dropped shares of own and added texts, and both mAPs.

    Args:
        case: A criterion of a set.
    """
    found = {}
    own = len(next(iter(case.texts.values())))
    for condition, texts in case.texts.items():
        fires = vote(texts, case.images, case.background).fires
        kept = fires if fires.sum() >= 3 else np.ones(len(texts), bool)
        added = 1 - kept[own:].mean() if len(texts) > own else 0.0
        found[condition] = (
            float(1 - kept[:own].mean()), float(added),
            _precision(case, texts), _precision(case, texts[kept]),
        )  # fmt: skip
    return found


def _precision(case: Case, texts: Rows) -> float:
    """Return the mAP of the contrastive basis of some texts."""
    rows = make_map(case, _CONTRASTIVE, texts).apply(case.images)
    is_query = find_queries(case.codes, case.groups)
    return float(retrieval_runs(rows, case.codes, case.groups, is_query)["mAP"].mean())


def markdown(cases: Iterable[Case]) -> str:
    """Return a table with one row per set and condition."""
    found: defaultdict[tuple[str, str], list[tuple[float, ...]]] = defaultdict(list)
    for case in cases:
        for condition, figures in measure(case).items():
            found[case.group, condition].append(figures)
    rows = []
    for (group, condition), all_figures in found.items():
        own, added, before, after = np.mean(all_figures, axis=0)
        rows.append([
            group, condition, f"{own:.0%}", f"{added:.0%}", f"{before:.1%}", f"{after:.1%}",
        ])  # fmt: skip
    head = ["set", "texts", "own texts dropped", "added texts dropped", "mAP", "after the vote"]
    return table(head, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="directory of the real vectors")
    try:
        with threadpool_limits(1):
            print(markdown(read_cases(parser.parse_args(arguments).data)))
    except MissingVectors as missing:
        print(missing)


if __name__ == "__main__":
    main()
