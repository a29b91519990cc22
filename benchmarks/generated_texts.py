"""What the default language model says on criteria that nothing was tuned on, unedited.

`python -m crl_benchmarks.generated_texts > docs/GENERATED.md`
"""

from __future__ import annotations

from crl_sdk.basis._generate import GenerationOptions, generate_texts
from crl_sdk.basis._language_model import LanguageModel
from crl_sdk.errors import GenerationError

CRITERIA = (
    "mood", "season", "animal habitat", "time of day", "material", "art style", "age", "weather",
    "viewpoint", "occasion", "plant disease", "damage", "emotion", "clothing", "food", "vehicle",
)  # fmt: skip
TUNED_ON = ("mood", "season", "time of day", "material", "weather", "vehicle")


def main() -> None:
    """Print one section per criterion."""
    with LanguageModel.open() as model:
        print(
            "# Generated texts\n\n"
            f"What {model.path.name} lists for criteria in words, as `crl basis create NAME` takes "
            "it, good or bad, with votes of at most 24 answers. Nothing is edited, and the filter "
            "in the space of a vision-language model is off, since the demo model knows none of "
            f"these words. The generator was tuned while looking at {', '.join(TUNED_ON)}.\n\n"
            "Made by `python -m crl_benchmarks.generated_texts`."
        )
        for criterion in CRITERIA:
            print(f"\n## {criterion}\n", flush=True)
            try:
                draft = generate_texts(criterion, model, GenerationOptions())
            except GenerationError as error:
                print(f"Refused: {error}")
                continue
            unsure = " The model is unsure, and `crl` says so." if draft.unsure else ""
            texts = ", ".join(f"{text.text} {text.votes}" for text in draft.texts)
            print(f"{texts}. ({draft.answers} answers.){unsure}")


if __name__ == "__main__":
    main()
