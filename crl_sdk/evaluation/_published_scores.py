"""Read published results: those of the paper, which ship, and those of a user's file."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from crl_sdk.errors import InvalidInputError
from crl_sdk.evaluation._protocols import ResultRow

COLUMNS = ("criterion", "embeddings", "measure", "percent", "source")

Key = tuple[str, str, str]

PAPER = "arXiv 2510.04564"

_PAPER_TABLES = Path(__file__).with_name("published.csv")
"""Tables 1 to 4 of the paper, one score per line, typed from the images in the authors' repository
(`figures/performance-*.png`). The means that the paper prints name all criteria they are over."""


@dataclass(frozen=True, slots=True)
class PaperRow:
    """One row of a table of the paper, for one criterion.

    Attributes:
        table: Number of the table.
        criterion: Criterion, named as in our results.
        method: Method, such as `universal`, `CRL` or `SCAN`.
        encoder: Encoder, such as `CLIP ViT-B/32`. Empty if the table names none.
        scores: Score for each measure, 0 to 1; measures are named as in our results.
        note: Doubt about the row. May be empty.
    """

    table: int
    criterion: str
    method: str
    encoder: str
    scores: Mapping[str, float]
    note: str = ""

    @property
    def label(self) -> str:
        """Method and encoder, marked as published."""
        return ", ".join(filter(None, ("published", self.method, self.encoder)))


def read_paper_rows(benchmark: str) -> tuple[PaperRow, ...]:
    """Return the paper's results on a benchmark, in the paper's order.

    Args:
        benchmark: Name of the benchmark, such as `clevr4`.

    Returns:
        Rows of all methods and encoders. Empty if the paper has no results on this benchmark.
    """
    found: dict[tuple[int, str, str, str], PaperRow] = {}
    with _PAPER_TABLES.open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            if line["benchmark"] != benchmark or line["measure"] == "mean":
                continue
            key = (int(line["table"]), line["criterion"], line["method"], line["encoder"])
            row = found.get(key) or PaperRow(*key, {}, line["note"])
            score = {line["measure"]: float(line["percent"]) / 100}
            found[key] = replace(row, scores={**row.scores, **score})
    return tuple(found.values())


def select_measured(rows: Iterable[PaperRow], measured: Sequence[ResultRow]) -> list[PaperRow]:
    """Return the scores of the paper whose criterion and measure were measured too."""
    pairs = {(row.criterion, measure) for row in measured for measure in row.scores}
    kept = [
        replace(row, scores={m: s for m, s in row.scores.items() if (row.criterion, m) in pairs})
        for row in rows
    ]
    return [row for row in kept if row.scores]


@dataclass(frozen=True, slots=True)
class PublishedScores:
    """Published results.

    Attributes:
        scores: Score, 0 to 1, for each (criterion, embeddings, measure), named as in our results.
        sources: Sources of the scores, such as the table and the encoder.
    """

    scores: Mapping[Key, float]
    sources: tuple[str, ...]

    def without_a_row(self, rows: Iterable[ResultRow]) -> list[Key]:
        """Return the keys of the published scores that were not measured."""
        keys = {(row.criterion, row.representation, name) for row in rows for name in row.scores}
        return [key for key in self.scores if key not in keys]


def read_published(path: Path) -> PublishedScores:
    """Read a CSV file with the header `criterion,embeddings,measure,percent,source`.

    Args:
        path: Path of the file.

    Raises:
        InvalidInputError: If the file cannot be read, the header is another one, a score is not a
            percentage or has no source, or a score occurs twice.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True, strict=True)
            header, lines = reader.fieldnames or [], list(reader)
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InvalidInputError(f"{path}: expected a CSV file in UTF-8 ({error})") from error
    if tuple(header) != COLUMNS or not lines:
        raise InvalidInputError(
            f"{path}: expected the header {','.join(COLUMNS)} and one score per line, got "
            f"{','.join(header)!r} and {len(lines)} lines"
        )
    scores: dict[Key, float] = {}
    sources: dict[str, None] = {}
    for number, line in enumerate(lines, 2):
        cells = {name: (line[name] or "").strip() for name in COLUMNS}
        key = (cells["criterion"], cells["embeddings"], cells["measure"])
        try:
            percent = float(cells["percent"])
        except ValueError:
            percent = float("nan")
        if not -100 <= percent <= 100 or not all(cells.values()) or None in line:
            raise InvalidInputError(
                f"{path}, line {number}: expected {', '.join(COLUMNS)}, with a percentage from "
                f"-100 to 100; got {', '.join(cells.values())!r}"
            )
        if key in scores:
            raise InvalidInputError(
                f"{path}, line {number}: {', '.join(key)} occurs twice: keep one line"
            )
        scores[key] = percent / 100
        sources[cells["source"]] = None
    return PublishedScores(scores, tuple(sources))
