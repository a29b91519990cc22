"""`make eval`: tables that compare all projection methods, with paired differences and controls.

`python -m crl_benchmarks.projection_tables --out benchmarks/results/projections`
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from crl_benchmarks.basis_quality import AS_SAID
from crl_benchmarks.markdown import table
from crl_benchmarks.projections import (
    CONTROLS,
    LISTS,
    MEASURES,
    NAMING_PROMPT,
    NOISES,
    PARTIAL,
    REFERENCES,
    SHOTS,
    SOURCES,
    UNREPORTED,
    VARIANTS,
    WARNED,
    Run,
    make_world,
    measure_all,
)
from crl_export.demo.captions import NEUTRAL_PROMPT
from crl_export.demo.world import CRITERIA
from crl_sdk import __version__
from crl_sdk._processors import count_processors
from crl_sdk.basis._language_model import LanguageModel
from crl_sdk.errors import InvalidInputError
from crl_sdk.storage._atomic_files import write_atomically
from crl_sdk.tasks._cluster_quality import MAX_UNDESCRIBED, MIN_SEPARATION

BASELINE = "cosine"

USEFUL = 0.05
"""Smallest gain in accuracy over the universal embedding and over random words for which a basis is
worth it."""

_TITLES = {"accuracy": "ACC", "nmi": "NMI", "ari": "ARI", "few_shot": "5-shot", "map": "mAP"}
_NOISE = {"": "clean", "off-topic": "half off-topic words", "other criteria's": "half words of "
          "other criteria"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Difference:
    """A paired difference.

    Attributes:
        mean: Mean over the seeds.
        half: Half the width of the 95 % confidence interval.
    """

    mean: float
    half: float

    def __str__(self) -> str:
        """Return the difference in percentage points."""
        return f"{100 * self.mean:+.1f} ± {100 * self.half:.1f}"


def difference(
    runs: Iterable[Run], variant: str, measure: str, baseline: str = BASELINE
) -> Difference:
    """Return the difference between two variants on the same texts, images and starts.

    Differences are averaged within each seed. The interval is Student's over the seeds.

    Args:
        runs: Runs of both variants.
        variant: Name of the variant.
        measure: One of `MEASURES`.
        baseline: Name of the variant to compare with.
    """
    from scipy.stats import t

    scores: dict[tuple[Any, ...], dict[str, float]] = {}
    for run in runs:
        key = (run.seed, run.factor, run.source, run.noise)
        scores.setdefault(key, {})[run.variant] = run.scores[measure]
    per_seed: dict[int, list[float]] = {}
    for key, each in scores.items():
        per_seed.setdefault(key[0], []).append(each[variant] - each[baseline])
    means = np.array([np.mean(values) for values in per_seed.values()])
    if len(means) < 2:
        return Difference(float(means.mean()), float("nan"))
    error = means.std(ddof=1) / len(means) ** 0.5
    return Difference(float(means.mean()), float(t.ppf(0.975, len(means) - 1) * error))


def markdown(runs: Sequence[Run], record: dict[str, Any]) -> str:
    """Format all tables."""
    return "\n\n".join(
        [
            "# Projections on the demo world",
            f"`make eval`: {record['images']} held-out scenes, {record['seeds']} seeds, "
            f"{record['seconds'] / 60:.0f} minutes. Each seed draws texts, noise, starts of "
            f"k-means and examples, and all methods get the same ones. The language model wrote "
            f"{LISTS} lists. Rows have the form of the paper's protocol: unit rows for clustering "
            "and retrieval, standardised rows for 5-shot. “Others”: the method gets "
            "the words of the five other criteria; the words of other criteria that are mixed in "
            "as noise are synonyms of those, never the same words. “Others generated”: the other "
            "criteria's texts come from the language model instead. “Sharpened”: with the images, "
            f"without their labels. “References”: the mean of {record['references']} other scenes "
            "is turned onto that of the texts. Differences are to `cosine`, "
            "the paper's method, in percentage points, with 95 % intervals over the seeds.",
            "## Methods",
            *(_methods(runs, noise) for noise in NOISES),
            "### Both kinds of noise together: difference from `cosine` over all noisy bases",
            _noisy(runs),
            "## By criterion and source of the texts: clustering accuracy",
            _by_source(runs),
            "## Controls",
            _controls(runs),
            "## Two more factors",
            "No table above reports these factors. The encoder hardly sees backgrounds.",
            _unreported(runs),
            "## When conditioning hurts, and the warning",
            _warning(runs),
        ]
    ) + "\n"  # fmt: skip


def _methods(runs: Sequence[Run], noise: str) -> str:
    own = [r for r in runs if r.factor in CRITERIA and r.source in SOURCES and r.noise == noise]
    head = ["method", *(_TITLES[m] for m in MEASURES), "ACC − cosine", "5-shot − cosine",
            "mAP − cosine"]  # fmt: skip
    controls = [
        (source, [r for r in runs if r.factor in CRITERIA and r.source == source])
        for source in ("universal", "universal, scale of a basis")
    ]
    for source in CONTROLS:
        drawn = [r for r in runs if r.factor in CRITERIA and r.source == source]
        controls += [(f"{source}, {variant}", [r for r in drawn if r.variant == variant])
                     for variant in (BASELINE, WARNED.name)]  # fmt: skip
    rows = [
        [name, *(_mean(each, measure) for measure in MEASURES), "", "", ""]
        for name, each in controls
    ]
    for variant in VARIANTS:
        mine = [run for run in own if run.variant == variant.name]
        rows.append(
            [
                variant.name,
                *(_mean(mine, measure) for measure in MEASURES),
                *(
                    "" if variant.name == BASELINE else str(difference(own, variant.name, measure))
                    for measure in ("accuracy", "few_shot", "map")
                ),
            ]
        )
    title = f"### {_NOISE[noise].capitalize()}: mean over {len(CRITERIA)} criteria and "
    return f"{title}{len(SOURCES)} sources of texts\n\n{table(head, rows)}"


def _noisy(runs: Sequence[Run]) -> str:
    noisy = [r for r in runs if r.factor in CRITERIA and r.source in SOURCES and r.noise]
    rows = [
        [variant.name, *(str(difference(noisy, variant.name, measure)) for measure in MEASURES)]
        for variant in VARIANTS
        if variant.name != BASELINE
    ]
    return table(["method", *(_TITLES[measure] for measure in MEASURES)], rows)


def _by_source(runs: Sequence[Run]) -> str:
    head = ["criterion", "texts from", "with", "universal", CONTROLS[0],
            *(v.name for v in VARIANTS)]  # fmt: skip
    rows = []
    for factor in CRITERIA:
        universal = _mean(_of(runs, factor, "universal"), "accuracy")
        random = _mean(
            [r for r in _of(runs, factor, CONTROLS[0]) if r.variant == BASELINE], "accuracy"
        )
        for source in SOURCES:
            for noise in NOISES:
                own = _of(runs, factor, source, noise)
                rows.append(
                    [_said(factor), source, _NOISE[noise], universal, random]
                    + [_mean([r for r in own if r.variant == v.name], "accuracy") for v in VARIANTS]
                )
    return table(head, rows)


def _controls(runs: Sequence[Run]) -> str:
    head = ["criterion", "control", "method", *(_TITLES[m] for m in MEASURES)]
    rows = []
    for factor in CRITERIA:
        for source in ("universal", "universal, scale of a basis"):
            own = _of(runs, factor, source)
            rows.append([_said(factor), source, "", *(_mean(own, m) for m in MEASURES)])
        for source in CONTROLS:
            for variant in VARIANTS:
                own = [r for r in _of(runs, factor, source) if r.variant == variant.name]
                rows.append(
                    [_said(factor), source, variant.name, *(_mean(own, m) for m in MEASURES)]
                )
    return table(head, rows)


def _unreported(runs: Sequence[Run]) -> str:
    head = ["criterion", "with", *(v.name for v in VARIANTS)]
    rows = []
    for factor in UNREPORTED:
        for noise in NOISES:
            own = [r for r in runs if r.factor == factor and r.source in SOURCES
                   and r.noise == noise]  # fmt: skip
            rows.append(
                [_said(factor), _NOISE[noise]]
                + [_mean([r for r in own if r.variant == v.name], "accuracy") for v in VARIANTS]
            )
    return table(head, rows)


def _warning(runs: Sequence[Run]) -> str:
    """Return a table of how often `assess_clusters` is right, by kind of basis."""
    plain = {(run.factor, run.seed): run.scores for run in runs if run.source == "universal"}
    chance = {
        factor: np.mean([run.scores["accuracy"] for run in runs if run.factor == factor
                         and run.source in CONTROLS and run.variant == WARNED.name])
        for factor in (*CRITERIA, *UNREPORTED)
    }  # fmt: skip

    def gain(run: Run, measure: str = "accuracy") -> float:
        return run.scores[measure] - plain[run.factor, run.seed][measure]

    def bad(run: Run) -> bool:
        over_chance = run.scores["accuracy"] - chance[run.factor]
        return run.source in CONTROLS or min(gain(run), over_chance) < USEFUL

    all_bases = [run for run in runs if run.variant == WARNED.name]
    head = [
        "basis", "bases", "5-shot below universal", "ACC below universal", "not worth it",
        "of these warned of", "of the others warned of", "a group that no text describes",
    ]  # fmt: skip
    kinds: list[tuple[str, Callable[[Run], bool]]] = [
        ("the criterion's words, or the model's", lambda r: r.source in SOURCES and not r.noise),
        ("… with half off-topic words", lambda r: r.noise == "off-topic"),
        ("… with half words of other criteria", lambda r: r.noise == "other criteria's"),
        *((source, lambda r, s=source: r.source == s) for source in (*PARTIAL, CONTROLS[0])),
        ("all with more than two texts", lambda r: "separation" in r.signals),
    ]
    rows = []
    for kind, fits in kinds:
        own = [run for run in all_bases if fits(run)]
        worse = [sum(gain(run, name) < 0 for run in own) for name in ("few_shot", "accuracy")]
        wrong = [run for run in own if bad(run)]
        counts = [str(number) for number in (len(own), *worse, len(wrong))]
        right = [run for run in own if not bad(run)]
        strange = (
            f"{100 * np.mean([run.signals['unlike'] > 0 for run in own]):.0f} %" if own else ""
        )
        rows.append([kind, *counts, _share_warned(wrong), _share_warned(right), strange])
    whole = [run for run in all_bases if run.source in SOURCES[:2] and not run.noise]
    lacking = [run for run in all_bases if run.source in PARTIAL[:2]]
    unlike = [
        f"{sum(run.signals['unlike'] > 0 for run in own if run.factor in CRITERIA)} of "
        f"{sum(run.factor in CRITERIA for run in own)}"
        for own in (whole, lacking)
    ]
    return (
        f"A basis is not worth it if its accuracy is less than {100 * USEFUL:.0f} points above "
        "that of the universal embedding or that of random words. `crl_sdk.tasks.assess_clusters` "
        f"warns, without labels, if the separation is below {MIN_SEPARATION} or more than "
        f"{MAX_UNDESCRIBED:.0%} of the groups have no text. These "
        "thresholds were chosen on real vectors, not here. The last column is "
        "another sign: if the images are clustered into as many groups as the criterion has "
        "values, no text describes at least one of the groups. On the four criteria above this "
        f"happens with {unlike[0]} bases that have all the words, and with {unlike[1]} that have "
        f"three or four of them.\n\n{table(head, rows)}"
    )


def _share_warned(runs: Sequence[Run]) -> str:
    def warned(run: Run) -> bool:
        signals = run.signals
        if "separation" not in signals:  # two texts
            return True
        return signals["separation"] < MIN_SEPARATION or signals["undescribed"] > MAX_UNDESCRIBED

    return f"{100 * np.mean([warned(run) for run in runs]):.0f} %" if runs else ""


def _of(runs: Sequence[Run], factor: str, source: str, noise: str = "") -> list[Run]:
    return [r for r in runs if (r.factor, r.source, r.noise) == (factor, source, noise)]


def _mean(runs: Sequence[Run], measure: str) -> str:
    return f"{np.mean([run.scores[measure] for run in runs]):.3f}" if runs else "refused"


def _said(factor: str) -> str:
    return AS_SAID.get(factor, factor)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=900)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--workers", type=int, default=count_processors())
    parser.add_argument(
        "--out", type=Path, help="base name of the files to write: OUT.json and OUT.md"
    )
    arguments = parser.parse_args()
    started = time.perf_counter()
    with LanguageModel.open() as model:
        world = make_world(arguments.images, arguments.seeds, model)
    runs = measure_all(world, arguments.seeds, arguments.workers)
    record: dict[str, Any] = {
        "crl_sdk": __version__,
        "images": arguments.images,
        "seeds": arguments.seeds,
        "references": REFERENCES,
        "shots": SHOTS,
        "prompt": NEUTRAL_PROMPT,
        "naming_prompt": NAMING_PROMPT,
        "seconds": round(time.perf_counter() - started),
        "generated": world.generated,
        "runs": [asdict(run) for run in runs],
    }
    text = markdown(runs, record)
    print(text)
    if arguments.out is not None:
        write_atomically(arguments.out.with_suffix(".md"), text.encode(), InvalidInputError)
        data = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        write_atomically(arguments.out.with_suffix(".json"), data, InvalidInputError)


if __name__ == "__main__":
    main()
