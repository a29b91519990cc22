"""Turn images into requests, and responses into `Embeddings`. It needs no image library."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from crl_sdk._embeddings import Embeddings
from crl_sdk._image_bytes import read_image_file
from crl_sdk.client._results import ServedPreprocessing
from crl_sdk.errors import (
    ImageError,
    ImageTooLargeError,
    InvalidInputError,
    MissingDependencyError,
    ServiceError,
)
from crl_sdk.pb.crl.v1 import embedding_pb2
from crl_sdk.projection._row_dtypes import RowDtype, failed_rows, is_row_dtype
from crl_sdk.rpc._tensors import decode_tensor, dtype_code, encode_tensor

if TYPE_CHECKING:
    from PIL import Image

    ClientImage: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | NDArray[Any]"


def embed_request(
    images: Sequence[ClientImage],
    criteria: Sequence[str],
    resize: ServedPreprocessing | None = None,
    *,
    dtype: RowDtype = "float32",
) -> tuple[embedding_pb2.EmbedRequest, dict[int, ImageError]]:
    """Return the request for a batch of images.

    Args:
        images: Paths, bytes, PIL images, pixels or stored embeddings.
        criteria: Names of bases.
        resize: How to decode and resize the images here. None sends them as they are.
        dtype: Dtype of the reply's rows.

    Returns:
        The request, without the images that cannot be read here; and the errors of those, by
        position.

    Raises:
        InvalidInputError: If something is not an image at all.
        MissingDependencyError: If `resize` is given and Pillow is not installed.
    """
    messages, errors = [], {}
    for position, image in enumerate(images):
        try:
            sent = _image(image, position) if resize is None else _resized(image, position, resize)
            messages.append(sent)
        except ImageError as error:
            errors[position] = error
    request = embedding_pb2.EmbedRequest(
        images=messages, criteria=criteria, dtype=dtype_code(np.dtype(dtype))
    )
    return request, errors


def _resized(
    image: ClientImage, position: int, preprocessing: ServedPreprocessing
) -> embedding_pb2.Image:
    """Return the pixels that the server would make of an image, or a stored embedding unchanged.

    Raises:
        ImageError: If the image cannot be read.
    """
    if isinstance(image, np.ndarray) and is_row_dtype(image.dtype):
        return _image(image, position)
    try:
        from crl_sdk.model._preprocess import PreprocessSpec, load_pixels
    except ImportError as error:
        raise MissingDependencyError("pillow", "runtime", "ClientOptions(resize=True)") from error
    spec = PreprocessSpec(
        height=preprocessing.height,
        width=preprocessing.width,
        mean=(0, 0, 0),  # unused: the server's graph scales the pixels
        std=(1, 1, 1),
        interpolation=preprocessing.interpolation,  # type: ignore[arg-type]
        resize_mode=preprocessing.resize_mode,  # type: ignore[arg-type]
        fill=preprocessing.fill,
        resize=preprocessing.resize,
    )
    pixels = encode_tensor(load_pixels(image, spec))
    if spec.resize is None:  # the server has nothing to resize in pixels of this size
        return embedding_pb2.Image(pixels=pixels)
    return embedding_pb2.Image(prepared=pixels)


_MAX_FILE = 2**31 - 1
"""Largest number of bytes that a message can hold. The server has limits of its own."""


def _image(image: ClientImage, position: int) -> embedding_pb2.Image:
    if isinstance(image, bytes):
        return embedding_pb2.Image(encoded=image)
    if isinstance(image, str | os.PathLike):
        return embedding_pb2.Image(encoded=read_image_file(image, str(image), _MAX_FILE))
    if isinstance(image, np.ndarray):
        tensor = encode_tensor(image)
        if tensor.dtype == embedding_pb2.DTYPE_UINT8:
            return embedding_pb2.Image(pixels=tensor)
        return embedding_pb2.Image(embedding=tensor)
    if hasattr(image, "save"):  # a PIL image, recognised without importing PIL
        buffer = io.BytesIO()
        image.save(buffer, "PNG", compress_level=1)
        return embedding_pb2.Image(encoded=buffer.getvalue())
    raise InvalidInputError(
        f"image {position}: expected a path, bytes, a PIL image or an array, "
        f"got {type(image).__name__}"
    )


def read_response(
    response: embedding_pb2.EmbedResponse,
    local: Mapping[int, ImageError],
    images: Sequence[ClientImage],
) -> Embeddings:
    """Return the embeddings of a batch.

    Args:
        response: Response of the server, about the images that were sent.
        local: Errors of the images that were not sent, by position. If there are none, the arrays
            of the result are views of the response.
        images: Images of the batch. Errors name an image by its path, if it has one.
    """
    count = len(images)
    sent = [i for i in range(count) if i not in local]
    errors = dict(local)
    cached = np.zeros(count, np.bool_)
    for position, status in zip(sent, response.images, strict=True):
        cached[position] = status.cached
        if status.code != embedding_pb2.ImageStatus.CODE_OK:
            large = status.code == embedding_pb2.ImageStatus.CODE_TOO_LARGE
            kind = ImageTooLargeError if large else ImageError
            image = images[position]
            source = str(image) if isinstance(image, str | os.PathLike) else f"image {position}"
            errors[position] = kind(status.message, source=source)

    def rows(tensor: embedding_pb2.Tensor) -> NDArray[Any]:
        array = decode_tensor(tensor)
        if not local:
            return array
        spread = failed_rows((count, array.shape[1]), array.dtype)
        spread[sent] = array
        return spread

    return Embeddings(
        universal=rows(response.universal),
        conditional={part.criterion: rows(part.rows) for part in response.conditional},
        errors=errors,
        fingerprint=response.fingerprint,
        cached=cached,
        basis_sha256={part.criterion: part.basis_sha256 for part in response.conditional},
        timings={
            name.name: getattr(response.timings, name.name)
            for name in embedding_pb2.Timings.DESCRIPTOR.fields
        },
    )


def failed_batch(errors: dict[int, ImageError], count: int) -> Embeddings:
    """Return the result of a batch of which no image could be sent."""
    none = np.full((count, 0), np.nan, np.float32)
    return Embeddings(none, {}, errors, cached=np.zeros(count, np.bool_))


def join_batches(parts: Sequence[Embeddings]) -> Embeddings:
    """Return the results of several batches as one.

    Args:
        parts: Results in the order of their images. The rows of a batch of which no image could
            be sent become NaN, or zeros as int8.

    Raises:
        InvalidInputError: If there are no parts.
    """
    if not parts:
        raise InvalidInputError("expected at least one image, got an empty list")
    if len(parts) == 1:
        return parts[0]
    model = next((part for part in parts if part.fingerprint), parts[0])
    starts = np.cumsum([0, *(len(part.universal) for part in parts)])

    def rows(name: str | None) -> NDArray[Any]:
        like = model.universal if name is None else model.conditional[name]
        blank = [failed_rows((len(p.universal), like.shape[1]), like.dtype) for p in parts]
        return np.concatenate(
            [
                blank[i] if not p.fingerprint else p.universal if name is None
                else p.conditional[name]
                for i, p in enumerate(parts)
            ]
        )  # fmt: skip

    return Embeddings(
        universal=rows(None),
        conditional={name: rows(name) for name in model.conditional},
        errors={
            int(start) + position: _renumbered(error, position, int(start))
            for start, part in zip(starts, parts, strict=False)
            for position, error in part.errors.items()
        },
        fingerprint=model.fingerprint,
        cached=np.concatenate([part.cached for part in parts if part.cached is not None]),
        basis_sha256=model.basis_sha256,
        timings={name: sum(part.timings.get(name, 0) for part in parts) for name in model.timings},
    )


def _renumbered(error: ImageError, position: int, start: int) -> ImageError:
    """Return an error of a batch that names its image by the position in the whole list."""
    if error.source != f"image {position}":
        return error
    return type(error)(error.reason, source=f"image {start + position}")


def stale_parts(parts: Sequence[Embeddings]) -> list[int]:
    """Return the positions of parts whose bases have other versions than those of the last part.

    Raises:
        ServiceError: If the model was replaced between the parts.
    """
    made = [i for i, part in enumerate(parts) if part.fingerprint]
    if len({parts[i].fingerprint for i in made}) > 1:
        raise ServiceError("the server's model was replaced during the call: call again")
    return [i for i in made if parts[i].basis_sha256 != parts[made[-1]].basis_sha256]


def with_conditional(part: Embeddings, fresh: Embeddings) -> Embeddings:
    """Return a part with other conditional embeddings. Rows of failed images stay as they are.

    Args:
        part: Embeddings of n images, some of which may have failed.
        fresh: Embeddings of those that have not.
    """
    conditional = {}
    for name, rows in fresh.conditional.items():
        spread = failed_rows((len(part.universal), rows.shape[1]), rows.dtype)
        spread[part.ok] = rows
        conditional[name] = spread
    return replace(part, conditional=conditional, basis_sha256=fresh.basis_sha256)
