"""The engines of crl, through the public `Embedder`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import loop
import numpy as np

from crl_sdk import Embedder
from crl_sdk.model._preprocess import load_pixels


class Crl(loop.Engine):
    """An `Embedder` with one engine."""

    def __init__(self, options: dict[str, Any]) -> None:
        """Open `bundle` with `engine`."""
        self._embedder = Embedder.open(
            options["bundle"], engine=options["engine"], threads=options["threads"]
        )
        self.settings = f"engine {options['engine']}: {self._embedder.engine}"

    def decode(self, data: bytes) -> np.ndarray:
        """See `loop.Engine.decode`."""
        return load_pixels(data, self._embedder.bundle.preprocess)

    def run(self, batch: np.ndarray) -> np.ndarray:
        """See `loop.Engine.run`."""
        return self._embedder.embed_pixels(batch)

    def embed(self, images: Sequence[bytes], batch: int, threads: int) -> np.ndarray:
        """See `loop.Engine.embed`. The embedder has its own decoding threads."""
        return self._embedder.embed(images, batch_size=batch).universal


if __name__ == "__main__":
    loop.run(Crl)
