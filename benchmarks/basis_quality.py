"""Quality of generated bases, measured on the demo world, whose right answers are known.

`python -m crl_benchmarks.basis_quality [--llm FILE.gguf …]` generates bases under several seeds. It
compares them with the world's own words, with the curated lists, with random words and with the
universal embedding, by clustering and by classification from ten examples per value. *Together*
means that the bases of all factors are made against each other, as `crl demo` does.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crl_export.demo.captions import NEUTRAL_PROMPT
from crl_export.demo.dataset import TEST_SEED, labels_of, read_labels, write_dataset
from crl_export.demo.evaluate import kmeans_accuracy, own_words
from crl_export.demo.lexicon import OFF_TOPIC, SYNONYMS
from crl_export.demo.world import CRITERIA
from crl_sdk import Embedder, demo_bundle
from crl_sdk.basis._basis import Basis
from crl_sdk.basis._curated import require_curated
from crl_sdk.basis._generation_options import GenerationOptions
from crl_sdk.basis._language_model import LanguageModel
from crl_sdk.basis._votes import text_key
from crl_sdk.errors import GenerationError
from crl_sdk.projection._projection import normalise_rows

SHOTS = 10
SPLITS = 20

AS_SAID = {"shape": "shape", "colour": "color", "texture": "texture", "count": "count"}
"""What a user would type for each factor."""

HELPED: dict[str, dict[str, GenerationOptions]] = {
    "texture": {
        "hint": GenerationOptions(hint="the pattern on the surface"),
        "example": GenerationOptions(
            examples={"surface pattern": ("striped", "plain", "dotted", "tartan")}
        ),
    },
    "count": {
        "hint": GenerationOptions(hint="how many there are in words"),
        "example": GenerationOptions(
            examples={"number of people": ("one", "two", "three", "four")}
        ),
    },
}
"""What a user could add for a criterion that the model knows badly: a hint, or an example."""


@dataclass(frozen=True, slots=True)
class Score:
    """Figures of one basis, or of the universal embedding.

    Attributes:
        clustering: Accuracy of k-means, mean over its seeds 0-4.
        few_shot: Accuracy of logistic regression on ten examples per value, mean over splits.
        texts: Number of texts; 0 for the universal embedding.
        named: Number of the factor's values that the texts name, by any of the world's words.
    """

    clustering: float
    few_shot: float
    texts: int = 0
    named: int = 0


class World:
    """Held-out scenes, embedded once, and the model that embedded them."""

    def __init__(self, embedder: Embedder, images: int, splits: int) -> None:
        """Render and embed the scenes.

        Args:
            embedder: Embedder of the demo model.
            images: Number of scenes.
            splits: Number of random splits of the few-shot classification.
        """
        self.splits = splits
        with tempfile.TemporaryDirectory() as scratch:
            files, codes = read_labels(write_dataset(Path(scratch), images, TEST_SEED))
            self.universal = embedder.embed(files).universal
        self.labels = labels_of(codes)
        self.embedder = embedder

    def score_universal(self, factor: str) -> Score:
        """Measure the universal embedding."""
        labels = self.labels[factor]
        return Score(
            kmeans_accuracy(self.universal, labels),
            few_shot_accuracy(self.universal, labels, self.splits),
        )

    def score_basis(self, factor: str, basis: Basis) -> Score:
        """Measure the conditional embedding of a basis."""
        labels = self.labels[factor]
        rows = basis.projection.apply(self.universal)
        texts = [*basis.texts, *(merged.text for merged in basis.merged)]
        return Score(
            kmeans_accuracy(rows, labels),
            few_shot_accuracy(rows, labels, self.splits),
            len(basis.texts),
            values_named(factor, texts),
        )

    def score_words(self, factor: str, words: Sequence[str], **options: Any) -> Score:
        """Measure the basis of given words; the options are those of `Embedder.create_basis`."""
        basis = self.embedder.create_basis(
            AS_SAID[factor], words, prompts=(NEUTRAL_PROMPT,), load=False, **options
        )
        return self.score_basis(factor, basis)


def few_shot_accuracy(
    rows: NDArray[np.float32], labels: NDArray[np.int64], splits: int = SPLITS
) -> float:
    """Classify from a few examples per value, as in the paper: standardised rows, C = 1.

    Args:
        rows: Embeddings, shape (n, m), float32.
        labels: Value of each row, shape (n,), int64.
        splits: Number of random choices of the examples.

    Returns:
        Mean accuracy on the other rows, over the splits.
    """
    from sklearn.linear_model import LogisticRegression

    inputs = normalise_rows(rows, "standardise")
    accuracies = []
    for seed in range(splits):
        order = np.random.default_rng(seed).permutation(len(labels))
        train = np.concatenate([order[labels[order] == v][:SHOTS] for v in np.unique(labels)])
        test = np.setdiff1d(order, train)
        model = LogisticRegression(max_iter=1000).fit(inputs[train], labels[train])
        accuracies.append(model.score(inputs[test], labels[test]))
    return float(np.mean(accuracies))


def values_named(factor: str, texts: Sequence[str]) -> int:
    """Return the number of a factor's values that the texts name, by any of the world's words."""
    keys = {text_key(text) for text in texts}
    return sum(any(text_key(form) in keys for form in forms) for forms in SYNONYMS[factor].values())


def generated(
    world: World,
    factor: str,
    llm: LanguageModel,
    options: GenerationOptions,
    seeds: Sequence[int],
) -> list[Basis | None]:
    """Generate a basis under each seed. None stands for a refusal."""
    bases: list[Basis | None] = []
    for seed in seeds:
        try:
            basis = world.embedder.generate_basis(
                AS_SAID[factor], llm=llm, options=replace(options, seed=1000 * seed),
                prompts=(NEUTRAL_PROMPT,), load=False,
            )  # fmt: skip
        except GenerationError:
            bases.append(None)
        else:
            bases.append(basis)
    return bases


def score_generated(world: World, factor: str, bases: Sequence[Basis | None]) -> dict[str, Any]:
    """Measure generated bases. A refusal scores as the universal embedding."""
    scores = [
        world.score_universal(factor) if basis is None else world.score_basis(factor, basis)
        for basis in bases
    ]
    lists = [[] if basis is None else list(basis.provenance["votes"]) for basis in bases]
    return {"scores": [asdict(score) for score in scores], "texts": lists}


def made_together(
    world: World, bases: Mapping[str, Sequence[Basis | None]]
) -> dict[str, list[Basis | None]]:
    """Make the bases of all factors against each other, seed by seed.

    Args:
        world: The demo world.
        bases: Generated bases of each factor, one for each seed.
    """
    together: dict[str, list[Basis | None]] = {factor: [] for factor in bases}
    for of_seed in zip(*bases.values(), strict=True):
        named = dict(zip(bases, of_seed, strict=True))
        for factor, basis in named.items():
            others = [each for name, each in named.items() if name != factor and each is not None]
            together[factor].append(
                basis
                and world.embedder.create_basis(
                    AS_SAID[factor], list(basis.provenance["votes"]), prompts=(NEUTRAL_PROMPT,),
                    against=others, provenance={"votes": basis.provenance["votes"]}, load=False,
                )
            )  # fmt: skip
    return together


def scored(
    world: World, factor: str, lists: Sequence[Sequence[str]], **options: Any
) -> dict[str, Any]:
    """Measure lists of texts that no language model wrote."""
    return {"scores": [asdict(world.score_words(factor, texts, **options)) for texts in lists]}


def evaluate(
    models: dict[str, LanguageModel],
    *,
    images: int,
    seeds: Sequence[int],
    splits: int = SPLITS,
    helped: bool = True,
) -> dict[str, Any]:
    """Measure all sources of texts on all factors.

    Args:
        models: Language models by name.
        images: Number of held-out scenes.
        seeds: Seeds of the generator and of the random words.
        splits: Number of splits of the few-shot classification.
        helped: Whether to measure hints and examples too.

    Returns:
        Scores per seed and texts, by factor and source, as JSON values.
    """
    results: dict[str, Any] = {}
    made: dict[str, dict[str, list[Basis | None]]] = {name: {} for name in models}
    with Embedder.open(demo_bundle()) as embedder:
        world = World(embedder, images, splits)
        for factor in CRITERIA:
            curated = require_curated(AS_SAID[factor]).texts
            rows = results[factor] = {
                "universal": {"scores": [asdict(world.score_universal(factor))]},
                "own words": scored(world, factor, [own_words(factor)]),
                "curated list": scored(world, factor, [curated]),
            }
            for name, model in models.items():
                made[name][factor] = generated(world, factor, model, GenerationOptions(), seeds)
                rows[name] = score_generated(world, factor, made[name][factor])
                for help_, options in HELPED.get(factor, {}).items() if helped else ():
                    bases = generated(world, factor, model, options, seeds)
                    rows[f"{name}, {help_}"] = score_generated(world, factor, bases)
            size = max(2, round(np.mean([s["texts"] for s in rows[next(iter(models))]["scores"]])))
            shuffled = [np.random.default_rng(seed).permutation(OFF_TOPIC) for seed in seeds]
            words = [[str(word) for word in order[:size]] for order in shuffled]
            # not merged: the embeddings of words the model does not know are nearly equal
            rows["random words"] = scored(world, factor, words, merge_threshold=1.0)
        for name, bases_of in made.items():
            for factor, bases in made_together(world, bases_of).items():
                results[factor][f"{name}, together"] = score_generated(world, factor, bases)
    return results


def mean(row: dict[str, Any], name: str) -> float:
    """Return the mean of a figure over the seeds."""
    return float(np.mean([score[name] for score in row["scores"]]))


def gain(rows: dict[str, Any], source: str) -> float:
    """Return the gain of a source over the universal embedding, relative to that of own words."""
    low, high = mean(rows["universal"], "clustering"), mean(rows["own words"], "clustering")
    return (mean(rows[source], "clustering") - low) / (high - low)


def as_table(results: dict[str, Any]) -> str:
    """Format the results as a Markdown table."""
    lines = [
        "| criterion | texts from | clustering | gain recovered | 10-shot | texts | values named |",
        "|---|---|---|---|---|---|---|",
    ]
    for factor, rows in results.items():
        for source, row in rows.items():
            share = "" if source == "universal" else f"{100 * gain(rows, source):.0f} %"
            count = "" if source == "universal" else f"{mean(row, 'texts'):.0f}"
            named = "" if source == "universal" else f"{mean(row, 'named'):.1f} of 10"
            lines.append(
                f"| {AS_SAID[factor]} | {source} | {mean(row, 'clustering'):.3f} | {share} "
                f"| {mean(row, 'few_shot'):.3f} | {count} | {named} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llm", action="append", default=[], help="another GGUF file")
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="writes OUT.json and OUT.md")
    arguments = parser.parse_args()
    opened = [LanguageModel.open(), *map(LanguageModel.open, arguments.llm)]
    models = {Path(model.source).stem: model for model in opened}
    started = time.perf_counter()
    results = evaluate(models, images=arguments.images, seeds=range(arguments.seeds))
    record = {
        "images": arguments.images,
        "seeds": arguments.seeds,
        "prompt": NEUTRAL_PROMPT,
        "models": [model.describe() for model in opened],
        "options": asdict(GenerationOptions()),
        "helped": {f: {n: asdict(r) for n, r in rs.items()} for f, rs in HELPED.items()},
        "seconds": round(time.perf_counter() - started, 1),
        "results": results,
    }
    print(as_table(results))
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        header = (
            f"Bases on the demo world: {arguments.images} held-out scenes, mean over "
            f"{arguments.seeds} seeds of the generator (`make eval-bases`).\n\n"
        )
        arguments.out.with_suffix(".md").write_text(header + as_table(results) + "\n")
        arguments.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    for model in opened:
        model.close()


if __name__ == "__main__":
    main()
