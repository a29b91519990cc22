"""Finds out which library a model belongs to, and loads it."""

from __future__ import annotations

from pathlib import Path

from crl_export import open_clip_models
from crl_export.checkpoint import Checkpoint, with_text_of
from crl_export.hugging_face.hub import OPEN_CLIP_CONFIG, PREFIX, find_directory
from crl_sdk.errors import ExportError


def load_checkpoint(
    model: str,
    pretrained: str | None = None,
    *,
    text: bool = True,
    text_model: str | None = None,
    context_length: int | None = None,
    seed: int = 0,
) -> Checkpoint:
    """Load a model and its weights. Only tensors are unpickled, and no code of a model is run.

    Args:
        model: Name of an open_clip architecture; a directory with `open_clip_config.json`, or in
            the format of Hugging Face; or `hf:OWNER/REPO`, perhaps with `@REVISION`.
        pretrained: Tag of open_clip, a `.safetensors` or `.pt` file, or `none` for random weights.
            None if the model has its own weights, as directories and repositories have.
        text: Whether to load the text tower and its tokenizer.
        text_model: Directory or `hf:OWNER/REPO` of the text tower, if it is another one.
        context_length: Number of tokens per text of a text tower of Hugging Face; by default what
            its files say, at most 128.
        seed: Seed of random weights.

    Raises:
        ExportError: If the model or its weights do not exist, cannot be downloaded, or do not fit
            each other.
        MissingDependencyError: If the library that the model belongs to is not installed.
    """
    if text_model is None:
        return _load(model, pretrained, text, context_length, seed)
    checkpoint = _load(model, pretrained, False, None, seed)
    return with_text_of(checkpoint, _load(text_model, None, True, context_length, seed))


def _load(
    name: str, pretrained: str | None, text: bool, context_length: int | None, seed: int
) -> Checkpoint:
    if not name.startswith(PREFIX) and not Path(name).is_dir():
        return open_clip_models.load_architecture(name, pretrained, text=text, seed=seed)
    directory = find_directory(name)
    if (directory / OPEN_CLIP_CONFIG).is_file():
        if pretrained is not None:
            raise ExportError(f"{name} has its own weights: leave out --pretrained {pretrained}")
        return open_clip_models.load_directory(directory, text=text)
    from crl_export.hugging_face.checkpoint import load_directory  # transformers takes seconds

    return load_directory(
        directory, pretrained, text=text, context_length=context_length, seed=seed
    )
