"""Protocols on a whole data set: universal and conditional embeddings side by side, as rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crl_sdk._embedder import Embedder
from crl_sdk.basis._basis import Method
from crl_sdk.basis._build import EmbedText
from crl_sdk.errors import InvalidInputError
from crl_sdk.evaluation import _clustering as kmeans
from crl_sdk.evaluation import _few_shot as shots_of
from crl_sdk.evaluation._deepfashion import ATTRIBUTES, DeepFashion
from crl_sdk.evaluation._fashion import attribute_map, overall, reduced
from crl_sdk.evaluation._figures import Figure
from crl_sdk.evaluation._genecis import GeneCis
from crl_sdk.evaluation._labelled import DataSetError, Labelled
from crl_sdk.evaluation._similarity import MODES, gallery_scores, recalls
from crl_sdk.evaluation._texts import Texts, projections
from crl_sdk.tasks._retrieval import condition_captions

PROTOCOLS = ("clustering", "few-shot")
UNIVERSAL, CONDITIONAL = "universal", "conditional"
SCALED = "universal, same scale"
TRAINING_MEAN = "conditional, shots' mean"

Step = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Score:
    """One line of results.

    Attributes:
        criterion: what was asked for.
        protocol: `clustering`, `few-shot`, `retrieval`.
        representation: which embeddings.
        figures: measure → figure, between 0 and 1 (ARI from −1).
    """

    criterion: str
    protocol: str
    representation: str
    figures: Mapping[str, Figure]


def check_texts(texts: Mapping[str, Texts], method: Method, protocols: Sequence[str]) -> None:
    """Find out before pictures are embedded whether the texts can be measured.

    Raises:
        InvalidInputError: too few texts for the method, no against, or a space of one dimension,
            whose rows the few-shot protocol cannot standardise.
    """
    for criterion, projection in projections(texts, method).items():
        if "few-shot" in protocols and projection.output_dim < 2:
            raise InvalidInputError(
                f"{criterion}: few-shot classification needs rows of two columns or more, its "
                f"{len(texts[criterion].texts)} texts give {projection.output_dim}: add texts, or "
                "pass --protocol clustering"
            )


def embed_files(
    embedder: Embedder,
    files: Sequence[Path],
    *,
    batch_size: int = 32,
    progress: Callable[[int], None] | None = None,
) -> NDArray[np.float32]:
    """Embed all pictures of a data set.

    Returns:
        (n, d) float32, unit rows.

    Raises:
        DataSetError: one cannot be read: a figure without it would not be the benchmark's.
    """
    result = embedder.embed(files, batch_size=batch_size, on_error="collect", progress=progress)
    if result.errors:
        first = next(iter(result.errors.values()))
        raise DataSetError(
            f"{len(result.errors)} of {len(files)} pictures cannot be read, the first: {first}; "
            "get the data set again, figures on a part of it would not be its own"
        )
    return result.universal


def run_labelled(
    data: Labelled,
    universal: NDArray[np.float32],
    texts: Mapping[str, Texts],
    *,
    method: Method = "cosine",
    protocols: Sequence[str] = PROTOCOLS,
    seeds: int = 20,
    shots: Sequence[int] = shots_of.SHOTS,
    splits: int = shots_of.SPLITS,
    step: Step | None = None,
) -> list[Score]:
    """Cluster and classify by each criterion.

    Args:
        data: the pictures' labels.
        universal: (n, d) float32 of `data.files`, unit rows.
        texts: criterion → its texts; these criteria are measured.
        method: how texts become a map; `cosine` is the paper's.
        protocols: which of `PROTOCOLS`.
        seeds: of k-means, from 0.
        shots: pictures of each class to train on.
        splits: random choices of them.
        step: told what is being done.

    Returns:
        Rows in the order of criteria, then protocols.

    Raises:
        InvalidInputError: an unknown protocol, NaN, one class only, too few pictures of a class.
        MissingDependencyError: scikit-learn or SciPy is not installed.
    """
    unknown = sorted(set(protocols) - set(PROTOCOLS))
    if unknown or not protocols or seeds < 1:
        raise InvalidInputError(
            f"expected protocols of {PROTOCOLS} and seeds >= 1, got {list(protocols)} and {seeds}"
        )
    maps = projections(texts, method)
    rows = []
    for criterion in texts:
        labels = data.labels[criterion]
        plain = universal[labels.files]
        conditional = maps[criterion].apply(plain)
        if "clustering" in protocols:
            _tell(step, f"{criterion}: clustering")
            for name, given in ((UNIVERSAL, plain), (CONDITIONAL, conditional)):
                figures = kmeans.clustering(given, labels.codes, range(seeds))
                rows.append(Score(criterion, "clustering", name, figures))
        if "few-shot" in protocols:
            scaled = shots_of.scaled_to(
                plain, shots_of.scale_of(shots_of.standardised(conditional))
            )
            ways: tuple[tuple[str, NDArray[np.float32], dict[str, Any]], ...] = (
                (UNIVERSAL, plain, {"standardise": False}),
                (SCALED, scaled, {"standardise": False}),
                (CONDITIONAL, conditional, {"standardise": True}),
                (TRAINING_MEAN, conditional, {"standardise": True, "transductive": False}),
            )
            for name, given, options in ways:
                _tell(step, f"{criterion}: few-shot, {name}")
                figures = {
                    f"{n} shot{'s' * (n > 1)}": shots_of.few_shot(
                        given, labels.codes, n, count=splits, **options
                    )
                    for n in shots
                }
                rows.append(Score(criterion, "few-shot", name, figures))
    return rows


def run_genecis(
    data: GeneCis,
    universal: NDArray[np.float32],
    scene: Texts,
    embed_text: EmbedText,
    *,
    method: Method = "cosine",
    step: Step | None = None,
) -> list[Score]:
    """Rank each query's gallery.

    Args:
        data: the queries.
        universal: (n, d) float32 of `data.files`, unit rows.
        scene: texts of scenes.
        embed_text: texts to (n, d) float32 unit rows, cut at the model's context.
        method: how texts become a map; `cosine` is the paper's.
        step: told what is being done.

    Returns:
        The paper's score, what each half of it does alone, and the same with universal embeddings
        in the place of scenes; then the paper's score without its division by norms.

    Raises:
        InvalidInputError: too few texts for the method, or NaN.
    """
    conditional = projections({"scene": scene}, method)["scene"].apply(universal)
    _tell(step, "embedding the conditions' captions")
    words = sorted({query.condition for query in data.queries})
    embedded = embed_text([caption for word in words for caption in condition_captions(word)])
    said = dict(zip(words, embedded.reshape(len(words), -1, embedded.shape[1]), strict=True))
    _tell(step, f"ranking {len(data.queries)} galleries")
    rows = []
    for mode, weights in MODES.items():
        for name, given in ((UNIVERSAL, universal), (CONDITIONAL, conditional)):
            if not weights[0] and name == CONDITIONAL:
                continue  # the condition alone asks no scene
            for normalise in (True, False) if all(weights) else (True,):
                scores = [
                    gallery_scores(
                        given[query.reference],
                        given[query.gallery],
                        (universal[query.gallery] @ said[query.condition].T).mean(axis=1),
                        weights=weights,
                        normalise=normalise,
                    )
                    for query in data.queries
                ]
                label = f"{name}, {mode}" if weights[0] else mode
                label += "" if normalise else ", not divided by norms"
                rows.append(Score("scene", "retrieval", label, recalls(scores)))
    return rows


def run_deepfashion(
    data: DeepFashion,
    universal: NDArray[np.float32],
    texts: Mapping[str, Texts],
    *,
    components: int | None = None,
    step: Step | None = None,
) -> list[Score]:
    """Search by each attribute.

    Args:
        data: queries and candidates.
        universal: (n, d) float32 of `data.files`, unit rows.
        texts: attribute → its texts; all attributes.
        components: to which larger bases are reduced; None for the size of the smallest, as the
            authors do (97 with their texts).
        step: told what is being done.

    Returns:
        A row for each attribute and representation, then the means over attributes.

    Raises:
        InvalidInputError: an attribute has no texts, components is out of range, or NaN.
    """
    lacking = [name for name in ATTRIBUTES if name not in texts]
    if lacking:
        raise InvalidInputError(f"expected texts of {', '.join(ATTRIBUTES)}; none of {lacking}")
    size = components_of(texts, components)
    found: dict[str, dict[str, Figure]] = {UNIVERSAL: {}, CONDITIONAL: {}}
    rows = []
    for attribute in ATTRIBUTES:
        _tell(step, f"{attribute}: searching")
        queries, candidates = data.queries[attribute], data.candidates[attribute]
        conditional = universal @ reduced(texts[attribute].embeddings, size).T
        for name, given in ((UNIVERSAL, universal), (CONDITIONAL, conditional)):
            figure = attribute_map(
                given[queries.files], given[candidates.files], queries.values, candidates.values
            )
            found[name][attribute] = figure
            rows.append(Score(attribute, "retrieval", name, {"mAP": figure}))
    counts = {name: len(data.queries[name].files) for name in ATTRIBUTES}
    for name, figures in found.items():
        for which, figure in overall(figures, counts).items():
            rows.append(Score(which, "retrieval", name, {"mAP": figure}))
    return rows


def components_of(texts: Mapping[str, Texts], components: int | None) -> int:
    """Give the size of reduced bases: as asked, else that of the smallest one, d at most."""
    smallest = min(min(own.embeddings.shape) for own in texts.values())
    return smallest if components is None else components


def _tell(step: Step | None, what: str) -> None:
    if step is not None:
        step(what)
