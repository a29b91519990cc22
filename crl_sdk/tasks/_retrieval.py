"""The nearest pictures under one criterion or several, and "like this picture, but with …"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crl_sdk._criterion import normalise_criterion
from crl_sdk.basis._basis import Basis
from crl_sdk.errors import CriterionError, InvalidInputError
from crl_sdk.projection._project_rows import project_rows
from crl_sdk.projection._projection import EPSILON, check_embeddings
from crl_sdk.tasks._kmeans import check_rows

PLACES = ("left", "right", "top", "lower", "mid")
"""Where the captions of a condition put it: arXiv 2510.04564."""

PAPER_WEIGHT = 10.0
"""Of the scene against the condition in arXiv 2510.04564, whose scene rows are raw cosines."""

_BLOCK_BYTES = 8 << 20
_DECIMALS = 6  # of a score: float32 holds no more, and copies of a picture tie


@dataclass(frozen=True, slots=True, eq=False)
class Hits:
    """What was found, the best first; equal scores in the order of the index.

    Attributes:
        positions: (n,) int64, into the index.
        scores: (n,) float32, what they are ranked by.
        parts: each part of the score → (n,) float32, before its weight: a criterion's cosine, or
            `condition` for the similarity with the condition.
        weights: each part's weight.
    """

    positions: NDArray[np.int64]
    scores: NDArray[np.float32]
    parts: Mapping[str, NDArray[np.float32]]
    weights: Mapping[str, float] = field(default_factory=dict)


class Index:
    """Pictures to search, as conditional rows of one criterion or several.

    Nothing is trained: every search compares the query with all rows, in blocks, so that rows may
    be mapped files larger than memory. It reads them once when it is made and once a search.
    """

    def __init__(
        self, rows: Mapping[str, NDArray[Any]], *, universal: NDArray[Any] | None = None
    ) -> None:
        """Check the rows and take their lengths.

        Args:
            rows: criterion → conditional embeddings (n, m) float of the same n pictures, as
                `Embeddings.conditional` or mapped files of `crl project` have them. May be empty
                if there are universal embeddings.
            universal: (n, d) float, unit rows; `but_with` needs them.

        Raises:
            CriterionError: a criterion's name is malformed.
            InvalidInputError: nothing is given, the numbers of pictures differ, or a row holds NaN.
        """
        self._rows = {normalise_criterion(name): np.asarray(each) for name, each in rows.items()}
        if len(self._rows) != len(rows):
            raise InvalidInputError(f"expected each criterion once, got {list(rows)}")
        self._universal = None if universal is None else np.asarray(universal)
        given = [*self._rows.values(), *(() if universal is None else (self._universal,))]
        sizes = sorted({len(each) for each in given if each is not None and each.ndim == 2})
        if len(sizes) != 1 or any(each is None or each.ndim != 2 for each in given):
            shapes = [np.shape(each) for each in given]
            raise InvalidInputError(
                f"expected rows (n, m) of the same n pictures for each criterion, got {shapes}"
            )
        self._size = sizes[0]
        self._scales = {name: _scales(each) for name, each in self._rows.items()}
        if self._universal is not None:
            _scales(self._universal)

    @classmethod
    def project(cls, universal: NDArray[Any], bases: Sequence[Basis]) -> Index:
        """Make an index of universal embeddings.

        Args:
            universal: (n, d) float, unit rows; may be mapped.
            bases: at least one, of distinct criteria and one model.

        Raises:
            BasisMismatchError: the bases are of different models.
            InvalidInputError: shapes or values are wrong, or a criterion is there twice.
        """
        if not bases:
            raise InvalidInputError("expected at least one basis, got none")
        for basis in bases:
            basis.require_fingerprint(bases[0].fingerprint)
        names = [basis.criterion for basis in bases]
        if len(set(names)) != len(names):
            raise InvalidInputError(f"expected each criterion once, got {names}")
        rows = project_rows(universal, [basis.projection for basis in bases])
        return cls(dict(zip(names, rows, strict=True)), universal=universal)

    def __len__(self) -> int:
        """Tell how many pictures there are."""
        return self._size

    @property
    def criteria(self) -> tuple[str, ...]:
        """Criteria that can be searched by."""
        return tuple(self._rows)

    def nearest(
        self,
        query: Mapping[str, NDArray[Any]] | int,
        weights: Mapping[str, float] | None = None,
        n: int = 10,
    ) -> Hits:
        """Find the pictures nearest to a query: the weighted sum of each criterion's cosine.

        Args:
            query: criterion → its row (m,) or (1, m) float; or the position of a picture of the
                index, which is then left out of what is found.
            weights: criterion → its weight, not 0; a negative one looks for what is unlike. None
                weighs all criteria of the query 1.
            n: pictures at most.

        Raises:
            CriterionError: a criterion is not in the index or not in the query.
            InvalidInputError: a row of another length, NaN, a position out of range, n < 1.
        """
        own = query if isinstance(query, int | np.integer) else None
        rows = self._own(int(own)) if own is not None else dict(_named(query))  # type: ignore[arg-type]
        chosen = dict(_named(weights)) if weights is not None else dict.fromkeys(rows, 1.0)
        if not chosen or not all(np.isfinite(w) and w != 0 for w in chosen.values()):
            raise InvalidInputError(
                f"expected weights that are numbers other than 0, got {dict(chosen)}"
            )
        parts = {}
        for name in chosen:
            if name not in rows:
                raise CriterionError(f"the query has no criterion {name!r}, it has {sorted(rows)}")
            parts[name] = self.cosines(name, rows[name])
        return self._ranked(parts, chosen, n, None if own is None else int(own))

    def but_with(
        self,
        query: NDArray[Any] | int,
        condition: NDArray[Any],
        *,
        scene: str = "scene",
        weight: float | None = PAPER_WEIGHT,
        n: int = 10,
    ) -> Hits:
        """Find pictures like this one, but with something said in words.

        score = weight · cos(scene rows) + similarity with the condition, which is the mean cosine
        of the picture with the captions of `captions(condition)`: the retrieval of Conditional
        Representation Learning (arXiv 2510.04564) on GeneCIS (arXiv 2306.07969).

        Args:
            query: the picture's row (m,) or (1, m) float of the scene's criterion; or its position
                in the index, which is then left out.
            condition: (c, d) float, the embeddings of the captions.
            scene: the criterion that says what a scene is.
            weight: of the scene. The paper's 10 belongs to the method `cosine`, where cosines
                hardly differ between pictures. None gives both parts the same standard deviation
                over the index, whatever the method.
            n: pictures at most.

        Raises:
            CriterionError: the scene's criterion is not in the index.
            InvalidInputError: the index has no universal embeddings; a wrong shape, NaN, n < 1.
        """
        if self._universal is None:
            raise InvalidInputError(
                "the index has no universal embeddings, which a condition in words is compared "
                "with: make it with Index(rows, universal=…) or Index.project"
            )
        own = int(query) if isinstance(query, int | np.integer) else None
        name = normalise_criterion(scene)
        row = self._own(own)[name] if own is not None and name in self._rows else query
        likeness = self.cosines(name, row)  # type: ignore[arg-type]
        captions = check_rows(condition)
        mean = check_embeddings(captions, self._universal.shape[1]).mean(axis=0)
        condition_part = np.concatenate(
            [np.zeros(0, np.float32), *(block @ mean for block in _blocks(self._universal))]
        )
        if weight is None:
            spread = float(likeness.std(dtype=np.float64))
            weight = float(condition_part.std(dtype=np.float64)) / max(spread, EPSILON)
        if not np.isfinite(weight):
            raise InvalidInputError(f"expected a weight that is a number, got {weight}")
        parts = {name: likeness, "condition": condition_part}
        return self._ranked(parts, {name: weight, "condition": 1.0}, n, own)

    def cosines(self, criterion: str, row: NDArray[Any]) -> NDArray[np.float32]:
        """Give the cosine of all pictures with one row, under one criterion.

        Args:
            criterion: of the index.
            row: (m,) or (1, m) float.

        Returns:
            (n,) float32; 0 where a row is all zeros.

        Raises:
            CriterionError: the criterion is not in the index.
            InvalidInputError: the row is of another length or holds NaN.
        """
        name = normalise_criterion(criterion)
        if name not in self._rows:
            raise CriterionError(
                f"no criterion {name!r} in this index, it has {sorted(self._rows)}"
            )
        rows = self._rows[name]
        one = check_embeddings(np.atleast_2d(np.asarray(row)), rows.shape[1])
        if len(one) != 1:
            raise InvalidInputError(f"expected one query row, got {len(one)}: search one by one")
        unit = one[0] / max(float(np.linalg.norm(one[0])), EPSILON)
        products = [np.zeros(0, np.float32), *(block @ unit for block in _blocks(rows))]
        return np.asarray(np.concatenate(products) * self._scales[name], np.float32)

    def _own(self, position: int) -> dict[str, NDArray[Any]]:
        if not 0 <= position < self._size:
            raise InvalidInputError(
                f"expected a position from 0 to {self._size - 1}, got {position}"
            )
        return {name: rows[position] for name, rows in self._rows.items()}

    def _ranked(
        self,
        parts: Mapping[str, NDArray[np.float32]],
        weights: Mapping[str, float],
        n: int,
        own: int | None,
    ) -> Hits:
        if n < 1:
            raise InvalidInputError(f"expected n >= 1, got {n}")
        scores = np.zeros(self._size)
        for name, values in parts.items():
            scores += weights[name] * values.astype(np.float64)
        best = top(np.round(scores, _DECIMALS), n + (own is not None))
        best = best[best != own][:n] if own is not None else best
        return Hits(
            positions=best,
            scores=scores[best].astype(np.float32),
            parts={name: values[best] for name, values in parts.items()},
            weights=dict(weights),
        )


def captions(condition: str) -> list[str]:
    """Give the captions whose mean embedding stands for a condition, such as `a dog`.

    They are the paper's for GeneCIS: `a photo with a dog on the left`, right, top, lower, mid; `a`
    is put before a condition without an article. Pass them to `embed_text` of an `Embedder` or a
    `Client`.

    Raises:
        InvalidInputError: the condition is blank.
    """
    words = " ".join(condition.split())
    if not words:
        raise InvalidInputError("expected a condition in words, such as 'a dog', got none")
    if words.split()[0].lower() not in ("a", "an", "the"):
        words = f"a {words}"
    return [f"a photo with {words} on the {place}" for place in PLACES]


def top(scores: NDArray[np.floating], n: int) -> NDArray[np.int64]:
    """Give the positions of the n highest of (s,) scores, highest first, ties by position."""
    if n < len(scores):
        edge = np.partition(scores, len(scores) - n)[len(scores) - n]
        above = np.flatnonzero(scores > edge)
        at = np.flatnonzero(scores == edge)[: n - len(above)]
        chosen = np.concatenate([above, at])
    else:
        chosen = np.arange(len(scores))
    return np.asarray(chosen[np.lexsort((chosen, -scores[chosen]))], np.int64)


def _named(given: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(normalise_criterion(name), value) for name, value in given.items()]


def _scales(rows: NDArray[Any]) -> NDArray[np.float32]:
    """Give 1 / length of each row, 0 for a row of zeros; refuse what is not finite."""
    lengths = [np.zeros(0, np.float32)]
    for start, block in zip(_starts(rows), _blocks(rows), strict=True):
        values = np.linalg.norm(block, axis=1)
        if not np.isfinite(values).all():
            bad = start + int(np.flatnonzero(~np.isfinite(values))[0])
            raise InvalidInputError(
                f"row {bad} holds NaN or infinity: leave out the rows of images that failed"
            )
        lengths.append(values)
    length = np.concatenate(lengths)
    return np.where(length > EPSILON, 1 / np.maximum(length, EPSILON), 0).astype(np.float32)


def _starts(rows: NDArray[Any]) -> range:
    return range(0, len(rows), max(_BLOCK_BYTES // (4 * max(rows.shape[1], 1)), 1))


def _blocks(rows: NDArray[Any]) -> Any:
    """Give the rows block by block, as float32."""
    starts = _starts(rows)
    for start in starts:
        yield _as_float32(rows[start : start + starts.step])


def _as_float32(block: NDArray[Any]) -> NDArray[np.float32]:
    """Give a block as float32; refuse what is not a float."""
    if block.dtype.kind != "f":
        raise InvalidInputError(f"expected rows of a float dtype, got {block.dtype}")
    return block.astype(np.float32, copy=False)
