"""`crl.v1.BasisService` on top of the store of bases: messages in, messages out."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from crl_sdk._progress import GenerationProgress
from crl_sdk.basis._basis import Basis
from crl_sdk.basis._curated import require_curated
from crl_sdk.basis._generation_options import DEFAULT_OPTIONS, Form, GenerationOptions
from crl_sdk.basis._language_model import LanguageModel
from crl_sdk.basis._methods import METHODS
from crl_sdk.errors import (
    CrlError,
    GenerationError,
    InvalidInputError,
    NotOfferedError,
    ServiceError,
)
from crl_sdk.pb.crl.v1 import basis_pb2, basis_pb2_grpc
from crl_sdk.projection._projection import POSTS
from crl_sdk.serving._bases import StoredBasis
from crl_sdk.serving._models import Models
from crl_sdk.serving._pipeline import Pipeline
from crl_sdk.serving._responses import Context, abort, respond
from crl_sdk.serving._text_work import Check

OpenLanguageModel = Callable[[], LanguageModel]

_log = logging.getLogger(__name__)

_PROGRESS_SECONDS = 0.2
"""Shortest time between two progress messages of one call."""


class BasisService(basis_pb2_grpc.BasisServiceServicer):
    """`crl.v1.BasisService`. proto/crl/v1/basis.proto describes each method."""

    def __init__(
        self, models: Models | Pipeline, open_llm: OpenLanguageModel | None = None
    ) -> None:
        """Store the parts.

        Args:
            models: Models whose bases are served, or the only one.
            open_llm: Function that loads the language model, or None to offer no generation.
        """
        self._models = models if isinstance(models, Models) else Models(models)
        self._open_llm = open_llm
        self._generating = asyncio.Lock()  # a language model uses all cores: one at a time

    async def ListBases(
        self, request: basis_pb2.ListBasesRequest, context: Context
    ) -> basis_pb2.ListBasesResponse:
        """Return the facts of all bases."""

        async def list_bases() -> basis_pb2.ListBasesResponse:
            bases = self._models.find(request.model).bases.snapshot
            infos = [_to_info(bases[name]) for name in sorted(bases)]
            return basis_pb2.ListBasesResponse(bases=infos)

        return await respond(context, list_bases)

    async def GetBasis(
        self, request: basis_pb2.GetBasisRequest, context: Context
    ) -> basis_pb2.GetBasisResponse:
        """Return a basis as a file."""

        async def get() -> basis_pb2.GetBasisResponse:
            (stored,) = await self._models.find(request.model).bases.find([request.criterion])
            return basis_pb2.GetBasisResponse(info=_to_info(stored), file=stored.basis.to_bytes())

        return await respond(context, get)

    async def PutBasis(
        self, request: basis_pb2.PutBasisRequest, context: Context
    ) -> basis_pb2.PutBasisResponse:
        """Store a basis that is sent as a file, or made from texts."""

        def put(pipeline: Pipeline, check: Check) -> basis_pb2.PutBasisResponse:
            pipeline.bases.require_writable()
            source = request.WhichOneof("source")
            if source is None:
                raise InvalidInputError("expected a basis file or texts, got neither")
            if source == "file":
                basis = Basis.from_bytes(request.file)
                pipeline.texts.check(basis.texts, basis.prompts)
                self._models.require_model_of(basis, pipeline)
            else:
                basis = _build(pipeline, request.texts, check)
            check()  # after this, the change is finished even if the client goes away
            stored, replaced = pipeline.bases.put(basis, replace=not request.no_replace)
            return basis_pb2.PutBasisResponse(info=_to_info(stored), replaced=replaced)

        async def work() -> basis_pb2.PutBasisResponse:
            pipeline = self._models.find(request.model)
            rows = pipeline.texts.check(_texts(request.texts)[0], request.texts.prompts)
            remaining = context.time_remaining()
            deadline = None if remaining is None else time.monotonic() + remaining
            return await pipeline.texts.run(rows, deadline, partial(put, pipeline))

        return await respond(context, work)

    async def DeleteBasis(
        self, request: basis_pb2.DeleteBasisRequest, context: Context
    ) -> basis_pb2.DeleteBasisResponse:
        """Delete a basis."""

        def delete() -> basis_pb2.DeleteBasisResponse:
            self._models.find(request.model).bases.delete(request.criterion)
            return basis_pb2.DeleteBasisResponse()

        return await respond(context, lambda: asyncio.shield(asyncio.to_thread(delete)))

    async def GenerateBasis(
        self, request: basis_pb2.GenerateBasisRequest, context: Context
    ) -> AsyncIterator[basis_pb2.GenerateBasisResponse]:
        """Let the language model write texts, store the basis made from them, report progress."""
        if self._open_llm is None:
            message = (
                "this server has no language model: ask its operator to start it with "
                "--generate, or send a basis with PutBasis"
            )
            await abort(context, NotOfferedError(message))
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[basis_pb2.GenerateBasisResponse | Exception] = asyncio.Queue()
        client_gone = threading.Event()

        def send(event: basis_pb2.GenerateBasisResponse | Exception) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        def generate() -> None:
            try:
                done = self._generate(request, send, client_gone)
                send(basis_pb2.GenerateBasisResponse(done=done))
            except Exception as error:  # every failure must reach the call, or it would wait
                send(error)

        async with self._generating:
            worker = asyncio.create_task(asyncio.to_thread(generate))
            try:
                while True:
                    event = await events.get()
                    if isinstance(event, CrlError):
                        await abort(context, event)
                    if isinstance(event, Exception):
                        raise event
                    yield event
                    if event.HasField("done"):
                        break
            finally:
                client_gone.set()
                await asyncio.shield(worker)

    def _generate(
        self,
        request: basis_pb2.GenerateBasisRequest,
        send: Callable[[basis_pb2.GenerateBasisResponse], None],
        client_gone: threading.Event,
    ) -> basis_pb2.PutBasisResponse:
        """Generate, make and store a basis; runs in a thread."""
        options = GenerationOptions(
            hint=request.hint,
            include=tuple(request.include),
            exclude=tuple(request.exclude),
            seed=request.seed,
            count=request.count or DEFAULT_OPTIONS.count,
            accept_unsure=request.accept_unsure,
            form=cast("Form", request.form or DEFAULT_OPTIONS.form),
            max_words=request.max_words or DEFAULT_OPTIONS.max_words,
            any_script=request.any_script,
            subject=request.subject,
        )
        sent_at = 0.0

        def report(progress: GenerationProgress) -> None:
            nonlocal sent_at
            if client_gone.is_set():
                raise ServiceError("the client went away")
            if progress.seconds - sent_at < _PROGRESS_SECONDS:
                return
            sent_at = progress.seconds
            message = basis_pb2.GenerationProgress(
                answers=progress.answers,
                max_answers=progress.max_answers,
                tokens=progress.tokens,
                tokens_per_second=progress.tokens_per_second,
            )
            send(basis_pb2.GenerateBasisResponse(progress=message))

        pipeline = self._models.find(request.model)
        pipeline.bases.require_writable()  # the language model takes a minute
        pipeline.texts.check([*request.include, *request.exclude], request.prompts)
        prompts = tuple(request.prompts) or None
        against, ignore = _select(pipeline, request.against), _select(pipeline, request.ignore)
        pictures = _read_pictures(pipeline, request.pictures)
        pipeline.embedder.check_generation(
            request.criterion, options, prompts=prompts, against=against, ignore=ignore,
            pictures=pictures,
        )  # fmt: skip
        if request.no_replace:  # `put` checks it again, but the language model takes a minute
            pipeline.bases.require_new(request.criterion)
        with self._open_language_model() as llm:
            basis = pipeline.embedder.generate_basis(
                request.criterion, llm=llm, options=options,
                prompts=prompts, against=against, ignore=ignore, pictures=pictures,
                progress=report, load=False,
            )  # fmt: skip
        stored, replaced = pipeline.bases.put(basis, replace=not request.no_replace)
        return basis_pb2.PutBasisResponse(info=_to_info(stored), replaced=replaced)

    def _open_language_model(self) -> LanguageModel:
        """Load the language model. Why it fails is logged, because the client gets no paths."""
        assert self._open_llm is not None
        try:
            return self._open_llm()
        except CrlError as error:
            _log.error("the language model cannot be loaded: %s", error)
            raise GenerationError(
                "the server cannot load its language model: its operator finds the reason in the "
                "server's log"
            ) from error


def _build(pipeline: Pipeline, request: basis_pb2.BasisTexts, check: Check) -> Basis:
    """Make a basis from the texts of a client."""
    method, post = request.method or None, request.post or "l2"
    if (method is not None and method not in METHODS) or post not in POSTS:
        raise InvalidInputError(
            f"expected a method of {METHODS} and a post of {POSTS}, got {method!r} and {post!r}"
        )
    texts, provenance = _texts(request)
    return pipeline.embedder.create_basis(
        request.criterion,
        texts,
        prompts=tuple(request.prompts) or None,
        method=method,
        post=post,
        against=_select(pipeline, request.against),
        ignore=_select(pipeline, request.ignore),
        provenance=provenance,
        load=False,
        check=check,
    )


def _read_pictures(pipeline: Pipeline, data: bytes) -> NDArray[np.float32] | None:
    """Return the universal embeddings in a message, shape (n, d); None if there are none."""
    if not data:
        return None
    dim = pipeline.embedder.bundle.embedding_dim
    if len(data) % (4 * dim):
        raise InvalidInputError(
            f"expected pictures of {dim} float32 numbers each, {4 * dim:,} bytes, got "
            f"{len(data):,} bytes in all: send universal embeddings of this server's model"
        )
    return np.frombuffer(data, "<f4").reshape(-1, dim)


def _select(pipeline: Pipeline, criteria: Sequence[str]) -> list[Basis]:
    return [stored.basis for stored in pipeline.bases.select(criteria)]


def _texts(request: basis_pb2.BasisTexts) -> tuple[list[str], dict[str, Any]]:
    """Return the texts that a request gives or names, and their provenance."""
    if not request.curated:
        return list(request.texts), {"texts": "given by a client"}
    if request.texts:
        raise InvalidInputError(
            "expected texts or `curated`, got both: leave the texts out, or clear `curated`"
        )
    curated = require_curated(request.criterion)
    return list(curated.texts), curated.provenance


def _to_info(stored: StoredBasis) -> basis_pb2.BasisInfo:
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
