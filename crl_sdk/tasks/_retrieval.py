"""Search images by one or several criteria, or for "this image, but with …"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crl_sdk._criterion import normalise_criterion
from crl_sdk.basis._basis import Basis, require_one_model
from crl_sdk.errors import CriterionError, InvalidInputError
from crl_sdk.projection._project_rows import project_rows
from crl_sdk.projection._projection import EPSILON, check_embeddings
from crl_sdk.projection._row_dtypes import decode_rows
from crl_sdk.tasks._kmeans import check_rows

PLACES = ("left", "right", "top", "lower", "mid")
"""Places that the captions of a condition name, after arXiv 2510.04564."""

PAPER_WEIGHT = 10.0
"""Weight of the scene relative to the condition in arXiv 2510.04564, for bases made by `cosine`."""

_BLOCK_BYTES = 8 << 20
_DECIMALS = 6  # of a score: float32 holds no more, and copies of an image must have equal scores


@dataclass(frozen=True, slots=True, eq=False)
class SearchResults:
    """Images that a search found, best first. Equal scores are in the order of the index.

    Attributes:
        positions: Positions in the index, shape (n,), int64.
        scores: Scores that the images are ranked by, shape (n,), float32.
        parts: Unweighted parts of the scores, each of shape (n,), float32. The keys are criteria,
            whose part is a cosine, and `condition`, whose part is the similarity with the
            condition.
        weights: Weight of each part.
    """

    positions: NDArray[np.int64]
    scores: NDArray[np.float32]
    parts: Mapping[str, NDArray[np.float32]]
    weights: Mapping[str, float] = field(default_factory=dict)


class Index:
    """Images to search by one or several criteria.

    Every search compares the query with all rows, block by block. The rows may therefore be
    memory-mapped files larger than memory. They are read once when the index is made and once in
    every search.

    Example:
        >>> import numpy as np
        >>> from crl_sdk.tasks import Index
        >>> index = Index({"color": np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])})
        >>> index.nearest(0, n=1).positions.tolist()
        [1]
    """

    def __init__(
        self, rows: Mapping[str, NDArray[Any]], *, universal: NDArray[Any] | None = None
    ) -> None:
        """Check the rows and compute their lengths.

        Args:
            rows: Conditional embeddings of the same n images for each criterion, shape (n, m), of
                a float dtype. `Embeddings.conditional` and memory-mapped files of `crl project`
                have this form. May be empty if `universal` is given.
            universal: Universal embeddings of the same images, shape (n, d), of a float dtype,
                unit rows. Only `but_with` needs them.

        Raises:
            CriterionError: If the name of a criterion is malformed.
            InvalidInputError: If nothing is given, the numbers of images differ, or a row holds
                NaN.
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
                f"expected rows (n, m) of the same n images for each criterion, got {shapes}"
            )
        self._size = sizes[0]
        self._scales = {name: _scales(each) for name, each in self._rows.items()}
        if self._universal is not None:
            _scales(self._universal)

    @classmethod
    def project(cls, universal: NDArray[Any], bases: Sequence[Basis]) -> Index:
        """Make an index from universal embeddings.

        Args:
            universal: Universal embeddings, shape (n, d), of a float dtype, unit rows. May be
                memory-mapped.
            bases: At least one basis. The criteria must differ, and the model must be the same.

        Returns:
            Index with the conditional embeddings of each basis.

        Raises:
            BasisMismatchError: If the bases were made for different models.
            InvalidInputError: If a shape or a value is wrong, or two bases have one criterion.
        """
        if not bases:
            raise InvalidInputError("expected at least one basis, got none")
        require_one_model(bases)
        names = [basis.criterion for basis in bases]
        if len(set(names)) != len(names):
            raise InvalidInputError(f"expected each criterion once, got {names}")
        rows = project_rows(universal, [basis.projection for basis in bases])
        return cls(dict(zip(names, rows, strict=True)), universal=universal)

    def __repr__(self) -> str:
        """Return the number of images, and the criteria."""
        criteria = ", ".join(map(repr, self._rows)) or "none"
        universal = "" if self._universal is None else ", with universal embeddings"
        return f"Index({self._size} images; criteria: {criteria}{universal})"

    def __len__(self) -> int:
        """Return the number of images."""
        return self._size

    @property
    def criteria(self) -> tuple[str, ...]:
        """Criteria of the index."""
        return tuple(self._rows)

    def nearest(
        self,
        query: Mapping[str, NDArray[Any]] | int,
        weights: Mapping[str, float] | None = None,
        n: int = 10,
    ) -> SearchResults:
        """Find the images nearest to a query.

        score = sum over the criteria of weight * cosine.

        Args:
            query: Row of each criterion, shape (m,) or (1, m), of a float dtype; or the position
                of an image of the index, which is then left out of the results.
            weights: Weight of each criterion, not 0. A negative weight prefers dissimilar images.
                None gives every criterion of the query the weight 1.
            n: Largest number of results.

        Returns:
            The best n images.

        Raises:
            CriterionError: If a criterion is missing in the index or in the query.
            InvalidInputError: If a row has the wrong length or holds NaN, the position is out of
                range, or `n` is below 1.
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
    ) -> SearchResults:
        """Find images that show the scene of a query, but with something described in words.

        score = weight * cosine of the scene rows + mean cosine of the image with the captions of
        the condition. This is the retrieval of Conditional Representation Learning
        (arXiv 2510.04564) on GeneCIS (arXiv 2306.07969).

        Args:
            query: Row of the query image for the criterion `scene`, shape (m,) or (1, m), of a
                float dtype; or the position of an image of the index, which is then left out of
                the results.
            condition: Text embeddings of `condition_captions(condition)`, shape (c, d), of a float
                dtype.
            scene: Criterion that describes scenes.
            weight: Weight of the scene. The paper's 10 is meant for the method `cosine`, whose
                cosines hardly differ between images. None gives both parts the same standard
                deviation over the index, for any method.
            n: Largest number of results.

        Returns:
            The best n images.

        Raises:
            CriterionError: If the criterion `scene` is not in the index.
            InvalidInputError: If the index has no universal embeddings, a shape is wrong, a value
                is NaN, or `n` is below 1.
        """
        if self._universal is None:
            raise InvalidInputError(
                "the index has no universal embeddings, and a condition in words is compared with "
                "those: make the index with Index(rows, universal=…) or Index.project"
            )
        own = int(query) if isinstance(query, int | np.integer) else None
        name = normalise_criterion(scene)
        row = self._own(own)[name] if own is not None and name in self._rows else query
        scene_part = self.cosines(name, row)  # type: ignore[arg-type]
        mean = check_embeddings(check_rows(condition), self._universal.shape[1]).mean(axis=0)
        condition_part = np.concatenate(
            [np.zeros(0, np.float32), *(block @ mean for block in _blocks(self._universal))]
        )
        if weight is None:
            spread = float(scene_part.std(dtype=np.float64))
            weight = float(condition_part.std(dtype=np.float64)) / max(spread, EPSILON)
        if not np.isfinite(weight):
            raise InvalidInputError(f"expected a weight that is a number, got {weight}")
        parts = {name: scene_part, "condition": condition_part}
        return self._ranked(parts, {name: weight, "condition": 1.0}, n, own)

    def cosines(self, criterion: str, row: NDArray[Any]) -> NDArray[np.float32]:
        """Return the cosine of each image with one row, for one criterion.

        Args:
            criterion: Criterion of the index.
            row: Row to compare with, shape (m,) or (1, m), of a float dtype or int8.

        Returns:
            Cosines, shape (n,), float32. 0 for an image whose row is all zeros.

        Raises:
            CriterionError: If the criterion is not in the index.
            InvalidInputError: If the row has the wrong length or holds NaN.
        """
        name = normalise_criterion(criterion)
        if name not in self._rows:
            raise CriterionError(
                f"no criterion {name!r} in this index, it has {sorted(self._rows)}"
            )
        rows = self._rows[name]
        one = check_embeddings(np.atleast_2d(np.asarray(row)), rows.shape[1])
        if len(one) != 1:
            raise InvalidInputError(
                f"expected one query row, got {len(one)}: search for one query at a time"
            )
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
    ) -> SearchResults:
        if n < 1:
            raise InvalidInputError(f"expected n >= 1, got {n}")
        scores = np.zeros(self._size)
        for name, values in parts.items():
            scores += weights[name] * values.astype(np.float64)
        best = top_positions(np.round(scores, _DECIMALS), n + (own is not None))
        best = best[best != own][:n] if own is not None else best
        return SearchResults(
            positions=best,
            scores=scores[best].astype(np.float32),
            parts={name: values[best] for name, values in parts.items()},
            weights=dict(weights),
        )


def condition_captions(condition: str) -> list[str]:
    """Return captions of a condition, such as `a dog`, for `Index.but_with`.

    The captions are those of arXiv 2510.04564 for GeneCIS. Pass them to `embed_text` of an
    `Embedder` or a `Client`.

    Args:
        condition: Condition in words. `a` is put in front of it if it has no article.

    Returns:
        One caption for each place: left, right, top, lower and mid.

    Raises:
        InvalidInputError: If the condition is blank.

    Example:
        >>> from crl_sdk.tasks import condition_captions
        >>> condition_captions("dog")[0]
        'a photo with a dog on the left'
    """
    words = " ".join(condition.split())
    if not words:
        raise InvalidInputError("expected a condition in words, such as 'a dog', got an empty one")
    if words.split()[0].lower() not in ("a", "an", "the"):
        words = f"a {words}"
    return [f"a photo with {words} on the {place}" for place in PLACES]


def top_positions(scores: NDArray[np.floating], n: int) -> NDArray[np.int64]:
    """Return the positions of the n highest scores, highest first, equal ones by position."""
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
    """Return 1 / length of each row, and 0 for a row of zeros. Refuse NaN and infinity."""
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
    """Yield the rows block by block, as float32."""
    starts = _starts(rows)
    for start in starts:
        yield decode_rows(rows[start : start + starts.step])
