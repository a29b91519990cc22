"""Published figures, typed in by a user from a paper, to stand beside those measured here."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from crl_sdk.errors import InvalidInputError
from crl_sdk.evaluation._run import Score

COLUMNS = ("criterion", "embeddings", "measure", "percent", "source")

Key = tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class Published:
    """Figures of others.

    Attributes:
        figures: (criterion, embeddings, measure), as results name them → figure between 0 and 1.
        sources: where they are from: the table, and the encoder.
    """

    figures: Mapping[Key, float]
    sources: tuple[str, ...]

    def without_a_row(self, rows: Iterable[Score]) -> list[Key]:
        """Give those that nothing was measured for."""
        keys = {(row.criterion, row.representation, name) for row in rows for name in row.figures}
        return [key for key in self.figures if key not in keys]


def read_published(path: Path) -> Published:
    """Read a CSV file whose header is `criterion,embeddings,measure,percent,source`.

    Raises:
        InvalidInputError: it cannot be read; the header is another; a figure is no percentage, has
            no source, or is there twice.
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
            f"{path}: expected the header {','.join(COLUMNS)} and a figure on each line, got "
            f"{','.join(header)!r} and {len(lines)} lines"
        )
    figures: dict[Key, float] = {}
    sources: dict[str, None] = {}
    for number, line in enumerate(lines, 2):
        told = {name: (line[name] or "").strip() for name in COLUMNS}
        key = (told["criterion"], told["embeddings"], told["measure"])
        try:
            percent = float(told["percent"])
        except ValueError:
            percent = float("nan")
        if not -100 <= percent <= 100 or not all(told.values()) or None in line:
            raise InvalidInputError(
                f"{path}, line {number}: expected {', '.join(COLUMNS)}, with a figure from -100 to "
                f"100; got {', '.join(told.values())!r}"
            )
        if key in figures:
            raise InvalidInputError(f"{path}, line {number}: {', '.join(key)} is there twice")
        figures[key] = percent / 100
        sources[told["source"]] = None
    return Published(figures, tuple(sources))
