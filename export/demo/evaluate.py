"""Measure whether clusters of conditional embeddings follow the criterion.

The input is plain arrays, so that a torch model and an exported bundle are measured alike.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from crl_export.demo.captions import NEUTRAL_PROMPT, background_captions
from crl_export.demo.lexicon import OFF_TOPIC, SYNONYMS
from crl_export.demo.world import CRITERIA, FACTORS
from crl_sdk.basis._methods import Method, make_projection
from crl_sdk.tasks._metrics import clustering_accuracy

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    TextEmbedder = Callable[[Sequence[str]], NDArray[np.float32]]

SEEDS = (0, 1, 2, 3, 4)


@dataclass(frozen=True, slots=True)
class Row:
    """Clustering accuracies of one criterion, each the mean over the k-means seeds.

    Attributes:
        criterion: Name of the factor.
        universal: Accuracy of the universal embeddings.
        cosine: Accuracy of the cosines with the criterion's words, normalised: the paper's method.
        contrastive: Accuracy with the method `contrastive` and the demo model's background.
        mixed: Like `contrastive`, with half as many off-topic words added.
        mixed_cosine: Like `cosine`, with the same off-topic words added.
        random: Like `contrastive`, with off-topic words only, as many as the criterion has words.
        random_cosine: Like `cosine`, with the same off-topic words only.
    """

    criterion: str
    universal: float
    cosine: float
    contrastive: float
    mixed: float
    mixed_cosine: float
    random: float
    random_cosine: float


def kmeans_accuracy(
    embeddings: NDArray[np.float32], labels: NDArray[np.int64], seeds: Sequence[int] = SEEDS
) -> float:
    """Cluster with k-means (k = number of labels) and return the mean accuracy over `seeds`."""
    from sklearn.cluster import KMeans

    k = int(labels.max()) + 1
    runs = (KMeans(k, n_init=10, random_state=seed).fit_predict(embeddings) for seed in seeds)
    return float(np.mean([clustering_accuracy(labels, run) for run in runs]))


def evaluate(
    images: NDArray[np.float32],
    embed_texts: TextEmbedder,
    labels: Mapping[str, NDArray[np.int64]],
    *,
    prompt: str = NEUTRAL_PROMPT,
    seeds: Sequence[int] = SEEDS,
) -> list[Row]:
    """Cluster held-out images by every criterion.

    Args:
        images: Universal embeddings, shape (n, d), float32.
        embed_texts: Function from k texts to their unit embeddings, shape (k, d), float32.
        labels: Index of each image's value by criterion, shape (n,), int64.
        prompt: Prompt for all criteria and controls, with one `{}`.
        seeds: Seeds of k-means.

    Returns:
        One row per criterion of `world.CRITERIA`, in that order.
    """
    rng = np.random.default_rng(0)
    background = embed_texts(background_captions())
    rows = []
    for criterion in CRITERIA:
        words = own_words(criterion)
        off_topic = [str(word) for word in rng.permutation(OFF_TOPIC)]
        own = embed_texts([prompt.format(word) for word in words])
        noise = embed_texts([prompt.format(word) for word in off_topic[: len(words)]])
        mixed = np.concatenate([own, noise[: len(words) // 2]])

        def accuracy(
            texts: NDArray[np.float32], method: Method, criterion: str = criterion
        ) -> float:
            conditional = make_projection(texts, method, background=background).apply(images)
            return kmeans_accuracy(conditional, labels[criterion], seeds)

        rows.append(
            Row(
                criterion=criterion,
                universal=kmeans_accuracy(images, labels[criterion], seeds),
                cosine=accuracy(own, "cosine"),
                contrastive=accuracy(own, "contrastive"),
                mixed=accuracy(mixed, "contrastive"),
                mixed_cosine=accuracy(mixed, "cosine"),
                random=accuracy(noise, "contrastive"),
                random_cosine=accuracy(noise, "cosine"),
            )
        )
    return rows


def own_words(criterion: str) -> tuple[str, ...]:
    """Return the plainest word of each value of a criterion; counts are `one` … `ten`."""
    return tuple(SYNONYMS[criterion][value][0] for value in FACTORS[criterion])


def as_table(rows: Sequence[Row]) -> str:
    """Format rows as a Markdown table."""
    names = [name for name in asdict(rows[0]) if name != "criterion"]
    lines = ["| criterion | " + " | ".join(name.replace("_", ", ") for name in names) + " |"]
    lines.append("|---|" + "---|" * len(names))
    for row in rows:
        cells = (f"{getattr(row, name):.3f}" for name in names)
        lines.append(f"| {row.criterion} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
