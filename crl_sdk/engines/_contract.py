"""What every inference engine implements. Engines know arrays, but no requests or image files.

Several threads may call an engine at the same time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from crl_sdk.engines._engine_name import EngineName


class ImageEngine(Protocol):
    """Runs an image tower and the projection onto bases."""

    @property
    def name(self) -> EngineName:
        """Name of the engine, such as `onnx/cpu/fp32`."""

    @property
    def max_columns(self) -> int | None:
        """Largest number of columns of a run, all bases together; None for any number."""

    def run(
        self,
        pixels: NDArray[np.uint8],
        weight: NDArray[np.float32],
        bias: NDArray[np.float32],
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Embed a batch of images and project it onto packed bases, in one run.

        Args:
            pixels: Preprocessed images from `crl_sdk.model`, shape (b, H, W, 3), uint8.
            weight: Weights of all bases side by side, shape (d, K) with K >= 0, float32; see
                `crl_sdk.projection.pack`.
            bias: Biases of all bases, shape (K,), float32.

        Returns:
            Universal embeddings, shape (b, d), float32, unit rows; and the projected columns
            `embeddings @ weight + bias`, shape (b, K), float32, without row normalisation.

        Raises:
            EngineError: If the run failed.
            ClosedError: If the engine is closed.
            ForkError: If this process was forked after the engine had been opened.
        """

    def close(self) -> None:
        """Free device memory. Idempotent. A later run raises `ClosedError`."""


Finish: TypeAlias = Callable[[], tuple[NDArray[np.float32], NDArray[np.float32]]]
"""Waits for a started run and returns what `ImageEngine.run` returns. It is called once."""


@runtime_checkable
class PipelinedEngine(ImageEngine, Protocol):
    """An engine that takes the next images while it still works on the last ones."""

    def start(
        self,
        pixels: NDArray[np.uint8],
        weight: NDArray[np.float32],
        bias: NDArray[np.float32],
    ) -> Finish:
        """Begin a run, see `ImageEngine.run`. Two runs may be under way, a third one waits.

        Returns:
            Function that waits for the result. It must be called: until then, the run occupies
            memory that later runs need.

        Raises:
            EngineError: If the run cannot be started.
            ClosedError: If the engine is closed.
            ForkError: If this process was forked after the engine had been opened.
        """


class TextEngine(Protocol):
    """Runs a text tower."""

    def run(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Embed a batch of texts.

        Args:
            tokens: Token ids from `crl_sdk.model`, shape (b, context_length), int64.

        Returns:
            Text embeddings, shape (b, d), float32, unit rows.

        Raises:
            EngineError: If the run failed.
        """
