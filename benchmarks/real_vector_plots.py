"""Plots of `make eval-real`: accuracy against noise, and against the number of texts."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from crl_sdk.basis._methods import PAPER_METHOD

if TYPE_CHECKING:
    from crl_benchmarks.real_vectors import CountRun, Run

GROUPS = {"clothes": "Clothes", "dress": "Dressed people", "animals": "Animals"}
SHOWN = {
    "universal": ("universal embedding", "0.6", ":"),
    PAPER_METHOD: ("cosine (the paper's)", "black", "-"),
    "orthogonal": ("orthogonal", "C0", "--"),
    "tangent": ("tangent (CLAY)", "C4", "--"),
    "exclusive-orthogonal": ("exclusive-orthogonal (OD-CRL), others", "C2", "--"),
    "contrastive: generic": ("contrastive", "C1", "-"),
    "contrastive: others + generic": ("contrastive, others", "C3", "-"),
    "contrastive: generic, sharpened": ("contrastive, sharpened", "C1", "-."),
    "contrastive: others + generic, sharpened": ("contrastive, others, sharpened", "C3", "-."),
}
"""Label, colour and line of each variant that is plotted."""


def plot_noise(runs: Sequence[Run]) -> bytes:
    """Plot clustering accuracy against the condition, one panel for each set, as PNG."""
    conditions = list(dict.fromkeys(run.condition for run in runs))

    def draw(panel: Any, group: str) -> None:
        for method, (label, colour, line) in SHOWN.items():
            heights = [
                _mean([r.scores[0] for r in runs
                       if (r.group, r.method, r.condition) == (group, method, condition)])
                for condition in conditions
            ]  # fmt: skip
            panel.plot(range(len(conditions)), heights, line, color=colour, marker="o", label=label)
        panel.set_xticks(range(len(conditions)), [c.replace(" of ", " of\n") for c in conditions])

    return _figure(draw, {**GROUPS, "demo world": "Demo world"})


def plot_counts(runs: Sequence[CountRun]) -> bytes:
    """Plot clustering accuracy against the number of texts, one panel for each set, as PNG."""

    def draw(panel: Any, group: str) -> None:
        own = [run for run in runs if run.group == group]
        criteria = {run.criterion for run in own}
        for method, (label, colour, line) in SHOWN.items():
            found = [run for run in own if run.method == method]
            # only numbers of texts that all criteria of the set have, so that means are comparable
            shared = [
                count
                for count in sorted({run.count for run in found})
                if {run.criterion for run in found if run.count == count} == criteria
            ]
            if shared:
                heights = [_mean([r.accuracy for r in found if r.count == c]) for c in shared]
                panel.plot(shared, heights, line, color=colour, marker="o", label=label)
        panel.set_xlabel("texts of the criterion")

    return _figure(draw, GROUPS)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def _figure(draw: Any, groups: Mapping[str, str]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1 + 4 * len(groups), 4.6), layout="constrained")
    panels = figure.subplots(1, len(groups))
    for panel, (group, title) in zip(panels, groups.items(), strict=True):
        draw(panel, group)
        panel.set_title(title)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("clustering accuracy")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False
    )
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=130, metadata={"Software": None})
    return target.getvalue()
