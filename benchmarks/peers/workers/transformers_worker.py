"""`CLIPModel` of transformers with its own processor."""

from __future__ import annotations

import io
from typing import Any

import loop
import numpy as np
from PIL import Image


class Transformers(loop.Engine):
    """A `CLIPModel` on the CPU."""

    def __init__(self, options: dict[str, Any]) -> None:
        """Load the model in the directory `model`."""
        import torch
        from transformers import AutoImageProcessor, CLIPModel

        torch.set_num_threads(options["threads"])
        self._torch = torch
        self._model = CLIPModel.from_pretrained(options["model"], attn_implementation="sdpa").eval()
        self._processor = AutoImageProcessor.from_pretrained(options["model"])
        self.settings = (
            f"inference_mode, sdpa attention, {type(self._processor).__name__}, threads = cores"
        )

    def decode(self, data: bytes) -> Any:
        """See `loop.Engine.decode`."""
        image = Image.open(io.BytesIO(data))
        return self._processor(images=image, return_tensors="pt")["pixel_values"][0]

    def stack(self, rows: list[Any]) -> Any:
        """See `loop.Engine.stack`."""
        return self._torch.stack(rows)

    def run(self, batch: Any) -> np.ndarray:
        """See `loop.Engine.run`."""
        with self._torch.inference_mode():
            features = self._model.get_image_features(pixel_values=batch)
        # transformers before 5 returns a tensor, later versions an output object
        return getattr(features, "pooler_output", features).numpy()


if __name__ == "__main__":
    loop.run(Transformers)
