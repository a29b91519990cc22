"""Finds out which library a model belongs to, and loads it."""

from __future__ import annotations

from pathlib import Path

from crl_export import open_clip_models
from crl_export.checkpoint import RANDOM, Checkpoint, with_text_of
from crl_export.hugging_face.files import check_files
from crl_export.hugging_face.hub import (
    OPEN_CLIP_CONFIG,
    PREFIX,
    Report,
    find_directory,
    small_files,
)
from crl_sdk.errors import ExportError


def load_checkpoint(
    model: str,
    pretrained: str | None = None,
    *,
    text: bool = True,
    text_model: str | None = None,
    context_length: int | None = None,
    seed: int = 0,
    report: Report | None = None,
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
        report: Function that is called with the progress of downloads.

    Raises:
        ExportError: If the model or its weights do not exist, cannot be downloaded, or do not fit
            each other.
        MissingDependencyError: If the library that the model belongs to is not installed.
    """
    if text_model is None:
        return _load(
            model, pretrained, text=text, context_length=context_length, seed=seed, report=report
        )
    if not text_model.startswith(PREFIX) and not Path(text_model).is_dir():
        raise ExportError(
            f"--text-model: {text_model} is no directory; expected one, or hf:OWNER/REPO"
        )
    checkpoint = _load(model, pretrained, text=False, context_length=None, seed=seed, report=report)
    words = _load(
        text_model,
        None,
        image=False,
        text=True,
        context_length=context_length,
        seed=seed,
        report=report,
    )
    return with_text_of(checkpoint, words)


def _load(
    name: str,
    pretrained: str | None,
    *,
    image: bool = True,
    text: bool,
    context_length: int | None,
    seed: int,
    report: Report | None,
) -> Checkpoint:
    if not name.startswith(PREFIX) and not Path(name).is_dir():
        _refuse_length(name, context_length)
        return open_clip_models.load_architecture(name, pretrained, text=text, seed=seed)
    choose = small_files if pretrained == RANDOM else None
    directory = find_directory(name, report, choose=choose, check=_check)
    if (directory / OPEN_CLIP_CONFIG).is_file():
        if pretrained is not None:
            raise ExportError(f"{name} has its own weights: leave out --pretrained {pretrained}")
        _refuse_length(name, context_length)
        return open_clip_models.load_directory(directory, text=text, report=report)
    check_files(directory)
    # transformers takes seconds
    from crl_export.hugging_face.checkpoint import load_directory
    from crl_export.hugging_face.text_towers import clip_folder, load_text_tower

    folder = clip_folder(directory)
    if folder is None:
        if pretrained is not None:
            raise ExportError(f"{name} has its own weights: leave out --pretrained {pretrained}")
        return load_text_tower(directory, context_length=context_length)
    return load_directory(
        folder,
        pretrained,
        image=image,
        text=text,
        context_length=context_length,
        seed=seed,
        root=directory,
    )


def _refuse_length(name: str, context_length: int | None) -> None:
    if context_length is not None:
        raise ExportError(
            f"{name}: models of open_clip say how many tokens their text tower reads; leave out "
            f"--context-length {context_length}"
        )


def _check(directory: Path) -> None:
    """Check that the configuration of a repository is one that can be exported."""
    if (directory / OPEN_CLIP_CONFIG).is_file():
        return
    # transformers takes seconds
    from crl_export.hugging_face.models import architecture_of, read_config
    from crl_export.hugging_face.text_towers import clip_folder

    folder = clip_folder(directory)
    if folder is not None:
        architecture_of(folder, read_config(folder))
