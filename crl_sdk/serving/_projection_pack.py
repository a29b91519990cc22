"""The bases that a GPU engine projects onto in the same run that embeds the images.

On a CPU, the server projects each request's rows by the NumPy definition, and no basis goes through
the engine. On a GPU, one run computes the columns of all bases that requests currently name. This
module knows no transport.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crl_sdk.projection._projection import pack
from crl_sdk.serving._bases import StoredBasis


@dataclass(frozen=True, slots=True)
class ProjectionPack:
    """Bases side by side, as an engine takes them. It never changes.

    Attributes:
        weight: Weights, shape (d, K), float32.
        bias: Biases, shape (K,), float32.
        columns: Columns of each basis, by the SHA-256 that is its version.
    """

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    columns: Mapping[str, slice]

    @classmethod
    def of(cls, bases: Sequence[StoredBasis], dim: int) -> ProjectionPack:
        """Return the pack of some bases of dimension `dim`; without bases, one of no columns."""
        if not bases:
            return cls(np.zeros((dim, 0), np.float32), np.zeros(0, np.float32), {})
        weight, bias, slices = pack([stored.basis.projection for stored in bases])
        names = [stored.sha256 for stored in bases]
        return cls(weight, bias, dict(zip(names, slices, strict=True)))


@dataclass(frozen=True, slots=True)
class EngineRow:
    """What the engine returned for one image.

    Attributes:
        universal: Universal embedding, shape (d,), float32, unit norm.
        projected: Columns of all bases in `pack`, shape (K,), float32, not normalised.
        pack: The bases that the run had. Every column of a run is of the same pack.
    """

    universal: NDArray[np.float32]
    projected: NDArray[np.float32]
    pack: ProjectionPack

    def columns_of(self, stored: StoredBasis) -> NDArray[np.float32] | None:
        """Return the columns of a basis, shape (m,), or None if the run did not have this version.

        Args:
            stored: Basis, in the version that the request saw.
        """
        columns = self.pack.columns.get(stored.sha256)
        return None if columns is None else self.projected[columns]


class BasesInUse:
    """Chooses the bases of the next engine run: those that requests named last.

    `use` is called in the event loop, and `pack` is read in the engine's thread. A new pack
    replaces the old one as a whole, so that a run never sees two versions of a basis.
    """

    def __init__(self, dim: int, max_columns: int | None, only: str | None = None) -> None:
        """Begin with no basis.

        Args:
            dim: Length d of a universal embedding.
            max_columns: Largest number of columns of a run; None for any number. 0 leaves all
                projections to NumPy.
            only: SHA-256 of the one basis that the engine can project onto, because it was compiled
                into its plan; None if it takes any.
        """
        self._dim = dim
        self._max_columns = max_columns
        self._only = only
        self._used: OrderedDict[str, StoredBasis] = OrderedDict()
        self.no_bases = ProjectionPack.of([], dim)
        self.pack = self.no_bases

    def leave_to_numpy(self) -> None:
        """Make no pack any more, because the engine cannot run with one."""
        self._max_columns = 0
        self.pack = self.no_bases

    def use(self, bases: Sequence[StoredBasis], current: Mapping[str, StoredBasis]) -> None:
        """Note that a request named these bases, and make a new pack if the bases in use changed.

        If they have too many columns together, those that were not named for the longest time are
        left out. NumPy then projects onto them.

        Args:
            bases: Bases of a request whose images the engine has to embed.
            current: All bases that the server has now. Others are dropped.
        """
        if self._max_columns == 0:
            return
        for stored in bases:
            if self._only is None or stored.sha256 == self._only:
                self._used[stored.basis.criterion] = stored
                self._used.move_to_end(stored.basis.criterion)
        for name, stored in list(self._used.items()):
            if name not in current or current[name].sha256 != stored.sha256:
                del self._used[name]
        chosen, columns = [], 0
        for stored in reversed(self._used.values()):
            columns += stored.basis.projection.output_dim
            if self._max_columns is not None and columns > self._max_columns:
                break
            chosen.append(stored)
        while len(self._used) > len(chosen):
            self._used.popitem(last=False)
        chosen.sort(key=lambda stored: stored.basis.criterion)  # the same bases make the same pack
        if [stored.sha256 for stored in chosen] != list(self.pack.columns):
            self.pack = ProjectionPack.of(chosen, self._dim)
