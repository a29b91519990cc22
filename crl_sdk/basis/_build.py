"""Make a basis from texts: merge duplicates, average over prompts and make the projection."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from crl_sdk._criterion import normalise_criterion
from crl_sdk.basis._basis import Basis, MergedText
from crl_sdk.basis._contrastive import text_weights
from crl_sdk.basis._methods import (
    Method,
    check_method,
    default_method,
    find_method,
    make_projection,
)
from crl_sdk.errors import BasisError, InvalidInputError
from crl_sdk.projection._projection import EPSILON, POSTS, Post

DEFAULT_PROMPT = "{}"
"""Prompt that leaves a text as it is. `Embedder` uses the prompt that its bundle recommends."""

DEFAULT_MERGE_THRESHOLD = 0.995

_MADE_WITH = ("against", "ignore", "background", "weights", "sharpened")
"""Keys of the provenance that say what the projection was made with."""

FROM_VECTORS = "vectors"
"""Key of the provenance of a basis that was made without a text tower."""

EmbedText: TypeAlias = Callable[[Sequence[str]], NDArray[np.float32]]
"""Text tower of a model: n texts to embeddings of shape (n, d), float32, unit rows."""


def build_basis(
    criterion: str,
    texts: Sequence[str],
    embed_text: EmbedText,
    *,
    fingerprint: str,
    prompts: Sequence[str] = (DEFAULT_PROMPT,),
    method: Method | None = None,
    post: Post = "l2",
    merge_threshold: float = DEFAULT_MERGE_THRESHOLD,
    against: Sequence[Basis] = (),
    ignore: Sequence[Basis] = (),
    background: NDArray[np.floating] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Basis:
    """Make a basis from texts (Conditional Representation Learning, arXiv 2510.04564).

    Texts that differ only in case and white space are merged. So are texts whose embeddings have a
    cosine of at least `merge_threshold`: they are merged into the first of them. The basis records
    both, because a repeated text would have a hidden weight.

    Args:
        criterion: What the texts describe, such as `color`.
        texts: Short descriptive texts, at least one.
        embed_text: Text tower of the model.
        fingerprint: Fingerprint of that model's bundle.
        prompts: Templates with one `{}` for the text. Embeddings are averaged over all of them.
        method: Projection method, one of `crl_sdk.basis.METHODS`. None for `contrastive`, or for
            `cosine` with two texts.
        post: Row normalisation of the conditional embedding.
        merge_threshold: Cosine in (0, 1]; 1 merges exact duplicates only.
        against: Bases of other criteria. What varies in their texts counts less.
        ignore: Bases of criteria to disregard. Their directions are removed from the map.
        background: Embeddings of generic texts, shape (n, d), such as `ModelBundle.background`.
        provenance: JSON values to store with the basis.

    Returns:
        The basis.

    Raises:
        CriterionError: If the criterion is malformed.
        BasisMismatchError: If a basis in `against` or `ignore` was made for another model.
        InvalidInputError: If there are too few texts, a prompt or the threshold is malformed, or
            `against` does not fit the method.
    """
    name, checked_prompts = check_options(
        criterion, fingerprint=fingerprint, prompts=prompts, method=method, post=post,
        merge_threshold=merge_threshold, against=against, ignore=ignore,
    )  # fmt: skip
    distinct, counts, merged = _merge_exact(texts)
    embeddings = embed_with_prompts(distinct, checked_prompts, embed_text)
    kept, counts, near = _merge_near(distinct, counts, embeddings, merge_threshold)
    unit = embeddings[kept]
    chosen = check_method(
        method or default_method(len(kept), against=len(against)), against=len(against)
    )
    if len(kept) < min(chosen.min_texts, len(distinct)):
        raise InvalidInputError(
            f"the {len(distinct)} texts merge into {', '.join(repr(distinct[i]) for i in kept)}, "
            f"because their embeddings have cosines of {merge_threshold:g} or more: give texts "
            "that differ more, or raise merge_threshold"
        )
    others = [other.text_embeddings for other in against]
    projection = make_projection(
        unit, chosen.name, post=post, against=others, background=background,
        ignore=[other.projection for other in ignore],
    )  # fmt: skip
    made_with: dict[str, Any] = {}
    if against:
        made_with["against"] = [other.criterion for other in against]
    if ignore:
        made_with["ignore"] = [other.criterion for other in ignore]
    if background is not None and chosen.takes_background:
        made_with["background"] = len(background)
    if chosen.weights_texts:
        weights = text_weights(unit, others, background)
        made_with["weights"] = [round(float(each), 4) for each in weights / weights.max()]
    return Basis(
        criterion=name,
        texts=tuple(distinct[i] for i in kept),
        counts=tuple(counts),
        prompts=checked_prompts,
        text_embeddings=unit,
        projection=projection,
        method=chosen.name,
        fingerprint=fingerprint,
        merge_threshold=merge_threshold,
        merged=(*merged, *near),
        provenance={**(provenance or {}), **made_with},
    )


def check_options(
    criterion: str,
    *,
    fingerprint: str,
    prompts: Sequence[str],
    method: Method | None,
    post: Post,
    merge_threshold: float,
    against: Sequence[Basis],
    ignore: Sequence[Basis] = (),
) -> tuple[str, tuple[str, ...]]:
    """Check the arguments of `build_basis` that do not depend on its texts.

    This takes no time, while a language model may need a minute to write the texts.

    Returns:
        Normalised name of the criterion, and the prompts.

    Raises:
        CriterionError: If the criterion is malformed.
        BasisMismatchError: If a basis in `against` or `ignore` was made for another model.
        InvalidInputError: If another argument is malformed, or `against` does not fit the method.
    """
    name = normalise_criterion(criterion)
    checked_prompts = check_prompts(prompts)
    if not 0.0 < merge_threshold <= 1.0:
        raise InvalidInputError(f"expected merge_threshold in (0, 1], got {merge_threshold}")
    if post not in POSTS:
        raise InvalidInputError(f"expected post in {POSTS}, got {post!r}")
    for role, others in (("against", against), ("ignore", ignore)):
        for other in others:
            other.require_fingerprint(fingerprint)
            if other.criterion == name:
                raise InvalidInputError(
                    f"expected other criteria in {role}, got {name!r} itself: leave it out"
                )
    if method is not None:
        check_method(method, against=len(against))
    return name, checked_prompts


def edit_basis(
    basis: Basis,
    embed_text: EmbedText,
    *,
    fingerprint: str,
    add: Sequence[str] = (),
    remove: Sequence[str] = (),
    against: Sequence[Basis] = (),
    ignore: Sequence[Basis] = (),
    background: NDArray[np.floating] | None = None,
) -> Basis:
    """Make a basis again with texts added or removed.

    Prompts, method and row normalisation stay the same. Texts that had been merged into a removed
    text come back. The change is appended to `edits` in the provenance. A sharpened basis loses
    what it learnt from images: sharpen the result again.

    Args:
        basis: Basis to start from.
        embed_text: Text tower of the model.
        fingerprint: Fingerprint of that model's bundle.
        add: Texts to append.
        remove: Texts to leave out; case and white space do not matter.
        against: Bases of the other criteria that the basis was made against, which its file names
            but does not contain.
        ignore: Bases of the criteria that the basis disregards, likewise.
        background: Embeddings of generic texts, shape (n, d), such as `ModelBundle.background`.

    Returns:
        The new basis.

    Raises:
        BasisMismatchError: If the basis was made for another model.
        InvalidInputError: If a text to remove is missing, a text to add is there already, or too
            few texts would be left.
        BasisError: If the basis was made from vectors, or `against` or `ignore` are not the
            criteria that it was made with.
    """
    if basis.provenance.get(FROM_VECTORS):
        raise BasisError(
            f"basis {basis.criterion!r} was made from vectors, so that no text tower can embed "
            "other texts: make it again with crl basis create --vectors FILE --overwrite"
        )
    basis.require_fingerprint(fingerprint)
    for role, given in (("against", against), ("ignore", ignore)):
        expected = basis.provenance.get(role, [])
        if sorted(expected) != sorted(other.criterion for other in given):
            raise BasisError(
                f"basis {basis.criterion!r} was made with {role} {', '.join(expected) or 'nothing'}"
                f": pass the bases of these criteria as {role}"
            )
    texts = [*basis.texts, *(merged.text for merged in basis.merged)]
    gone = {_comparison_key(text) for text in remove}
    missing = [
        text for text in remove if _comparison_key(text) not in {_comparison_key(t) for t in texts}
    ]
    if missing:
        raise InvalidInputError(
            f"basis {basis.criterion!r} has no text {missing[0]!r}; it has {', '.join(texts)}"
        )
    kept = [text for text in texts if _comparison_key(text) not in gone]
    present = {_comparison_key(text) for text in kept}
    if double := [text for text in add if _comparison_key(text) in present]:
        raise InvalidInputError(f"basis {basis.criterion!r} has the text {double[0]!r} already")
    kept_provenance = {k: v for k, v in basis.provenance.items() if k not in _MADE_WITH}
    edits = [*basis.provenance.get("edits", ()), {"added": [*add], "removed": [*remove]}]
    return build_basis(
        basis.criterion,
        [*kept, *add],
        embed_text,
        fingerprint=fingerprint,
        prompts=basis.prompts,
        method=find_method(basis.method).name,
        post=basis.projection.post,
        merge_threshold=basis.merge_threshold,
        against=against,
        ignore=ignore,
        background=background,
        provenance={**kept_provenance, "edits": edits},
    )


def check_prompts(prompts: Sequence[str]) -> tuple[str, ...]:
    """Return prompts as a tuple; a single string is one prompt.

    Raises:
        InvalidInputError: If there is no prompt, or one does not have exactly one `{}`.
    """
    if isinstance(prompts, str):
        prompts = (prompts,)
    if len(prompts) == 0:
        raise InvalidInputError("expected at least one prompt, such as '{}'")
    for prompt in prompts:
        if prompt.count("{}") != 1:
            raise InvalidInputError(
                f"expected a prompt with exactly one {{}} for the text, such as "
                f"'a photo of {{}}'; got {prompt!r}"
            )
    return tuple(prompts)


def embed_with_prompts(
    texts: Sequence[str], prompts: Sequence[str], embed_text: EmbedText
) -> NDArray[np.float32]:
    """Embed each text with each prompt, average over the prompts and normalise.

    Args:
        texts: The k texts.
        prompts: Templates with one `{}`.
        embed_text: Text tower of the model.

    Returns:
        Embeddings of shape (k, d), float32, unit rows.
    """
    filled = [prompt.replace("{}", text) for prompt in prompts for text in texts]
    embeddings = np.asarray(embed_text(filled), dtype=np.float32)
    mean = embeddings.reshape(len(prompts), len(texts), -1).mean(axis=0)
    norms = np.linalg.norm(mean, axis=1, keepdims=True)
    return np.asarray(mean / np.maximum(norms, EPSILON), dtype=np.float32)


def _merge_exact(
    texts: Sequence[str],
) -> tuple[list[str], list[int], tuple[MergedText, ...]]:
    """Merge texts that differ only in case and white space."""
    if isinstance(texts, str):
        raise InvalidInputError(f"expected a list of texts, got one string: pass [{texts[:40]!r}]")
    first: dict[str, int] = {}
    kept: list[str] = []
    counts: list[int] = []
    merged: list[MergedText] = []
    for text in texts:
        tidy = " ".join(text.split())
        if not tidy:
            raise InvalidInputError(f"a text has no visible characters ({text[:40]!r}): remove it")
        position = first.setdefault(_comparison_key(text), len(kept))
        if position == len(kept):
            kept.append(tidy)
            counts.append(1)
        else:
            counts[position] += 1
            merged.append(MergedText(tidy, kept[position], 1.0))
    if not kept:
        raise InvalidInputError("expected at least one text, got an empty list")
    return kept, counts, tuple(merged)


def _merge_near(
    texts: Sequence[str],
    counts: Sequence[int],
    embeddings: NDArray[np.float32],
    threshold: float,
) -> tuple[list[int], list[int], tuple[MergedText, ...]]:
    """Merge each text into the nearest kept text if their cosine reaches `threshold`."""
    kept: list[int] = []
    totals: list[int] = []
    merged: list[MergedText] = []
    for i, text in enumerate(texts):
        cosines = embeddings[kept] @ embeddings[i] if kept and threshold < 1 else np.zeros(0)
        if cosines.size and cosines.max() >= threshold:
            nearest = int(cosines.argmax())
            totals[nearest] += counts[i]
            merged.append(MergedText(text, texts[kept[nearest]], round(float(cosines.max()), 6)))
        else:
            kept.append(i)
            totals.append(counts[i])
    return kept, totals, tuple(merged)


def _comparison_key(text: str) -> str:
    """Return a text without differences in case and white space."""
    return " ".join(text.split()).casefold()
