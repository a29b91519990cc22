"""Let the user's own pictures vote on texts: which of them tell the pictures apart?

Similarities are taken after the mean of the background is subtracted from the texts and the mean of
the pictures from the pictures. `python -m crl_benchmarks.picture_votes` shows what this finds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crl_sdk.errors import InvalidInputError
from crl_sdk.projection._projection import normalise_rows

MIN_PICTURES = 20
"""Smallest number of pictures that can vote."""

TEMPERATURE = 0.01
"""Temperature of the shares, that of CLIP."""

MIN_SHARE = 0.1
"""A text fires if its share of the pictures is at least this part of an equal share."""

NEVER_FIRES = "fits {:.1f} % of the pictures best"
"""Reason why a text was dropped."""


@dataclass(frozen=True, slots=True, eq=False)
class PictureVotes:
    """What pictures say about texts.

    Attributes:
        spread: Standard deviation of each text's similarity over the pictures, shape (k,).
        share: Share of the pictures that each text fits best, shape (k,). The sum is 1.
        fires: Whether each text fits some pictures best, shape (k,).
        count: Number of pictures.
    """

    spread: NDArray[np.float32]
    share: NDArray[np.float32]
    fires: NDArray[np.bool_]
    count: int


def require_pictures(pictures: NDArray[np.floating], dim: int) -> None:
    """Check that pictures can vote.

    Args:
        pictures: Universal embeddings of the pictures.
        dim: Length d of the model's embeddings.

    Raises:
        InvalidInputError: If they are not finite rows of length d, or are fewer than
            `MIN_PICTURES`.
    """
    shape = np.shape(pictures)
    if len(shape) != 2 or shape[1] != dim:
        raise InvalidInputError(
            f"expected universal embeddings of pictures of shape (n, {dim}), got {shape}"
        )
    if shape[0] < MIN_PICTURES:
        raise InvalidInputError(
            f"expected at least {MIN_PICTURES} pictures to vote, got {shape[0]}"
        )
    if not np.isfinite(pictures).all():
        bad = int(np.flatnonzero(~np.isfinite(pictures).all(axis=1))[0])
        raise InvalidInputError(
            f"expected finite embeddings of pictures, row {bad} has NaN or infinity: leave out "
            "pictures that could not be embedded"
        )


def vote(
    texts: NDArray[np.floating],
    pictures: NDArray[np.floating],
    background: NDArray[np.floating] | None = None,
) -> PictureVotes:
    """Return what pictures say about texts.

    Args:
        texts: Embeddings of the texts, shape (k, d), unit rows.
        pictures: Universal embeddings of the pictures, shape (n, d), unit rows.
        background: Embeddings of generic texts, shape (b, d), unit rows. Without them, the mean of
            the texts is subtracted.

    Raises:
        InvalidInputError: If the pictures cannot vote, see `require_pictures`.
    """
    require_pictures(pictures, texts.shape[1])
    common = (texts if background is None else background).mean(axis=0, dtype=np.float64)
    rows = normalise_rows(np.asarray(texts - common, np.float32), "l2")
    similarity = (pictures - pictures.mean(axis=0)) @ rows.T
    weights = np.exp((similarity - similarity.max(axis=1, keepdims=True)) / TEMPERATURE)
    share = (weights / weights.sum(axis=1, keepdims=True)).mean(axis=0)
    return PictureVotes(
        np.asarray(similarity.std(axis=0), np.float32),
        np.asarray(share, np.float32),
        share >= MIN_SHARE / len(texts),
        len(pictures),
    )


def describe(votes: PictureVotes, texts: Sequence[str], kept: Sequence[str]) -> dict[str, object]:
    """Return what a basis records about the votes on its texts, as JSON values.

    Args:
        votes: The votes.
        texts: The texts that were voted on.
        kept: Those of them that were kept.
    """
    wanted = set(kept)
    both = zip(texts, votes.spread, votes.share, strict=True)
    found = {text: (float(spread), float(share)) for text, spread, share in both if text in wanted}
    return {
        "count": votes.count,
        "spread": {text: round(spread, 4) for text, (spread, _) in found.items()},
        "share": {text: round(share, 4) for text, (_, share) in found.items()},
    }
