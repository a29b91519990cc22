"""What each dtype of stored embeddings costs on real vectors, a part of `make eval-real`.

Beside the dtypes that are offered, it measures bits, which are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from crl_benchmarks.markdown import table
from crl_benchmarks.real_vector_sets import CONDITIONS, Case, Rows
from crl_benchmarks.real_vectors import Variant, make_map
from crl_sdk.evaluation._clustering import clustering_runs
from crl_sdk.evaluation._few_shot import Split, few_shot_runs, splits
from crl_sdk.evaluation._vector_protocols import find_queries, retrieval_runs
from crl_sdk.projection._row_dtypes import ROW_DTYPES, decode_rows, encode_rows

MAP = Variant("contrastive", others=True)
STORED = ("universal", "conditional", "conditional, projected from the stored universal")
SHOTS = 2
FEW_SHOT_SPLITS = 10
_HYPERPLANES = 512

SIGNS, HYPERPLANES = "signs", f"sides of {_HYPERPLANES} hyperplanes"
DTYPES = (*ROW_DTYPES, SIGNS, HYPERPLANES)


@dataclass(frozen=True, slots=True)
class Cost:
    """Scores of one stored array in one dtype.

    Attributes:
        group: Name of the set.
        what: One of `STORED`.
        dtype: Name of the dtype.
        bits: Bits of a stored row.
        scores: Clustering accuracy, mAP, 1-NN, and the accuracy with `SHOTS` shots.
    """

    group: str
    what: str
    dtype: str
    bits: int
    scores: tuple[float, float, float, float]


def signs(rows: Rows) -> Rows:
    """Return what one bit per column keeps of rows, shape (n, m): their signs."""
    return np.asarray(np.where(rows >= 0, 1, -1) / np.sqrt(rows.shape[1]), np.float32)


def hyperplanes(rows: Rows) -> Rows:
    """Return on which sides of 512 random hyperplanes rows lie, shape (n, 512).

    The hyperplanes are drawn in sets of m orthogonal ones. Source: Charikar, STOC 2002.
    """
    rng, dim = np.random.default_rng(0), rows.shape[1]
    count = -(-_HYPERPLANES // dim)
    drawn = [np.linalg.qr(rng.standard_normal((dim, dim)))[0] for _ in range(count)]
    return signs(rows @ np.concatenate(drawn, axis=1)[:, :_HYPERPLANES].astype(np.float32))


def kept_in(dtype: str, rows: Rows) -> tuple[Rows, int]:
    """Return what a dtype keeps of rows, shape (n, m), and the bits of a row in it."""
    if dtype == SIGNS:
        return signs(rows), rows.shape[1]
    if dtype == HYPERPLANES:
        return hyperplanes(rows), _HYPERPLANES
    stored = encode_rows(rows, dtype)
    return decode_rows(stored), 8 * stored.itemsize * rows.shape[1]


def measure_dtypes(cases: Sequence[Case]) -> Iterator[Cost]:
    """Measure each dtype on each case, with the criterion's own texts."""
    for case in cases:
        made = make_map(case, MAP, case.texts[CONDITIONS[0]])
        rows = made.apply(case.images)
        score = _Scores(case)
        for dtype in DTYPES:
            stored, bits = kept_in(dtype, case.images)
            arrays = {STORED[0]: (stored, bits), STORED[1]: kept_in(dtype, rows)}
            if dtype != HYPERPLANES:  # their number of columns is another
                arrays[STORED[2]] = (made.apply(stored), bits)
            for what, (array, size) in arrays.items():
                yield Cost(case.group, what, dtype, size, score.of(array))


class _Scores:
    """Scores of rows for the images of one case.

    Few-shot leaves out classes with images of too few groups.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.is_query = find_queries(case.codes, case.groups)
        pairs = np.unique(np.stack([case.codes, case.groups], axis=1), axis=0)
        self.kept = np.bincount(pairs[:, 0])[case.codes] > SHOTS
        self.codes = np.unique(case.codes[self.kept], return_inverse=True)[1].reshape(-1)
        self.drawn: list[Split] = list(
            splits(self.codes, SHOTS, FEW_SHOT_SPLITS, case.groups[self.kept])
        )

    def of(self, rows: Rows) -> tuple[float, float, float, float]:
        case = self.case
        found = retrieval_runs(rows, case.codes, case.groups, self.is_query)
        few = few_shot_runs(rows[self.kept], self.codes, self.drawn, standardise=True)
        return (
            float(np.mean(clustering_runs(rows, case.codes, case.seeds)["ACC"])),
            float(found["mAP"].mean()), float(found["1-NN"].mean()), float(np.mean(few)),
        )  # fmt: skip


def dtype_tables(costs: Sequence[Cost], title: Callable[[str], str]) -> str:
    """Write the tables, one for each set."""
    parts = [
        "## Dtypes of stored embeddings\n",
        f"Clustering accuracy / mAP / 1-NN / accuracy with {SHOTS} shots, with clean texts and "
        f"the map `{MAP.name}`. Below float32: differences to it, in percentage points. Clustering "
        "accuracy depends on the starts of k-means: for two arrays that are all but equal it may "
        "differ by a point or two. The vectors of dressed people and of animals were published as "
        "float16, so it cannot cost anything for the universal embedding there. `float16` and "
        "`int8` are offered. The last two are not: they keep one bit of each column, or of each "
        f"of {_HYPERPLANES} random directions.\n",
    ]
    for group in dict.fromkeys(cost.group for cost in costs):
        rows = []
        for what in STORED:
            base = _mean(costs, group, what, "float32")
            for dtype in DTYPES:
                found = [c for c in costs if (c.group, c.what, c.dtype) == (group, what, dtype)]
                if not found:
                    continue
                mean = _mean(costs, group, what, dtype)
                if dtype == "float32":
                    cell = " / ".join(f"{value:.3f}" for value in mean)
                else:
                    cell = " / ".join(_points(value) for value in mean - base)
                size = np.mean([c.bits for c in found]) / 8
                rows.append([what, dtype, f"{size:.0f}", cell])
        header = ["stored", "dtype", "bytes of a row", f"ACC / mAP / 1-NN / {SHOTS} shots"]
        parts += [f"### {title(group)}\n", table(header, rows) + "\n"]
    return "\n".join(parts)


def _mean(costs: Sequence[Cost], group: str, what: str, dtype: str) -> np.ndarray:
    found = [c.scores for c in costs if (c.group, c.what, c.dtype) == (group, what, dtype)]
    return np.asarray(np.mean(found, axis=0))


def _points(value: float) -> str:
    return f"{round(100 * value, 1) + 0.0:+.1f}".replace("-", "−")
