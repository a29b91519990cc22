"""Embeddings of images seen before: least recently used go first, bounded in bytes."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

_OVERHEAD = 200  # bytes of an entry beside its rows: key, array header, links


class EmbeddingCache:
    """Digest of an image → its universal embedding. For one thread: the event loop's."""

    def __init__(self, max_bytes: int) -> None:
        """Store the bound; 0 keeps nothing."""
        self.max_bytes = max_bytes
        self.hits = self.misses = 0
        self._used = 0
        self._rows: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()

    def __len__(self) -> int:
        """How many embeddings it holds."""
        return len(self._rows)

    @property
    def used_bytes(self) -> int:
        """What it holds, bookkeeping included, in bytes."""
        return self._used

    def get(self, digest: bytes) -> NDArray[np.float32] | None:
        """Give an image's embedding (d,), or None; counts a hit or a miss."""
        row = self._rows.get(digest)
        if row is None:
            self.misses += 1
            return None
        self._rows.move_to_end(digest)
        self.hits += 1
        return row

    def put(self, digest: bytes, embedding: NDArray[np.float32]) -> None:
        """Keep a copy of an embedding (d,), in place of those not used for longest."""
        size = embedding.nbytes + _OVERHEAD
        if size > self.max_bytes or digest in self._rows:
            return
        row = embedding.copy()  # a view would keep its whole batch alive
        row.flags.writeable = False
        self._rows[digest] = row
        self._used += size
        while self._used > self.max_bytes:
            _, oldest = self._rows.popitem(last=False)
            self._used -= oldest.nbytes + _OVERHEAD
