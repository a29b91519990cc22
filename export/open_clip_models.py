"""Loads models of open_clip by name and tag, from a file, or from a directory."""

from __future__ import annotations

import difflib
import gzip
import hashlib
import json
import logging
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import open_clip
import torch
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model
from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, HFTokenizer, SimpleTokenizer
from open_clip.transformer import QuickGELU

from crl_export.checkpoint import RANDOM, Checkpoint, ImagePart, TextPart, weights_sha256
from crl_export.checkpoint_files import load_weights
from crl_export.hugging_face.cache import is_cached, label_of, license_of, name_of
from crl_export.hugging_face.hub import (
    OPEN_CLIP_CONFIG,
    PREFIX,
    Report,
    find_directory,
    small_files,
)
from crl_export.imported.preprocessing import three_values
from crl_export.messages import first_lines
from crl_export.pretrained_tags import doubts_about_file, needs_quick_gelu, preprocess_of_file
from crl_export.tokenizers import OpenClipTokenizer
from crl_sdk.errors import ExportError
from crl_sdk.model._manifest import RANDOM_WEIGHTS, Source
from crl_sdk.model._preprocess import PreprocessSpec

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "spiece.model")
"""Files of which a directory has one at least if it has a tokenizer of transformers."""


def load_architecture(
    architecture: str, pretrained: str | None, *, text: bool = True, seed: int = 0
) -> Checkpoint:
    """Create a model by name and load its weights.

    Args:
        architecture: Name of an open_clip architecture.
        pretrained: Tag of open_clip, a `.safetensors` or `.pt` file, or `none` for random weights.
        text: Whether to load the tokenizer of the text tower too.
        seed: Seed of random weights.

    Raises:
        ExportError: If the architecture, tag or file does not exist, the file is not a checkpoint
            of this architecture, or the weights cannot be downloaded.
    """
    if architecture not in open_clip.list_models():
        near = difflib.get_close_matches(architecture, open_clip.list_models(), n=4, cutoff=0.5)
        hint = f"; near names are {', '.join(near)}" if near else ""
        raise ExportError(
            f"open_clip has no architecture {architecture!r}{hint}; expected one of "
            f"open_clip.list_models(), a directory with {OPEN_CLIP_CONFIG} or in the format of "
            "Hugging Face, or hf:OWNER/REPO"
        )
    if pretrained is None:
        raise ExportError(
            f"{architecture}: expected weights with --pretrained: {_known_tags(architecture)}, a "
            f".safetensors or .pt file, or {RANDOM} for random weights, which know nothing"
        )
    _check_pretrained(architecture, pretrained)
    with _quiet(), _typed_errors(architecture, pretrained):
        torch.manual_seed(seed)
        file = _weights_file(architecture, pretrained)
        model = open_clip.create_model(
            architecture,
            pretrained=None if pretrained == RANDOM or file else pretrained,
            pretrained_text=False,
            force_quick_gelu=needs_quick_gelu(architecture, pretrained),
            force_preprocess_cfg=preprocess_of_file(architecture) if file else None,
        )
        if file is not None:
            load_weights(model, architecture, file, text=text)
    for doubt in doubts_about_file(architecture) if file else ():
        warnings.warn(doubt, stacklevel=2)
    label = Path(pretrained).name if Path(pretrained).is_file() else pretrained
    if pretrained == RANDOM:
        label = f"{RANDOM_WEIGHTS}, seed {seed})"
    tokenizer = _tokenizer(architecture, open_clip.get_tokenizer) if text else None
    return _checkpoint(model, architecture, tokenizer, architecture, label)


def load_directory(
    directory: Path, *, text: bool = True, report: Report | None = None
) -> Checkpoint:
    """Load a directory with `open_clip_config.json` and weights.

    Args:
        directory: The directory.
        text: Whether to load the tokenizer of the text tower too.
        report: Function that is called with the progress of downloads: a repository of the hub may
            take its tokenizer from another one.

    Raises:
        ExportError: If a file is missing or damaged, or there is no tokenizer.
    """
    with _quiet(), _typed_errors(str(directory), "its own weights"):
        config = json.loads((directory / OPEN_CLIP_CONFIG).read_text())["model_cfg"]
        words = config["text_cfg"]
        changed = {}
        if "hf_model_name" in words and is_cached(directory):
            base = find_directory(
                f"{PREFIX}{words['hf_model_name']}", report, choose=lambda _: ["config.json"]
            )
            changed["text_cfg"] = {
                **words,
                "hf_model_name": str(base),
                "hf_model_pretrained": False,
            }
        model = open_clip.create_model(f"local-dir:{directory}", require_pretrained=True, **changed)

    def make_tokenizer(name: str) -> Any:
        merges = sorted(directory.glob("bpe*.txt.gz"))
        if merges:
            return SimpleTokenizer(
                str(merges[0]), context_length=words.get("context_length", DEFAULT_CONTEXT_LENGTH)
            )
        other = words.get("hf_tokenizer_name")
        if not other or any((directory / each).is_file() for each in _TOKENIZER_FILES):
            return open_clip.get_tokenizer(name)
        if not is_cached(directory):
            raise ExportError(
                f"its tokenizer is that of {other}: copy {', '.join(_TOKENIZER_FILES[:2])} of that "
                f"repository into {directory}"
            )
        return HFTokenizer(
            str(find_directory(f"{PREFIX}{other}", report, choose=small_files)),
            context_length=words.get("context_length", DEFAULT_CONTEXT_LENGTH),
            tokenizer_mode=words.get("tokenizer_mode"),
            **words.get("tokenizer_kwargs", {}),
        )

    tokenizer = _tokenizer(f"local-dir:{directory}", make_tokenizer) if text else None

    # not the directory's name: a model that is moved or renamed is the same model
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    label = label_of(directory)
    checkpoint = _checkpoint(model, name_of(directory), tokenizer, f"config {digest[:16]}", label)
    known = msgspec.structs.replace(
        checkpoint.source, license=license_of(directory) or checkpoint.source.license
    )
    return replace(checkpoint, source=known)


def _checkpoint(
    model: Any, name: str, tokenizer: OpenClipTokenizer | None, architecture: str, label: str
) -> Checkpoint:
    model.eval().requires_grad_(False)
    config = open_clip.get_model_preprocess_cfg(model)
    try:
        spec = _preprocess_spec(config)
    except (KeyError, TypeError, ValueError) as error:
        raise ExportError(
            f"{name}: {type(error).__name__} at {error}: the preprocessing {config} is none of "
            f"open_clip's; correct preprocess_cfg in {OPEN_CLIP_CONFIG}"
        ) from error
    return Checkpoint(
        name=name,
        image=ImagePart(model, spec),
        text=None if tokenizer is None else TextPart(model, tokenizer),
        source=_source(model, architecture, label),
        library="open_clip_torch",
    )


def _tokenizer(name: str, make: Callable[[str], Any]) -> OpenClipTokenizer:
    try:
        return OpenClipTokenizer(make(name))
    except Exception as error:  # transformers and the hub raise many types
        raise ExportError(
            f"the tokenizer of {name} cannot be loaded ({error}); export the image tower alone "
            "with --no-text"
        ) from error


def _source(model: torch.nn.Module, architecture: str, label: str) -> Source:
    return Source(
        architecture=architecture,
        pretrained=label,
        weights_sha256=weights_sha256(model),
        # depends on the tag in open_clip, not on the weights
        quick_gelu=any(isinstance(module, QuickGELU) for module in model.modules()),
    )


def _preprocess_spec(config: dict[str, Any]) -> PreprocessSpec:
    size = config["size"]
    height, width = (size, size) if isinstance(size, int) else size
    return PreprocessSpec(
        height=int(height),
        width=int(width),
        mean=three_values(config["mean"]),
        std=three_values(config["std"]),
        # open_clip evaluates with bicubic if training used a random filter
        interpolation="bilinear" if config.get("interpolation") == "bilinear" else "bicubic",
        resize_mode=config.get("resize_mode") or "shortest",
        fill=int(config.get("fill_color") or 0),
    )


def _weights_file(architecture: str, pretrained: str) -> Path | None:
    """Return the file that `pretrained` names, unless it is one that open_clip reads itself."""
    path = Path(pretrained)
    if get_pretrained_cfg(architecture, pretrained) or not path.is_file():
        return None
    return None if path.suffix in (".npz", ".npy") else path  # big_vision's


def _check_pretrained(architecture: str, pretrained: str) -> None:
    path = Path(pretrained)
    if pretrained == RANDOM or path.is_file() or get_pretrained_cfg(architecture, pretrained):
        return
    if path.suffix in (".pt", ".pth", ".bin", ".safetensors") or path.parent != Path():
        raise ExportError(f"{path}: no such checkpoint file; check the path")
    raise ExportError(
        f"{architecture} has no weights {pretrained!r}: expected {_known_tags(architecture)}, or a "
        ".safetensors or .pt file"
    )


def _known_tags(architecture: str) -> str:
    tags = list_pretrained_tags_by_model(architecture)
    return f"one of the tags {', '.join(tags)}" if tags else "a tag (open_clip has none for it)"


@contextmanager
def _typed_errors(architecture: str, pretrained: str) -> Iterator[None]:
    """Translate exceptions of open_clip and torch into errors that say what to do."""
    where = f"{architecture} with {pretrained}"
    try:
        yield
    except ExportError:
        raise
    except (pickle.UnpicklingError, EOFError, gzip.BadGzipFile) as error:
        raise ExportError(
            f"{where}: not a checkpoint of tensors only ({error}); truncated, or pickled code, "
            "which is never run. Convert it to .safetensors where you trust it"
        ) from error
    except OSError as error:
        raise ExportError(
            f"{where}: cannot be read or downloaded ({error}); without network, download the "
            "file elsewhere and pass its path as --pretrained"
        ) from error
    except RuntimeError as error:
        message = str(error)
        if "download" in message or "onnect" in message:
            advice = "without network, download the file elsewhere and pass its path"
        elif "state_dict" in message or "size mismatch" in message:
            advice = "the checkpoint is of another architecture"
        else:
            advice = "the file is damaged or no checkpoint; get it again"
        raise ExportError(f"{where}: {first_lines(error, 4)}; {advice}") from error
    except Exception as error:  # safetensors, json and open_clip raise many types
        raise ExportError(
            f"{where}: not a loadable checkpoint ({type(error).__name__}: "
            f"{first_lines(error, 4)}); check the file"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence log messages about weights and retried downloads. Failures are raised."""
    levels = {name: logging.getLogger(name).level for name in (None, "huggingface_hub")}
    for name in levels:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
