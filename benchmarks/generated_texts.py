"""Print the unedited texts of the default language model for criteria in words.

`python -m crl_benchmarks.generated_texts > docs/GENERATED.md`
"""

from __future__ import annotations

from pathlib import Path

from crl_benchmarks.everyday_values import DEVELOPMENT
from crl_sdk.basis._generate import generate_texts
from crl_sdk.basis._language_model import LanguageModel
from crl_sdk.errors import GenerationError

CRITERIA = (
    "mood", "season", "animal habitat", "time of day", "material", "art style", "age", "weather",
    "viewpoint", "occasion", "plant disease", "damage", "emotion", "clothing", "food", "vehicle",
)  # fmt: skip


def main() -> None:
    """Print one section for each criterion."""
    with LanguageModel.open() as llm:
        print(
            "# Generated texts\n\n"
            f"What {Path(llm.source).name} lists for criteria in words, as `crl basis create NAME` "
            "takes it, good or bad, with votes of at most 24 answers. Nothing is edited, and the "
            "filter in the space of a vision-language model is off, since the demo model knows "
            "none of these words. The generator was tuned while looking at "
            f"{', '.join(DEVELOPMENT)}.\n\n"
            "Made by `python -m crl_benchmarks.generated_texts`."
        )
        for criterion in CRITERIA:
            print(f"\n## {criterion}\n", flush=True)
            try:
                generated = generate_texts(criterion, llm)  # without embeddings: see above
            except GenerationError as error:
                print(f"Refused: {error}")
                continue
            unsure = " The model is unsure, and `crl` says so." if generated.unsure else ""
            texts = ", ".join(f"{text.text} {text.votes}" for text in generated.texts)
            print(f"{texts}. ({generated.answers} answers.){unsure}")


if __name__ == "__main__":
    main()
