"""Our gRPC services over the pipeline: messages in, messages out, errors as statuses."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, NoReturn, TypeVar

import grpc
import numpy as np
from numpy.typing import NDArray

from crl_sdk._progress import GenerationProgress
from crl_sdk._version import __version__
from crl_sdk.basis._basis import Basis
from crl_sdk.basis._build import DEFAULT_PROMPT
from crl_sdk.basis._generate import DEFAULT_OPTIONS, GenerationOptions
from crl_sdk.basis._language_model import LanguageModel
from crl_sdk.basis._methods import METHODS
from crl_sdk.errors import (
    CrlError,
    ImageTooLargeError,
    InvalidInputError,
    NotOfferedError,
    ServiceError,
)
from crl_sdk.pb.crl.v1 import (
    basis_pb2,
    basis_pb2_grpc,
    embedding_pb2,
    embedding_pb2_grpc,
)
from crl_sdk.projection._projection import POSTS
from crl_sdk.rpc._status import error_trailers, status_code
from crl_sdk.rpc._tensors import decode_tensor, encode_tensor
from crl_sdk.serving._bases import StoredBasis
from crl_sdk.serving._call_interceptor import (
    REQUEST_ID_KEY,
    caller,
    log_unexpected_error,
    request_id,
)
from crl_sdk.serving._pipeline import Pipeline
from crl_sdk.serving._results import EmbedResult, ImageSource

OpenModel = Callable[[], LanguageModel]
Context = grpc.aio.ServicerContext[Any, Any]
Reply = TypeVar("Reply")

STREAM_WINDOW = 8
"""Requests of one stream that are in the works at once; the next is read when one is done."""

_PROGRESS_SECONDS = 0.2

_ROW_DTYPES: dict[int, type[np.floating]] = {
    embedding_pb2.DTYPE_UNSPECIFIED: np.float32,
    embedding_pb2.DTYPE_FLOAT32: np.float32,
    embedding_pb2.DTYPE_FLOAT16: np.float16,
}


class EmbeddingService(embedding_pb2_grpc.EmbeddingServiceServicer):
    """`crl.v1.EmbeddingService`."""

    def __init__(self, pipeline: Pipeline) -> None:
        """Store the pipeline, which must be started."""
        self._pipeline = pipeline

    async def Embed(
        self, request: embedding_pb2.EmbedRequest, context: Context
    ) -> embedding_pb2.EmbedResponse:
        """See proto/crl/v1/embedding.proto."""
        return await answer(context, lambda: self._embed(request, context))

    async def EmbedStream(
        self,
        request_iterator: AsyncIterator[embedding_pb2.EmbedStreamRequest],
        context: Context,
    ) -> AsyncIterator[embedding_pb2.EmbedStreamResponse]:
        """See proto/crl/v1/embedding.proto."""
        done: asyncio.Queue[embedding_pb2.EmbedStreamResponse | None] = asyncio.Queue()
        window = asyncio.Semaphore(STREAM_WINDOW)
        tasks: set[asyncio.Task[None]] = set()

        async def serve(message: embedding_pb2.EmbedStreamRequest) -> None:
            reply = embedding_pb2.EmbedStreamResponse(id=message.id)
            try:
                reply.response.CopyFrom(await self._embed(message.request, context))
            except CrlError as error:
                reply.error.code, reply.error.message = status_code(error).value[0], str(error)
            except Exception as error:  # of one request: the others are answered
                reply.error.code = grpc.StatusCode.INTERNAL.value[0]
                reply.error.message = log_unexpected_error(
                    "/crl.v1.EmbeddingService/EmbedStream", error
                )
            await done.put(reply)

        async def read() -> None:
            try:
                async for message in request_iterator:
                    await window.acquire()
                    task = asyncio.create_task(serve(message))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
                await asyncio.gather(*tasks)
            finally:
                await done.put(None)

        reader = asyncio.create_task(read())
        try:
            while (response := await done.get()) is not None:
                yield response
                window.release()  # only now: a client that does not read is not read either
            await reader
        finally:
            for task in (reader, *tasks):
                task.cancel()

    async def EmbedText(
        self, request: embedding_pb2.EmbedTextRequest, context: Context
    ) -> embedding_pb2.EmbedTextResponse:
        """See proto/crl/v1/embedding.proto."""

        async def embed() -> embedding_pb2.EmbedTextResponse:
            dtype = _row_dtype(request.dtype)
            rows = await asyncio.to_thread(
                self._pipeline.embedder.embed_text, list(request.texts), truncate=request.truncate
            )
            return embedding_pb2.EmbedTextResponse(
                embeddings=encode_tensor(rows.astype(dtype, copy=False)),
                fingerprint=self._pipeline.embedder.bundle.fingerprint,
            )

        return await answer(context, embed)

    async def GetModel(
        self, request: embedding_pb2.GetModelRequest, context: Context
    ) -> embedding_pb2.GetModelResponse:
        """See proto/crl/v1/embedding.proto."""
        embedder = self._pipeline.embedder
        manifest = embedder.bundle.manifest
        spec = manifest.preprocess
        return embedding_pb2.GetModelResponse(
            name=manifest.name,
            fingerprint=manifest.fingerprint,
            embedding_dim=manifest.embedding_dim,
            engine=embedder.engine,
            preprocessing=embedding_pb2.Preprocessing(
                height=spec.height, width=spec.width, interpolation=spec.interpolation,
                resize_mode=spec.resize_mode, fill=spec.fill, mean=spec.mean, std=spec.std,
            ),
            context_length=manifest.text.context_length if manifest.text else 0,
            max_images=self._pipeline.limits.max_images,
            server_version=__version__,
        )  # fmt: skip

    async def _embed(
        self, request: embedding_pb2.EmbedRequest, context: Context
    ) -> embedding_pb2.EmbedResponse:
        dtype = _row_dtype(request.dtype)
        sources = [_source(image, i) for i, image in enumerate(request.images)]
        remaining = context.time_remaining()
        result = await self._pipeline.embed(
            sources,
            request.criteria,
            deadline=None if remaining is None else time.monotonic() + remaining,
            client=caller.get(),
        )
        return _response(
            result, self._pipeline.embedder.bundle.fingerprint, dtype, request.omit_universal
        )


class BasisService(basis_pb2_grpc.BasisServiceServicer):
    """`crl.v1.BasisService`."""

    def __init__(self, pipeline: Pipeline, open_model: OpenModel | None = None) -> None:
        """Store the pipeline, whose bases these are, and what loads the language model, if any."""
        self._pipeline = pipeline
        self._open_model = open_model
        self._generating = asyncio.Lock()  # one at a time: it takes all cores

    async def ListBases(
        self, request: basis_pb2.ListBasesRequest, context: Context
    ) -> basis_pb2.ListBasesResponse:
        """See proto/crl/v1/basis.proto."""
        bases = self._pipeline.bases.snapshot
        return basis_pb2.ListBasesResponse(bases=[_info(bases[name]) for name in sorted(bases)])

    async def GetBasis(
        self, request: basis_pb2.GetBasisRequest, context: Context
    ) -> basis_pb2.GetBasisResponse:
        """See proto/crl/v1/basis.proto."""

        async def get() -> basis_pb2.GetBasisResponse:
            (stored,) = self._pipeline.bases.select([request.criterion])
            return basis_pb2.GetBasisResponse(info=_info(stored), file=stored.basis.to_bytes())

        return await answer(context, get)

    async def PutBasis(
        self, request: basis_pb2.PutBasisRequest, context: Context
    ) -> basis_pb2.PutBasisResponse:
        """See proto/crl/v1/basis.proto."""

        def put() -> basis_pb2.PutBasisResponse:
            kind = request.WhichOneof("source")
            if kind is None:
                raise InvalidInputError("expected a basis file or texts, got neither")
            basis = Basis.from_bytes(request.file) if kind == "file" else self._build(request.texts)
            stored, replaced = self._pipeline.bases.put(basis, replace=not request.no_replace)
            return basis_pb2.PutBasisResponse(info=_info(stored), replaced=replaced)

        # once begun it is finished, even if the client goes away
        return await answer(context, lambda: asyncio.shield(asyncio.to_thread(put)))

    async def DeleteBasis(
        self, request: basis_pb2.DeleteBasisRequest, context: Context
    ) -> basis_pb2.DeleteBasisResponse:
        """See proto/crl/v1/basis.proto."""

        def delete() -> basis_pb2.DeleteBasisResponse:
            self._pipeline.bases.delete(request.criterion)
            return basis_pb2.DeleteBasisResponse()

        return await answer(context, lambda: asyncio.shield(asyncio.to_thread(delete)))

    async def GenerateBasis(
        self, request: basis_pb2.GenerateBasisRequest, context: Context
    ) -> AsyncIterator[basis_pb2.GenerateBasisResponse]:
        """See proto/crl/v1/basis.proto."""
        if self._open_model is None:
            message = (
                "this server has no language model; its operator can start it with --generate, "
                "or send a basis with PutBasis"
            )
            await abort(context, NotOfferedError(message))
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[basis_pb2.GenerateBasisResponse | CrlError] = asyncio.Queue()
        gone = threading.Event()

        def tell(event: basis_pb2.GenerateBasisResponse | CrlError) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        def work() -> None:
            try:
                done = self._generate(request, tell, gone)
                tell(basis_pb2.GenerateBasisResponse(done=done))
            except CrlError as error:
                tell(error)

        async with self._generating:
            worker = asyncio.create_task(asyncio.to_thread(work))
            try:
                while True:
                    event = await events.get()
                    if isinstance(event, CrlError):
                        await abort(context, event)
                    yield event
                    if event.HasField("done"):
                        break
            finally:
                gone.set()
                await asyncio.shield(worker)

    def _generate(
        self,
        request: basis_pb2.GenerateBasisRequest,
        tell: Callable[[basis_pb2.GenerateBasisResponse], None],
        gone: threading.Event,
    ) -> basis_pb2.PutBasisResponse:
        """Generate, build and store a basis; in a thread."""
        assert self._open_model is not None
        options = GenerationOptions(
            hint=request.hint,
            include=tuple(request.include),
            exclude=tuple(request.exclude),
            seed=request.seed,
            count=request.count or DEFAULT_OPTIONS.count,
        )
        sent = 0.0

        def report(progress: GenerationProgress) -> None:
            nonlocal sent
            if gone.is_set():
                raise ServiceError("the client went away")
            if progress.seconds - sent < _PROGRESS_SECONDS:
                return
            sent = progress.seconds
            message = basis_pb2.GenerationProgress(
                answers=progress.answers,
                max_answers=progress.max_answers,
                tokens=progress.tokens,
                tokens_per_second=progress.tokens_per_second,
            )
            tell(basis_pb2.GenerateBasisResponse(progress=message))

        against = self._others(request.against)
        with self._open_model() as llm:
            basis = self._pipeline.embedder.generate_basis(
                request.criterion, llm=llm, options=options,
                prompts=tuple(request.prompts) or (DEFAULT_PROMPT,), against=against,
                progress=report, load=False,
            )  # fmt: skip
        stored, replaced = self._pipeline.bases.put(basis, replace=not request.no_replace)
        return basis_pb2.PutBasisResponse(info=_info(stored), replaced=replaced)

    def _build(self, given: basis_pb2.BasisTexts) -> Basis:
        against = self._others(given.against)
        method, post = given.method or None, given.post or "l2"
        if (method is not None and method not in METHODS) or post not in POSTS:
            raise InvalidInputError(
                f"expected a method of {METHODS} and a post of {POSTS}, got {method!r} and {post!r}"
            )
        return self._pipeline.embedder.create_basis(
            given.criterion,
            list(given.texts),
            prompts=tuple(given.prompts) or (DEFAULT_PROMPT,),
            method=method,
            post=post,
            against=against,
            provenance={"texts": "given by a client"},
            load=False,
        )

    def _others(self, criteria: Sequence[str]) -> list[Basis]:
        return [stored.basis for stored in self._pipeline.bases.select(criteria)]


async def answer(context: Context, work: Callable[[], Awaitable[Reply]]) -> Reply:
    """Do the work of a call; its typed errors become the call's status."""
    try:
        return await work()
    except CrlError as error:
        await abort(context, error)


async def abort(context: Context, error: CrlError) -> NoReturn:
    """End a call with the status of an error."""
    trailers = (*error_trailers(error), (REQUEST_ID_KEY, request_id.get()))
    await context.abort(status_code(error), str(error), trailers)


def _row_dtype(dtype: int) -> type[np.floating]:
    if dtype not in _ROW_DTYPES:
        raise InvalidInputError(
            f"expected a dtype of FLOAT32 or FLOAT16 for the reply, got {dtype}"
        )
    return _ROW_DTYPES[dtype]


def _source(image: embedding_pb2.Image, position: int) -> ImageSource:
    """Read an image out of its message."""
    kind = image.WhichOneof("source")
    if kind == "encoded":
        return image.encoded
    if kind is None:
        raise InvalidInputError(
            f"image {position}: expected encoded bytes, pixels or an embedding, got none of them"
        )
    array: NDArray[Any] = decode_tensor(image.pixels if kind == "pixels" else image.embedding)
    wanted = "u" if kind == "pixels" else "f"
    ranks = (2, 3) if kind == "pixels" else (1,)
    if array.dtype.kind != wanted or array.ndim not in ranks:
        raise InvalidInputError(
            f"image {position}: expected {kind} "
            + ("UINT8 of shape (height, width[, channels])" if kind == "pixels" else "of shape (d)")
            + f", got {array.dtype} of shape {array.shape}"
        )
    return array


def _response(
    result: EmbedResult, fingerprint: str, dtype: type[np.floating], omit_universal: bool
) -> embedding_pb2.EmbedResponse:
    def rows(array: NDArray[np.float32]) -> embedding_pb2.Tensor:
        return encode_tensor(array.astype(dtype, copy=False))

    codes = embedding_pb2.ImageStatus
    return embedding_pb2.EmbedResponse(
        images=[
            embedding_pb2.ImageStatus(
                code=codes.CODE_OK
                if image.error is None
                else codes.CODE_TOO_LARGE
                if isinstance(image.error, ImageTooLargeError)
                else codes.CODE_INVALID,
                message="" if image.error is None else image.error.reason,
                digest=image.digest,
                cached=image.cached,
            )
            for image in result.images
        ],
        universal=None if omit_universal else rows(result.universal),
        conditional=[
            embedding_pb2.ConditionalEmbedding(
                criterion=stored.basis.criterion, rows=rows(array), basis_sha256=stored.sha256
            )
            for stored, array in zip(result.bases, result.conditional, strict=True)
        ],
        fingerprint=fingerprint,
        timings=embedding_pb2.Timings(
            preprocess_us=round(result.timing.preprocess_seconds * 1e6),
            queue_us=round(result.timing.queue_seconds * 1e6),
            infer_us=round(result.timing.infer_seconds * 1e6),
            project_us=round(result.timing.project_seconds * 1e6),
            total_us=round(result.timing.total_seconds * 1e6),
        ),
    )


def _info(stored: StoredBasis) -> basis_pb2.BasisInfo:
    basis = stored.basis
    return basis_pb2.BasisInfo(
        criterion=basis.criterion,
        sha256=stored.sha256,
        texts=basis.texts,
        prompts=basis.prompts,
        method=basis.method,
        post=basis.projection.post,
        output_dim=basis.projection.output_dim,
    )
