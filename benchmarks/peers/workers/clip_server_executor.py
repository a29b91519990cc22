"""clip-server's encoder with weights from `PEERS_WEIGHTS`: its own would be downloaded."""

from __future__ import annotations

import os

from clip_server.executors.clip_torch import CLIPEncoder
from clip_server.model import openclip_model


class LocalEncoder(CLIPEncoder):
    """The encoder, unchanged but for where its weights are."""

    def __init__(self, **kwargs: object) -> None:
        """Load the weights as those of OpenAI's ViT-B/32."""
        openclip_model.download_model = lambda *_, **__: os.environ["PEERS_WEIGHTS"]
        super().__init__(name="ViT-B-32::openai", **kwargs)
