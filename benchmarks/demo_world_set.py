"""The demo world as one more set of `make eval-real`, in the form of the real ones."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np

from crl_benchmarks import projections
from crl_benchmarks.real_vector_sets import CONDITIONS, SEEDS, Case
from crl_export.demo.world import CRITERIA

DEMO_WORLD = "demo world"
SCENES = 400
DRAWS = 2


def read_demo_cases() -> Iterator[Case]:
    """Render scenes, embed them, and yield a case for each criterion, with lists of synonyms."""
    world = projections.make_word_world(SCENES)
    for factor, draw in product(CRITERIA, range(DRAWS)):
        texts = {
            condition: world.embed(projections.texts_of(world, factor, "synonyms", noise, draw))
            for condition, noise in zip(CONDITIONS, projections.NOISES, strict=True)
        }
        yield Case(
            DEMO_WORLD, factor, draw, SEEDS, world.universal, world.labels[factor],
            np.arange(len(world.universal)), texts,
            projections.other_texts(world, factor, draw), world.background, None,
        )  # fmt: skip
