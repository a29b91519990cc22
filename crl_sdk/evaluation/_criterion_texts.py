"""Texts of the criteria of a benchmark, with their embeddings, from lists or from bases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crl_sdk.basis._basis import Basis
from crl_sdk.basis._build import EmbedText, embed_with_prompts
from crl_sdk.basis._methods import Method, find_method, make_projection
from crl_sdk.errors import InvalidInputError
from crl_sdk.projection._projection import Projection


@dataclass(frozen=True, slots=True, eq=False)
class CriterionTexts:
    """Texts of a criterion.

    Attributes:
        texts: The k texts.
        embeddings: Embeddings of the texts, shape (k, d), float32, unit rows.
        prompts: Prompts that the texts were embedded with.
        source: Description of where the texts come from.
    """

    texts: tuple[str, ...]
    embeddings: NDArray[np.float32]
    prompts: tuple[str, ...]
    source: str

    @property
    def repeated(self) -> int:
        """Number of texts that repeat another one, ignoring case. They weigh more than others."""
        return len(self.texts) - len({text.casefold() for text in self.texts})


def texts_from_list(
    texts: Sequence[str], prompt: str, embed_text: EmbedText, source: str
) -> CriterionTexts:
    """Embed a list of texts as the authors do. Repeated texts are kept.

    `crl basis create` merges repeated texts instead, because they act as hidden weights.

    Args:
        texts: Texts, at least one.
        prompt: Prompt with one `{}`.
        embed_text: Function from n texts to embeddings, shape (n, d), float32, unit rows.
        source: Description of where the texts come from.

    Raises:
        InvalidInputError: If there are no texts, a text is blank or too long for the model, or the
            prompt is malformed.
    """
    tidy = [" ".join(text.split()) for text in texts]
    if not tidy or not all(tidy):
        raise InvalidInputError(f"{source}: expected texts that are not blank, got {len(tidy)}")
    if prompt.count("{}") != 1:
        raise InvalidInputError(f"expected a prompt with exactly one {{}}, got {prompt!r}")
    embeddings = embed_with_prompts(tidy, (prompt,), embed_text)
    return CriterionTexts(tuple(tidy), embeddings, (prompt,), source)


def texts_from_basis(basis: Basis, fingerprint: str, source: str) -> CriterionTexts:
    """Return the texts of a basis, embedded with its own prompts.

    Args:
        basis: The basis.
        fingerprint: Fingerprint of the model to evaluate.
        source: Description of where the basis comes from.

    Raises:
        BasisMismatchError: If the basis was made for another model.
    """
    basis.require_fingerprint(fingerprint)
    return CriterionTexts(basis.texts, basis.text_embeddings, basis.prompts, source)


def make_projections(
    texts: Mapping[str, CriterionTexts],
    method: Method,
    background: NDArray[np.floating] | None = None,
) -> dict[str, Projection]:
    """Make the projection of each criterion, without row normalisation.

    The protocols normalise the rows themselves.

    Args:
        texts: Texts of all criteria. Methods that take other criteria get the remaining ones.
        method: One of `crl_sdk.basis.METHODS`. `cosine` is the paper's.
        background: Embeddings of generic texts, shape (n, d), such as `ModelBundle.background`.

    Raises:
        InvalidInputError: If there are too few texts for the method, or no other criteria.
    """
    made = {}
    for criterion, own in texts.items():
        others = [each.embeddings for name, each in texts.items() if name != criterion]
        made[criterion] = make_projection(
            own.embeddings, method, post="none",
            against=others if find_method(method).takes_against else (), background=background,
        )  # fmt: skip
    return made
