"""Convert images to the uint8 pixels (H, W, 3) that a model's image tower takes.

This is the only preprocessing code of the project. On RGB input it equals the evaluation transform
of open_clip bit for bit. Scaling to floats, mean and std are part of the exported graph.
"""

from __future__ import annotations

import io
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from crl_sdk.errors import ImageError, ImageTooLargeError

ImageInput: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | NDArray[np.uint8]"
"""An image: a path, the bytes of a file, a Pillow image, or an array; see `load_pixels`."""

Decode: TypeAlias = Literal["exact", "fast"]
"""How JPEGs are decoded, see `load_pixels`."""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, KeyError, struct.error)
_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
_ORIENTATION = 0x0112
"""EXIF tag of the orientation. The following tuples list its values by their effect."""
_TURNED = (5, 6, 7, 8)
"""Values that swap width and height."""
_MIRRORED = (2, 3, 6, 7)
"""Values that swap left and right, after that."""
_FLIPPED = (3, 4, 7, 8)
"""Values that swap top and bottom, after that."""

_CHANNELS = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


@dataclass(frozen=True, slots=True)
class PreprocessSpec:
    """The preprocessing of a model, in the terms of open_clip.

    Attributes:
        height: Height of the model's input in pixels.
        width: Width of the model's input in pixels.
        mean: Mean of each channel after scaling to [0, 1]. The graph subtracts it.
        std: Standard deviation of each channel. The graph divides by it.
        interpolation: Resampling filter, always with antialiasing.
        resize_mode: `shortest` scales the shorter side and crops the centre, `longest` scales the
            longer side and pads, `squash` ignores the aspect ratio.
        fill: Grey level 0-255 of the padding of `longest`.
    """

    height: int
    width: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize_mode: Literal["shortest", "longest", "squash"] = "shortest"
    fill: int = 0


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """Limits on images. They are checked before any pixel is decoded.

    Attributes:
        max_bytes: Largest size of an encoded image in bytes.
        max_pixels: Largest width × height in pixels, of the image and of the image after resizing.
        min_side: Smallest length of the shorter side in pixels.
    """

    max_bytes: int = 64 * 2**20
    max_pixels: int = 64_000_000
    min_side: int = 2


DEFAULT_LIMITS = ImageLimits()


def load_pixels(
    image: ImageInput,
    spec: PreprocessSpec,
    *,
    limits: ImageLimits = DEFAULT_LIMITS,
    source: str | None = None,
    decode: Decode = "exact",
) -> NDArray[np.uint8]:
    """Decode one image and convert it to the input size of a model.

    EXIF orientation is applied. Transparent images get a white background. 16-bit images are
    scaled to 8 bits. CMYK and palettes are converted to RGB. Of an animation the first frame is
    used.

    Args:
        image: A path, encoded bytes (JPEG, PNG, WebP, BMP, GIF, TIFF), a PIL image, or a uint8
            array of shape (h, w), (h, w, 1), (h, w, 2), (h, w, 3) or (h, w, 4): grey,
            grey+alpha, RGB or RGBA.
        spec: Preprocessing of the model.
        limits: Limits above which an image is refused.
        source: Name of the image in error messages; the path by default.
        decode: `exact` decodes as in the training of the models. `fast` lets libjpeg decode large
            JPEGs at a half, a quarter or an eighth of their size, but no smaller than the model's
            input, and resizes only the part that is not cropped. The pixels differ slightly, see
            benchmarks/LOG.md.

    Returns:
        RGB pixels, shape (spec.height, spec.width, 3), uint8, C-contiguous.

    Raises:
        ImageTooLargeError: If the image exceeds a limit.
        ImageError: If the image is missing, empty, truncated, of an unknown format, or of a wrong
            dtype or shape.

    Example:
        >>> spec = PreprocessSpec(64, 64, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        >>> load_pixels(np.zeros((100, 80, 3), np.uint8), spec).shape
        (64, 64, 3)
    """
    name = source or (str(image) if isinstance(image, str | os.PathLike) else "image")
    opened = _open(image, limits, name)
    try:
        _check_size(opened.size, spec, limits, name)
        try:
            if decode == "fast" and opened.format in ("JPEG", "MPO"):
                return _load_fast(opened, spec)
            opened.load()
            return fit(to_rgb(ImageOps.exif_transpose(opened)), spec)
        except _DECODE_ERRORS as error:
            raise ImageError(
                f"the image is damaged or truncated ({error}); send the complete file", source=name
            ) from error
    finally:
        if opened is not image:
            opened.close()


def fit(image: Image.Image, spec: PreprocessSpec) -> NDArray[np.uint8]:
    """Resize and crop or pad an RGB image to the input size of a model, as open_clip does.

    Args:
        image: Image of mode RGB and any size.
        spec: Preprocessing of the model.

    Returns:
        Pixels, shape (spec.height, spec.width, 3), uint8, C-contiguous.
    """
    width, height = resized_size(image.size, spec)
    if image.size != (width, height):
        image = image.resize((width, height), _interpolation(spec))
    left, top = _crop_offset(width, spec.width), _crop_offset(height, spec.height)
    if (left, top, width, height) != (0, 0, spec.width, spec.height):
        if left < 0 or top < 0:
            canvas = Image.new(
                "RGB", (max(width, spec.width), max(height, spec.height)), (spec.fill,) * 3
            )
            canvas.paste(image, (max(-left, 0), max(-top, 0)))
            image, left, top = canvas, max(left, 0), max(top, 0)
        image = image.crop((left, top, left + spec.width, top + spec.height))
    return np.ascontiguousarray(image, dtype=np.uint8)


def _load_fast(opened: Image.Image, spec: PreprocessSpec) -> NDArray[np.uint8]:
    """Decode a JPEG at a reduced size, then resize the part that is not cropped."""
    orientation = opened.getexif().get(_ORIENTATION)
    turned = orientation in _TURNED
    width, height = resized_size(opened.size[::-1] if turned else opened.size, spec)
    drafted = opened.draft(None, (height, width) if turned else (width, height))
    # size of the whole image in pixels of the reduced one; it may be fractional, because the last
    # row and column of the reduced image can cover fewer pixels
    across, down = drafted[1][2:] if drafted is not None else opened.size
    if turned:
        across, down = down, across
    opened.load()
    image = to_rgb(ImageOps.exif_transpose(opened))
    x = image.width - across if orientation in _MIRRORED else 0.0
    y = image.height - down if orientation in _FLIPPED else 0.0
    left, top = _crop_offset(width, spec.width), _crop_offset(height, spec.height)
    if width < spec.width or height < spec.height:  # padded, not cropped
        whole = (x, y, x + across, y + down)
        return fit(image.resize((width, height), _interpolation(spec), box=whole), spec)
    per_x, per_y = across / width, down / height
    kept = (
        x + left * per_x,
        y + top * per_y,
        min(x + (left + spec.width) * per_x, image.width),
        min(y + (top + spec.height) * per_y, image.height),
    )
    resized = image.resize((spec.width, spec.height), _interpolation(spec), box=kept)
    return np.ascontiguousarray(resized, dtype=np.uint8)


def resized_size(size: tuple[int, int], spec: PreprocessSpec) -> tuple[int, int]:
    """Return the size that an image is scaled to before cropping or padding.

    Args:
        size: Width and height in pixels.
        spec: Preprocessing of the model.

    Returns:
        Width and height in pixels.
    """
    width, height = size
    if spec.resize_mode == "squash":
        return spec.width, spec.height
    if spec.resize_mode == "shortest" and spec.width == spec.height:
        side = spec.width
        if width <= height:
            return side, int(side * height / width)
        return int(side * width / height), side
    ratios = (height / spec.height, width / spec.width)
    ratio = max(ratios) if spec.resize_mode == "longest" else min(ratios)
    return max(round(width / ratio), 1), max(round(height / ratio), 1)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB, with its full range and without transparency.

    Args:
        image: Image of any mode. 16-bit modes hold 0-65535, the 32-bit float mode holds 0-255.

    Returns:
        Image of mode RGB. Transparent parts are white.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # I, I;16, I;16B, I;16L: Pillow's own conversion clips at 255
        values = np.asarray(image, dtype=np.float64)
        eight_bit = np.rint(np.clip(values, 0, 65535) / 257).astype(np.uint8)
        return Image.fromarray(eight_bit).convert("RGB")
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _open(image: ImageInput, limits: ImageLimits, name: str) -> Image.Image:
    """Open an image. Its header is read; encoded pixels are not decoded yet."""
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, np.ndarray):
        return _from_array(image, name)
    if isinstance(image, str | os.PathLike):
        path = Path(image)
        try:
            nbytes = path.stat().st_size
            _check_bytes(nbytes, limits, name)
            data = path.read_bytes()
        except OSError as error:
            raise ImageError(
                f"cannot be read ({error.strerror or error}); check the path", source=name
            ) from error
    elif isinstance(image, bytes | bytearray | memoryview):
        data = bytes(image)
        _check_bytes(len(data), limits, name)
    else:
        raise ImageError(
            f"expected a path, encoded bytes, a PIL image or a uint8 array, "
            f"got {type(image).__name__}",
            source=name,
        )
    if not data:
        raise ImageError("the image is empty (0 bytes); send the complete file", source=name)
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLargeError(f"{error}; send a smaller image", source=name) from error
    except _DECODE_ERRORS as error:
        raise ImageError(
            f"not a readable image: expected {', '.join(FORMATS)}, got {len(data)} bytes "
            f"starting with {data[:8]!r}",
            source=name,
        ) from error


def _from_array(array: NDArray[Any], name: str) -> Image.Image:
    if array.dtype != np.uint8:
        raise ImageError(
            f"expected an array of dtype uint8 (0-255), got {array.dtype}; for floats in [0, 1] "
            "pass (array * 255).round().astype('uint8')",
            source=name,
        )
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels not in _CHANNELS or 0 in array.shape:
        raise ImageError(
            f"expected an array of shape (h, w), (h, w, 1), (h, w, 2), (h, w, 3) or (h, w, 4), "
            f"got {array.shape}; pass images one by one or as a list, channels last",
            source=name,
        )
    if channels == 1:
        array = array.reshape(array.shape[:2])
    return Image.fromarray(np.ascontiguousarray(array), mode=None)


def _check_bytes(nbytes: int, limits: ImageLimits, name: str) -> None:
    if nbytes > limits.max_bytes:
        raise ImageTooLargeError(
            f"{nbytes:,} bytes are over the limit of {limits.max_bytes:,}; send a smaller image "
            "or raise ImageLimits.max_bytes",
            source=name,
        )


def _check_size(
    size: tuple[int, int], spec: PreprocessSpec, limits: ImageLimits, name: str
) -> None:
    width, height = size
    if min(size) < limits.min_side:
        raise ImageError(
            f"{width}×{height} pixels: the shorter side must have at least {limits.min_side}; "
            "send a larger image",
            source=name,
        )
    resized_width, resized_height = resized_size(size, spec)
    for what, pixels in (
        ("pixels", width * height),
        (f"pixels once scaled to {resized_width}×{resized_height}", resized_width * resized_height),
    ):
        if pixels > limits.max_pixels:
            raise ImageTooLargeError(
                f"{width}×{height} is {pixels:,} {what}, over the limit of "
                f"{limits.max_pixels:,}; send a smaller image or crop it, "
                "or raise ImageLimits.max_pixels",
                source=name,
            )


def _crop_offset(size: int, target: int) -> int:
    """Return the start of the centre crop, rounded as in torchvision; negative for padding."""
    if size < target:
        return -((target - size) // 2)
    return round((size - target) / 2.0)


def _interpolation(spec: PreprocessSpec) -> Image.Resampling:
    # For non-square targets the transform of open_clip always uses bicubic interpolation.
    if spec.resize_mode == "shortest" and spec.width != spec.height:
        return Image.Resampling.BICUBIC
    return _RESAMPLING[spec.interpolation]
