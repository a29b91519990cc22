"""`make eval-real`: all projection methods on embeddings of real CLIP models, with noisy texts.

The scores are those of the `measure.py` that lies beside the vectors.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from crl_benchmarks.markdown import table
from crl_benchmarks.real_vector_sets import (
    CONDITIONS,
    SEEDS,
    SPLITS,
    Case,
    MissingVectors,
    Rows,
    read_cases,
)
from crl_sdk import __version__
from crl_sdk.basis._methods import PAPER_METHOD, Method, find_method, make_projection
from crl_sdk.errors import InvalidInputError
from crl_sdk.evaluation._clustering import clustering_runs
from crl_sdk.evaluation._vector_protocols import (
    Comparison,
    compare,
    find_queries,
    retrieval_runs,
)
from crl_sdk.projection._projection import Projection
from crl_sdk.storage._atomic_files import write_atomically
from crl_sdk.tasks._sharpen import sharpen_projection

UNIVERSAL = "universal"
TITLES = {
    "clothes": "Clothes: 686 photographs, FashionCLIP; colour, type and pattern",
    "dress": "Dressed people: 1,000 generated images, OpenAI ViT-B/32; colour and garment",
    "gender": "Man or woman: the same 1,000 images; four nouns as texts",
    "animals": "Animals: 1,592 images of ImageNet, OpenAI ViT-B/32; seven kinds, 33 nouns as texts",
    "demo world": "Demo world: 400 rendered scenes, demo model; shape, colour, texture, count",
}


@dataclass(frozen=True, slots=True)
class Variant:
    """A method with its options, as it is measured.

    Attributes:
        method: Name of the method.
        others: Whether it gets the texts of other criteria.
        generic: Whether it gets generic texts.
        sharpened: Which images sharpen it, without their labels: the `scored` ones, `unseen` ones,
            or none.
    """

    method: Method
    others: bool = False
    generic: bool = True
    sharpened: str = ""

    @property
    def name(self) -> str:
        """Name in the tables."""
        if not find_method(self.method).takes_background:
            return self.method
        known = ["others"] * self.others + ["generic"] * self.generic
        more = {"": "", "scored": ", sharpened", "unseen": ", sharpened with other images"}
        return f"{self.method}: {' + '.join(known) or 'own texts alone'}{more[self.sharpened]}"


VARIANTS = (
    Variant("cosine"),
    Variant("orthogonal"),
    Variant("tangent"),
    Variant("exclusive-orthogonal", others=True),
    Variant("contrastive", generic=False),
    Variant("contrastive"),
    Variant("contrastive", others=True, generic=False),
    Variant("contrastive", others=True),
    Variant("contrastive", sharpened="unseen"),
    Variant("contrastive", sharpened="scored"),
    Variant("contrastive", others=True, sharpened="unseen"),
    Variant("contrastive", others=True, sharpened="scored"),
)


COUNTED = tuple(
    each
    for each in VARIANTS
    if each.method == PAPER_METHOD
    or (each.method == "contrastive" and each.generic and each.sharpened != "unseen")
)
"""Variants that are measured with fewer texts."""
COUNTS = (3, 4, 6, 8, 12, 16, 24)
COUNT_DRAWS = 3


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """Scores of one method on one case, under one condition.

    Attributes:
        group: Name of the set.
        criterion: Name of the criterion.
        split: Number of the split or draw.
        method: Name of the variant, or `UNIVERSAL`.
        condition: One of `CONDITIONS`.
        accuracies: Clustering accuracy for each seed of k-means, shape (s,).
        precisions: Average precision of each query, shape (q,).
        query_groups: Group of each query, shape (q,), int64.
    """

    group: str
    criterion: str
    split: int
    method: str
    condition: str
    accuracies: NDArray[np.float64]
    precisions: NDArray[np.float64]
    query_groups: NDArray[np.int64]

    @property
    def scores(self) -> tuple[float, float]:
        """Mean clustering accuracy, and mAP."""
        return float(self.accuracies.mean()), float(self.precisions.mean())


@dataclass(frozen=True, slots=True)
class CountRun:
    """Clustering accuracy with some of the criterion's texts.

    Attributes:
        group: Name of the set.
        criterion: Name of the criterion.
        method: Name of the variant.
        count: Number of texts.
        accuracy: Clustering accuracy.
    """

    group: str
    criterion: str
    method: str
    count: int
    accuracy: float


def measure(case: Case, variants: Sequence[Variant] = VARIANTS) -> Iterator[Run]:
    """Measure the universal embedding and all variants on a case."""
    universal = _measure_rows(case, UNIVERSAL, CONDITIONS[0], case.images)
    for condition, texts in case.texts.items():
        yield replace(universal, condition=condition)
        for variant in variants:
            if variant.sharpened != "unseen" or case.unseen is not None:
                made = make_map(case, variant, texts)
                yield _measure_rows(case, variant.name, condition, made.apply(case.images))


def make_map(case: Case, variant: Variant, texts: Rows) -> Projection:
    """Make the map of a variant from texts, shape (k, d), float32, unit rows."""
    made = make_projection(
        texts, variant.method, against=case.against if variant.others else (),
        background=case.background if variant.generic else None,
    )  # fmt: skip
    if not variant.sharpened:
        return made
    images = case.images if variant.sharpened == "scored" else case.unseen
    assert images is not None
    return sharpen_projection(made, len(texts), images)[0]


def measure_counts(case: Case) -> Iterator[CountRun]:
    """Measure some variants with fewer of the criterion's own texts."""
    own = case.texts[CONDITIONS[0]]
    for count in (*(c for c in COUNTS if c < len(own)), len(own)):
        for draw in range(COUNT_DRAWS):
            rng = np.random.default_rng([case.split, draw])
            texts = own[np.sort(rng.permutation(len(own))[:count])]
            for variant in COUNTED:
                rows = make_map(case, variant, texts).apply(case.images)
                scores = clustering_runs(rows, case.codes, case.seeds[:2])["ACC"]
                mean = float(np.mean(scores))
                yield CountRun(case.group, case.criterion, variant.name, count, mean)


def compare_accuracies(runs: Sequence[Run], paper: Sequence[Run]) -> Comparison:
    """Compare clustering accuracies with those of `cosine` in the same runs.

    Runs that share a criterion and a split are one unit of the interval. A set of one split has
    too few of those, so each start of k-means is a unit there.
    """
    single = len({run.split for run in runs}) == 1
    units = [
        (run.criterion, run.split, seed if single else -1)
        for run in runs
        for seed in range(len(run.accuracies))
    ]
    return compare(
        np.concatenate([run.accuracies for run in runs]),
        np.concatenate([run.accuracies for run in paper]),
        groups=np.unique(units, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64),
    )


def compare_precisions(runs: Sequence[Run], paper: Sequence[Run]) -> Comparison:
    """Compare the mAP, as the mean over the runs, with that of `cosine`.

    All queries of one group are one unit of the interval, over all criteria and splits.
    """
    apart = [run.precisions - base.precisions for run, base in zip(runs, paper, strict=True)]
    mean = float(np.mean([each.mean() for each in apart]))
    count = sum(len(each) for each in apart) / len(apart)
    # Each run counts equally, although the runs differ in their number of queries.
    weighted = np.concatenate([mean + count / len(each) * (each - mean) for each in apart])
    groups = np.concatenate([run.query_groups for run in runs])
    return compare(weighted, np.zeros(len(weighted)), groups=groups)


def markdown(runs: Sequence[Run], seconds: float) -> str:
    """Write the tables."""
    parts = [
        "# Projection methods on real vectors\n",
        f"`make eval-real`, crl_sdk {__version__}, {seconds:.0f} s. Each cell holds clustering "
        "accuracy / mAP, as the mean over the criteria and over all runs. In brackets: the "
        f"difference to `{PAPER_METHOD}`, the paper's method, in percentage points with a 95 % "
        "interval. Columns: the criterion's own texts; half as many off-topic texts added; half as "
        "many texts of other criteria added; the mean of the three.\n",
        f"Runs: the clothes have {SPLITS} splits into products for the texts and products that are "
        "scored, dressed people have one draw of the noise, the other sets have "
        f"{SPLITS} draws. Each has {len(SEEDS)} starts of k-means. Labels, words, splits and noise "
        "of clothes and dressed people are those of the `measure.py` beside the vectors; "
        "its figures differ by up to 0.002, because k-means gets float32 here. The demo world is "
        "not real: it is here so that a method is seen on both. Its lists are synonyms, with "
        "two draws of the noise.\n",
        "The intervals are paired. For mAP their unit is a product of the clothes, or a group of "
        "near-duplicate images, so that they do not cover the choice of the texts. For accuracy it "
        "is a criterion and split, or draw. Dressed people have one draw: there it is a start of "
        "k-means for a criterion, so that these intervals of accuracy are too narrow.\n",
        "“Others”: the method gets the words that the last condition is drawn from. “Generic”: it "
        "gets generic texts, which for the clothes are all captions of the basis half, and for the "
        "other sets the nouns that both the bank and the list of `crl export` have. “Sharpened”: "
        "with the images that are scored, or with the images of the other half, without labels. "
        "The constants of `contrastive` were chosen on these sets, see docs/PROJECTIONS.md.\n",
        "Left out: the textures (of 47 labels, the bank has words for three or four), and indoor "
        "or outdoor scenes (the bank has no words for them).\n",
        "![Clustering accuracy against noise](real-vectors.png)\n",
        "![Clustering accuracy against the number of texts](real-vectors-texts.png)\n",
    ]  # fmt: skip
    for group in dict.fromkeys(run.group for run in runs):
        own = [run for run in runs if run.group == group]
        parts += [f"## {TITLES[group]}\n", _means(own) + "\n"]
        if len({run.criterion for run in own}) > 1:
            parts += ["Each criterion:\n", _each_criterion(own) + "\n"]
    return "\n".join(parts)


def _measure_rows(case: Case, method: str, condition: str, rows: Rows) -> Run:
    is_query = find_queries(case.codes, case.groups)
    return Run(
        case.group, case.criterion, case.split, method, condition,
        np.array(clustering_runs(rows, case.codes, case.seeds)["ACC"]),
        retrieval_runs(rows, case.codes, case.groups, is_query)["mAP"],
        case.groups[is_query],
    )  # fmt: skip


def _means(runs: Sequence[Run]) -> str:
    rows = []
    for method in dict.fromkeys(run.method for run in runs):
        cells = [f"`{method}`" if method != UNIVERSAL else method]
        for conditions in (*((name,) for name in CONDITIONS), CONDITIONS):
            found = [r for r in runs if r.method == method and r.condition in conditions]
            paper = [r for r in runs if r.method == PAPER_METHOD and r.condition in conditions]
            cells.append(_cell(found, paper))
        rows.append(cells)
    return table(["", *CONDITIONS, "mean"], rows)


def _cell(runs: Sequence[Run], paper: Sequence[Run]) -> str:
    scores = _mean_scores(runs)
    if runs[0].method == PAPER_METHOD:
        return scores
    apart = (compare_accuracies(runs, paper), compare_precisions(runs, paper))
    return f"{scores} ({' / '.join(map(_difference, apart))})"


def _difference(found: Comparison) -> str:
    if found.difference is None:
        return ""
    value = f"{round(100 * found.difference, 1) + 0.0:+.1f}".replace("-", "−")
    if found.high is None:
        return value
    return f"{value} ± {100 * (found.high - found.difference):.1f}"


def _each_criterion(runs: Sequence[Run]) -> str:
    rows = []
    for criterion in dict.fromkeys(run.criterion for run in runs):
        for method in dict.fromkeys(run.method for run in runs):
            own = [r for r in runs if (r.criterion, r.method) == (criterion, method)]
            cells = [_mean_scores([r for r in own if r.condition == c]) for c in CONDITIONS]
            rows.append([criterion, f"`{method}`" if method != UNIVERSAL else method, *cells])
    return table(["criterion", "", *CONDITIONS], rows)


def _mean_scores(runs: Sequence[Run]) -> str:
    return " / ".join(f"{mean:.3f}" for mean in np.mean([run.scores for run in runs], axis=0))


def _record(runs: Sequence[Run], counts: Sequence[CountRun], seconds: float) -> bytes:
    found = [
        {
            "set": run.group, "criterion": run.criterion, "split": run.split,
            "method": run.method, "condition": run.condition,
            "ACC": [round(value, 6) for value in run.accuracies.tolist()],
            "mAP": round(run.scores[1], 6),
        }
        for run in runs
    ]  # fmt: skip
    document = {
        "crl_sdk": __version__, "seconds": round(seconds), "runs": found,
        "counts": [asdict(each) for each in counts],
    }  # fmt: skip
    return json.dumps(document).encode()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="directory of the real vectors")
    parser.add_argument(
        "--out", type=Path, help="base name of the files to write: OUT.md, OUT.png and others"
    )
    parsed = parser.parse_args(arguments)
    from crl_benchmarks.demo_world_set import read_demo_cases
    from crl_benchmarks.real_vector_dtypes import dtype_tables, measure_dtypes
    from crl_benchmarks.real_vector_plots import plot_counts, plot_noise
    from crl_benchmarks.real_vector_texts import text_tables
    from crl_benchmarks.real_vector_warnings import assess, warning_tables

    started = time.perf_counter()
    try:
        with threadpool_limits(1):
            cases = list(read_cases(parsed.data))
            demo = list(read_demo_cases())
            runs = [run for case in (*cases, *demo) for run in measure(case)]
            counts = [run for case in cases for run in measure_counts(case)]
            assessed = list(assess(cases))
            costs = list(measure_dtypes(cases))
            texts = text_tables(parsed.data, cases)
    except MissingVectors as missing:
        print(missing)
        return
    seconds = time.perf_counter() - started
    parts = [
        markdown(runs, seconds),
        warning_tables(assessed),
        dtype_tables(costs, lambda group: TITLES[group].split(":")[0]),
        texts,
    ]
    text = "\n".join(parts)
    print(text)
    if parsed.out is not None:
        for suffix, data in (
            (".md", text.encode()),
            (".png", plot_noise(runs)),
            ("-texts.png", plot_counts(counts)),
            (".json", _record(runs, counts, seconds)),
        ):
            path = parsed.out.with_name(parsed.out.name + suffix)
            write_atomically(path, data, InvalidInputError)


if __name__ == "__main__":
    main()
