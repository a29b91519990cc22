"""The contract of an inference engine: arrays in, arrays out, no knowledge of requests or files.

One module per runtime implements it. Engines may be called from several threads.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from crl_sdk.engines._engine_name import EngineName


class ImageEngine(Protocol):
    """Runs an image tower with the projection fused in."""

    @property
    def name(self) -> EngineName:
        """Name of the engine, such as `onnx/cpu/fp32`."""

    def run(
        self,
        pixels: NDArray[np.uint8],
        weight: NDArray[np.float32],
        bias: NDArray[np.float32],
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Embed a batch and project it onto packed bases, in one run.

        Args:
            pixels: (b, H, W, 3) uint8, from `crl_sdk.model`.
            weight: (d, K) float32, K >= 0, see `crl_sdk.projection.pack`.
            bias: (K,) float32.

        Returns:
            embeddings (b, d) float32 with unit rows, and `embeddings @ weight + bias` (b, K).

        Raises:
            EngineError: the run failed.
        """

    def close(self) -> None:
        """Free what it holds of a device. Idempotent; later runs may be refused."""


class TextEngine(Protocol):
    """Runs a text tower."""

    def run(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Embed a batch of texts.

        Args:
            tokens: (b, context_length) int64, from `crl_sdk.model`.

        Returns:
            (b, d) float32, unit rows.

        Raises:
            EngineError: the run failed.
        """
