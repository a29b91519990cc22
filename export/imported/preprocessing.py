"""Turns the preprocessing of a foreign export into ours.

Hugging Face's keys: `transformers/models/clip/image_processing_clip.py` of
github.com/huggingface/transformers. The crops of transformers and of immich round half a pixel
down, ours rounds it as torchvision does: an image may be cropped one pixel further.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

from crl_sdk.errors import ExportError
from crl_sdk.model._preprocess import PreprocessSpec

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of OpenAI's CLIP, which clip-as-service uses for every model."""

Three: TypeAlias = "tuple[float, float, float]"
"""A value for each channel."""

_SQUASHED = 384
"""Shortest edge from which ConvNextImageProcessor ignores the aspect ratio and crops nothing."""

_PILLOW = {2: "bilinear", 3: "bicubic"}
"""Numbers of Pillow's filters that the models are trained with."""


def spec_from(
    config: dict[str, Any], path: Path, input_size: tuple[int, int] | None = None
) -> PreprocessSpec:
    """Return the preprocessing that a file describes.

    Args:
        config: Content of `preprocessor_config.json` (Hugging Face) or `preprocess_cfg.json`
            (open_clip, as immich writes it).
        path: Path of the file, for error messages.
        input_size: Height and width of the model's input, if they are known. An image whose
            shortest edge is scaled, and which the file does not crop, is cropped to them.

    Raises:
        ExportError: If a step has no counterpart here. The message names the key.
    """
    try:
        if "mean" in config and "image_mean" not in config:
            return _from_open_clip(config, path)
        return _from_hugging_face(config, path, input_size)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise ExportError(
            f"{path}: {type(error).__name__} at {error}: not the preprocessing of a CLIP model; "
            "give `crl import` all of --size, --mean, --std, --interpolation and --resize-mode "
            "(and --resize)"
        ) from error


def _from_open_clip(config: dict[str, Any], path: Path) -> PreprocessSpec:
    height, width = _height_width(config["size"])
    mode = config.get("resize_mode") or "shortest"
    if mode not in ("shortest", "longest", "squash"):
        raise _unsupported(path, "resize_mode", mode, "shortest, longest or squash")
    return PreprocessSpec(
        height=height,
        width=width,
        mean=three_values(config["mean"]),
        std=three_values(config["std"]),
        interpolation=_interpolation(config.get("interpolation", "bicubic"), path),
        resize_mode=cast("Literal['shortest', 'longest', 'squash']", mode),
        fill=int(config.get("fill_color") or 0),
    )


def _from_hugging_face(
    config: dict[str, Any], path: Path, input_size: tuple[int, int] | None
) -> PreprocessSpec:
    for key, expected in (("do_pad", False), ("do_flip_channel_order", False), ("do_resize", True)):
        if bool(config.get(key, expected)) != expected:
            raise _unsupported(path, key, not expected, str(expected).lower())
    resize_mode, resize, crop = _sizes(config, path, input_size)
    if crop[0] > resize[0] or crop[1] > resize[1]:  # transformers would pad with black
        raise _unsupported(
            path, "crop_size", f"{crop[0]}×{crop[1]}", f"at most `size`, {resize[0]}×{resize[1]}"
        )
    mean, std = _normalisation(config)
    return PreprocessSpec(
        height=crop[0],
        width=crop[1],
        mean=mean,
        std=std,
        interpolation=_interpolation(config.get("resample", 3), path),
        resize_mode=resize_mode,
        resize=resize,
    )


def _sizes(
    config: dict[str, Any], path: Path, input_size: tuple[int, int] | None
) -> tuple[Literal["shortest", "squash"], tuple[int, int], tuple[int, int]]:
    """Return how an image is scaled, to which height and width, and to which it is cropped."""
    size = config["size"]
    crops = bool(config.get("do_center_crop", "crop_size" in config))
    if isinstance(size, dict) and "longest_edge" in size:
        raise _unsupported(path, "size", size, "shortest_edge, or height and width")
    share = config.get("crop_pct")  # of ConvNextImageProcessor
    if isinstance(size, dict):
        edge = size.get("shortest_edge")
    else:  # as older versions of transformers wrote it
        edge = size if (crops or share) and not isinstance(size, list | tuple) else None
    if edge is None:
        resize = _height_width(size)
        return "squash", resize, _height_width(config.get("crop_size", size)) if crops else resize
    edge, _ = _height_width(edge)
    if share is not None:
        crop = (edge, edge)
        if edge >= _SQUASHED:
            return "squash", crop, crop
        edge = int(edge / share)
    elif crops:
        crop = _height_width(config.get("crop_size", edge))
    elif input_size is not None:
        crop = input_size
    else:
        raise _unsupported(
            path,
            "do_center_crop",
            False,
            f"a crop, because images scaled to a shortest edge of {edge} have several sizes "
            f"(`crl import --size {edge}` says what the model takes)",
        )
    return "shortest", (edge, edge), crop


def _normalisation(config: dict[str, Any]) -> tuple[Three, Three]:
    """Return mean and standard deviation in terms of pixels / 255.

    The graph of Hugging Face takes (pixels × factor - offset - mean) / std, which
    EfficientNetImageProcessor divides by std again if `include_top` is true, its default.
    """
    rescales = config.get("do_rescale", True)
    factor = float(config.get("rescale_factor", 1 / 255)) if rescales else 1.0
    offset = 1.0 if rescales and config.get("rescale_offset") else 0.0
    normalises = config.get("do_normalize", True)
    mean = three_values(config["image_mean"]) if normalises else (0.0, 0.0, 0.0)
    std = three_values(config["image_std"]) if normalises else (1.0, 1.0, 1.0)
    efficient_net = str(config.get("image_processor_type", "")).startswith("EfficientNet")
    if config.get("include_top", efficient_net):
        again = three_values(config["image_std"])
        std = three_values([first * second for first, second in zip(std, again, strict=True)])
    scale = 1 / (255 * factor)
    return _scaled(three_values([value + offset for value in mean]), scale), _scaled(std, scale)


def _scaled(values: Three, scale: float) -> Three:
    return values if abs(scale - 1) < 1e-6 else three_values([value * scale for value in values])


def _height_width(size: Any) -> tuple[int, int]:
    if isinstance(size, dict):
        height, width = size["height"], size["width"]
    elif isinstance(size, list | tuple):
        height, width = size
    else:
        height = width = size
    if int(height) < 1 or int(width) < 1:
        raise ValueError(f"a size of {height}×{width} pixels")
    return int(height), int(width)


def three_values(values: Any) -> Three:
    """Return a value for each channel, of one or three numbers."""
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
