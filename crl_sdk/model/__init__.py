"""Model bundles: the exported graphs of a CLIP model, its tokenizer and its preprocessing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crl_sdk._lazy import lazy_names

if TYPE_CHECKING:
    from crl_sdk.model._bundle import ModelBundle, demo_bundle
    from crl_sdk.model._manifest import Manifest, Parity, Precision
    from crl_sdk.model._preprocess import (
        Decode,
        ImageInput,
        ImageLimits,
        PreprocessSpec,
        load_pixels,
    )
    from crl_sdk.model._tokenizer import Tokenizer

__all__ = [
    "Decode",
    "ImageInput",
    "ImageLimits",
    "Manifest",
    "ModelBundle",
    "Parity",
    "Precision",
    "PreprocessSpec",
    "Tokenizer",
    "demo_bundle",
    "load_pixels",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "_bundle": (
            "ModelBundle",
            "demo_bundle",
        ),
        "_manifest": (
            "Manifest",
            "Parity",
            "Precision",
        ),
        "_preprocess": (
            "Decode",
            "ImageInput",
            "ImageLimits",
            "PreprocessSpec",
            "load_pixels",
        ),
        "_tokenizer": ("Tokenizer",),
    },
    extra="cpu",
)
