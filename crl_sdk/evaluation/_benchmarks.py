"""Which benchmarks there are: criteria, the paper's prompts and encoders, where the data is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias, get_args

from crl_sdk.evaluation import _cards as cards
from crl_sdk.evaluation import _clevr4 as clevr4
from crl_sdk.evaluation import _deepfashion as deepfashion
from crl_sdk.evaluation import _genecis as genecis

Name: TypeAlias = Literal[
    "clevr4", "cards", "genecis-focus", "genecis-change", "deepfashion", "demo", "cards-photos"
]
NAMES: tuple[Name, ...] = get_args(Name)


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A benchmark.

    Attributes:
        task: `labels` for clustering and few-shot classification, or the retrieval of that name.
        prompts: criterion → template with one `{}`; the paper's wherever it has one.
        encoder: that the authors' code loads; empty where the paper has no such benchmark.
        layout: of its directory, in words.
        source: where its data comes from.
        columns: criterion → column of `labels.csv`, where there is one.
        remark: what its figures do not mean.
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


BENCHMARKS: Mapping[Name, Benchmark] = MappingProxyType(
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
            "labels.csv (file, rank, suit) and the pictures",
            "208 photographs, four of each card",
            {"number": "rank", "suits": "suit"},
            "a small set to try the plumbing with; the paper has none like it",
        ),
    }
)
