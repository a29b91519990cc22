"""`crl.v1.EmbeddingService` on top of the pipeline: messages in, messages out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import numpy as np
from numpy.typing import NDArray

from crl_sdk._version import __version__
from crl_sdk.errors import ImageError, ImageTooLargeError, InvalidInputError
from crl_sdk.pb.crl.v1 import embedding_pb2, embedding_pb2_grpc
from crl_sdk.projection._row_dtypes import (
    RowDtype,
    encode_rows,
    is_row_dtype,
    require_row_dtype,
)
from crl_sdk.rpc._status import status_code
from crl_sdk.rpc._tensors import decode_tensor, encode_tensor
from crl_sdk.serving._call_interceptor import caller, typed_error
from crl_sdk.serving._models import Models
from crl_sdk.serving._pipeline import Pipeline
from crl_sdk.serving._responses import Context, respond
from crl_sdk.serving._results import EmbedResult, ImageOutcome, ImageSource, PreparedPixels

STREAM_WINDOW = 8
"""Number of requests of one stream that are in progress at once.

The server reads the next request only when one of them is done.
"""

_ROW_DTYPES: dict[int, RowDtype] = {
    embedding_pb2.DTYPE_UNSPECIFIED: "float32",
    embedding_pb2.DTYPE_FLOAT32: "float32",
    embedding_pb2.DTYPE_FLOAT16: "float16",
    embedding_pb2.DTYPE_INT8: "int8",
}


class EmbeddingService(embedding_pb2_grpc.EmbeddingServiceServicer):
    """`crl.v1.EmbeddingService`. proto/crl/v1/embedding.proto describes each method."""

    def __init__(self, models: Models | Pipeline) -> None:
        """Store the models, or the only one, whose pipelines have been started."""
        self._models = models if isinstance(models, Models) else Models(models)

    async def Embed(
        self, request: embedding_pb2.EmbedRequest, context: Context
    ) -> embedding_pb2.EmbedResponse:
        """Embed the images of one request."""
        return await respond(context, lambda: self._embed(request, context))

    async def EmbedStream(
        self,
        request_iterator: AsyncIterator[embedding_pb2.EmbedStreamRequest],
        context: Context,
    ) -> AsyncIterator[embedding_pb2.EmbedStreamResponse]:
        """Embed the images of many requests, and reply in the order in which they are done."""
        replies: asyncio.Queue[embedding_pb2.EmbedStreamResponse | None] = asyncio.Queue()
        window = asyncio.Semaphore(STREAM_WINDOW)
        tasks: set[asyncio.Task[None]] = set()

        async def process(message: embedding_pb2.EmbedStreamRequest) -> None:
            reply = embedding_pb2.EmbedStreamResponse(id=message.id)
            try:
                reply.response.CopyFrom(await self._embed(message.request, context))
            except Exception as error:  # only this request fails; the stream goes on
                typed = typed_error("/crl.v1.EmbeddingService/EmbedStream", error)
                reply.error.code, reply.error.message = status_code(typed).value[0], str(typed)
            await replies.put(reply)

        async def read() -> None:
            try:
                async for message in request_iterator:
                    await window.acquire()
                    task = asyncio.create_task(process(message))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
                await asyncio.gather(*tasks)
            finally:
                await replies.put(None)

        reader = asyncio.create_task(read())
        try:
            while (reply := await replies.get()) is not None:
                yield reply
                # Released only after the reply is sent: the server does not read from a client
                # that does not read its replies.
                window.release()
            await reader
        finally:
            for task in (reader, *tasks):
                task.cancel()

    async def EmbedText(
        self, request: embedding_pb2.EmbedTextRequest, context: Context
    ) -> embedding_pb2.EmbedTextResponse:
        """Embed texts."""

        async def embed() -> embedding_pb2.EmbedTextResponse:
            dtype = _row_dtype(request.dtype)
            pipeline = self._models.find(request.model)
            texts = list(request.texts)
            rows = await pipeline.texts.run(
                pipeline.texts.check(texts),
                _deadline(context),
                lambda check: pipeline.embedder.embed_text(
                    texts, truncate=request.truncate, check=check
                ),
            )
            return embedding_pb2.EmbedTextResponse(
                embeddings=encode_tensor(encode_rows(rows, dtype)),
                fingerprint=pipeline.embedder.bundle.fingerprint,
            )

        return await respond(context, embed)

    async def GetModel(
        self, request: embedding_pb2.GetModelRequest, context: Context
    ) -> embedding_pb2.GetModelResponse:
        """Return the facts of a model."""

        async def describe() -> embedding_pb2.GetModelResponse:
            pipeline = self._models.find(request.model)
            embedder, manifest = pipeline.embedder, pipeline.embedder.bundle.manifest
            spec = manifest.preprocess
            resize_height, resize_width = spec.resize or (0, 0)
            return embedding_pb2.GetModelResponse(
                name=manifest.name,
                fingerprint=manifest.fingerprint,
                embedding_dim=manifest.embedding_dim,
                engine=embedder.engine,
                preprocessing=embedding_pb2.Preprocessing(
                    height=spec.height, width=spec.width, interpolation=spec.interpolation,
                    resize_mode=spec.resize_mode, fill=spec.fill, mean=spec.mean, std=spec.std,
                    resize_height=resize_height, resize_width=resize_width,
                ),
                context_length=manifest.text.context_length if manifest.text else 0,
                max_images=pipeline.limits.max_images,
                server_version=__version__,
                prompt=embedder.bundle.prompt,
                models=list(self._models.pipelines),
            )  # fmt: skip

        return await respond(context, describe)

    async def _embed(
        self, request: embedding_pb2.EmbedRequest, context: Context
    ) -> embedding_pb2.EmbedResponse:
        dtype = _row_dtype(request.dtype)
        pipeline = self._models.find(request.model)
        sources = [_read_source(image) for image in request.images]
        result = await pipeline.embed(
            sources, request.criteria, deadline=_deadline(context), client=caller.get()
        )
        return _to_response(
            result, pipeline.embedder.bundle.fingerprint, dtype, request.omit_universal
        )


def _deadline(context: Context) -> float | None:
    """Return the `time.monotonic()` at which the client stops waiting, or None."""
    remaining = context.time_remaining()
    return None if remaining is None else time.monotonic() + remaining


def _row_dtype(dtype: int) -> RowDtype:
    """Return the dtype of a reply's rows."""
    if dtype not in _ROW_DTYPES:
        raise InvalidInputError(
            f"expected a dtype of FLOAT32, FLOAT16 or INT8 for the reply, got {dtype}"
        )
    return _ROW_DTYPES[dtype]


def _read_source(image: embedding_pb2.Image) -> ImageSource | ImageError:
    """Return the image, the pixels or the stored embedding in a message, or what is wrong."""
    kind = image.WhichOneof("source")
    if kind == "encoded":
        return image.encoded
    if kind is None:
        return ImageError("expected encoded bytes, pixels or an embedding, got none of them")
    try:
        array = decode_tensor(getattr(image, kind))
    except InvalidInputError as error:
        return ImageError(str(error))
    if kind == "pixels":
        fits = array.dtype.kind == "u" and array.ndim in (2, 3)
        expected = "pixels UINT8 of shape (height, width[, channels])"
    elif kind == "prepared":
        fits = array.dtype.kind == "u"
        expected = "prepared pixels UINT8 of shape (height, width, 3)"
    else:
        fits = is_row_dtype(array.dtype) and array.ndim == 1
        expected = "embedding FLOAT32, FLOAT16 or INT8 of shape (d)"
    if not fits:
        return ImageError(f"expected {expected}, got {array.dtype} of shape {array.shape}")
    return PreparedPixels(array) if kind == "prepared" else array


def _to_response(
    result: EmbedResult, fingerprint: str, dtype: RowDtype, omit_universal: bool
) -> embedding_pb2.EmbedResponse:
    def rows(array: NDArray[np.float32]) -> embedding_pb2.Tensor:
        return encode_tensor(encode_rows(array, dtype))

    for stored in result.bases:
        require_row_dtype(dtype, stored.basis.projection.post)
    timing = result.timing
    return embedding_pb2.EmbedResponse(
        images=[_to_status(image) for image in result.images],
        universal=None if omit_universal else rows(result.universal),
        conditional=[
            embedding_pb2.ConditionalEmbedding(
                criterion=stored.basis.criterion, rows=rows(array), basis_sha256=stored.sha256
            )
            for stored, array in zip(result.bases, result.conditional, strict=True)
        ],
        fingerprint=fingerprint,
        timings=embedding_pb2.Timings(
            preprocess_us=round(timing.preprocess_seconds * 1e6),
            queue_us=round(timing.queue_seconds * 1e6),
            infer_us=round(timing.infer_seconds * 1e6),
            project_us=round(timing.project_seconds * 1e6),
            total_us=round(timing.total_seconds * 1e6),
        ),
    )


def _to_status(image: ImageOutcome) -> embedding_pb2.ImageStatus:
    codes = embedding_pb2.ImageStatus
    if image.error is None:
        code = codes.CODE_OK
    elif isinstance(image.error, ImageTooLargeError):
        code = codes.CODE_TOO_LARGE
    else:
        code = codes.CODE_INVALID
    return embedding_pb2.ImageStatus(
        code=code,
        message="" if image.error is None else image.error.reason,
        digest=image.digest,
        cached=image.cached,
    )
