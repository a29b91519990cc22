"""Turns the preprocessing of a foreign export into ours.

Hugging Face's keys: `transformers/models/clip/image_processing_clip.py` of
github.com/huggingface/transformers. The crops of transformers and of immich round half a pixel
down, ours rounds it as torchvision does: an image may be cropped one pixel further.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast

from crl_sdk.errors import ExportError
from crl_sdk.model._preprocess import PreprocessSpec

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of OpenAI's CLIP, which clip-as-service uses for every model."""

_PILLOW = {2: "bilinear", 3: "bicubic"}
"""Numbers of Pillow's filters that the models are trained with."""


def spec_from(config: dict[str, Any], path: Path) -> PreprocessSpec:
    """Return the preprocessing that a file describes.

    Args:
        config: Content of `preprocessor_config.json` (Hugging Face) or `preprocess_cfg.json`
            (open_clip, as immich writes it).
        path: Path of the file, for error messages.

    Raises:
        ExportError: If a step has no counterpart here. The message names the key.
    """
    try:
        if "mean" in config and "image_mean" not in config:
            return _from_open_clip(config, path)
        return _from_hugging_face(config, path)
    except (KeyError, TypeError, ValueError) as error:
        raise ExportError(
            f"{path}: {type(error).__name__} at {error}: not the preprocessing of a CLIP model; "
            "give it with --size, --mean, --std, --interpolation and --resize-mode"
        ) from error


def _from_open_clip(config: dict[str, Any], path: Path) -> PreprocessSpec:
    height, width = _height_width(config["size"])
    mode = config.get("resize_mode") or "shortest"
    if mode not in ("shortest", "longest", "squash"):
        raise _unsupported(path, "resize_mode", mode, "shortest, longest or squash")
    return PreprocessSpec(
        height=height,
        width=width,
        mean=_three(config["mean"]),
        std=_three(config["std"]),
        interpolation=_interpolation(config.get("interpolation", "bicubic"), path),
        resize_mode=cast("Literal['shortest', 'longest', 'squash']", mode),
        fill=int(config.get("fill_color") or 0),
    )


def _from_hugging_face(config: dict[str, Any], path: Path) -> PreprocessSpec:
    if config.get("do_pad"):
        raise _unsupported(path, "do_pad", True, "false")
    if not config.get("do_resize", True):
        raise _unsupported(path, "do_resize", False, "true")
    size = config["size"]
    crops = bool(config.get("do_center_crop", "crop_size" in config))
    if isinstance(size, dict) and "longest_edge" in size:
        raise _unsupported(path, "size", size, "shortest_edge, or height and width")
    edge = size.get("shortest_edge") if isinstance(size, dict) else size if crops else None
    if edge is not None:
        height, width = _height_width(config.get("crop_size", edge) if crops else edge)
        if not crops or not height == width == int(edge):
            raise _unsupported(
                path,
                "size",
                f"{size} with crop_size {config.get('crop_size')}",
                "a crop of the size of the shortest edge (or pass --resize-mode yourself)",
            )
    else:
        height, width = _height_width(size)
        if crops and _height_width(config.get("crop_size", size)) != (height, width):
            raise _unsupported(path, "crop_size", config.get("crop_size"), f"{size}, or no crop")
    # The graph takes pixels × factor; ours normalises pixels / 255.
    factor = float(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", True) else 1.0
    scale = 1 / (255 * factor)
    normalises = config.get("do_normalize", True)
    mean = _three(config["image_mean"]) if normalises else (0.0, 0.0, 0.0)
    std = _three(config["image_std"]) if normalises else (1.0, 1.0, 1.0)
    return PreprocessSpec(
        height=height,
        width=width,
        mean=_scaled(mean, scale),
        std=_scaled(std, scale),
        interpolation=_interpolation(config.get("resample", 3), path),
        resize_mode="squash" if edge is None else "shortest",
    )


def _scaled(values: tuple[float, float, float], scale: float) -> tuple[float, float, float]:
    return values if abs(scale - 1) < 1e-6 else _three([value * scale for value in values])


def _height_width(size: Any) -> tuple[int, int]:
    if isinstance(size, dict):
        return int(size["height"]), int(size["width"])
    if isinstance(size, list | tuple):
        height, width = size
        return int(height), int(width)
    return int(size), int(size)


def _three(values: Any) -> tuple[float, float, float]:
    if isinstance(values, int | float):
        values = (values,) * 3
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def _interpolation(value: Any, path: Path) -> Literal["bicubic", "bilinear"]:
    name = _PILLOW.get(value, value) if isinstance(value, int) else str(value).lower()
    if name == "random":  # open_clip evaluates with bicubic if training used a random filter
        name = "bicubic"
    if name not in ("bicubic", "bilinear"):
        raise _unsupported(path, "resample", value, "2 (bilinear) or 3 (bicubic)")
    return cast("Literal['bicubic', 'bilinear']", name)


def _unsupported(path: Path, key: str, value: Any, expected: str) -> ExportError:
    return ExportError(
        f"{path}: `{key}` is {value}, expected {expected}: this preprocessing cannot be reproduced"
    )
