"""Write the results of `crl eval`, with all settings, as JSON or Markdown."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crl_sdk._version import __version__
from crl_sdk.errors import InvalidInputError
from crl_sdk.evaluation._benchmarks import Benchmark
from crl_sdk.evaluation._criterion_texts import CriterionTexts
from crl_sdk.evaluation._mean_std import MeanStd
from crl_sdk.evaluation._protocols import ResultRow
from crl_sdk.evaluation._published_scores import (
    PAPER,
    PaperRow,
    PublishedScores,
    select_measured,
)
from crl_sdk.model._bundle import ModelBundle
from crl_sdk.storage._atomic_files import write_atomically

SUFFIXES = (".md", ".json")


def make_document(
    name: str,
    benchmark: Benchmark,
    *,
    rows: Sequence[ResultRow],
    texts: Mapping[str, CriterionTexts],
    bundle: ModelBundle,
    engine: str,
    images: int,
    settings: Mapping[str, Any],
    notes: Sequence[str],
    remarks: Sequence[str],
    paper: Sequence[PaperRow] = (),
    published: PublishedScores | None = None,
) -> dict[str, Any]:
    """Return a document with the results and everything that is needed to repeat them.

    Args:
        name: Name of the benchmark.
        benchmark: Description of the benchmark.
        rows: Rows of results.
        texts: Texts of each criterion.
        bundle: The model.
        engine: Name of the engine that ran the model.
        images: Number of images that were embedded.
        settings: Method, number of seeds, number of splits and other settings.
        notes: Remarks on how the data set was read.
        remarks: Limits of what the results mean.
        paper: Rows of the paper on this benchmark. Those that match a result are kept.
        published: Published scores of the user's file, to show next to the measured ones.

    Returns:
        Document of JSON values.
    """
    source = bundle.manifest.source
    published_scores = {} if published is None else published.scores
    remarks = list(remarks)
    if published is not None and (left := published.without_a_row(rows)):
        remarks.append(f"published but not measured here: {'; '.join(map(', '.join, left))}")
    return {
        "benchmark": name,
        "version": __version__,
        "images": images,
        "model": {
            "name": bundle.manifest.name,
            "architecture": source.architecture,
            "pretrained": source.pretrained,
            "fingerprint": bundle.fingerprint,
            "engine": engine,
        },
        "paper_encoder": benchmark.encoder or None,
        "published": [] if published is None else list(published.sources),
        "paper_rows": [
            {
                "source": f"{PAPER}, Table {row.table}",
                "criterion": row.criterion,
                "method": row.method,
                "encoder": row.encoder or None,
                "label": row.label,
                "scores": dict(row.scores),
                "note": row.note or None,
            }
            for row in select_measured(paper, rows)
        ],
        "settings": dict(settings),
        "texts": {
            criterion: {
                "count": len(own.texts),
                "repeated": own.repeated,
                "source": own.source,
                "prompts": list(own.prompts),
                "sha256": hashlib.sha256("\n".join(own.texts).encode()).hexdigest(),
                "texts": list(own.texts),
            }
            for criterion, own in texts.items()
        },
        "notes": list(notes),
        "remarks": remarks,
        "rows": [
            {
                "criterion": row.criterion,
                "protocol": row.protocol,
                "representation": row.representation,
                "scores": {
                    measure: {
                        "mean": score.mean,
                        "std": score.std,
                        "published": published_scores.get(
                            (row.criterion, row.representation, measure)
                        ),
                    }
                    for measure, score in row.scores.items()
                },
            }
            for row in rows
        ],
    }


def tables(found: Mapping[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    """Return the rows of a document as one table per protocol.

    Args:
        found: The document.

    Returns:
        Header and cells of each table, with scores in percent. The rows of the paper follow the
        measured rows of their criterion.
    """
    made = []
    for protocol in dict.fromkeys(row["protocol"] for row in found["rows"]):
        rows = [row for row in found["rows"] if row["protocol"] == protocol]
        measures = list(rows[0]["scores"])
        cells = []
        for criterion in dict.fromkeys(row["criterion"] for row in rows):
            cells += [
                [criterion, row["representation"], *(_cell(row["scores"][m]) for m in measures)]
                for row in rows
                if row["criterion"] == criterion
            ]
            cells += [
                [criterion, row["label"], *(_paper_cell(row["scores"].get(m)) for m in measures)]
                for row in found["paper_rows"]
                if row["criterion"] == criterion and not set(measures).isdisjoint(row["scores"])
            ]
        made.append(([protocol, "embeddings", *measures], cells))
    return made


def format_paper_notes(found: Mapping[str, Any]) -> list[str]:
    """Return the source of a document's rows of the paper, and the doubts about them."""
    rows = found["paper_rows"]
    if not rows:
        return []
    sources = "; ".join(sorted({row["source"] for row in rows}))
    doubts = dict.fromkeys(f"{row['label']}: {row['note']}" for row in rows if row["note"])
    return [
        f"rows marked published are from {sources}, with the encoder that each names; they are "
        "not results of this model and these texts",
        *doubts,
    ]


def _cell(score: Mapping[str, Any]) -> str:
    text = format_percent(MeanStd(score["mean"], score["std"]))
    other = score["published"]
    return text if other is None else f"{text} (published {100 * other:.2f})"


def _paper_cell(score: float | None) -> str:
    return "" if score is None else f"{100 * score:.2f}"


def format_percent(score: MeanStd) -> str:
    """Format a score and its standard deviation in percent."""
    spread = "" if score.std is None else f" ± {100 * score.std:.2f}"
    return f"{100 * score.mean:.2f}{spread}"


def format_markdown(found: Mapping[str, Any]) -> str:
    """Format a document as Markdown."""
    model = found["model"]
    lines = [
        f"# crl eval {found['benchmark']}",
        "",
        f"Model {model['name']} ({model['architecture']}, {model['pretrained']}), fingerprint "
        f"{model['fingerprint'][:12]}…, engine {model['engine']}; {found['images']} images; "
        f"crl {found['version']}.",
        "",
    ]
    if found["paper_encoder"]:
        lines += [f"The paper uses {found['paper_encoder']} for this benchmark.", ""]
    if found["published"]:
        lines += [f"Published scores, in brackets, are from {'; '.join(found['published'])}.", ""]
    lines += [f"Settings: {format_settings(found)}. Scores in percent.", ""]
    for criterion, own in found["texts"].items():
        again = f", {own['repeated']} of them repeated" if own["repeated"] else ""
        lines.append(
            f"- {criterion}: {own['count']} texts{again} from {own['source']}, with the prompts "
            + ", ".join(f"`{prompt}`" for prompt in own["prompts"])
        )
    notes = (*format_paper_notes(found), *found["notes"], *found["remarks"])
    lines += [f"- {note}" for note in notes] + [""]
    for header, cells in tables(found):
        lines.append("| " + " | ".join(header) + " |")
        lines.append("|" + "---|" * len(header))
        lines += ["| " + " | ".join(row) + " |" for row in cells] + [""]
    return "\n".join(lines)


def format_settings(found: Mapping[str, Any]) -> str:
    """Format the settings of a document in a line: `method cosine, seeds 20, shots 1 5 10`."""
    return ", ".join(
        f"{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in found["settings"].items()
    )


def check_path(path: Path) -> None:
    """Check the suffix of a results file. Call it before the benchmark runs.

    Args:
        path: Path of the file.

    Raises:
        InvalidInputError: If the suffix is wrong.
    """
    if path.suffix not in SUFFIXES:
        raise InvalidInputError(f"--out: expected a .md or .json file, got {str(path)!r}")


def write_document(path: Path, found: Mapping[str, Any]) -> None:
    """Write a document as JSON or Markdown, depending on the suffix of the file.

    Args:
        path: Path of the file.
        found: The document.

    Raises:
        InvalidInputError: If the file cannot be written.
    """
    text = format_markdown(found) if path.suffix == ".md" else json.dumps(found, indent=1) + "\n"
    write_atomically(path, text.encode(), InvalidInputError)
