"""The background of a bundle: embeddings of generic texts, made with its own text tower."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crl_sdk.errors import IntegrityError

BACKGROUND_FILE = "background.safetensors"

_TEXTS = "texts"  # key in the metadata of the file


def encode_background(texts: Sequence[str], embeddings: NDArray[np.floating]) -> bytes:
    """Serialise generic texts and their embeddings.

    Args:
        texts: The n texts.
        embeddings: Their embeddings, shape (n, d), unit rows. They are stored as float16.

    Returns:
        Content of the safetensors file.
    """
    from safetensors.numpy import save

    half = np.ascontiguousarray(embeddings, np.float16)
    return bytes(save({"embeddings": half}, {_TEXTS: json.dumps(list(texts))}))


def read_background(path: Path, dim: int) -> NDArray[np.float32]:
    """Read the embeddings of generic texts.

    Args:
        path: The file, which the bundle has verified.
        dim: Number of dimensions of the model.

    Returns:
        Embeddings, shape (n, d), float32, read-only. Rows have unit length up to float16.

    Raises:
        IntegrityError: If the file does not hold such embeddings.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        embeddings = load_file(path)["embeddings"].astype(np.float32)
    except (OSError, KeyError, SafetensorError) as error:
        raise IntegrityError(
            f"{path}: not a file of background embeddings ({error}); make it again with "
            f"{_make_again(path)}"
        ) from error
    if embeddings.ndim != 2 or embeddings.shape[1] != dim or len(embeddings) == 0:
        raise IntegrityError(
            f"{path}: expected embeddings (n, {dim}), got {embeddings.shape}; make it again with "
            f"{_make_again(path)}"
        )
    if not np.isfinite(embeddings).all():
        raise IntegrityError(
            f"{path}: the embeddings hold NaN or infinity; make it again with {_make_again(path)}"
        )
    embeddings.setflags(write=False)
    return np.asarray(embeddings)


def _make_again(path: Path) -> str:
    return shlex.join(["crl", "background", str(path.parent)])
