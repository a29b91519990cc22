"""What the pipeline takes and returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crl_sdk.errors import ImageError
from crl_sdk.serving._bases import StoredBasis
from crl_sdk.serving._projection_pack import EngineRow


@dataclass(frozen=True, slots=True)
class PreparedPixels:
    """Pixels that the client has resized and cropped for the model, shape (H, W, 3), uint8."""

    pixels: NDArray[np.uint8]


ImageSource = bytes | NDArray[Any] | PreparedPixels
"""An encoded image (bytes), pixels (uint8, shape (h, w) or (h, w, channels)), a stored universal
embedding (a float dtype or int8, shape (d,)), or prepared pixels."""


@dataclass(slots=True)
class ImageOutcome:
    """What became of one image.

    Attributes:
        embedding: Universal embedding, shape (d,), float32; None if the image failed.
        error: Reason why the image failed, or None.
        digest: Digest of the image, see `digest_image`; empty for a stored embedding.
        cached: Whether the embedding came from the cache.
        engine_row: What the engine returned; None for a cached or stored embedding.
    """

    embedding: NDArray[np.float32] | None = None
    error: ImageError | None = None
    digest: bytes = b""
    cached: bool = False
    engine_row: EngineRow | None = None

    def columns_of(self, stored: StoredBasis) -> NDArray[np.float32] | None:
        """Return the columns of a basis that the engine computed, shape (m,), or None."""
        return None if self.engine_row is None else self.engine_row.columns_of(stored)


@dataclass(slots=True)
class RequestTiming:
    """Where the time of a request went. Each stage has the seconds of its slowest image.

    Attributes:
        preprocess_seconds: Decoding and resizing, including the wait for a decoding thread.
        queue_seconds: Waiting for the engine.
        infer_seconds: Engine run of the batch that the image was in.
        project_seconds: Projection of all images onto all bases.
        total_seconds: The whole request.
        engine_runs: Number of engine runs, where each run counts with the share that this
            request's images had in it.
    """

    preprocess_seconds: float = 0.0
    queue_seconds: float = 0.0
    infer_seconds: float = 0.0
    project_seconds: float = 0.0
    total_seconds: float = 0.0
    engine_runs: float = 0.0


@dataclass(frozen=True, slots=True)
class EmbedResult:
    """Result of a request.

    Attributes:
        images: Outcome of each image.
        universal: Universal embeddings, shape (n, d), float32; NaN in the rows of failed images.
        conditional: Conditional embeddings, one array per basis in the requested order, shape
            (n, m), float32; NaN in the rows of failed images.
        bases: Bases that were used, all from the same moment.
        timing: Where the time went.
    """

    images: list[ImageOutcome]
    universal: NDArray[np.float32]
    conditional: list[NDArray[np.float32]]
    bases: list[StoredBasis]
    timing: RequestTiming
