"""Write the results of `crl eval vectors`, with all settings, as JSON or Markdown."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crl_sdk._version import __version__
from crl_sdk.errors import InvalidInputError
from crl_sdk.evaluation._criterion_texts import CriterionTexts
from crl_sdk.evaluation._mean_std import MeanStd
from crl_sdk.evaluation._results import format_percent, format_settings
from crl_sdk.evaluation._vector_noise import CLEAN
from crl_sdk.evaluation._vector_protocols import VectorRow
from crl_sdk.evaluation._vectors import VectorSet
from crl_sdk.storage._atomic_files import write_atomically


def make_document(
    source: str,
    data: VectorSet,
    *,
    criteria: Mapping[str, str],
    rows: Sequence[VectorRow],
    texts: Mapping[str, CriterionTexts],
    settings: Mapping[str, Any],
    notes: Sequence[str],
) -> dict[str, Any]:
    """Return a document with the results and everything that is needed to repeat them.

    Args:
        source: Name of the data file.
        data: The vectors.
        criteria: Criterion of each label column.
        rows: Rows of results.
        texts: Text vectors of all criteria.
        settings: Methods, seeds, splits and other settings.
        notes: Remarks on what was changed or left out.
    """
    return {
        "benchmark": "vectors",
        "version": __version__,
        "data": source,
        "images": len(data.images),
        "dimensions": data.images.shape[1],
        "labels": {
            column: {
                "criterion": criteria[column],
                "images": len(own.files),
                "classes": {
                    value: int((own.codes == code).sum()) for code, value in enumerate(own.values)
                },
            }
            for column, own in data.labels.items()
        },
        "settings": dict(settings),
        "texts": {
            criterion: {
                "count": len(own.texts),
                "source": own.source,
                "sha256": hashlib.sha256(own.embeddings.tobytes()).hexdigest(),
                "texts": list(own.texts),
            }
            for criterion, own in texts.items()
        },
        "notes": list(notes),
        "rows": [
            {
                "labels": row.labels,
                "criterion": row.criterion,
                "protocol": row.protocol,
                "representation": row.representation,
                "texts": row.noise,
                "scores": {
                    measure: {
                        "mean": each.score.mean,
                        "std": each.score.std,
                        "difference": each.difference,
                        "low": each.low,
                        "high": each.high,
                    }
                    for measure, each in row.scores.items()
                },
            }
            for row in rows
        ],
    }


def tables(
    rows: Sequence[Mapping[str, Any]],
) -> list[tuple[list[str], list[tuple[list[str], list[str]]]]]:
    """Return the rows of a document as one table per protocol.

    Returns:
        Header of each table, and for each of its rows the scores in percent and below them the
        differences to `cosine` in points. The first two cells are the label column, with the noise
        if there is any, and the embeddings.
    """
    made: dict[str, tuple[list[str], list[tuple[list[str], list[str]]]]] = {}
    for row in rows:
        scores = row["scores"]
        _, cells = made.setdefault(row["protocol"], ([row["protocol"], "embeddings", *scores], []))
        cells.append(
            (
                [_with_noise(row), row["representation"],
                 *(format_percent(MeanStd(each["mean"], each["std"])) for each in scores.values())],
                ["", "", *map(_difference, scores.values())],
            )
        )  # fmt: skip
    return list(made.values())


def format_markdown(found: Mapping[str, Any]) -> str:
    """Format a document as Markdown."""
    lines = [
        "# crl eval vectors",
        "",
        f"{found['data']}: {found['images']} image vectors of {found['dimensions']} dimensions; "
        f"crl {found['version']}.",
        "",
        f"Settings: {format_settings(found)}. {EXPLANATION}",
        "",
    ]
    for column, own in found["labels"].items():
        lines.append(
            f"- labels {column}, criterion {own['criterion']}: {own['images']} images of "
            f"{len(own['classes'])} classes"
        )
    for criterion, own in found["texts"].items():
        lines.append(f"- texts of {criterion}: {own['count']} from {own['source']}")
    lines += [f"- {note}" for note in found["notes"]] + [""]
    for header, cells in tables(found["rows"]):
        head = header[:2] + [part for name in header[2:] for part in (name, f"{name} − cosine")]
        lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for scores, apart in cells:
            both = [part for pair in zip(scores[2:], apart[2:], strict=True) for part in pair]
            lines.append("| " + " | ".join(scores[:2] + both) + " |")
        lines.append("")
    return "\n".join(lines)


EXPLANATION = (
    "Scores in percent, with their standard deviation over seeds or splits. Differences to cosine "
    "in points, with paired 95 % intervals over seeds, splits or queries."
)


def write_document(path: Path, found: Mapping[str, Any]) -> None:
    """Write a document as JSON or Markdown, depending on the suffix of the file.

    Raises:
        InvalidInputError: If the file cannot be written.
    """
    text = format_markdown(found) if path.suffix == ".md" else json.dumps(found, indent=1) + "\n"
    write_atomically(path, text.encode(), InvalidInputError)


def _with_noise(row: Mapping[str, Any]) -> str:
    return str(row["labels"]) if row["texts"] == CLEAN else f"{row['labels']}, {row['texts']}"


def _difference(score: Mapping[str, Any]) -> str:
    if score["difference"] is None:
        return ""
    if score["low"] is None:
        return f"{100 * score['difference']:+.2f}"
    return (
        f"{100 * score['difference']:+.2f} [{100 * score['low']:+.2f}, {100 * score['high']:+.2f}]"
    )
