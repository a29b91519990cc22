"""The result of embedding images, in process or by a service."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crl_sdk._criterion import normalise_criterion
from crl_sdk.errors import CriterionError, ImageError


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Embeddings:
    """Embeddings of n images; `embeddings["color"]` is the array of one criterion.

    Attributes:
        universal: Universal embeddings, shape (n, d), unit rows, float32 or the dtype that the
            call asked for. Rows of failed images are NaN, or zeros as int8.
        conditional: Conditional embeddings by criterion, each of shape (n, m), of the same dtype.
        errors: Reasons why images failed, by position.
        fingerprint: Fingerprint of the model that made them. Embeddings can be compared only if
            their fingerprints are equal.
        cached: Whether the service had the image in its cache, shape (n,). None in process.
        basis_sha256: Version of the basis that was used, by criterion. Empty in process.
        timings: Microseconds that the service spent on each stage, summed over its calls. Empty
            in process.
    """

    universal: NDArray[Any]
    conditional: Mapping[str, NDArray[Any]]
    errors: Mapping[int, ImageError] = field(default_factory=dict)
    fingerprint: str = ""
    cached: NDArray[np.bool_] | None = None
    basis_sha256: Mapping[str, str] = field(default_factory=dict)
    timings: Mapping[str, int] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Return the number of images and the sizes of their embeddings."""
        sizes = [f"{name} {rows.shape[1]}" for name, rows in self.conditional.items()]
        failed = f", {len(self.errors)} failed" if self.errors else ""
        return (
            f"Embeddings({len(self.universal)} images{failed}; universal "
            f"{self.universal.shape[1]}{''.join(f', {size}' for size in sizes)}; "
            f"{self.universal.dtype})"
        )

    def __getitem__(self, criterion: str) -> NDArray[Any]:
        """Return the conditional embeddings of one criterion, shape (n, m).

        Raises:
            CriterionError: If the criterion was not among those of the call.
        """
        name = normalise_criterion(criterion)
        if name not in self.conditional:
            raise CriterionError(
                f"no criterion {name!r} in this result, it has {sorted(self.conditional)}: "
                "name it in embed(…, criteria=[…])"
            )
        return self.conditional[name]

    def __contains__(self, criterion: object) -> bool:
        """Return whether the result has conditional embeddings of a criterion."""
        try:
            return normalise_criterion(criterion) in self.conditional  # type: ignore[arg-type]
        except CriterionError:
            return False

    @property
    def ok(self) -> NDArray[np.bool_]:
        """Whether each image was embedded, shape (n,)."""
        mask = np.ones(len(self.universal), dtype=np.bool_)
        mask[list(self.errors)] = False
        return mask
