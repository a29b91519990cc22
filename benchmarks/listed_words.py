"""What generated lists are worth on real vectors: words of a bank that they hit, and their bases.

`python -m crl_benchmarks.listed_words --data DIR` generates lists for criteria of the sets of
`make eval-real` whose texts come from a bank of words. A text that is no word of the bank has no
vector there, so that the bases are made from those that are.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from crl_benchmarks.markdown import table
from crl_benchmarks.real_vector_sets import (
    WORDS,
    Case,
    MissingVectors,
    Rows,
    WordBank,
    read_cases,
    read_word_bank,
)
from crl_benchmarks.real_vectors import Variant, make_map
from crl_sdk.basis._generate import generate_texts
from crl_sdk.basis._generation_options import GenerationOptions
from crl_sdk.basis._language_model import LanguageModel
from crl_sdk.basis._votes import text_key
from crl_sdk.evaluation._clustering import clustering_runs
from crl_sdk.evaluation._vector_protocols import find_queries, retrieval_runs

ASKED = {"colour": "color", "garment": "clothing", "animals": "animal"}
"""What is asked for each criterion of the sets."""

BANK = {"color": "colour", "material": "material", "pattern": "pattern", "clothing": "garment",
        "clothing style": "style", "occasion": "occasion"}  # fmt: skip
"""Kind of words in the bank for each criterion that is asked for."""

_CONTRASTIVE = Variant("contrastive")


def hits(bank: WordBank, kind: str, texts: Sequence[str]) -> np.ndarray:
    """Return which words of a kind, shape (n,), a list names."""
    keys = {text_key(text) for text in texts}
    named = np.array([text_key(str(word)) in keys for word in bank.words])
    return np.asarray(named & (bank.kinds == kind))


def scores(case: Case, texts: Rows) -> str:
    """Return the clustering accuracy and mAP of the contrastive basis of some texts."""
    rows = make_map(case, _CONTRASTIVE, texts).apply(case.images)
    is_query = find_queries(case.codes, case.groups)
    accuracy = np.mean(clustering_runs(rows, case.codes, case.seeds)["ACC"])
    precision = retrieval_runs(rows, case.codes, case.groups, is_query)["mAP"].mean()
    return f"{accuracy:.1%} / {precision:.1%}"


def markdown(folder: Path, llm: LanguageModel) -> str:
    """Return a table of hit words, and one of bases.

    Args:
        folder: Directory of the real vectors.
        llm: The language model.
    """
    cases = {case.criterion: case for case in read_cases(folder) if case.split == 0}
    bank = read_word_bank(folder / WORDS)
    options = GenerationOptions(accept_unsure=True)
    asked = dict.fromkeys([*BANK, *ASKED.values()])
    lists = {
        name: [each.text for each in generate_texts(name, llm, options).texts] for name in asked
    }
    hit_rows, basis_rows = [], []
    for name, kind in BANK.items():
        found = hits(bank, kind, lists[name])
        of_kind = int((bank.kinds == kind).sum())
        hit_rows.append([name, f"{found.sum()} of {of_kind}", str(len(lists[name]))])
    for criterion, name in ASKED.items():
        case = cases[criterion]
        own = case.texts["clean"]
        chosen = bank.vectors[hits(bank, BANK.get(name, "noun"), lists[name])]
        made = scores(case, chosen.astype(np.float32)) if len(chosen) >= 3 else "too few"
        basis_rows.append([
            f"{case.group}, {criterion}", scores(case, own), str(len(own)), made, str(len(chosen)),
        ])  # fmt: skip
    first = table(["criterion", "words of the bank that are named", "texts"], hit_rows)
    head = ["set", "own words, ACC / mAP", "words", "generated, ACC / mAP", "words of the bank"]
    return f"{llm.name}\n\n{first}\n\n{table(head, basis_rows)}\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="directory of the real vectors")
    parser.add_argument("--llm", help="GGUF file; the default model if it is left out")
    parsed = parser.parse_args(arguments)
    try:
        with threadpool_limits(1), LanguageModel.open(parsed.llm) as llm:
            print(markdown(parsed.data, llm))
    except MissingVectors as missing:
        print(missing)


if __name__ == "__main__":
    main()
