"""faster-clip, whose Rust extension decodes, resizes and runs in one call."""

from __future__ import annotations

from typing import Any

import loop
import numpy as np


class FasterClip(loop.Engine):
    """A `ClipModel`, with weights in the cache to which it would download its own."""

    whole = True

    def __init__(self, options: dict[str, Any]) -> None:
        """Load the model from the cache directory in `FASTER_CLIP_CACHE`."""
        import faster_clip

        self._model = faster_clip.ClipModel()
        self.settings = "int8 weights (it has no other), RAYON_NUM_THREADS = cores"

    def run(self, batch: list[bytes]) -> np.ndarray:
        """See `loop.Engine.run`. The batch holds JPEGs."""
        return np.array(self._model.encode_image(batch), np.float32)


if __name__ == "__main__":
    loop.run(FasterClip)
