"""Read published results that a user copied from a paper, to compare them with measured ones."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from crl_sdk.errors import InvalidInputError
from crl_sdk.evaluation._protocols import ResultRow

COLUMNS = ("criterion", "embeddings", "measure", "percent", "source")

Key = tuple[str, str, str]


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
