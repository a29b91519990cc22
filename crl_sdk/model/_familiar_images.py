"""What a specialised model's own images look like, so that others can be told apart.

Only the demo model has such a file. Its images are rendered scenes, and it has never seen a
photograph.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crl_sdk.errors import IntegrityError

FAMILIAR_IMAGES_FILE = "familiar-images.safetensors"

RIDGE = 1e-4
"""Added to the variances. It makes the distances of other images of the same kind small."""

FEW = 5
"""Number of images from which `limit` holds. With fewer, single distances vary more."""

FEW_FACTOR = 1.1
"""Factor of the limit for fewer images."""

_KEY = "familiar"


@dataclass(frozen=True, slots=True, eq=False)
class FamiliarImages:
    """Mean and covariance of the embeddings of a model's own images.

    Attributes:
        subject: What the images show, in words.
        mean: Mean embedding, shape (d,), float32.
        whitening: Square root W of the inverse covariance, shape (d, d), float32: the Mahalanobis
            distance of an embedding x is |(x − mean) W|.
        limit: Median distance of images above which they are not of this kind.
    """

    subject: str
    mean: NDArray[np.float32]
    whitening: NDArray[np.float32]
    limit: float

    @classmethod
    def fit(cls, embeddings: NDArray[np.float32], *, subject: str, limit: float) -> FamiliarImages:
        """Return the statistics of embeddings, shape (n, d), n much larger than d."""
        wide = embeddings.astype(np.float64)
        covariance = np.cov(wide.T) + RIDGE * np.eye(wide.shape[1])
        whitening = np.linalg.cholesky(np.linalg.inv(covariance))
        return cls(
            subject, wide.mean(axis=0).astype(np.float32), whitening.astype(np.float32), limit
        )

    def distances(self, embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the Mahalanobis distance of each embedding, shape (n,).

        Args:
            embeddings: Universal embeddings, shape (n, d), unit rows.
        """
        away = (embeddings - self.mean) @ self.whitening
        return np.asarray(np.linalg.norm(away, axis=1), np.float32)

    def warning(self, distances: NDArray[np.floating], model: str) -> str | None:
        """Return a warning if images are not of the model's own kind, or None.

        Args:
            distances: Result of `distances`, shape (n,).
            model: Name of the model.
        """
        limit = self.limit * (FEW_FACTOR if len(distances) < FEW else 1.0)
        if not len(distances) or np.median(distances) <= limit:
            return None
        return (
            f"the model {model} has never seen images like these: it knows {self.subject} and "
            "nothing else, so that groups, names and scores mean nothing. Get a real model with "
            "crl export ViT-B-32 --pretrained laion2b_s34b_b79k --out clip-b32, and name it with "
            "--bundle clip-b32"
        )


def encode_familiar_images(familiar: FamiliarImages) -> bytes:
    """Serialise the statistics as a safetensors file."""
    from safetensors.numpy import save

    metadata = json.dumps({"subject": familiar.subject, "limit": familiar.limit})
    arrays = {"mean": familiar.mean, "whitening": familiar.whitening}
    return bytes(save(arrays, {_KEY: metadata}))


def read_familiar_images(path: Path, dim: int) -> FamiliarImages:
    """Read the statistics.

    Args:
        path: The file, which the bundle has verified.
        dim: Number of dimensions of the model.

    Raises:
        IntegrityError: If the file does not hold such statistics.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            facts = json.loads(file.metadata()[_KEY])
            arrays = {name: file.get_tensor(name) for name in ("mean", "whitening")}
            found = FamiliarImages(str(facts["subject"]), limit=float(facts["limit"]), **arrays)
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise IntegrityError(
            f"{path}: not a file of a model's own images ({error}); copy the bundle again"
        ) from error
    if found.mean.shape != (dim,) or found.whitening.shape != (dim, dim):
        raise IntegrityError(
            f"{path}: expected mean ({dim},) and whitening ({dim}, {dim}), got "
            f"{found.mean.shape} and {found.whitening.shape}; copy the bundle again"
        )
    return found
