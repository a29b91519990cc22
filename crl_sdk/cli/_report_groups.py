"""What a report shows of clusters: groups with a name and pictures, and a panel per criterion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crl_sdk.tasks._clustering import SHOWN, Clustering
from crl_sdk.tasks._kmeans import Choice


@dataclass(frozen=True, slots=True)
class Group:
    """One cluster, as it is shown.

    Attributes:
        name: its most frequent label; without labels, the texts that set it apart.
        size: pictures.
        pictures: positions of `SHOWN` of them: drawn at random if there are labels, so that what
            does not fit is seen; else the most typical.
        fitting: for each of those whether its label is the group's name; empty without labels.
        purity: share of all the group's pictures whose label is its name; None without labels.
        cohesion: mean cosine of its rows; None with labels.
        edge: positions of the least typical pictures; empty with labels.
    """

    name: str
    size: int
    pictures: tuple[int, ...]
    fitting: tuple[bool, ...] = ()
    purity: float | None = None
    cohesion: float | None = None
    edge: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Panel:
    """One criterion: the same pictures grouped twice.

    Attributes:
        criterion: in words.
        texts: of its basis.
        written: whether the language model wrote them.
        universal: groups of the universal embeddings.
        conditional: groups of the conditional embeddings.
        accuracies: of both clusterings against the labels; None without labels.
        remark: how the number of groups came about; may be empty.
        doubts: what speaks against the conditional groups, one sentence each.
    """

    criterion: str
    texts: tuple[str, ...]
    written: bool
    universal: tuple[Group, ...]
    conditional: tuple[Group, ...]
    accuracies: tuple[float, float] | None = None
    remark: str = ""
    doubts: tuple[str, ...] = ()


def labelled_groups(
    clusters: NDArray[np.int64], labels: NDArray[np.int64], values: Sequence[str]
) -> tuple[Group, ...]:
    """Name groups by their most frequent label, in the order of the values.

    Args:
        clusters: each picture's cluster, (n,) int64.
        labels: each picture's value, (n,) int64 into `values`.
        values: the labels' names.
    """
    found = []
    for number in np.unique(clusters):
        members = np.flatnonzero(clusters == number)
        label = int(np.bincount(labels[members]).argmax())
        shown = np.random.default_rng(0).permutation(members)[:SHOWN]
        group = Group(
            name=values[label],
            size=len(members),
            pictures=tuple(map(int, shown)),
            fitting=tuple(bool(labels[i] == label) for i in shown),
            purity=float((labels[members] == label).mean()),
        )
        found.append((label, -len(members), group))
    return tuple(group for *_, group in sorted(found, key=lambda item: item[:2]))


def described_groups(clustering: Clustering) -> tuple[Group, ...]:
    """Show clusters that have names, the largest first."""
    return tuple(
        Group(
            name="" if each.name is None else each.name.text,
            size=each.size,
            pictures=each.typical,
            cohesion=each.cohesion,
            edge=each.edge,
        )
        for each in clustering.clusters
    )


def told_choice(choice: Choice | None, stability: float | None) -> str:
    """Say in a sentence or two how many groups there are and how sure that is."""
    told = []
    if choice is not None and choice.agreement is not None:
        told.append(
            f"{choice.k} groups, chosen: {choice.agreement:.0%} of {choice.resamples} random parts "
            f"of the pictures say so, mean silhouette {choice.silhouettes[choice.k]:.2f}"
        )
        if choice.margin is not None:
            told[-1] += f", {choice.margin:.3f} above the next best, {choice.runner_up}"
        if choice.weak:
            told.append("They hardly stand apart: take the groups as a rough division")
    if stability is not None:
        told.append(f"Regrouped without a fifth of the pictures, they agree by {stability:.2f}")
    return "".join(f"{sentence}. " for sentence in told).strip()
