"""Run the protocols on a whole data set, with universal and with conditional embeddings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crl_sdk._embedder import Embedder
from crl_sdk.basis._build import EmbedText
from crl_sdk.basis._methods import PAPER_METHOD, Method
from crl_sdk.errors import InvalidInputError
from crl_sdk.evaluation import _clustering as kmeans
from crl_sdk.evaluation import _few_shot as shots_of
from crl_sdk.evaluation._attribute_retrieval import (
    average_over_attributes,
    reduce_texts,
    search_attribute,
)
from crl_sdk.evaluation._criterion_texts import CriterionTexts, make_projections
from crl_sdk.evaluation._dataset import DataSetError, LabelledImages
from crl_sdk.evaluation._deepfashion import ATTRIBUTES, DeepFashion
from crl_sdk.evaluation._gallery_retrieval import MODES, gallery_scores, recalls
from crl_sdk.evaluation._genecis import GeneCis
from crl_sdk.evaluation._mean_std import MeanStd
from crl_sdk.tasks._retrieval import condition_captions

PROTOCOLS = ("clustering", "few-shot")
UNIVERSAL, CONDITIONAL = "universal", "conditional"
SCALED = "universal, same scale"
TRAINING_MEAN = "conditional, shots' mean"

Step = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ResultRow:
    """One row of results.

    Attributes:
        criterion: Criterion that was evaluated.
        protocol: `clustering`, `few-shot` or `retrieval`.
        representation: Embeddings that were evaluated.
        scores: Score for each measure, 0 to 1; for ARI -1 to 1.
    """

    criterion: str
    protocol: str
    representation: str
    scores: Mapping[str, MeanStd]


def check_texts(
    texts: Mapping[str, CriterionTexts], method: Method, protocols: Sequence[str]
) -> None:
    """Check that the protocols can use some texts. Call it before images are embedded.

    Args:
        texts: Texts of each criterion.
        method: Method that makes the projections.
        protocols: Names of the protocols to run.

    Raises:
        InvalidInputError: If there are too few texts for the method, if it needs other criteria
            and there are none, or if the few-shot protocol would get rows with one column.
    """
    for criterion, projection in make_projections(texts, method).items():
        if "few-shot" in protocols and projection.output_dim < 2:
            raise InvalidInputError(
                f"{criterion}: few-shot classification needs rows with two columns or more, but "
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
    """Embed all images of a data set.

    Args:
        embedder: Embedder of the model.
        files: The n image files.
        batch_size: Number of images per engine run.
        progress: Function that is called with the number of images done so far.

    Returns:
        Universal embeddings, shape (n, d), float32, unit rows.

    Raises:
        DataSetError: If an image cannot be read. Results on the others would not be those of the
            benchmark.
    """
    result = embedder.embed(files, batch_size=batch_size, on_error="collect", progress=progress)
    if result.errors:
        first = next(iter(result.errors.values()))
        raise DataSetError(
            f"{len(result.errors)} of {len(files)} images cannot be read, the first: {first}; "
            "get the data set again, results need all of its images"
        )
    return result.universal


def run_labelled(
    data: LabelledImages,
    universal: NDArray[np.float32],
    texts: Mapping[str, CriterionTexts],
    *,
    method: Method = PAPER_METHOD,
    background: NDArray[np.float32] | None = None,
    protocols: Sequence[str] = PROTOCOLS,
    seeds: int = 20,
    shots: Sequence[int] = shots_of.SHOTS,
    splits: int = shots_of.SPLITS,
    step: Step | None = None,
) -> list[ResultRow]:
    """Run clustering and few-shot classification for each criterion.

    Args:
        data: Labelled images.
        universal: Universal embeddings of `data.files`, shape (n, d), float32, unit rows.
        texts: Texts of each criterion. These criteria are evaluated.
        method: Method that makes the projections. `cosine` is the paper's.
        background: Embeddings of generic texts, shape (b, d), for methods that use them.
        protocols: Some of `PROTOCOLS`.
        seeds: Number of k-means seeds, counted from 0.
        shots: Numbers of training images of each class.
        splits: Number of random choices of the training images.
        step: Function that is called with a description of each step.

    Returns:
        Rows sorted by criterion, then by protocol.

    Raises:
        InvalidInputError: If a protocol is unknown, a value is NaN, there is only one class, or a
            class has too few images.
        MissingDependencyError: If scikit-learn or SciPy is not installed.
    """
    unknown = sorted(set(protocols) - set(PROTOCOLS))
    if unknown or not protocols or seeds < 1:
        raise InvalidInputError(
            f"expected protocols of {PROTOCOLS} and seeds >= 1, got {list(protocols)} and {seeds}"
        )
    maps = make_projections(texts, method, background)
    rows = []
    for criterion in texts:
        labels = data.labels[criterion]
        plain = universal[labels.files]
        conditional = maps[criterion].apply(plain)
        if "clustering" in protocols:
            _report(step, f"{criterion}: clustering")
            for name, given in ((UNIVERSAL, plain), (CONDITIONAL, conditional)):
                scores = kmeans.clustering(given, labels.codes, range(seeds))
                rows.append(ResultRow(criterion, "clustering", name, scores))
        if "few-shot" in protocols:
            scaled = shots_of.rescale(
                plain, shots_of.rms_norm(shots_of.standardise_all(conditional))
            )
            ways: tuple[tuple[str, NDArray[np.float32], dict[str, Any]], ...] = (
                (UNIVERSAL, plain, {"standardise": False}),
                (SCALED, scaled, {"standardise": False}),
                (CONDITIONAL, conditional, {"standardise": True}),
                (TRAINING_MEAN, conditional, {"standardise": True, "transductive": False}),
            )
            for name, given, options in ways:
                _report(step, f"{criterion}: few-shot, {name}")
                scores = {
                    f"{n} shot{'s' * (n > 1)}": shots_of.few_shot(
                        given, labels.codes, n, count=splits, **options
                    )
                    for n in shots
                }
                rows.append(ResultRow(criterion, "few-shot", name, scores))
    return rows


def run_genecis(
    data: GeneCis,
    universal: NDArray[np.float32],
    scene: CriterionTexts,
    embed_text: EmbedText,
    *,
    method: Method = PAPER_METHOD,
    background: NDArray[np.float32] | None = None,
    step: Step | None = None,
) -> list[ResultRow]:
    """Rank the gallery of each query.

    Args:
        data: Images and queries.
        universal: Universal embeddings of `data.files`, shape (n, d), float32, unit rows.
        scene: Texts that describe scenes.
        embed_text: Function from n texts to embeddings, shape (n, d), float32, unit rows. Texts
            are cut at the context length of the model.
        method: Method that makes the projection. `cosine` is the paper's.
        background: Embeddings of generic texts, shape (b, d), for methods that use them.
        step: Function that is called with a description of each step.

    Returns:
        Rows for the paper's score, with and without its division by norms, and for each of its two
        parts. Each row is computed with conditional and with universal embeddings; the condition
        alone depends on neither.

    Raises:
        InvalidInputError: If there are too few texts for the method or a value is NaN.
    """
    made = make_projections({"scene": scene}, method, background)
    conditional = made["scene"].apply(universal)
    _report(step, "embedding the conditions' captions")
    words = sorted({query.condition for query in data.queries})
    embedded = embed_text([caption for word in words for caption in condition_captions(word)])
    by_word = embedded.reshape(len(words), -1, embedded.shape[1])
    captions = dict(zip(words, by_word, strict=True))
    _report(step, f"ranking {len(data.queries)} galleries")
    rows = []
    for mode, weights in MODES.items():
        for name, given in ((UNIVERSAL, universal), (CONDITIONAL, conditional)):
            if not weights[0] and name == CONDITIONAL:
                continue  # the condition alone does not use the scene
            for normalise in (True, False) if all(weights) else (True,):
                scores = [
                    gallery_scores(
                        given[query.reference],
                        given[query.gallery],
                        (universal[query.gallery] @ captions[query.condition].T).mean(axis=1),
                        weights=weights,
                        normalise=normalise,
                    )
                    for query in data.queries
                ]
                label = f"{name}, {mode}" if weights[0] else mode
                label += "" if normalise else ", not divided by norms"
                rows.append(ResultRow("scene", "retrieval", label, recalls(scores)))
    return rows


def run_deepfashion(
    data: DeepFashion,
    universal: NDArray[np.float32],
    texts: Mapping[str, CriterionTexts],
    *,
    components: int | None = None,
    step: Step | None = None,
) -> list[ResultRow]:
    """Run the search for each attribute.

    Args:
        data: Queries and candidates.
        universal: Universal embeddings of `data.files`, shape (n, d), float32, unit rows.
        texts: Texts of each attribute. All attributes are needed.
        components: Size that larger bases are reduced to. None for the size of the smallest basis,
            as in the paper (97 with the authors' texts).
        step: Function that is called with a description of each step.

    Returns:
        A row for each attribute and representation, followed by the averages over attributes.

    Raises:
        InvalidInputError: If an attribute has no texts, `components` is out of range, or a value
            is NaN.
    """
    lacking = [name for name in ATTRIBUTES if name not in texts]
    if lacking:
        raise InvalidInputError(f"expected texts of {', '.join(ATTRIBUTES)}; {lacking} have none")
    size = reduced_size(texts, components)
    found: dict[str, dict[str, MeanStd]] = {UNIVERSAL: {}, CONDITIONAL: {}}
    rows = []
    for attribute in ATTRIBUTES:
        _report(step, f"{attribute}: searching")
        queries, candidates = data.queries[attribute], data.candidates[attribute]
        conditional = universal @ reduce_texts(texts[attribute].embeddings, size).T
        for name, given in ((UNIVERSAL, universal), (CONDITIONAL, conditional)):
            score = search_attribute(
                given[queries.files], given[candidates.files], queries.values, candidates.values
            )
            found[name][attribute] = score
            rows.append(ResultRow(attribute, "retrieval", name, {"mAP": score}))
    counts = {name: len(data.queries[name].files) for name in ATTRIBUTES}
    for name, scores in found.items():
        for which, score in average_over_attributes(scores, counts).items():
            rows.append(ResultRow(which, "retrieval", name, {"mAP": score}))
    return rows


def reduced_size(texts: Mapping[str, CriterionTexts], components: int | None) -> int:
    """Return `components`, or if it is None the size of the smallest basis (at most d)."""
    smallest = min(min(own.embeddings.shape) for own in texts.values())
    return smallest if components is None else components


def _report(step: Step | None, what: str) -> None:
    if step is not None:
        step(what)
