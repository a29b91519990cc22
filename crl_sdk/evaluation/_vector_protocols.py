"""Run the protocols on stored vectors, for every projection method and two controls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from crl_sdk.basis._methods import (
    PAPER_METHOD,
    PROJECTION_METHODS,
    Method,
    find_method,
    make_projection,
)
from crl_sdk.errors import InvalidInputError
from crl_sdk.evaluation import _clustering as kmeans
from crl_sdk.evaluation import _few_shot as shots_of
from crl_sdk.evaluation._criterion_texts import CriterionTexts
from crl_sdk.evaluation._mean_std import MeanStd
from crl_sdk.evaluation._protocols import SCALED, UNIVERSAL, Step
from crl_sdk.evaluation._vector_noise import CLEAN, mix_in
from crl_sdk.evaluation._vectors import VectorSet
from crl_sdk.projection._projection import normalise_rows
from crl_sdk.tasks._metrics import average_precision
from crl_sdk.tasks._sharpen import ENOUGH_IMAGES, sharpen_projection

VECTOR_PROTOCOLS = ("clustering", "few-shot", "retrieval")
RANDOM = "random directions"
SHARPENED = "contrastive, sharpened"
"""The method `contrastive`, sharpened with the images that are evaluated, without their labels."""
DESCRIBING = tuple(method.name for method in PROJECTION_METHODS if method.texts_describe)
"""Methods whose conditional embeddings are about the criterion."""
_DRAWS = 5
"""Number of draws of the random directions. Seed or split i uses draw i modulo this."""
_BLOCK = 1 << 22
"""Number of similarities that are ranked at once."""

Rows: TypeAlias = NDArray[np.float32]
Runs: TypeAlias = dict[str, NDArray[np.float64]]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Score of one measure, and its difference to the method `cosine`.

    Attributes:
        score: Mean and standard deviation. Retrieval has no standard deviation.
        difference: Mean difference to `cosine`; None for `cosine` itself.
        low: Lower end of the 95 % interval of the difference; None if there is one run only.
        high: Upper end of this interval.
    """

    score: MeanStd
    difference: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class VectorRow:
    """One row of results.

    Attributes:
        labels: Name of the label column.
        criterion: Criterion whose texts were used.
        protocol: One of `VECTOR_PROTOCOLS`.
        representation: Embeddings that were evaluated: universal, a control, or a method.
        noise: What was mixed into the texts, one of `NOISES`.
        scores: Comparison for each measure.
    """

    labels: str
    criterion: str
    protocol: str
    representation: str
    noise: str
    scores: Mapping[str, Comparison]


@dataclass(frozen=True, slots=True)
class VectorOptions:
    """Options of the protocols.

    Attributes:
        methods: Projection methods to run. `cosine` is added, because the others are compared
            with it.
        protocols: Some of `VECTOR_PROTOCOLS`.
        seeds: Number of k-means seeds, counted from 0.
        shots: Numbers of training images of each class.
        splits: Number of random choices of the training images.
        noises: Some of `NOISES`. The universal embedding and the controls, which hardly depend on
            the texts, are evaluated with the first of them.
    """

    methods: tuple[Method, ...] = DESCRIBING
    protocols: tuple[str, ...] = VECTOR_PROTOCOLS
    seeds: int = 20
    shots: tuple[int, ...] = shots_of.SHOTS
    splits: int = shots_of.SPLITS
    noises: tuple[str, ...] = (CLEAN,)


def run_vectors(
    data: VectorSet,
    criteria: Mapping[str, str],
    texts: Mapping[str, CriterionTexts],
    options: VectorOptions,
    step: Step | None = None,
    *,
    background: Rows | None = None,
) -> tuple[list[VectorRow], list[str]]:
    """Run the protocols for each label column.

    Args:
        data: Image vectors with labels.
        criteria: Criterion of each label column.
        texts: Text vectors of all criteria. Methods that take other criteria get all but the
            evaluated one.
        options: Options of the protocols.
        step: Function that is called with a description of each step.
        background: Vectors of generic texts, shape (n, d), float32, unit rows.

    Returns:
        Rows sorted by label column, then by protocol and noise; and remarks on methods that were
        left out.

    Raises:
        InvalidInputError: If a label column, its criterion or a kind of noise has too little data.
        MissingDependencyError: If scikit-learn or SciPy is not installed.
    """
    rows: list[VectorRow] = []
    notes: list[str] = []
    for column, criterion in criteria.items():
        own = data.labels[column]
        images, groups = data.images[own.files], data.groups[own.files]
        k, d = texts[criterion].embeddings.shape
        if k < 2:
            raise InvalidInputError(
                f"{texts[criterion].source}: {criterion}: expected two texts or more, got {k}: add "
                "texts that describe different values of the criterion"
            )
        others = [each.embeddings for name, each in texts.items() if name != criterion]
        methods = _usable_methods(options.methods, k, len(others), column, notes)
        run = _Protocols(own.codes, groups, options, data.grouped)
        found: list[VectorRow] = []
        for noise in options.noises:
            mixed, generic = mix_in(texts[criterion].embeddings, noise, others, background)
            maps = _maps(mixed, methods, others, generic, images)
            ways = {name: [mapped] for name, mapped in maps.items()}
            if noise == options.noises[0]:
                draws = [images @ _directions(k, d, seed).T for seed in range(_DRAWS)]
                ways = {UNIVERSAL: [images], SCALED: [images], RANDOM: draws, **ways}
            for protocol in options.protocols:
                runs: dict[str, Runs] = {}
                for name, given in ways.items():
                    if name == SCALED and protocol != "few-shot":
                        continue  # the other protocols ignore the scale
                    if protocol == "few-shot" and given[0].shape[1] < 2:
                        notes.append(
                            f"{column}: few-shot is left out for {name}, whose rows have one "
                            f"column with {k} texts: add texts"
                        )
                        continue
                    if step is not None:
                        step(f"{column}: {protocol}, {name}, {noise} texts")
                    runs[name] = run.run(protocol, name, given, maps[PAPER_METHOD])
                found += [
                    VectorRow(
                        column, criterion, protocol, name, noise,
                        run.compare(protocol, scores, runs[PAPER_METHOD]),
                    )
                    for name, scores in runs.items()
                ]  # fmt: skip
        rows += sorted(found, key=lambda row: VECTOR_PROTOCOLS.index(row.protocol))
        if "retrieval" in options.protocols and run.left_out:
            notes.append(
                f"{column}: {run.left_out} of {len(images)} images are not used as queries of "
                "retrieval, because their class has no image outside their group"
            )
    return rows, list(dict.fromkeys(notes))


def _usable_methods(
    methods: Sequence[Method], texts: int, others: int, column: str, notes: list[str]
) -> list[Method]:
    """Return the methods that fit the numbers of texts and of other criteria, `cosine` first."""
    usable = []
    for method in dict.fromkeys((PAPER_METHOD, *methods)):
        needed = find_method(method).min_texts
        if find_method(method).needs_against and not others:
            notes.append(
                f"{column}: the method {method} is left out, because it needs the texts of other "
                "criteria and there are none"
            )
        elif texts < needed:
            notes.append(
                f"{column}: the method {method} is left out, because it needs {needed} texts and "
                f"there are {texts}"
            )
        else:
            usable.append(method)
    return usable


def _maps(
    texts: Rows,
    methods: Sequence[Method],
    others: Sequence[Rows],
    background: Rows | None,
    images: Rows,
) -> dict[str, Rows]:
    """Return the conditional embeddings of the images by each method."""
    maps: dict[str, Rows] = {}
    for method in methods:
        made = make_projection(
            texts, method, post="none", background=background,
            against=others if find_method(method).takes_against else (),
        )  # fmt: skip
        maps[method] = made.apply(images)
        if method == "contrastive" and len(images) >= ENOUGH_IMAGES:
            maps[SHARPENED] = sharpen_projection(made, len(texts), images)[0].apply(images)
    return maps


class _Protocols:
    """Run protocols on the images of one label column."""

    def __init__(
        self,
        codes: NDArray[np.int64],
        groups: NDArray[np.int64],
        options: VectorOptions,
        grouped: bool,
    ) -> None:
        self.codes, self.groups, self.options = codes, groups, options
        self.grouped = groups if grouped else None
        self.is_query = find_queries(codes, groups)
        self.query_groups = groups[self.is_query]
        self.left_out = int((~self.is_query).sum())

    def run(self, protocol: str, name: str, draws: list[Rows], paper: Rows) -> Runs:
        """Return the scores of each seed, split or query."""
        if protocol == "clustering":
            return _over_draws(self.options.seeds, draws, self._cluster)
        if protocol == "retrieval":
            scores = [
                retrieval_runs(rows, self.codes, self.groups, self.is_query) for rows in draws
            ]
            return {name: np.mean([each[name] for each in scores], axis=0) for name in scores[0]}
        plain = name in (UNIVERSAL, SCALED)
        if name == SCALED:
            scale = shots_of.rms_norm(shots_of.standardise_all(paper))
            draws = [shots_of.rescale(rows, scale) for rows in draws]
        found: Runs = {}
        for n in self.options.shots:
            measure = f"{n} shot{'s' * (n > 1)}"
            drawn = list(shots_of.splits(self.codes, n, self.options.splits, self.grouped))

            def classify(
                rows: Rows,
                at: Sequence[int],
                drawn: Sequence[shots_of.Split] = drawn,
                measure: str = measure,
            ) -> dict[str, list[float]]:
                chosen = [drawn[i] for i in at]
                return {
                    measure: shots_of.few_shot_runs(rows, self.codes, chosen, standardise=not plain)
                }

            found |= _over_draws(len(drawn), draws, classify)
        return found

    def compare(self, protocol: str, scores: Runs, paper: Runs) -> dict[str, Comparison]:
        """Compare each measure with that of `cosine`."""
        groups = self.query_groups if protocol == "retrieval" else None
        return {
            measure: compare(values, paper[measure], groups=groups)
            for measure, values in scores.items()
        }

    def _cluster(self, rows: Rows, seeds: Sequence[int]) -> dict[str, list[float]]:
        return kmeans.clustering_runs(rows, self.codes, seeds)


def find_queries(codes: NDArray[np.int64], groups: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which images can be queries: those whose class has an image outside their group.

    Args:
        codes: Class of each image, shape (n,), int64.
        groups: Group of each image, shape (n,), int64.
    """
    pairs = np.unique(np.stack([codes, groups], axis=1), axis=0)
    return np.asarray(np.bincount(pairs[:, 0], minlength=codes.max() + 1)[codes] > 1)


def retrieval_runs(
    rows: Rows,
    codes: NDArray[np.int64],
    groups: NDArray[np.int64],
    is_query: NDArray[np.bool_],
) -> Runs:
    """Rank all images of other groups by cosine, for each query.

    Args:
        rows: Embeddings of the images, shape (n, m).
        codes: Class of each image, shape (n,), int64.
        groups: Group of each image, shape (n,), int64.
        is_query: Which images are queries, shape (n,), see `find_queries`.

    Returns:
        For each query, shape (q,): the average precision (`mAP`), and whether the nearest image is
        of the right class (`1-NN`). It counts as the nearest only if no other image is as near.
    """
    unit = normalise_rows(rows, "l2")
    queries = np.flatnonzero(is_query)
    precision, nearest = [], []
    step = max(1, _BLOCK // len(unit))
    for start in range(0, len(queries), step):
        at = queries[start : start + step]
        scores = unit[at] @ unit.T
        scores[groups[at, None] == groups[None]] = -np.inf
        right = (codes[at, None] == codes[None]) & np.isfinite(scores)
        precision.append(average_precision(scores, right))
        best = np.where(right, scores, -np.inf).max(axis=1)
        nearest.append(best > np.where(right, -np.inf, scores).max(axis=1))
    return {
        "mAP": np.concatenate(precision),
        "1-NN": np.concatenate(nearest).astype(np.float64),
    }


def compare(
    values: NDArray[np.float64],
    paper: NDArray[np.float64],
    *,
    groups: NDArray[np.int64] | None = None,
) -> Comparison:
    """Compare the scores of runs with those of `cosine` on the same runs.

    The interval is that of Student's t for paired runs. If the runs are queries with groups, the
    standard error is that of the sums over groups, because members of a group are not independent.

    Args:
        values: Score of each run, shape (r,).
        paper: Score of `cosine` for each run, shape (r,).
        groups: Group of each run, shape (r,), integers, if the runs are queries.
    """
    from scipy.stats import t

    score = MeanStd.of(list(values)) if groups is None else MeanStd(float(values.mean()))
    if values is paper:
        return Comparison(score)
    apart = values - paper
    mean = float(apart.mean())
    _, where = np.unique(np.arange(len(apart)) if groups is None else groups, return_inverse=True)
    sums = np.bincount(where.reshape(-1), weights=apart - mean)
    if len(sums) < 2:
        return Comparison(score, mean)
    error = float(np.sqrt(len(sums) / (len(sums) - 1) * np.square(sums).sum())) / len(apart)
    half = float(t.ppf(0.975, len(sums) - 1)) * error
    return Comparison(score, mean, mean - half, mean + half)


def _over_draws(
    count: int,
    draws: Sequence[Rows],
    function: Callable[[Rows, Sequence[int]], Mapping[str, Sequence[float]]],
) -> Runs:
    """Run a protocol `count` times, with the draws of the embeddings in turn."""
    found: Runs = {}
    for i, rows in enumerate(draws):
        at = list(range(i, count, len(draws)))
        for measure, scores in function(rows, at).items() if at else ():
            found.setdefault(measure, np.empty(count))[at] = scores
    return found


def _directions(count: int, dim: int, seed: int) -> Rows:
    """Return random unit vectors, shape (count, dim), float32."""
    drawn = np.random.default_rng(seed).standard_normal((count, dim))
    return np.asarray(drawn / np.linalg.norm(drawn, axis=1, keepdims=True), np.float32)
