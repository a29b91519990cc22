"""A model that is ready to be exported, whichever library it comes from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import torch

from crl_export.encoders import ImageEncoder, TextEncoder
from crl_export.tokenizers import TextTokenizer
from crl_sdk.errors import ExportError
from crl_sdk.model._manifest import Source
from crl_sdk.model._preprocess import PreprocessSpec

RANDOM = "none"
"""Name in place of weights for random ones, which know nothing."""


@dataclass(frozen=True, slots=True)
class ImagePart:
    """The image tower, in eval mode, float32, on the CPU, with its preprocessing."""

    model: ImageEncoder
    preprocess: PreprocessSpec


@dataclass(frozen=True, slots=True)
class TextPart:
    """The text tower, in eval mode, float32, on the CPU, with its tokenizer."""

    model: TextEncoder
    tokenizer: TextTokenizer


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model ready to be exported.

    Attributes:
        name: Default name of the bundle.
        image: Image tower; None if the files have none.
        text: Text tower; None if it was not asked for, or the files have none.
        source: Origin of the weights.
        library: Package that the image tower belongs to.
    """

    name: str
    image: ImagePart | None
    text: TextPart | None
    source: Source
    library: str


def with_text_of(checkpoint: Checkpoint, other: Checkpoint) -> Checkpoint:
    """Return a checkpoint with the text tower of another one.

    Raises:
        ExportError: If the other one has no text tower.
    """
    if other.text is None:
        raise ExportError(f"{other.source.pretrained}: has no text tower; check --text-model")
    first, second = checkpoint.source, other.source
    digest = hashlib.sha256(f"{first.weights_sha256} {second.weights_sha256}".encode())
    source = msgspec.structs.replace(
        first,
        architecture=f"{first.architecture}, texts {second.architecture}",
        pretrained=f"{first.pretrained}, texts {second.pretrained}",
        weights_sha256=digest.hexdigest(),
        license=" and ".join(dict.fromkeys((first.license, second.license))),
    )
    return replace(checkpoint, text=other.text, source=source)


def weights_sha256(model: torch.nn.Module) -> str:
    """Return the digest of names, dtypes, shapes and bytes of the state dict, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        values: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(values.data)
    return digest.hexdigest()
