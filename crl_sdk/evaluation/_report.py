"""Results as a document: what was measured, on what, with which texts; as JSON and as Markdown."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crl_sdk._version import __version__
from crl_sdk.errors import InvalidInputError
from crl_sdk.evaluation._benchmarks import Benchmark
from crl_sdk.evaluation._figures import Figure
from crl_sdk.evaluation._published import Published
from crl_sdk.evaluation._run import Score
from crl_sdk.evaluation._texts import Texts
from crl_sdk.model._bundle import ModelBundle
from crl_sdk.storage._atomic_files import write_atomically

SUFFIXES = (".md", ".json")


def document(
    name: str,
    benchmark: Benchmark,
    *,
    rows: Sequence[Score],
    texts: Mapping[str, Texts],
    bundle: ModelBundle,
    engine: str,
    pictures: int,
    settings: Mapping[str, Any],
    notes: Sequence[str],
    remarks: Sequence[str],
    published: Published | None = None,
) -> dict[str, Any]:
    """Gather everything that someone would need to run it again.

    Args:
        name: of the benchmark.
        benchmark: its description.
        rows: the results.
        texts: of each criterion.
        bundle: the model.
        engine: that ran it.
        pictures: how many were embedded.
        settings: method, seeds, splits and the like.
        notes: how the data set was read.
        remarks: what the figures do not mean.
        published: figures of others, to stand beside these.

    Returns:
        JSON values.
    """
    source = bundle.manifest.source
    beside = {} if published is None else published.figures
    remarks = list(remarks)
    if published is not None and (left := published.without_a_row(rows)):
        remarks.append(f"published, but not measured here: {'; '.join(map(', '.join, left))}")
    return {
        "benchmark": name,
        "version": __version__,
        "pictures": pictures,
        "model": {
            "name": bundle.manifest.name,
            "architecture": source.architecture,
            "pretrained": source.pretrained,
            "fingerprint": bundle.fingerprint,
            "engine": engine,
        },
        "paper_encoder": benchmark.encoder or None,
        "published": [] if published is None else list(published.sources),
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
                "figures": {
                    measure: {
                        "mean": figure.mean,
                        "std": figure.std,
                        "published": beside.get((row.criterion, row.representation, measure)),
                    }
                    for measure, figure in row.figures.items()
                },
            }
            for row in rows
        ],
    }


def tables(rows: Sequence[Mapping[str, Any]]) -> list[tuple[list[str], list[list[str]]]]:
    """Lay out a document's rows: one table for each protocol.

    Returns:
        Header and cells of each table; figures in percent.
    """
    made: dict[str, tuple[list[str], list[list[str]]]] = {}
    for row in rows:
        measures = list(row["figures"])
        header = [row["protocol"], "embeddings", *measures]
        _, cells = made.setdefault(row["protocol"], (header, []))
        cells.append(
            [row["criterion"], row["representation"],
             *(_cell(row["figures"][measure]) for measure in measures)]
        )  # fmt: skip
    return list(made.values())


def _cell(figure: Mapping[str, Any]) -> str:
    told = percent(Figure(figure["mean"], figure["std"]))
    other = figure["published"]
    return told if other is None else f"{told} (published {100 * other:.2f})"


def percent(figure: Figure) -> str:
    """Write a figure in percent with its deviation."""
    spread = "" if figure.std is None else f" ± {100 * figure.std:.2f}"
    return f"{100 * figure.mean:.2f}{spread}"


def markdown(found: Mapping[str, Any]) -> str:
    """Write a document as Markdown."""
    model = found["model"]
    lines = [
        f"# crl eval {found['benchmark']}",
        "",
        f"Model {model['name']} ({model['architecture']}, {model['pretrained']}), fingerprint "
        f"{model['fingerprint'][:12]}…, engine {model['engine']}; {found['pictures']} pictures; "
        f"crl {found['version']}.",
        "",
    ]
    if found["paper_encoder"]:
        lines += [f"The paper's encoder here is {found['paper_encoder']}.", ""]
    if found["published"]:
        lines += [f"Published figures, in brackets, are from {'; '.join(found['published'])}.", ""]
    lines += [f"Settings: {settings(found)}. Figures in percent.", ""]
    for criterion, own in found["texts"].items():
        again = f", {own['repeated']} of them repeated" if own["repeated"] else ""
        lines.append(
            f"- {criterion}: {own['count']} texts{again} from {own['source']}, under "
            + ", ".join(f"`{prompt}`" for prompt in own["prompts"])
        )
    lines += [f"- {note}" for note in (*found["notes"], *found["remarks"])] + [""]
    for header, cells in tables(found["rows"]):
        lines.append("| " + " | ".join(header) + " |")
        lines.append("|" + "---|" * len(header))
        lines += ["| " + " | ".join(row) + " |" for row in cells] + [""]
    return "\n".join(lines)


def settings(found: Mapping[str, Any]) -> str:
    """Write a document's settings in a line: `method cosine, seeds 20, shots 1 5 10`."""
    return ", ".join(
        f"{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in found["settings"].items()
    )


def check_path(path: Path) -> None:
    """Refuse, before anything is computed, a file that could not be written.

    Raises:
        InvalidInputError: another suffix, or its directory does not exist.
    """
    if path.suffix not in SUFFIXES:
        raise InvalidInputError(f"--out: expected a .md or .json file, got {str(path)!r}")
    if not path.parent.is_dir():
        raise InvalidInputError(f"--out: the directory {path.parent} does not exist; make it first")


def write(path: Path, found: Mapping[str, Any]) -> None:
    """Write a document as its suffix says.

    Raises:
        InvalidInputError: the file cannot be written.
    """
    text = markdown(found) if path.suffix == ".md" else json.dumps(found, indent=1) + "\n"
    write_atomically(path, text.encode(), InvalidInputError)
