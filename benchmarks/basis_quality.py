"""How good are generated bases? On the demo world, whose right answers are known.

`python -m crl_benchmarks.basis_quality [--model FILE.gguf …]` makes bases with the generator under
several seeds and compares them with the world's own words, with random words and with the universal
embedding, by clustering and by classification from ten examples per value. The generator was tuned
on other criteria (season, mood, material, time of day, vehicle, weather).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
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
from crl_sdk.basis._build import DEFAULT_MERGE_THRESHOLD, build_basis
from crl_sdk.basis._generate import GenerationOptions, generate_texts
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
"""What a user could add where the model alone does badly: a remark, or a line of their own."""


@dataclass(frozen=True, slots=True)
class Score:
    """What a set of texts gives.

    Attributes:
        clustering: accuracy of k-means, mean over seeds 0-4 of its own.
        few_shot: accuracy of logistic regression on ten examples per value, mean over splits.
        texts: how many; 0 for the universal embedding.
        named: how many of the factor's values they name, in any of the world's words.
    """

    clustering: float
    few_shot: float
    texts: int = 0
    named: int = 0


class World:
    """Held-out scenes, embedded once, and the texts of the model that embedded them."""

    def __init__(self, embedder: Embedder, images: int, splits: int) -> None:
        """Render and embed the scenes."""
        self.splits = splits
        with tempfile.TemporaryDirectory() as scratch:
            files, codes = read_labels(write_dataset(Path(scratch), images, TEST_SEED))
            self.universal = embedder.embed(files).universal
        self.labels = labels_of(codes)
        self.embedder = embedder

    def score(
        self, factor: str, texts: Sequence[str], merge: float = DEFAULT_MERGE_THRESHOLD
    ) -> Score:
        """Measure the basis of some texts; none of them for the universal embedding itself.

        The model gives words it does not know nearly one embedding: as a user would get them, they
        are merged; random words are not, or hardly any would be left.
        """
        labels = self.labels[factor]
        if not texts:
            return Score(
                kmeans_accuracy(self.universal, labels),
                few_shot_accuracy(self.universal, labels, self.splits),
            )
        basis = build_basis(
            AS_SAID[factor], texts, self.embedder.embed_text,
            fingerprint=self.embedder.bundle.fingerprint, prompts=(NEUTRAL_PROMPT,),
            merge_threshold=merge,
        )  # fmt: skip
        rows = basis.projection.apply(self.universal)
        return Score(
            kmeans_accuracy(rows, labels),
            few_shot_accuracy(rows, labels, self.splits),
            len(basis.texts),
            values_named(factor, texts),
        )


def few_shot_accuracy(
    rows: NDArray[np.float32], labels: NDArray[np.int64], splits: int = SPLITS
) -> float:
    """Classify from a few examples per value, as in the paper: standardised rows, C = 1.

    Args:
        rows: (n, m) float32.
        labels: (n,) int64.
        splits: how many random choices of the examples.

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
    """Count the values of a factor that some of the texts name, by any of the world's words."""
    keys = {text_key(text) for text in texts}
    return sum(any(text_key(form) in keys for form in forms) for forms in SYNONYMS[factor].values())


def generated(
    world: World,
    factor: str,
    model: LanguageModel,
    options: GenerationOptions,
    seeds: Sequence[int],
) -> dict[str, Any]:
    """Measure the generator on a factor, under several seeds; a refusal scores as universal."""
    scores, lists = [], []
    for seed in seeds:
        try:
            draft = generate_texts(
                AS_SAID[factor], model, replace(options, seed=1000 * seed),
                embed_text=world.embedder.embed_text, prompts=(NEUTRAL_PROMPT,),
            )  # fmt: skip
            texts = [candidate.text for candidate in draft.texts]
        except GenerationError:
            texts = []
        lists.append(texts)
        scores.append(world.score(factor, texts))
    return {"scores": [asdict(score) for score in scores], "texts": lists}


def scored(
    world: World,
    factor: str,
    lists: Sequence[Sequence[str]],
    merge: float = DEFAULT_MERGE_THRESHOLD,
) -> dict[str, Any]:
    """Measure lists of texts that no language model wrote."""
    return {"scores": [asdict(world.score(factor, texts, merge)) for texts in lists]}


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
        models: name → language model.
        images: number of held-out scenes.
        seeds: of the generator and of the random words.
        splits: of the few-shot classification.
        helped: measure hints and examples too.

    Returns:
        factor → source → scores per seed (and the texts), as JSON values.
    """
    results: dict[str, Any] = {}
    with Embedder.open(demo_bundle()) as embedder:
        world = World(embedder, images, splits)
        for factor in CRITERIA:
            own = own_words(factor)
            rows = results[factor] = {
                "universal": scored(world, factor, [()]),
                "own words": scored(world, factor, [own]),
            }
            for name, model in models.items():
                recipes = {"": GenerationOptions()} | (HELPED.get(factor, {}) if helped else {})
                for help_, options in recipes.items():
                    source = f"{name}, {help_}" if help_ else name
                    rows[source] = generated(world, factor, model, options, seeds)
            size = max(2, round(np.mean([s["texts"] for s in rows[next(iter(models))]["scores"]])))
            shuffled = [np.random.default_rng(seed).permutation(OFF_TOPIC) for seed in seeds]
            words = [[str(word) for word in order[:size]] for order in shuffled]
            rows["random words"] = scored(world, factor, words, merge=1.0)
    return results


def mean(row: dict[str, Any], name: str) -> float:
    """Give a figure's mean over the seeds."""
    return float(np.mean([score[name] for score in row["scores"]]))


def gain(rows: dict[str, Any], source: str) -> float:
    """Give the share of the own words' gain over the universal embedding that a source recovers."""
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
    parser.add_argument("--model", action="append", default=[], help="another GGUF file")
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="writes OUT.json and OUT.md")
    arguments = parser.parse_args()
    opened = [LanguageModel.open(), *map(LanguageModel.open, arguments.model)]
    models = {model.path.stem: model for model in opened}
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
