"""Texts → basis: duplicates merged and prompts averaged; `crl_sdk.basis` makes the affine map."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from crl_sdk._criterion import normalise_criterion
from crl_sdk.basis._basis import Basis, MergedText, Method
from crl_sdk.basis._methods import default_method, make_projection
from crl_sdk.errors import BasisError, InvalidInputError
from crl_sdk.projection._projection import EPSILON, Post

DEFAULT_PROMPT = "{}"
"""Prompt that leaves a text as it is."""

DEFAULT_MERGE_THRESHOLD = 0.995

EmbedText: TypeAlias = Callable[[Sequence[str]], NDArray[np.float32]]


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
    reference: NDArray[np.floating] | None = None,
    against: Sequence[Basis] = (),
    provenance: Mapping[str, Any] | None = None,
) -> Basis:
    """Make a basis from texts (Conditional Representation Learning, arXiv 2510.04564).

    Texts equal but for case and white space are one; texts whose embeddings have a cosine of
    `merge_threshold` or more are merged into the first of them. Both are counted and reported,
    because repeated texts act as hidden weights.

    Args:
        criterion: what the texts describe.
        texts: short descriptive texts, at least one.
        embed_text: texts to (n, d) float32 unit rows; the model's text tower.
        fingerprint: of the model behind `embed_text`.
        prompts: templates with one `{}` for the text. Over several, embeddings are averaged.
        method: how to make the map of the texts, see `crl_sdk.basis`; None for `centred`, or
            `exclusive-weighted` with against.
        post: normalisation of the conditional embedding.
        merge_threshold: cosine in (0, 1]; 1 merges exact duplicates only.
        reference: (n, d) embeddings of typical images; their mean is removed from every image.
        against: bases of other criteria, for the methods that begin with `exclusive`.
        provenance: JSON values to keep with the basis.

    Raises:
        CriterionError: the criterion is malformed.
        BasisMismatchError: a other is another model's.
        InvalidInputError: no texts, too few for the method, a malformed prompt or threshold;
            references or against that the method does not take or lacks.
    """
    name = normalise_criterion(criterion)
    checked_prompts = _check_prompts(prompts)
    if not 0.0 < merge_threshold <= 1.0:
        raise InvalidInputError(f"expected merge_threshold in (0, 1], got {merge_threshold}")
    distinct, counts, merged = _merge_exact(texts)
    embeddings = embed_with_prompts(distinct, checked_prompts, embed_text)
    kept, counts, near = _merge_near(distinct, counts, embeddings, merge_threshold)
    unit = embeddings[kept]
    method = method or default_method(against=bool(against))
    if len(kept) == 1 < len(distinct) and method != "cosine":
        raise InvalidInputError(
            f"all {len(distinct)} texts merge into {distinct[0]!r}: the model hardly tells them "
            f"apart (cosines from {merge_threshold:g}); give others, or merge from a higher cosine"
        )
    for other in against:
        other.require_fingerprint(fingerprint)
        if other.criterion == name:
            raise InvalidInputError(
                f"expected other criteria than {name!r} as against: it is not its own other"
            )
    projection = make_projection(
        unit, method, post=post, reference=reference,
        against=[other.text_embeddings for other in against],
    )  # fmt: skip
    made_with: dict[str, Any] = {} if reference is None else {"references": len(reference)}
    if against:
        made_with["against"] = [other.criterion for other in against]
    return Basis(
        criterion=name,
        texts=tuple(distinct[i] for i in kept),
        counts=tuple(counts),
        prompts=checked_prompts,
        text_embeddings=unit,
        projection=projection,
        method=method,
        fingerprint=fingerprint,
        merge_threshold=merge_threshold,
        merged=(*merged, *near),
        provenance={**(provenance or {}), **made_with},
    )


def edit_basis(
    basis: Basis,
    embed_text: EmbedText,
    *,
    fingerprint: str,
    add: Sequence[str] = (),
    remove: Sequence[str] = (),
) -> Basis:
    """Make a basis again with other texts, its prompts, method and post-normalisation kept.

    Texts that had been merged into a removed one come back. The change is added to the basis'
    provenance under `edits`.

    Args:
        basis: to start from.
        embed_text: texts to (n, d) float32 unit rows; the model's text tower.
        fingerprint: of the model behind `embed_text`.
        add: texts to append.
        remove: texts to leave out, equal but for case and white space.

    Raises:
        BasisMismatchError: the basis is another model's.
        InvalidInputError: a text to remove is not there, or too few would be left.
        BasisError: the basis was made with reference images or against, which it does not hold.
    """
    basis.require_fingerprint(fingerprint)
    if used := [name for name in ("references", "against") if name in basis.provenance]:
        raise BasisError(
            f"basis {basis.criterion!r} was made with {' and '.join(used)}, which it does not "
            "hold: make it again with build_basis(…)"
        )
    texts = [*basis.texts, *(merged.text for merged in basis.merged)]
    gone = {_folded(text) for text in remove}
    missing = [text for text in remove if _folded(text) not in {_folded(t) for t in texts}]
    if missing:
        raise InvalidInputError(
            f"basis {basis.criterion!r} has no text {missing[0]!r}; it has {', '.join(texts)}"
        )
    edits = [*basis.provenance.get("edits", ()), {"added": [*add], "removed": [*remove]}]
    return build_basis(
        basis.criterion,
        [*(text for text in texts if _folded(text) not in gone), *add],
        embed_text,
        fingerprint=fingerprint,
        prompts=basis.prompts,
        method=basis.method,
        post=basis.projection.post,
        merge_threshold=basis.merge_threshold,
        provenance={**basis.provenance, "edits": edits},
    )


def embed_with_prompts(
    texts: Sequence[str], prompts: Sequence[str], embed_text: EmbedText
) -> NDArray[np.float32]:
    """Embed each text under each prompt, average over prompts and normalise.

    Args:
        texts: k texts.
        prompts: templates with one `{}`.
        embed_text: texts to (n, d) float32 unit rows.

    Returns:
        (k, d) float32, unit rows.
    """
    filled = [prompt.replace("{}", text) for prompt in prompts for text in texts]
    embeddings = np.asarray(embed_text(filled), dtype=np.float32)
    mean = embeddings.reshape(len(prompts), len(texts), -1).mean(axis=0)
    norms = np.linalg.norm(mean, axis=1, keepdims=True)
    return np.asarray(mean / np.maximum(norms, EPSILON), dtype=np.float32)


def _check_prompts(prompts: Sequence[str]) -> tuple[str, ...]:
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


def _merge_exact(
    texts: Sequence[str],
) -> tuple[list[str], list[int], tuple[MergedText, ...]]:
    """Drop texts that are equal but for case and white space."""
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
        position = first.setdefault(_folded(text), len(kept))
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
    """Merge each text into the first kept one whose cosine reaches `threshold`."""
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


def _folded(text: str) -> str:
    """Give what texts that are equal but for case and white space have in common."""
    return " ".join(text.split()).casefold()
