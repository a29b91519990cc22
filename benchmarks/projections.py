"""Compare all projection methods on the demo world, with clean bases, noisy bases and controls.

The methods are compared on four criteria, and on two others (`UNREPORTED`) in a table of their
own. Each seed draws texts, noise, starts of k-means and examples, and all methods get the same
ones, so that differences are paired. `crl_benchmarks.projection_tables` runs this and writes the
tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from crl_benchmarks.basis_quality import AS_SAID
from crl_export.demo.captions import NEUTRAL_PROMPT
from crl_export.demo.dataset import MONITOR_SEED, TEST_SEED, scene_seed
from crl_export.demo.lexicon import OFF_TOPIC, SYNONYMS
from crl_export.demo.scenes import render_scene, sample_scene
from crl_export.demo.world import CRITERIA, FACTORS
from crl_sdk import Embedder, demo_bundle
from crl_sdk.basis._generation_options import GenerationOptions
from crl_sdk.basis._language_model import LanguageModel
from crl_sdk.basis._methods import Method, make_projection
from crl_sdk.errors import GenerationError
from crl_sdk.evaluation._clustering import clustering
from crl_sdk.evaluation._few_shot import few_shot, rescale
from crl_sdk.projection._projection import normalise_rows
from crl_sdk.tasks._cluster_quality import MIN_TEXTS, assess_clusters
from crl_sdk.tasks._kmeans import kmeans
from crl_sdk.tasks._metrics import mean_average_precision
from crl_sdk.tasks._naming import name_clusters
from crl_sdk.tasks._sharpen import sharpen_projection

UNREPORTED = ("size", "background")
"""Factors that no table reports. The encoder sees the first well and the second hardly."""

NAMING_PROMPT = "a photo with the {criterion} of {{}}"

SHOTS = 5
QUERIES = 0.3
"""Share of the images that are queries in the retrieval. The others are the candidates."""

REFERENCES = 400

LISTS = 4
"""Number of lists that the language model writes for a factor. Further seeds reuse them."""

MEASURES = ("accuracy", "nmi", "ari", "few_shot", "map")

Texts = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Variant:
    """A method with its options, as it is measured.

    Attributes:
        method: Method that makes the projection.
        against: Where the texts of the other criteria come from: `own words` of the demo world,
            `generated` by the language model, or nothing.
        sharpened: Whether the projection is sharpened with the images, without their labels.
        referenced: Whether the mean of reference images is used.
    """

    method: Method
    against: Literal["", "own words", "generated"] = ""
    sharpened: bool = False
    referenced: bool = False

    @property
    def name(self) -> str:
        """Name in the tables."""
        more = {"": "", "own words": ", others", "generated": ", others generated"}[self.against]
        more += ", sharpened" * self.sharpened + ", references" * self.referenced
        return self.method + more


VARIANTS = (
    Variant("cosine"),
    Variant("contrastive"),
    Variant("contrastive", against="own words"),
    Variant("contrastive", against="generated"),
    Variant("contrastive", sharpened=True),
    Variant("contrastive", against="own words", sharpened=True),
    Variant("orthogonal"),
    Variant("exclusive-orthogonal", against="own words"),
    Variant("tangent"),
    Variant("tangent", referenced=True),
)

SOURCES = ("own words", "synonyms", "language model")
NOISES = ("", "off-topic", "other criteria's")
CONTROLS = ("random words", "random words, naming prompt")
PARTIAL = ("3 of the words", "4 of the words", "other criteria's words")
"""Bases with other defects, to test the warning. Only the method `WARNED` is measured on them."""

WARNED = Variant("contrastive")


@dataclass(frozen=True, slots=True, eq=False)
class World:
    """Data that all runs share.

    Attributes:
        universal: Universal embeddings of held-out scenes, shape (n, d), float32, unit rows.
        reference: Universal embeddings of other scenes, shape (r, d), float32, unit rows.
        background: Embeddings of the bundle's generic texts, shape (b, d), float32.
        labels: Labels of the held-out scenes for each factor, shape (n,), int64.
        texts: Text embeddings by (prompt, text), shape (d,), float32, unit length.
        generated: Lists that the language model wrote for each factor. A list is empty if the
            model could not write one.
    """

    universal: NDArray[np.float32]
    reference: NDArray[np.float32]
    background: NDArray[np.float32]
    labels: Mapping[str, NDArray[np.int64]]
    texts: Mapping[tuple[str, str], NDArray[np.float32]]
    generated: Mapping[str, Sequence[Sequence[str]]]

    def embed(self, texts: Sequence[str], prompt: str = NEUTRAL_PROMPT) -> Texts:
        """Return the embeddings of known texts, shape (k, d), float32."""
        return np.stack([self.texts[prompt, text] for text in texts])


@dataclass(frozen=True, slots=True)
class Run:
    """Scores of one criterion, source of texts, method and seed.

    Attributes:
        factor: Factor of the demo world.
        source: One of `SOURCES` or `CONTROLS`, or a name that starts with `universal`.
        noise: One of `NOISES`. Noise adds half as many texts that do not belong to the criterion.
        variant: Name of a `Variant`. Empty for the universal embedding.
        seed: Seed of all random choices.
        texts: Number of texts.
        scores: Score for each of `MEASURES`.
        signals: Measures that need no labels, for `WARNED` only: `separation` and `undescribed` of
            `crl_sdk.tasks.assess_clusters` (not with two texts), and `unlike`, the share of as many
            clusters as the factor has values that no text describes.
    """

    factor: str
    source: str
    noise: str
    variant: str
    seed: int
    texts: int
    scores: dict[str, float]
    signals: dict[str, float]


def make_world(images: int, seeds: int, llm: LanguageModel) -> World:
    """Render and embed the scenes, and let the language model write texts."""
    with Embedder.open(demo_bundle(), engine="onnx/cpu/fp32") as embedder:
        universal, labels = _embedded(embedder, TEST_SEED, images)
        reference, _ = _embedded(embedder, MONITOR_SEED, REFERENCES)
        generated = {
            factor: [_written(llm, factor, embedder, seed) for seed in range(min(LISTS, seeds))]
            for factor in (*CRITERIA, *UNREPORTED)
        }
        words = {form for forms in SYNONYMS.values() for each in forms.values() for form in each}
        words |= {text for lists in generated.values() for texts in lists for text in texts}
        wanted = [(NEUTRAL_PROMPT, word) for word in sorted(words | set(OFF_TOPIC))]
        wanted += [(_naming(f), word) for f in (*CRITERIA, *UNREPORTED) for word in OFF_TOPIC]
        rows = embedder.embed_text([prompt.format(word) for prompt, word in wanted])
        background = embedder.bundle.background
    assert background is not None
    return World(
        universal, reference, background, labels, dict(zip(wanted, rows, strict=True)), generated
    )


def make_word_world(images: int) -> World:
    """Render and embed the scenes, without texts of a language model."""
    with Embedder.open(demo_bundle(), engine="onnx/cpu/fp32") as embedder:
        universal, labels = _embedded(embedder, TEST_SEED, images)
        words = {form for forms in SYNONYMS.values() for each in forms.values() for form in each}
        wanted = [(NEUTRAL_PROMPT, word) for word in sorted(words | set(OFF_TOPIC))]
        rows = embedder.embed_text([prompt.format(word) for prompt, word in wanted])
        background = embedder.bundle.background
    assert background is not None
    texts = dict(zip(wanted, rows, strict=True))
    return World(universal, universal[:0], background, labels, texts, {})


def texts_of(world: World, factor: str, source: str, noise: str, seed: int) -> list[str]:
    """Return the texts of a basis, drawn at random. Empty if the language model wrote none."""
    rng = np.random.default_rng([seed, *factor.encode()])
    values = SYNONYMS[factor].values()
    if source == "own words":
        texts = [forms[0] for forms in values]
    elif source == "synonyms":
        texts = [str(f) for forms in values for f in rng.permutation(forms)[:2]]
    elif source == "language model":
        texts = list(world.generated[factor][seed % LISTS])
    elif source.endswith("of the words"):
        plain = rng.permutation([forms[0] for forms in values])
        texts = [str(word) for word in plain[: min(int(source[0]), len(plain) - 1)]]
    elif source in CONTROLS:
        return [str(word) for word in rng.permutation(OFF_TOPIC)[: len(FACTORS[factor])]]
    else:
        return _theirs(factor, rng)[: len(FACTORS[factor])]
    if noise == "off-topic":
        texts += [str(word) for word in rng.permutation(OFF_TOPIC)[: len(texts) // 2]]
    elif noise:
        texts += _theirs(factor, rng)[: len(texts) // 2]
    return list(dict.fromkeys(texts))


def other_texts(world: World, factor: str, seed: int, *, written: bool = False) -> list[Texts]:
    """Return the text embeddings of all other criteria.

    Args:
        world: Shared data.
        factor: Factor to leave out.
        seed: Seed of the random choices.
        written: Whether to take the texts of the language model. The words of the demo world are
            used where it wrote fewer than two.
    """
    against = []
    for other in (*CRITERIA, *UNREPORTED):
        if other != factor:
            texts = texts_of(world, other, "language model", "", seed) if written else []
            if len(texts) < 2:
                texts = texts_of(world, other, "own words", "", seed)
            against.append(world.embed(texts))
    return against


def measure(rows: NDArray[np.float32], labels: NDArray[np.int64], seed: int,
            *, standardise: bool = True) -> dict[str, float]:  # fmt: skip
    """Measure rows, shape (n, m), on all tasks."""
    order = np.random.default_rng(seed).permutation(len(rows))
    shuffled, codes = rows[order], labels[order]
    found = clustering(shuffled, codes, seeds=(seed,))
    unit = normalise_rows(shuffled, "l2")
    asking = round(QUERIES * len(rows))
    return {
        "accuracy": found["ACC"].mean,
        "nmi": found["NMI"].mean,
        "ari": found["ARI"].mean,
        "few_shot": few_shot(shuffled, codes, SHOTS, standardise=standardise, count=1).mean,
        "map": mean_average_precision(unit[:asking], unit[asking:], codes[:asking], codes[asking:]),
    }


def runs_of(world: World, task: tuple[str, int]) -> list[Run]:
    """Measure all bases and methods for one factor and one seed."""
    factor, seed = task
    labels, k = world.labels[factor], len(FACTORS[factor])
    runs = []
    for name, rows in (
        ("universal", world.universal),
        ("universal, scale of a basis", rescale(world.universal, k**0.5)),
    ):
        scores = measure(rows, labels, seed, standardise=False)
        runs.append(Run(factor, name, "", "", seed, 0, scores, {}))
    for source, noise, texts, embedded in _bases(world, factor, seed):
        for variant in (WARNED,) if source in PARTIAL else VARIANTS:
            against = (
                other_texts(world, factor, seed, written=variant.against == "generated")
                if variant.against
                else ()
            )
            projection = make_projection(
                embedded, variant.method, post="none", against=against,
                background=world.background,
                reference=world.reference if variant.referenced else None,
            )  # fmt: skip
            if variant.sharpened:
                projection = sharpen_projection(
                    projection, len(embedded), world.universal, seed=seed
                )[0]
            rows = projection.apply(world.universal)
            scores = measure(rows, labels, seed)
            signals = {}
            if variant == WARNED:
                signals = _signals(world, normalise_rows(rows, "l2"), embedded, k, seed)
            runs.append(Run(factor, source, noise, variant.name, seed, len(texts), scores, signals))
    return runs


def _signals(
    world: World, rows: NDArray[np.float32], embedded: Texts, k: int, seed: int
) -> dict[str, float]:
    quality = assess_clusters(world.universal, rows, embedded, seed=seed)
    found, _ = kmeans(rows, k, seed=seed, starts=3)
    numbers = [str(number) for number in range(len(embedded))]
    names = name_clusters(found, world.universal @ embedded.T, numbers)
    signals = {"unlike": float(np.mean([not name.fits for name in names]))}
    if quality.separation is not None and quality.undescribed is not None:
        signals |= {"separation": quality.separation, "undescribed": quality.undescribed}
    return signals


def measure_all(world: World, seeds: int, workers: int) -> list[Run]:
    """Measure all factors with all seeds, in processes of one thread each.

    The rows are few, so that more threads would cost more than they save.
    """
    tasks = [(factor, seed) for seed in range(seeds) for factor in (*CRITERIA, *UNREPORTED)]
    if workers < 2:
        with threadpool_limits(1):
            return [run for task in tasks for run in runs_of(world, task)]
    with ProcessPoolExecutor(workers, initializer=_one_thread) as pool:
        return [run for runs in pool.map(partial(runs_of, world), tasks) for run in runs]


def _bases(world: World, factor: str, seed: int) -> Iterator[tuple[str, str, list[str], Texts]]:
    """Yield source, noise, texts and text embeddings (k, d) of all bases of a factor."""
    for source in SOURCES:
        for noise in NOISES:
            texts = texts_of(world, factor, source, noise, seed)
            if len(texts) >= MIN_TEXTS:
                yield source, noise, texts, world.embed(texts)
    for control in (*CONTROLS, *PARTIAL):
        texts = texts_of(world, factor, control, "", seed)
        prompt = _naming(factor) if "naming" in control else NEUTRAL_PROMPT
        if len(texts) >= MIN_TEXTS:
            yield control, "", texts, world.embed(texts, prompt)


def _theirs(factor: str, rng: np.random.Generator) -> list[str]:
    """Return words of the other factors in random order, without those of `other_texts`."""
    others = [other for other in SYNONYMS if other != factor]
    words = [rng.choice(forms[1:]) for other in others for forms in SYNONYMS[other].values()]
    return [str(word) for word in rng.permutation(words)]


def _embedded(
    embedder: Embedder, data_seed: int, count: int
) -> tuple[NDArray[np.float32], dict[str, NDArray[np.int64]]]:
    side = embedder.bundle.preprocess.height
    scenes = [sample_scene(scene_seed(data_seed, index)) for index in range(count)]
    rows = [
        embedder.embed_pixels(np.stack([render_scene(scene, side) for scene in scenes[i : i + 64]]))
        for i in range(0, count, 64)
    ]
    codes = np.array([scene.codes() for scene in scenes], np.int64)
    return np.concatenate(rows), {name: codes[:, i] for i, name in enumerate(FACTORS)}


def _written(llm: LanguageModel, factor: str, embedder: Embedder, seed: int) -> list[str]:
    try:
        generated = embedder.generate_texts(
            AS_SAID.get(factor, factor), llm=llm, options=GenerationOptions(seed=1000 * seed),
            prompts=(NEUTRAL_PROMPT,),
        )  # fmt: skip
    except GenerationError:
        return []
    return [each.text for each in generated.texts]


def _naming(factor: str) -> str:
    return NAMING_PROMPT.format(criterion=AS_SAID.get(factor, factor))


def _one_thread() -> None:
    threadpool_limits(1)
