"""Embeddings of images seen before, in a cache that is bounded in bytes."""

from __future__ import annotations

import numpy as np
from cachetools import LRUCache
from numpy.typing import NDArray

_ENTRY_OVERHEAD = 200  # bytes of an entry besides its row: the key, the array header, the links


def _entry_bytes(row: NDArray[np.float32]) -> int:
    return row.nbytes + _ENTRY_OVERHEAD


class EmbeddingCache:
    """Maps the digest of an image to its universal embedding; drops the least recently used first.

    It is not thread-safe: only the event loop's thread may use it.
    """

    def __init__(self, max_bytes: int) -> None:
        """Create an empty cache of at most `max_bytes` bytes; 0 keeps nothing."""
        self.max_bytes = max_bytes
        self.hits = self.misses = 0
        self._rows: LRUCache[bytes, NDArray[np.float32]] = LRUCache(max_bytes, _entry_bytes)

    def __len__(self) -> int:
        """Return the number of embeddings in the cache."""
        return len(self._rows)

    @property
    def used_bytes(self) -> int:
        """Size of the entries in bytes, including an estimate of their overhead."""
        return round(self._rows.currsize)

    def get(self, digest: bytes) -> NDArray[np.float32] | None:
        """Return an image's embedding, shape (d,), or None; count a hit or a miss."""
        row: NDArray[np.float32] | None = self._rows.get(digest)
        if row is None:
            self.misses += 1
        else:
            self.hits += 1
        return row

    def put(self, digest: bytes, embedding: NDArray[np.float32]) -> None:
        """Store a copy of an embedding, shape (d,). An embedding over the bound is not stored."""
        if digest in self._rows or _entry_bytes(embedding) > self.max_bytes:
            return
        row = embedding.copy()  # a view would keep its whole batch in memory
        row.flags.writeable = False
        self._rows[digest] = row
