"""clip-server's encoder with weights from `PEERS_WEIGHTS`, since its own need a download."""

from __future__ import annotations

import os

from clip_server.executors.clip_torch import CLIPEncoder
from clip_server.model import openclip_model


class LocalEncoder(CLIPEncoder):
    """The unchanged encoder with a local file of weights."""

    def __init__(self, **kwargs: object) -> None:
        """Load the local weights in place of OpenAI's ViT-B/32."""
        openclip_model.download_model = lambda *_, **__: os.environ["PEERS_WEIGHTS"]
        super().__init__(name="ViT-B-32::openai", **kwargs)
