"""The paper's requests and prompts for its data sets, by name.

The prompts are those of the authors' code (github.com/XLearning-SCU/2025-NeurIPS-CRL, commit
ec6033c). The requests follow the paper's template (arXiv 2510.04564): "Generate common expressions
to describe the …, as many as possible."
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from crl_sdk.errors import InvalidInputError


@dataclass(frozen=True, slots=True)
class Preset:
    """How the paper asks about a criterion of a data set.

    Attributes:
        subject: What the values describe, such as `the color of objects`.
        prompt: Prompt of the text tower, a template with one `{}` for the text.
    """

    subject: str
    prompt: str


PRESETS: Mapping[str, Preset] = MappingProxyType({
    **{
        f"clevr4-{criterion}": Preset(
            f"the {criterion} of objects", f"objects with the {criterion} of {{}}"
        )
        for criterion in ("texture", "shape", "color", "count")
    },
    "cards-number": Preset(
        "the number of a poker card", "a poker card with the number of {}"
    ),
    "cards-suits": Preset(
        "the suit of a poker card", "a poker card with the card suits of {}"
    ),
    "genecis-scene": Preset("the scene of a photo", "a photo with a scene of {}"),
    **{
        f"deepfashion-{criterion}": Preset(
            f"the {criterion} of clothes", f"a fashion with a {criterion} of {{}}"
        )
        for criterion in ("texture", "fabric", "shape", "part", "style")
    },
})  # fmt: skip
"""Presets by name."""


def find_preset(name: str) -> Preset:
    """Return a preset.

    Raises:
        InvalidInputError: If there is none of this name.
    """
    if name not in PRESETS:
        raise InvalidInputError(f"expected a preset of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]
