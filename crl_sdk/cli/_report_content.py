"""Content of a report: for each criterion, the same images grouped by two embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crl_sdk.tasks._clustering import TYPICAL_IMAGES, Clustering
from crl_sdk.tasks._kmeans import ClusterCount


@dataclass(frozen=True, slots=True)
class ReportGroup:
    """One group of images.

    Attributes:
        name: Most frequent label of the group, or the texts that describe it if there are no
            labels. May be empty.
        size: Number of images in the group.
        images: Positions of the images to show. With labels they are drawn at random, so that
            wrong images are seen; without labels they are the most typical ones.
        label_matches: Whether the label of each shown image is the group's name. Empty without
            labels.
        purity: Share of the group's images whose label is its name. None without labels.
        cohesion: Mean cosine of two different rows of the group. None with labels.
        edge: Positions of the least typical images. Empty with labels.
    """

    name: str
    size: int
    images: tuple[int, ...]
    label_matches: tuple[bool, ...] = ()
    purity: float | None = None
    cohesion: float | None = None
    edge: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ReportSection:
    """One criterion of a report.

    Attributes:
        criterion: Name of the criterion.
        texts: Texts of its basis.
        generated: Whether the language model wrote the texts.
        universal: Groups of the universal embeddings.
        conditional: Groups of the conditional embeddings.
        accuracies: Clustering accuracy of the universal and of the conditional groups, 0 to 1.
            None without labels.
        remark: How the number of groups was chosen. May be empty.
        reasons: Reasons why the conditional groups are not reliable. Empty if no check failed.
    """

    criterion: str
    texts: tuple[str, ...]
    generated: bool
    universal: tuple[ReportGroup, ...]
    conditional: tuple[ReportGroup, ...]
    accuracies: tuple[float, float] | None = None
    remark: str = ""
    reasons: tuple[str, ...] = ()


def labelled_groups(
    clusters: NDArray[np.int64], labels: NDArray[np.int64], values: Sequence[str]
) -> tuple[ReportGroup, ...]:
    """Return the groups of a clustering, each named by its most frequent label.

    Args:
        clusters: Cluster of each image, shape (n,), int64.
        labels: Label of each image as a position in `values`, shape (n,), int64.
        values: Names of the labels.

    Returns:
        The groups in the order of `values`, larger groups first where names are equal.
    """
    found = []
    for number in np.unique(clusters):
        members = np.flatnonzero(clusters == number)
        label = int(np.bincount(labels[members]).argmax())
        shown = np.random.default_rng(0).permutation(members)[:TYPICAL_IMAGES]
        group = ReportGroup(
            name=values[label],
            size=len(members),
            images=tuple(map(int, shown)),
            label_matches=tuple(bool(labels[i] == label) for i in shown),
            purity=float((labels[members] == label).mean()),
        )
        found.append((label, -len(members), group))
    return tuple(group for *_, group in sorted(found, key=lambda item: item[:2]))


def described_groups(clustering: Clustering) -> tuple[ReportGroup, ...]:
    """Return the groups of a clustering whose clusters were named by texts, largest first."""
    return tuple(
        ReportGroup(
            name="" if each.name is None else each.name.text,
            size=each.size,
            images=each.typical,
            cohesion=each.cohesion,
            edge=each.edge,
        )
        for each in clustering.clusters
    )


def describe_cluster_count(choice: ClusterCount | None, stability: float | None) -> str:
    """Return sentences that say how the number of groups was chosen and how certain it is.

    Args:
        choice: Result of the choice. None if the user gave the number.
        stability: Mean adjusted Rand index with clusterings of resamples. None if not measured.
    """
    sentences = []
    if choice is not None and choice.agreement is not None:
        sentences.append(
            f"The number of groups, {choice.k}, was chosen by silhouette: "
            f"{choice.agreement:.0%} of {choice.resamples} random parts of the images give it, "
            f"mean silhouette {choice.silhouettes[choice.k]:.2f}"
        )
        if choice.margin is not None:
            sentences[-1] += f", {choice.margin:.3f} above the next best, {choice.runner_up}"
        if choice.weak:
            sentences.append("The groups are hardly separated: take them as a rough division")
    if stability is not None:
        sentences.append(
            "Clusterings of 80 % of the images agree with these groups by "
            f"{stability:.2f} (adjusted Rand index, 1 for the same)"
        )
    return " ".join(f"{sentence}." for sentence in sentences)
