"""open_clip with its own transform, eager or compiled by inductor."""

from __future__ import annotations

import io
from typing import Any

import loop
import numpy as np
from PIL import Image


class OpenClip(loop.Engine):
    """An open_clip model on the CPU."""

    def __init__(self, options: dict[str, Any]) -> None:
        """Load `weights` into `architecture` in `precision`, and compile it if `compile` is set."""
        import open_clip
        import torch

        torch.set_num_threads(options["threads"])
        self._torch = torch
        self._dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options["precision"]]
        model, _, self._transform = open_clip.create_model_and_transforms(
            options["architecture"], pretrained=options["weights"]
        )
        self._encode = model.eval().to(self._dtype).encode_image
        self.settings = "inference_mode, threads = cores"
        if options["compile"]:
            from torch._inductor import config

            config.freezing = True  # torch recommends this for inference on CPUs
            self._encode = torch.compile(self._encode, dynamic=False)
            self.settings += ", torch.compile with inductor's freezing, one graph per batch size"

    def decode(self, data: bytes) -> Any:
        """See `loop.Engine.decode`."""
        return self._transform(Image.open(io.BytesIO(data)))

    def stack(self, rows: list[Any]) -> Any:
        """See `loop.Engine.stack`."""
        return self._torch.stack(rows)

    def run(self, batch: Any) -> np.ndarray:
        """See `loop.Engine.run`."""
        with self._torch.inference_mode():
            return self._encode(batch.to(self._dtype)).float().numpy()


if __name__ == "__main__":
    loop.run(OpenClip)
