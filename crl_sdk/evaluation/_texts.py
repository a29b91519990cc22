"""The texts of a benchmark's criteria, embedded: from lists, from bases, duplicates and all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crl_sdk.basis._basis import Basis, Method
from crl_sdk.basis._build import EmbedText, embed_with_prompts
from crl_sdk.basis._methods import make_projection, takes_against
from crl_sdk.errors import InvalidInputError
from crl_sdk.projection._projection import Projection


@dataclass(frozen=True, slots=True, eq=False)
class Texts:
    """What a criterion's space is made of.

    Attributes:
        texts: k texts.
        embeddings: (k, d) float32, unit rows.
        prompts: that they were embedded under.
        source: where they come from, in words.
    """

    texts: tuple[str, ...]
    embeddings: NDArray[np.float32]
    prompts: tuple[str, ...]
    source: str

    @property
    def repeated(self) -> int:
        """How many texts are there already, but for case: they weigh more than the others."""
        return len(self.texts) - len({text.casefold() for text in self.texts})


def embed_list(texts: Sequence[str], prompt: str, embed_text: EmbedText, source: str) -> Texts:
    """Embed a list of texts as the authors do: each as it is, a repeated one once more.

    (`crl basis create` merges them, since they act as hidden weights.)

    Args:
        texts: at least one.
        prompt: template with one `{}`.
        embed_text: texts to (n, d) float32 unit rows; the model's text tower.
        source: where they come from, in words.

    Raises:
        InvalidInputError: no texts, a blank one, one too long for the model, or another template.
    """
    tidy = [" ".join(text.split()) for text in texts]
    if not tidy or not all(tidy):
        raise InvalidInputError(f"{source}: expected texts, none of them blank, got {len(tidy)}")
    if prompt.count("{}") != 1:
        raise InvalidInputError(f"expected a prompt with exactly one {{}}, got {prompt!r}")
    return Texts(tuple(tidy), embed_with_prompts(tidy, (prompt,), embed_text), (prompt,), source)


def of_basis(basis: Basis, fingerprint: str, source: str) -> Texts:
    """Take the texts of a basis, under its own prompts.

    Raises:
        BasisMismatchError: it was made for another model.
    """
    basis.require_fingerprint(fingerprint)
    return Texts(basis.texts, basis.text_embeddings, basis.prompts, source)


def projections(texts: Mapping[str, Texts], method: Method) -> dict[str, Projection]:
    """Make each criterion's map, without a row normalisation: protocols bring their own.

    Args:
        texts: of all criteria; for the methods that begin with `exclusive` the others are the
            against.
        method: one of `crl_sdk.basis.METHODS`; `cosine` is the paper's.

    Raises:
        InvalidInputError: too few texts for the method, or no against.
    """
    made = {}
    for criterion, own in texts.items():
        others = [each.embeddings for name, each in texts.items() if name != criterion]
        made[criterion] = make_projection(
            own.embeddings, method, post="none",
            against=others if takes_against(method) else (),
        )  # fmt: skip
    return made
