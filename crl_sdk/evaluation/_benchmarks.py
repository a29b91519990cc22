"""List of the benchmarks, with their criteria, prompts, encoders and data sources."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias, get_args

from crl_sdk.evaluation import _cards as cards
from crl_sdk.evaluation import _clevr4 as clevr4
from crl_sdk.evaluation import _deepfashion as deepfashion
from crl_sdk.evaluation import _genecis as genecis

BenchmarkName: TypeAlias = Literal[
    "clevr4", "cards", "genecis-focus", "genecis-change", "deepfashion", "demo", "cards-photos"
]
BENCHMARK_NAMES: tuple[BenchmarkName, ...] = get_args(BenchmarkName)


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Description of a benchmark.

    Attributes:
        task: `labels` for clustering and few-shot classification, or the name of a retrieval task.
        prompts: Prompt of each criterion, with one `{}`. Those of the paper where it has one.
        encoder: Model that the authors' code loads. Empty if the benchmark is not in the paper.
        layout: Description of the data set's directory.
        source: Where to get the data set.
        columns: Column of `labels.csv` for each criterion. None if there is no such file.
        remark: Limit of what the results mean. May be empty.
    """

    task: Literal["labels", "genecis", "deepfashion"]
    prompts: Mapping[str, str]
    encoder: str
    layout: str
    source: str
    columns: Mapping[str, str] | None = None
    remark: str = ""


_CARDS = {
    "number": "a poker card with the number of {}",
    "suits": "a poker card with the card suits of {}",
}
_B32, _B16 = "OpenAI's CLIP ViT-B/32", "OpenAI's CLIP ViT-B/16"


def _genecis(task: str) -> Benchmark:
    return Benchmark(
        "genecis",
        {"scene": "a photo with a scene of {}"},
        _B16,
        genecis.layout(task),
        "https://github.com/facebookresearch/genecis",
    )


BENCHMARKS: Mapping[BenchmarkName, Benchmark] = MappingProxyType(
    {
        "clevr4": Benchmark(
            "labels",
            {name: f"objects with the {name} of {{}}" for name in clevr4.VALUES},
            _B32,
            clevr4.LAYOUT,
            "https://www.robots.ox.ac.uk/~vgg/data/clevr4/",
        ),
        "cards": Benchmark(
            "labels",
            _CARDS,
            _B32,
            cards.LAYOUT,
            "http://faculty.washington.edu/juhuah/images/AugDMC_datasets.zip",
        ),
        "genecis-focus": _genecis("focus"),
        "genecis-change": _genecis("change"),
        "deepfashion": Benchmark(
            "deepfashion",
            {name: f"a fashion with a {name} of {{}}" for name in deepfashion.ATTRIBUTES},
            _B16,
            deepfashion.layout("test"),
            "https://github.com/Maryeon/asenpp",
        ),
        "demo": Benchmark(
            "labels",
            {name: "a photo of {}" for name in ("shape", "colour", "texture", "count")},
            "",
            "labels.csv and images/",
            "crl demo-data",
            {name: name for name in ("shape", "colour", "texture", "count")},
            "the demo model was trained on other scenes of this world",
        ),
        "cards-photos": Benchmark(
            "labels",
            _CARDS,
            "",
            "labels.csv (file, rank, suit) and the images",
            "208 photographs, four of each card",
            {"number": "rank", "suits": "suit"},
            "a small set for trying the command; the paper has no such data set",
        ),
    }
)
"""The known benchmarks of conditional embeddings, by name."""
