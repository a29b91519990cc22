"""faster-clip, which decodes, resizes and runs in one call of its Rust extension."""

from __future__ import annotations

from typing import Any

import loop
import numpy as np


class FasterClip(loop.Engine):
    """A `ClipModel`; its weights are found where it would have downloaded them to."""

    whole = True

    def __init__(self, options: dict[str, Any]) -> None:
        """Load the model; `FASTER_CLIP_CACHE` is in the environment."""
        import faster_clip

        self._model = faster_clip.ClipModel()
        self.settings = "int8 weights (it has no other), RAYON_NUM_THREADS = cores"

    def run(self, batch: list[bytes]) -> np.ndarray:
        """See `loop.Engine.run`; the batch is of JPEGs."""
        return np.array(self._model.encode_image(batch), np.float32)


if __name__ == "__main__":
    loop.run(FasterClip)
