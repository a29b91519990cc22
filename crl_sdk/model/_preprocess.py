"""Convert images to the uint8 pixels (H, W, 3) that a model's image tower takes.

This is the only preprocessing code of the project. On RGB input it equals the evaluation transform
of open_clip bit for bit. Scaling to floats, mean and std are part of the exported graph.
"""

from __future__ import annotations

import io
import math
import os
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from crl_sdk._budget import Budget
from crl_sdk._image_bytes import check_bytes, read_image_file
from crl_sdk.errors import (
    EngineError,
    ImageError,
    ImageTooLargeError,
    InvalidInputError,
    MissingDependencyError,
)
from crl_sdk.model._decode_memory import estimate_decode_bytes
from crl_sdk.model._fast_resize import resize_part
from crl_sdk.model._gpu_decode import decode_jpeg
from crl_sdk.model._image_colours import is_plain, note_raw_mode, to_plain
from crl_sdk.model._image_formats import DEFAULT_FORMATS, check_formats, check_icon, identify

ImageInput: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | NDArray[np.uint8]"
"""An image: a path, the bytes of a file, a Pillow image, or an array; see `load_pixels`."""

Decode: TypeAlias = Literal["exact", "fast", "gpu"]
"""How images are decoded and resized, see `load_pixels`."""

_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_ORIENTATION = 0x0112
"""EXIF tag of the orientation. The following tuples list its values by their effect."""
_TURNED = (5, 6, 7, 8)
"""Values that swap width and height."""
_MIRRORED = (2, 3, 6, 7)
"""Values that swap left and right, after that."""
_FLIPPED = (3, 4, 7, 8)
"""Values that swap top and bottom, after that."""

_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings an image with an orientation upright."""

FAST_SIZE = 2.5
"""Smallest size at which `fast` decodes a JPEG, as a multiple of the size that it is scaled to.
`make bench-photos` shows the drift."""

_JPEG = b"\xff\xd8\xff"
"""First bytes of every JPEG."""

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
        resize: Height and width that images are scaled to, in pixels, before the centre is cropped
            to the model's input. None for the size of the input itself. Not for `longest`.
    """

    height: int
    width: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize_mode: Literal["shortest", "longest", "squash"] = "shortest"
    fill: int = 0
    resize: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Check `resize`, and make it None if it is the size of the model's input.

        Raises:
            InvalidInputError: If it is malformed or smaller than the input, or the mode is
                `longest`.
        """
        if self.resize is not None:
            resize = _check_resize(self.resize, (self.height, self.width), self.resize_mode)
            object.__setattr__(self, "resize", resize)


def _check_resize(resize: Any, target: tuple[int, int], mode: str) -> tuple[int, int] | None:
    if (
        not isinstance(resize, tuple | list)
        or len(resize) != 2
        or not all(type(side) is int for side in resize)
    ):
        raise InvalidInputError(
            f"resize: expected a height and a width in whole pixels, such as (256, 256), got "
            f"{resize!r}"
        )
    (height, width), (target_height, target_width) = resize, target
    if (height, width) == target:
        return None
    if height < target_height or width < target_width:
        raise InvalidInputError(
            f"resize: images scaled to {height}×{width} cannot be cropped to the model's "
            f"{target_height}×{target_width} pixels: scale to {target_height}×{target_width} at "
            "least (--resize), or check the size of the input (--size)"
        )
    if mode == "longest":
        raise InvalidInputError(
            f"resize: `longest` pads to {target_height}×{target_width} pixels and crops nothing: "
            "leave out the size to scale to (--resize), or crop with `shortest` or `squash`"
        )
    return height, width


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """Limits on images. They are checked before any pixel is decoded.

    Attributes:
        max_bytes: Largest size of an encoded image in bytes.
        max_pixels: Largest width × height in pixels, of the image and of the image after resizing.
        min_side: Smallest length of the shorter side in pixels.
        max_decode_bytes: Largest number of bytes that decoding may take, as estimated from the
            header: of one image, and of all images that an `Embedder` decodes at once.
        formats: Formats that are read, such as `JPEG` and `AVIF`, see docs/IMAGES.md.
    """

    max_bytes: int = 64 * 2**20
    max_pixels: int = 64_000_000
    min_side: int = 2
    max_decode_bytes: int = 2**30
    formats: tuple[str, ...] = DEFAULT_FORMATS

    def __post_init__(self) -> None:
        """Check the formats.

        Raises:
            InvalidInputError: If a format is unknown.
        """
        object.__setattr__(self, "formats", check_formats(self.formats))


DEFAULT_LIMITS = ImageLimits()


def load_pixels(
    image: ImageInput,
    spec: PreprocessSpec,
    *,
    limits: ImageLimits = DEFAULT_LIMITS,
    source: str | None = None,
    decode: Decode = "exact",
    budget: Budget | None = None,
) -> NDArray[np.uint8]:
    """Decode one image and convert it to the input size of a model.

    EXIF orientation is applied. Transparent images get a white background. 16-bit images are
    scaled to 8 bits. CMYK and palettes are converted to RGB. Of an animation the first frame is
    used. docs/IMAGES.md has the rules.

    Args:
        image: A path of a file, encoded bytes in one of `limits.formats`, a PIL image, or a uint8
            array of shape (h, w), (h, w, 1), (h, w, 2), (h, w, 3) or (h, w, 4): grey,
            grey+alpha, RGB or RGBA.
        spec: Preprocessing of the model.
        limits: Limits above which an image is refused.
        source: Name of the image in error messages; the path by default.
        decode: `exact` decodes and resizes as in the training of the models. `fast` lets libjpeg
            decode large JPEGs at a half, a quarter or an eighth of their size, but no smaller than
            `FAST_SIZE` times the size that they are scaled to, and resizes only the part that is
            not cropped, with vector instructions. `gpu` decodes JPEGs on an NVIDIA GPU at their
            full size, and resizes as `fast` does; it has not been run on hardware. The pixels
            differ slightly, see docs/IMAGES.md.
        budget: Bound on the memory of the images that are decoded at once. None for no bound.

    Returns:
        RGB pixels, shape (spec.height, spec.width, 3), uint8, C-contiguous.

    Raises:
        ImageTooLargeError: If the image exceeds a limit.
        ImageError: If the image is missing, empty, truncated, of a format that is not read, or of a
            wrong dtype or shape; or if memory runs out.
        EngineError: If `decode` is `gpu` and there is no GPU.
        MissingDependencyError: If `decode` is `gpu` and nvImageCodec is not installed.

    Example:
        >>> spec = PreprocessSpec(64, 64, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        >>> load_pixels(np.zeros((100, 80, 3), np.uint8), spec).shape
        (64, 64, 3)
    """
    name = source or (str(image) if isinstance(image, str | os.PathLike) else "image")
    data = _read(image, limits, name)
    opened = _open(data, limits, name)
    try:
        _check_size(opened.size, spec, limits, name)
        try:
            fast = decode != "exact"
            shrunk = _shrink_while_decoding(opened, spec) if decode == "fast" else None
            scaled = None if fast else resized_size(opened.size, spec)
            needed = _check_decode_bytes(opened, limits, name, copied=fast, scaled=scaled)
            with nullcontext() if budget is None else budget.reserve(needed):
                decoded = decode_jpeg(opened, data) if decode == "gpu" else None
                upright = _upright(opened, data, decoded)
                return _fit_fast(upright, spec, shrunk) if fast else fit(upright, spec)
        except (ImageError, EngineError, MissingDependencyError):
            raise
        except MemoryError as error:
            raise _out_of_memory(f"{opened.width}×{opened.height} pixels", name) from error
        except Exception as error:  # decoders of damaged files raise anything
            raise ImageError(
                f"the image is damaged or truncated ({error}); send the complete file", source=name
            ) from error
    finally:
        if opened is not image:
            opened.close()


def _upright(opened: Image.Image, data: Any, decoded: Image.Image | None = None) -> Image.Image:
    """Decode an image if it is not, convert it to 8-bit grey or RGB, and turn it upright."""
    if decoded is not None:
        plain = decoded
    else:
        note = isinstance(data, bytes) and "transparency" in opened.info
        if note:
            note_raw_mode(opened)
        opened.load()
        plain = to_plain(opened, data if note else None)
    orientation = opened.getexif().get(_ORIENTATION)  # Pillow has applied that of TIFF files
    method = _TRANSPOSITIONS.get(orientation) if isinstance(orientation, int) else None
    if method is None:
        return plain
    if plain is not opened and isinstance(data, bytes):
        opened.close()  # its pixels are no longer needed
    return plain.transpose(method)


def fit(image: Image.Image, spec: PreprocessSpec) -> NDArray[np.uint8]:
    """Resize and crop or pad an image to the input size of a model, as open_clip does.

    Grey images become RGB at the end, which gives the same pixels in a third of the time.

    Args:
        image: Image of mode RGB or L and any size.
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
            image = image.convert("RGB")
            canvas = Image.new(
                "RGB", (max(width, spec.width), max(height, spec.height)), (spec.fill,) * 3
            )
            canvas.paste(image, (max(-left, 0), max(-top, 0)))
            image, left, top = canvas, max(left, 0), max(top, 0)
        image = image.crop((left, top, left + spec.width, top + spec.height))
    return np.ascontiguousarray(image.convert("RGB"), dtype=np.uint8)


class _Shrunk(NamedTuple):
    """How libjpeg shrinks an image.

    Attributes:
        size: Width and height of the whole image, upright, before it is shrunk.
        across: Width of the whole upright image in pixels of the shrunk one. It may be fractional,
            because the last column of the shrunk image can cover fewer pixels.
        down: Height, likewise.
        x: First column of the shrunk image in its own pixels: not 0 if the fractional one is first.
        y: First row, likewise.
    """

    size: tuple[int, int]
    across: float
    down: float
    x: float
    y: float


def _shrink_while_decoding(opened: Image.Image, spec: PreprocessSpec) -> _Shrunk | None:
    """Let libjpeg decode a JPEG at a reduced size; return None for other formats."""
    if opened.format not in ("JPEG", "MPO"):
        return None
    orientation = opened.getexif().get(_ORIENTATION)
    turned = orientation in _TURNED
    size = opened.size[::-1] if turned else opened.size
    width, height = (math.ceil(side * FAST_SIZE) for side in resized_size(size, spec))
    drafted = opened.draft(None, (height, width) if turned else (width, height))
    across, down = drafted[1][2:] if drafted is not None else opened.size
    x = opened.width - across
    y = opened.height - down
    if turned:
        across, down, x, y = down, across, y, x
    return _Shrunk(
        size,
        across,
        down,
        x if orientation in _MIRRORED else 0,
        y if orientation in _FLIPPED else 0,
    )


def _fit_fast(
    image: Image.Image, spec: PreprocessSpec, shrunk: _Shrunk | None
) -> NDArray[np.uint8]:
    """Do what `fit` does, for the part that is not cropped and with a faster filter."""
    size, across, down, x, y = shrunk or _Shrunk(image.size, *image.size, 0, 0)
    width, height = resized_size(size, spec)
    filter_ = _interpolation(spec)
    if width < spec.width or height < spec.height:  # padded, not cropped
        box = (x, y, x + across, y + down)
        return fit(resize_part(image, (width, height), box, filter_), spec)
    left, top = _crop_offset(width, spec.width), _crop_offset(height, spec.height)
    per_x, per_y = across / width, down / height
    box = (
        x + left * per_x,
        y + top * per_y,
        min(x + (left + spec.width) * per_x, image.width),
        min(y + (top + spec.height) * per_y, image.height),
    )
    resized = resize_part(image, (spec.width, spec.height), box, filter_)
    return np.ascontiguousarray(resized.convert("RGB"), dtype=np.uint8)


def resized_size(size: tuple[int, int], spec: PreprocessSpec) -> tuple[int, int]:
    """Return the size that an image is scaled to before cropping or padding.

    Args:
        size: Width and height in pixels.
        spec: Preprocessing of the model.

    Returns:
        Width and height in pixels.
    """
    width, height = size
    target_height, target_width = spec.resize or (spec.height, spec.width)
    if spec.resize_mode == "squash":
        return target_width, target_height
    if spec.resize_mode == "shortest" and target_width == target_height:
        side = target_width
        if width <= height:
            return side, int(side * height / width)
        return int(side * width / height), side
    ratios = (height / target_height, width / target_width)
    ratio = max(ratios) if spec.resize_mode == "longest" else min(ratios)
    return max(round(width / ratio), 1), max(round(height / ratio), 1)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB, with its full range and without transparency.

    Args:
        image: Image of any mode. 16-bit modes hold 0-65535.

    Returns:
        Image of mode RGB. Transparent parts are white.

    Raises:
        ValueError: If values of a 32-bit mode are not finite, negative, or above 65,535.
    """
    return to_plain(image).convert("RGB")


def _read(image: ImageInput, limits: ImageLimits, name: str) -> Any:
    """Return an image as the bytes of its file, as a Pillow image, or as an array."""
    if isinstance(image, Image.Image | np.ndarray):
        return image
    if isinstance(image, str | os.PathLike):
        data = read_image_file(image, name, limits.max_bytes)
    elif isinstance(image, bytes | bytearray | memoryview):
        data = bytes(image)
        check_bytes(len(data), name, limits.max_bytes)
    else:
        raise ImageError(
            f"expected a path, encoded bytes, a PIL image or a uint8 array, "
            f"got {type(image).__name__}",
            source=name,
        )
    if not data:
        raise ImageError("the image is empty (0 bytes); send the complete file", source=name)
    return data


def _open(data: Any, limits: ImageLimits, name: str) -> Image.Image:
    """Open an image. Its header is read; encoded pixels are not decoded yet."""
    if isinstance(data, Image.Image):
        return data
    if isinstance(data, np.ndarray):
        return _from_array(data, name)
    if "ICO" in limits.formats:
        check_icon(data, name)
    try:
        return Image.open(io.BytesIO(data), formats=limits.formats)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLargeError(f"{error}; send a smaller image", source=name) from error
    except MemoryError as error:
        raise _out_of_memory(f"{len(data):,} bytes", name) from error
    except Exception as error:  # decoders of damaged files raise anything
        found = identify(data)
        if found is not None and found not in limits.formats:
            raise ImageError(
                f"its format is {found}, which is not read by default: pass --formats "
                f"{found.lower()} (ImageLimits.formats), or send {', '.join(DEFAULT_FORMATS)}",
                source=name,
            ) from error
        jpeg = ": a damaged JPEG, or one without 8 bits per value" if data[:3] == _JPEG else ""
        raise ImageError(
            f"not a readable image: expected {', '.join(limits.formats)}, got {len(data)} bytes "
            f"starting with {data[:8]!r}{jpeg}",
            source=name,
        ) from error


def _out_of_memory(what: str, name: str) -> ImageError:
    return ImageError(
        f"there was not enough memory to decode {what}: send a smaller image, or lower "
        "ImageLimits.max_decode_bytes (--max-decode-mb)",
        source=name,
    )


def _check_decode_bytes(
    opened: Image.Image,
    limits: ImageLimits,
    name: str,
    *,
    copied: bool,
    scaled: tuple[int, int] | None,
) -> int:
    """Return about how many bytes decoding and scaling take, if the limit allows it."""
    told = opened.format != "PNG" or "exif" in opened.info  # else `getexif` would load a PNG file
    needed = estimate_decode_bytes(
        opened,
        turned=told and opened.getexif().get(_ORIENTATION) in _TRANSPOSITIONS,
        plain=is_plain(opened),
        copied=copied,
        scaled=scaled,
    )
    if needed > limits.max_decode_bytes:
        needed_mib, most_mib = needed / 2**20, limits.max_decode_bytes / 2**20
        raise ImageTooLargeError(
            f"decoding and scaling {opened.width}×{opened.height} pixels of the mode {opened.mode} "
            f"takes about {needed_mib:,.1f} MiB, over the limit of {most_mib:,.1f} MiB; send a "
            "smaller image, or raise ImageLimits.max_decode_bytes (--max-decode-mb)",
            source=name,
        )
    return needed


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


def _check_size(
    size: tuple[int, int], spec: PreprocessSpec, limits: ImageLimits, name: str
) -> None:
    width, height = size
    if min(size) < limits.min_side:
        raise ImageError(
            f"{width}×{height} pixels: the shorter side must have at least {limits.min_side} "
            "(ImageLimits.min_side); send a larger image",
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
    # For non-square targets the transform of open_clip always uses bicubic interpolation. It knows
    # no `resize`.
    if spec.resize_mode == "shortest" and spec.resize is None and spec.width != spec.height:
        return Image.Resampling.BICUBIC
    return _RESAMPLING[spec.interpolation]
