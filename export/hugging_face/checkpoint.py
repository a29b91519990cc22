"""Makes a checkpoint of a directory in the format of Hugging Face."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from crl_export.checkpoint import RANDOM, Checkpoint, ImagePart, TextPart, weights_sha256
from crl_export.hugging_face.cache import label_of, license_of, name_of
from crl_export.hugging_face.files import check_files, check_weights
from crl_export.hugging_face.models import (
    Architecture,
    ImageTower,
    TextTower,
    architecture_of,
    import_transformers,
    load_model,
    quiet,
    random_model,
    read_config,
)
from crl_export.hugging_face.tokenizers import HuggingFaceTokenizer
from crl_export.imported.preprocessing import spec_from
from crl_sdk.errors import ExportError
from crl_sdk.model._manifest import RANDOM_WEIGHTS, Source
from crl_sdk.model._preprocess import PreprocessSpec

PREPROCESSING_FILE = "preprocessor_config.json"

_VOLATILE = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")
"""Keys of a configuration that change without changing the model."""


def load_directory(
    directory: Path,
    pretrained: str | None = None,
    *,
    image: bool = True,
    text: bool = True,
    context_length: int | None = None,
    seed: int = 0,
    root: Path | None = None,
) -> Checkpoint:
    """Load a model of transformers, its preprocessing and its tokenizer.

    Args:
        directory: Directory with `config.json`, the weights, `preprocessor_config.json` and the
            tokenizer.
        pretrained: `none` for random weights, which know nothing.
        image: Whether to load the preprocessing of the image tower too.
        text: Whether to load the tokenizer of the text tower too.
        context_length: Number of tokens per text, if the files do not say it.
        seed: Seed of random weights.
        root: Directory of the repository, if the model is in a folder of it.

    Raises:
        ExportError: If a file is missing or damaged, or the type of the model is not supported.
        MissingDependencyError: If transformers is not installed.
    """
    check_files(directory)
    config = read_config(directory)
    architecture = architecture_of(directory, config)
    label = label_of(root or directory)
    if pretrained == RANDOM:
        model = random_model(directory, architecture, seed)
        label = f"{RANDOM_WEIGHTS}, seed {seed}) for {label}"
    elif pretrained is not None:
        raise ExportError(
            f"{directory} has its own weights: leave out --pretrained {pretrained}, or pass "
            f"{RANDOM} for random ones"
        )
    else:
        check_weights(directory)
        model = load_model(directory, architecture)
    return Checkpoint(
        name=name_of(root or directory),
        image=_image_part(directory, model, architecture) if image else None,
        text=_text_part(directory, model, architecture, context_length) if text else None,
        source=Source(
            architecture=f"{architecture.model} {config_digest(config)}",
            pretrained=label,
            weights_sha256=weights_sha256(model),
            quick_gelu=any("QuickGELU" in type(module).__name__ for module in model.modules()),
            license=license_of(root or directory) or "unknown",
        ),
        library="transformers",
    )


def config_digest(config: dict[str, Any]) -> str:
    """Return a digest of a configuration, without what changes without changing the model."""

    def stable(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: stable(each) for key, each in value.items() if key not in _VOLATILE}

    return hashlib.sha256(json.dumps(stable(config), sort_keys=True).encode()).hexdigest()[:16]


def _image_part(
    directory: Path, model: torch.nn.Module, architecture: Architecture
) -> ImagePart | None:
    if architecture.image is None:
        return None
    tower = ImageTower(model, architecture)
    config: Any = model.config
    size = getattr(getattr(config, "vision_config", config), "image_size", None)
    spec = read_preprocessing(directory, (size, size) if isinstance(size, int) else None)
    return ImagePart(tower, spec)


def read_preprocessing(directory: Path, input_size: tuple[int, int] | None) -> PreprocessSpec:
    """Return the preprocessing of a directory, with the defaults of transformers filled in.

    Args:
        directory: Directory with the file.
        input_size: Height and width that the image tower takes, if they are known.

    Raises:
        ExportError: If there is none, or it has no counterpart here.
    """
    transformers = import_transformers()
    slow = {"use_fast": False} if transformers.__version__.startswith("4.") else {"backend": "pil"}
    path = directory / PREPROCESSING_FILE
    with quiet():
        try:
            processor = transformers.AutoImageProcessor.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False, **slow
            )
        except Exception as error:  # transformers raises many types
            raise ExportError(
                f"{path}: transformers cannot load the preprocessing ({type(error).__name__}: "
                f"{str(error)[:200]}); get the file from the repository of the model"
            ) from error
    given = {key: value for key, value in processor.to_dict().items() if value is not None}
    return spec_from(given, path, input_size)


def _text_part(
    directory: Path,
    model: torch.nn.Module,
    architecture: Architecture,
    context_length: int | None,
) -> TextPart | None:
    if architecture.text is None:
        return None
    texts: Any = model.config
    texts = getattr(texts, architecture.texts) if architecture.texts else texts
    positions = int(texts.max_position_embeddings) - architecture.unused_positions
    siglip = architecture.padding == "none"
    tokenizer = HuggingFaceTokenizer(
        directory, positions=positions, context_length=context_length, lower_case=siglip
    )
    if siglip and context_length not in (None, positions):
        raise ExportError(
            f"{architecture.model} reads its padding, and was trained with {positions} tokens: "
            "leave out --context-length"
        )
    _check_fit(directory, tokenizer, texts, architecture)
    ended = tokenizer.end_id == tokenizer.pad_id
    tower = TextTower(model, architecture, tokenizer.pad_id, pad_ends_texts=ended)
    return TextPart(tower, tokenizer)


_LEGACY_END = 2
"""`eos_token_id` of older configurations of CLIP, whose tower stops at the largest token id."""


def _check_fit(
    directory: Path, tokenizer: HuggingFaceTokenizer, texts: Any, architecture: Architecture
) -> None:
    """Raise an error if a tokenizer is not that of a text tower."""
    if architecture.padding != "end":
        return
    end = texts.eos_token_id
    if end == _LEGACY_END and architecture.model.startswith("CLIP"):
        end = max(tokenizer.ids(["a photo"])[0])
    if tokenizer.end_id != end:
        raise ExportError(
            f"{directory}: texts end with the token id {tokenizer.end_id}, the text tower reads "
            f"its embedding at {end}; get the tokenizer of this model, or export the image tower "
            "alone with --no-text"
        )
