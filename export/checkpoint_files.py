"""Loads a checkpoint file into a model: finds the weights among what training programs save."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import isqrt
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict
from safetensors.torch import load_file

from crl_export.pretrained_tags import QUICK_GELU
from crl_export.torchscript import is_torchscript, read_torchscript
from crl_sdk.errors import ExportError

# what OpenAI's archives and older versions hold beside the weights
_DERIVED = {"input_resolution", "context_length", "vocab_size", "attn_mask", "position_ids"}
# what training programs keep beside the weights: made as empty objects
_RECORDS = (
    "argparse.Namespace",
    "numpy.dtype",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
)
_DEPTH = 3
_IMAGE_TOWER = "visual."


class _Record:
    """Stands for a record beside the weights. It keeps nothing of it."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


@dataclass(frozen=True, slots=True)
class _Weights:
    """Tensors of a file that may be a model's.

    Attributes:
        where: Keys and prefix under which they were found; empty for the file itself.
        tensors: Tensors as open_clip names them.
        missing: Names of the model that the tensors lack.
        unexpected: Names of the tensors that belong to the model, and that it lacks.
        unlike: Names of both, whose shape or kind of number differs, with both.
    """

    where: str
    tensors: dict[str, torch.Tensor]
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    unlike: list[str] = field(default_factory=list)

    @property
    def faults(self) -> int:
        return len(self.missing) + len(self.unexpected) + len(self.unlike)


def load_weights(
    model: torch.nn.Module, architecture: str, path: Path, *, text: bool = True
) -> None:
    """Load the weights of a file into a model. Nothing of the file is run.

    Weights may lie in nested dictionaries (`state_dict`, `clip_model`), have prefixes (`module.`),
    be of half precision, and have other modules and the state of the training beside them. They are
    taken only if they fill the model exactly.

    Args:
        model: Model of open_clip.
        architecture: Its name in open_clip, for messages.
        path: `.safetensors` file, `.pt` file of tensors, or TorchScript archive.
        text: Whether the text tower is needed. If not, the weights may be those of an image tower
            alone; the others are then zeros.

    Raises:
        ExportError: If no set of weights in the file fits, or several do.
    """
    script = is_torchscript(path)
    document = _read(path, script)
    twin = f"{architecture}{QUICK_GELU}"
    if script and "input_resolution" in document and twin in open_clip.list_models():
        raise ExportError(
            f"{path.name} is an archive of OpenAI's, whose models have QuickGELU activations: "
            f"expected the architecture {twin}, got {architecture}"
        )
    expected = dict(model.state_dict())
    compared = [_compare(model, expected, each) for each in _candidates(document, "logit_scale")]
    fitting = [weights for weights in compared if not weights.faults]
    if not fitting and not text:
        expected = {name: own for name, own in expected.items() if name.startswith(_IMAGE_TOWER)}
        anchor = next(iter(expected)).removeprefix(_IMAGE_TOWER)
        towers = _candidates(document, anchor, _IMAGE_TOWER)
        fitting = [each for each in towers if not _compare(model, expected, each).faults]
    if len(fitting) > 1:  # beside averaged weights, for example: what open_clip loads
        fitting = [weights for weights in fitting if weights.where == "state_dict"] or fitting
    if len(fitting) > 1:
        places = " and ".join(repr(weights.where) for weights in fitting)
        raise ExportError(
            f"{path.name} has several sets of weights that fit {architecture}, under {places}: "
            "save one of them alone, with torch.save({'state_dict': …})"
        )
    if not fitting:
        raise ExportError(f"{path.name}: {_describe(document, compared, architecture)}")
    tensors = fitting[0].tensors
    model.load_state_dict(
        {
            name: tensors.get(name, own) if name in expected else torch.zeros_like(own)
            for name, own in model.state_dict().items()
        }
    )


def _read(path: Path, script: bool) -> Mapping[Any, Any]:
    if path.suffix == ".safetensors":
        return load_file(path)
    if script:
        return read_torchscript(path)
    # torch checks names against this list: none of the named code is run
    with torch.serialization.safe_globals([(_Record, name) for name in _RECORDS]):
        document = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    if not isinstance(document, Mapping):
        raise ExportError(f"{path.name}: expected weights by name, got {type(document).__name__}")
    return document


def _candidates(document: Mapping[Any, Any], anchor: str, within: str = "") -> Iterator[_Weights]:
    """Return what may be a model or tower: all tensors that share a prefix with one of a name.

    Args:
        document: Content of the file.
        anchor: Name of a tensor that the model or tower has.
        within: Prefix of the names that are returned.
    """
    for where, tensors in _dictionaries(document, "", _DEPTH):
        for name in tensors:
            if name == anchor or name.endswith(f".{anchor}"):
                prefix = name.removesuffix(anchor)
                yield _Weights(
                    ".".join(part for part in (where, prefix.rstrip(".")) if part),
                    {
                        f"{within}{name.removeprefix(prefix)}": tensor
                        for name, tensor in tensors.items()
                        if name.startswith(prefix)
                    },
                )


def _dictionaries(
    document: Mapping[Any, Any], where: str, depth: int
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Return every dictionary of tensors, with the keys that lead to it."""
    tensors = {
        name: value
        for name, value in document.items()
        if isinstance(name, str) and isinstance(value, torch.Tensor)
    }
    if tensors:
        yield where, tensors
    for name, value in document.items():
        if isinstance(name, str) and isinstance(value, Mapping) and depth:
            yield from _dictionaries(value, f"{where}.{name}" if where else name, depth - 1)


def _compare(
    model: torch.nn.Module, expected: Mapping[str, torch.Tensor], weights: _Weights
) -> _Weights:
    """Return weights under open_clip's names, compared with what the model expects."""
    tensors = dict(convert_state_dict(model, dict(weights.tensors)))
    if "positional_embedding" in tensors and "positional_embedding" not in expected:
        tensors = dict(convert_to_custom_text_state_dict(tensors))
    for name in ("logit_scale", "logit_bias"):  # a number, or one in a list
        if name in tensors and name in expected and tensors[name].numel() == 1:
            tensors[name] = tensors[name].reshape(expected[name].shape)
    own = {name.split(".")[0] for name in expected}
    return _Weights(
        weights.where,
        tensors,
        missing=[
            name
            for name in expected
            if name not in tensors and not name.endswith(".num_batches_tracked")
        ],
        # other modules with names of their own may lie beside the model's
        unexpected=[
            name
            for name in tensors
            if name not in expected
            and name.split(".")[-1] not in _DERIVED
            and ("." not in name or name.split(".")[0] in own)
        ],
        unlike=[
            f"{name} {_kind(tensors[name])}, expected {_kind(tensor)}"
            for name, tensor in expected.items()
            if name in tensors and _kind(tensors[name]) != _kind(tensor)
        ],
    )


def _kind(tensor: torch.Tensor) -> str:
    numbers = "" if tensor.is_floating_point() else f" {tensor.dtype}".replace("torch.", "")
    return f"{tuple(tensor.shape)}{numbers}"


def _describe(document: Mapping[Any, Any], compared: list[_Weights], architecture: str) -> str:
    """Return why no weights of a file fit, and what to do."""
    if compared:
        nearest = min(compared, key=lambda weights: weights.faults)
        faults = [
            f"{len(names)} {word}, such as {names[0]}"
            for names, word in (
                (nearest.missing, "missing"),
                (nearest.unexpected, "unexpected"),
                (nearest.unlike, "of another shape or type"),
            )
            if names
        ]
        place = f" under {nearest.where!r}" if nearest.where else ""
        names = architectures_of(nearest.tensors)
        advice = f": name {' or '.join(names)}" if names else ""
        return (
            f"the weights{place} do not fit {architecture} ({'; '.join(faults)}). They are "
            f"incomplete, or of another architecture{advice}"
        )
    dictionaries = list(_dictionaries(document, "", _DEPTH))
    for where, tensors in dictionaries:
        if any(re.match(r"(vision_model|text_model)\.", name) for name in tensors):
            return (
                "these are weights of transformers, which have other names: expected weights of "
                "open_clip or OpenAI's CLIP"
            )
        if any(re.search(r"(^|\.)(conv1\.weight|class_embedding)$", name) for name in tensors):
            place = f" under {where!r}" if where else ""
            return (
                f"the weights{place} are an image tower alone: give a text tower with "
                "--text-model, or leave the texts out with --no-text (docs/MODELS.md)"
            )
    parts = ", ".join(
        f"{where or 'the file'} ({len(tensors)} tensors, such as {next(iter(tensors))})"
        for where, tensors in dictionaries[:4]
    )
    return (
        f"expected the weights of {architecture}, found no CLIP model (no logit_scale) in "
        f"{parts or 'a file without tensors'}: give the file of the model itself"
    )


def architectures_of(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names of open_clip's architectures that have the layers of some weights.

    Only OpenAI's kinds of model are recognised: vision transformers and modified ResNets.

    Args:
        tensors: Weights by their names in open_clip.
    """
    try:
        shape = _shape_of_tensors(tensors)
    except (KeyError, IndexError, ValueError):
        return []
    return [name for name in open_clip.list_models() if _shape_of_architecture(name) == shape]


def _shape_of_tensors(tensors: Mapping[str, torch.Tensor]) -> tuple[Any, ...]:
    def count(pattern: str) -> int:
        found = (re.match(pattern, name) for name in tensors)
        return len({match[1] for match in found if match})

    text = (
        tensors["text_projection"].shape[1],
        tensors["positional_embedding"].shape[0],
        *tensors["token_embedding.weight"].shape,
        count(r"transformer\.resblocks\.(\d+)\."),
    )
    if "visual.class_embedding" in tensors:
        width, _, patch, _ = tensors["visual.conv1.weight"].shape
        grid = isqrt(tensors["visual.positional_embedding"].shape[0] - 1)
        layers: Any = count(r"visual\.transformer\.resblocks\.(\d+)\.")
        return (*text, width, layers, grid * patch, patch)
    width = tensors["visual.layer1.0.conv1.weight"].shape[0]
    grid = isqrt(tensors["visual.attnpool.positional_embedding"].shape[0] - 1)
    layers = tuple(count(rf"visual\.layer{stage}\.(\d+)\.") for stage in range(1, 5))
    return (*text, width, layers, grid * 32, None)


def _shape_of_architecture(name: str) -> tuple[Any, ...] | None:
    config = open_clip.get_model_config(name) or {}
    vision, text = config["vision_cfg"], config["text_cfg"]
    if "timm_model_name" in vision or "hf_model_name" in text or config.get("custom_text"):
        return None
    layers = vision.get("layers", 12)
    return (
        config["embed_dim"],
        text.get("context_length", 77),
        text.get("vocab_size", 49408),
        text.get("width", 512),
        text.get("layers", 12),
        vision.get("width", 768),
        tuple(layers) if isinstance(layers, list) else layers,
        vision.get("image_size", 224),
        None if isinstance(layers, list) else vision.get("patch_size"),
    )
