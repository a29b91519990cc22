"""The tables of the paper that ship: their means recompute, and their names match our results."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

import crl_sdk.evaluation
from crl_sdk.evaluation._benchmarks import BENCHMARKS
from crl_sdk.evaluation._mean_std import MeanStd
from crl_sdk.evaluation._protocols import ResultRow
from crl_sdk.evaluation._published_scores import read_paper_rows, select_measured

PAPER = ("clevr4", "cards", "genecis-focus", "genecis-change", "deepfashion")
MEASURES = {
    "1": {"1 shot", "5 shots", "10 shots"},
    "2": {"NMI", "ACC", "ARI"},
    "3": {"R@1", "R@2", "R@3"},
    "4": {"mAP"},
}


def shipped() -> list[dict[str, str]]:
    path = Path(crl_sdk.evaluation.__file__).with_name("published.csv")
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_every_printed_mean_recomputes():
    """A typing error in a score or a mean would show, since all means of nine or six fit."""
    lines = shipped()
    means = [line for line in lines if line["measure"] == "mean"]
    for mean in means:
        scores = [
            float(line["percent"])
            for line in lines
            if line["measure"] != "mean"
            and line["benchmark"] in mean["benchmark"].split(", ")
            and line["criterion"] in mean["criterion"].split(", ")
            and all(line[name] == mean[name] for name in ("table", "method", "encoder"))
        ]
        assert len(scores) == (6 if mean["table"] == "3" else 9), mean
        digits = len(mean["percent"].split(".")[1])
        # half a unit of the last place, and rounding of floats
        assert abs(np.mean(scores) - float(mean["percent"])) < 0.5 * 10**-digits + 1e-9, mean
    assert len(means) == 8 * 2 + 11 * 2 + 10


def test_the_means_of_table_4_share_one_set_of_weights():
    """They are over all queries, whose numbers per attribute the paper does not print."""
    rows = defaultdict(list)
    for row in read_paper_rows("deepfashion"):
        rows[row.method].append(100 * row.scores["mAP"])
    table = np.array(list(rows.values()))
    assert table.shape == (9, 6)
    plain = table[:, :5].mean(axis=1) - table[:, 5]
    assert 0.04 < np.abs(plain).max() < 0.05
    weights, *_ = np.linalg.lstsq(table[:, :5], table[:, 5], rcond=None)
    assert weights.sum() == pytest.approx(1, abs=2e-3) and weights.min() > 0.1
    assert np.abs(table[:, :5] @ weights - table[:, 5]).max() < 0.02


def test_scores_have_the_names_of_our_results():
    lines = shipped()
    for line in lines:
        assert line["measure"] in MEASURES[line["table"]] | {"mean"}, line
        assert -1 <= float(line["percent"]) <= 100 and line["method"], line
        if line["measure"] != "mean":
            known = set(BENCHMARKS[line["benchmark"]].prompts) | {"all queries"}
            assert line["criterion"] in known, line
    keys = {tuple(v for k, v in line.items() if k not in ("percent", "note")) for line in lines}
    assert len(keys) == len(lines) == 504
    assert all(read_paper_rows(name) for name in PAPER)
    assert read_paper_rows("demo") == read_paper_rows("cards-photos") == ()


def test_doubtful_rows_are_marked():
    doubtful = [row for name in PAPER for row in read_paper_rows(name) if row.note]
    assert {(row.table, row.encoder) for row in doubtful} == {(1, "MetaCLIP")}
    assert len(doubtful) == 4 and all("swapped" in row.note for row in doubtful)
    by = {(row.method, row.criterion): row.scores for row in doubtful}
    assert by["universal", "suits"]["1 shot"] < 0.25, "below chance among four suits"
    assert by["CRL", "number"]["1 shot"] > 2 * by["universal", "suits"]["1 shot"]


def test_only_what_was_measured_is_kept():
    measured = [ResultRow("shape", "clustering", "universal", {"ACC": MeanStd(0.5)})]
    kept = select_measured(read_paper_rows("clevr4"), measured)
    assert {(row.criterion, row.table) for row in kept} == {("shape", 2)} and len(kept) == 11
    assert all(set(row.scores) == {"ACC"} for row in kept)
    assert kept[3].label == "published, universal, CLIP ViT-B/32"
    assert kept[0].label == "published, CC"
