"""`make eval-relevance`: whether a language model knows if a text belongs to a criterion.

Two questions are compared on the default language model. One is "Is a cat a dog breed?" with yes or
no. The other is the log likelihood ratio that `crl basis create` uses: of the text after "Examples
of dog breed:" and after "Examples of things:".
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crl_benchmarks.markdown import table
from crl_sdk import __version__
from crl_sdk.basis._language_model import LanguageModel
from crl_sdk.basis._relevance import MIN_RELEVANCE, relevance
from crl_sdk.errors import InvalidInputError
from crl_sdk.storage._atomic_files import write_atomically

LISTS: dict[str, tuple[str, str]] = {
    "color": ("red, green, blue, yellow, brown, purple, pink, orange",
              "apple, wooden, rough, round, car, seven, happy"),
    "shape": ("circle, square, triangle, star, oval, cube, cylinder",
              "red, human, large, cotton, sunny, forest"),
    "texture": ("smooth, rough, striped, spotted, bumpy, woven",
                "red, large, happy, seven, paper, car"),
    "dog breed": ("poodle, beagle, labrador, bulldog, husky, terrier, dachshund",
                  "cat, bird, fish, wolf, sheep, lion"),
    "packaging damage": ("torn, dented, crushed, scratched, leaking, punctured, wet",
                         "people, happy, damaged people, injured, box, red"),
    "animal habitat": ("forest, desert, ocean, river, grassland, mountain, jungle, cave",
                       "hammer, wolf, lion, bird, red, shirt"),
    "room": ("kitchen, bedroom, bathroom, office, hallway, basement",
             "table, bed, lamp, window, red, dog"),
    "weather": ("sunny, rainy, cloudy, snowy, foggy, stormy, windy",
                "chair, red, cat, square, cotton, umbrella"),
    "mood": ("happy, sad, angry, calm, excited, bored", "table, red, cat, smile, forest, three"),
    "fabric": ("cotton, wool, silk, linen, denim, velvet, leather",
               "happy, red, shirt, dress, sunny, forest"),
    "season": ("spring, summer, autumn, winter", "happy, red, cotton, square, sunny, snow"),
    "musical instrument": ("guitar, piano, violin, drum, flute, trumpet",
                           "happy, red, song, singer, cotton, concert"),
    "vehicle": ("car, bus, truck, bicycle, train, motorcycle, boat",
                "road, red, driver, wheel, cat, square"),
    "fruit": ("apple, banana, orange, grape, peach, mango", "carrot, red, tree, knife, sweet, dog"),
    "art style": ("impressionism, cubism, surrealism, realism, pop art, baroque",
                  "painter, red, canvas, dog, museum, seven"),
    "hair style": ("braid, ponytail, bun, bob, curls, afro", "eye, red, happy, comb, nose, hat"),
    "time of day": ("morning, noon, afternoon, evening, night, dawn",
                    "red, clock, chair, forest, happy, cold"),
    "material": ("wood, metal, plastic, glass, stone, paper, leather",
                 "red, chair, happy, large, seven, dog"),
    "cuisine": ("italian, chinese, mexican, indian, french, japanese",
                "spoon, red, kitchen, happy, plate, dog"),
    "sport": ("football, tennis, basketball, swimming, hockey, golf",
              "ball, red, player, stadium, happy, tree"),
}  # fmt: skip
"""Texts that belong to each criterion, and texts that a language model might write in their place.
They were chosen before any measurement, except for the criteria of the issue that asked for it."""
NONSENSE = ("asdfgh qwerty", "xkcd zzyzx", "florbgle", "qwp mnb")

_YES_NO = (
    "Is banana a fruit? yes\nIs hammer a fruit? no\nIs hammer a tool? yes\nIs London a city? yes\n"
    "Is spoon a city? no\nIs tiger a tool? no\n"
)


def says_yes(llm: LanguageModel, criterion: str, texts: Sequence[str]) -> NDArray[np.float64]:
    """Return log p(yes) − log p(no) for the question whether each text is one, shape (n,)."""
    found = []
    for text in texts:
        yes, no = llm.log_likelihoods(f"{_YES_NO}Is {text} a {criterion}?", ["yes", "no"])
        found.append(yes - no)
    return np.array(found)


def area(good: NDArray[np.float64], wrong: NDArray[np.float64]) -> float:
    """Return how often a good text scores higher than a wrong one."""
    return float((good[:, None] > wrong[None]).mean())


def markdown(llm: LanguageModel) -> str:
    """Measure and write the tables."""
    rows, means, nonsense = [], [], []
    for criterion, lists in LISTS.items():
        good, wrong = (each.split(", ") for each in lists)
        asked = [says_yes(llm, criterion, texts) for texts in (good, wrong)]
        ratio = [relevance(llm, criterion, texts) for texts in (good, wrong)]
        means.append([float(each.mean()) for each in ratio])
        rows.append(
            [criterion, f"{area(*asked):.2f}", f"{area(*ratio):.2f}",
             *(f"{value:+.1f}" for value in means[-1]),
             f"{(ratio[0] < 0).mean():.0%}", f"{(ratio[1] < 0).mean():.0%}"]
        )  # fmt: skip
    every = [text for lists in LISTS.values() for text in lists[0].split(", ")]
    rng = np.random.default_rng(0)
    for criterion in NONSENSE:
        texts = [every[i] for i in rng.permutation(len(every))[:12]]
        nonsense.append(float(relevance(llm, criterion, texts).mean()))
    kept = np.mean([good >= MIN_RELEVANCE for good, _ in means])
    refused = np.mean([wrong < MIN_RELEVANCE for _, wrong in means])
    header = ["criterion", "yes or no: AUC", "ratio: AUC", "mean of good texts",
              "of wrong texts", "good texts below 0", "wrong texts below 0"]  # fmt: skip
    return "\n".join(
        [
            "# Does a language model know what belongs to a criterion?\n",
            f"`make eval-relevance`, crl_sdk {__version__}, {llm.name}. AUC: how often a text of "
            "the criterion scores higher than one that is not. Ratio: log p(text | “Examples of "
            "CRITERION:”) − log p(text | “Examples of things:”), in nats. Of five "
            "wordings, this one separates these lists best.\n",
            table(header, rows) + "\n",
            f"A list is doubted if its mean is below {MIN_RELEVANCE:g}. {kept:.0%} of the good "
            f"lists are not doubted, {refused:.0%} of the wrong ones are. Means of random texts "
            "for four criteria without meaning: "
            f"{', '.join(f'{value:+.1f}' for value in nonsense)}.\n",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llm", help="GGUF file; the default model if it is left out")
    parser.add_argument("--out", type=Path, help="file to write, .md")
    parsed = parser.parse_args(arguments)
    with LanguageModel.open(parsed.llm) as llm:
        text = markdown(llm)
    print(text)
    if parsed.out is not None:
        write_atomically(parsed.out, text.encode(), InvalidInputError)


if __name__ == "__main__":
    main()
