"""How many of the values that matter a generated list names, and how many of its texts are junk.

`python -m crl_benchmarks.coverage` asks for the twenty held-out everyday criteria of
`everyday_values`; `--development` for the ten that the generator was made on. Without a
vision-language model no text is dropped as an outlier.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from crl_benchmarks.everyday_values import DEVELOPMENT, HELD_OUT, Values
from crl_benchmarks.markdown import table
from crl_sdk.basis._generate import generate_texts
from crl_sdk.basis._generation_options import GenerationOptions
from crl_sdk.basis._language_model import LanguageModel
from crl_sdk.errors import GenerationError


def measure(
    llm: LanguageModel, criteria: Mapping[str, Values], options: GenerationOptions
) -> list[dict[str, Any]]:
    """Return what the list of each criterion covers, as JSON values.

    Args:
        llm: The language model.
        criteria: The criteria with their values.
        options: How to ask.
    """
    rows = []
    for criterion, values in criteria.items():
        started = time.perf_counter()
        unsure = False
        try:
            found = generate_texts(criterion, llm, options)
            texts, unsure = [each.text for each in found.texts], found.unsure
            answers = found.answers
        except GenerationError:
            texts, answers = [], options.max_answers
        covered = values.coverage(criterion, texts)
        rows.append({
            "criterion": criterion, "texts": texts, "unsure": unsure, "answers": answers,
            **asdict(covered),
            "seconds": round(time.perf_counter() - started, 1),
        })  # fmt: skip
    return rows


def summarise(model: str, rows: list[dict[str, Any]]) -> list[str]:
    """Return the cells of a model: named values, texts, junk and refusals."""
    named, obvious = sum(row["named"] for row in rows), sum(row["obvious"] for row in rows)
    texts, junk = sum(len(row["texts"]) for row in rows), sum(len(row["junk"]) for row in rows)
    return [
        model, f"{named} of {obvious} ({named / obvious:.0%})", f"{texts / len(rows):.1f}",
        f"{junk / len(rows):.1f}", str(sum(row["unsure"] for row in rows)),
        f"{sum(row['seconds'] for row in rows) / len(rows):.0f} s",
    ]  # fmt: skip


def main() -> None:
    """Print a table, and write all lists if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llm", action="append", default=[], help="another GGUF file or URL")
    parser.add_argument("--development", action="store_true")
    parser.add_argument("--answers", type=int, default=GenerationOptions().max_answers)
    parser.add_argument("--patience", type=int, default=GenerationOptions().patience)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--form", default="auto")
    parser.add_argument("--out", type=Path, help="JSON file with all lists")
    arguments = parser.parse_args()
    criteria = DEVELOPMENT if arguments.development else HELD_OUT
    options = GenerationOptions(
        max_answers=arguments.answers, patience=arguments.patience, seed=arguments.seed,
        form=arguments.form, accept_unsure=True,
    )  # fmt: skip
    cells, lists = [], {}
    for model in (None, *arguments.llm):
        with LanguageModel.open(model) as llm:
            lists[llm.name] = measure(llm, criteria, options)
            cells.append(summarise(llm.name, lists[llm.name]))
    head = ["model", "named", "texts", "junk", "unsure", "time"]
    print(table(head, cells))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(lists, indent=1))


if __name__ == "__main__":
    main()
