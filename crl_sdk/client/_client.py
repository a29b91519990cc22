"""The clients of the service: `AsyncClient` for asyncio, and `Client`, which blocks."""

from __future__ import annotations

import asyncio
import functools
import os
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, TypeVar

import grpc
import numpy as np
from numpy.typing import NDArray

from crl_sdk._embeddings import Embeddings
from crl_sdk._lifetime import Lifetime
from crl_sdk._progress import GenerationProgress
from crl_sdk.client._connection import Connection, typed_error
from crl_sdk.client._messages import (
    embed_request,
    failed_batch,
    join_batches,
    read_response,
    stale_parts,
    with_conditional,
)
from crl_sdk.client._options import DEFAULT_OPTIONS, ClientOptions
from crl_sdk.client._results import (
    BasisInfo,
    ServedBasis,
    ServedModel,
    read_basis_info,
    read_model,
    read_progress,
)
from crl_sdk.errors import (
    BasisError,
    ClosedError,
    CrlError,
    ImageBatchError,
    InvalidInputError,
    ServiceError,
)
from crl_sdk.pb.crl.v1 import basis_pb2, basis_pb2_grpc, embedding_pb2, embedding_pb2_grpc
from crl_sdk.projection._row_dtypes import RowDtype, require_row_dtype
from crl_sdk.rpc._tensors import decode_tensor

if TYPE_CHECKING:
    from crl_sdk.client._messages import ClientImage

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

DEFAULT_ADDRESS = "127.0.0.1:50051"

_MAX_REPROJECTIONS = 3
"""Number of attempts to bring all batches of a result to one version of their bases."""


class AsyncClient:
    """A client for asyncio. Use it as a context manager, or call `close`.

    It belongs to the event loop in which it is first used.
    """

    def __init__(
        self, address: str = DEFAULT_ADDRESS, options: ClientOptions = DEFAULT_OPTIONS
    ) -> None:
        """Store where the service is. The client connects at the first call.

        Args:
            address: Address of the service, `host:port` or `unix:PATH`.
            options: Timeouts, retries, batching and security.

        Raises:
            InvalidInputError: If a file of `options.security` cannot be read, or if there is a
                certificate without an authority.
        """
        self.address, self.options = address, options
        self._connection = Connection(address, options)
        self._embedding_stub: embedding_pb2_grpc.EmbeddingServiceAsyncStub | None = None
        self._basis_stub: basis_pb2_grpc.BasisServiceAsyncStub | None = None
        self._model: ServedModel | None = None  # known once images have been resized here

    def __repr__(self) -> str:
        """Return the address."""
        return f"AsyncClient({self.address!r})"

    @property
    def _embedding(self) -> embedding_pb2_grpc.EmbeddingServiceAsyncStub:
        channel = self._connection.channel
        if self._embedding_stub is None:
            self._embedding_stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)
        return self._embedding_stub

    @property
    def _bases(self) -> basis_pb2_grpc.BasisServiceAsyncStub:
        channel = self._connection.channel
        if self._basis_stub is None:
            self._basis_stub = basis_pb2_grpc.BasisServiceStub(channel)
        return self._basis_stub

    async def __aenter__(self) -> AsyncClient:
        """Return the client itself."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the connection."""
        await self.close()

    async def close(self) -> None:
        """Close the connection."""
        await self._connection.close()

    async def embed(
        self,
        images: Iterable[ClientImage],
        criteria: str | Sequence[str] = (),
        *,
        on_error: Literal["raise", "collect"] = "raise",
        dtype: RowDtype = "float32",
    ) -> Embeddings:
        """Embed any number of images, and return their embeddings in the same order.

        All rows of a criterion come from one version of its basis, even if the basis is replaced
        during the call.

        Args:
            images: Paths, encoded bytes, PIL images, uint8 pixels of shape (h, w) or (h, w, c), or
                stored universal embeddings as float or int8 arrays of shape (d,).
            criteria: Names of bases on the server, one or a list.
            on_error: What to do about images that cannot be read. `raise` embeds the others, then
                raises. `collect` reports the failures in `Embeddings.errors`.
            dtype: Dtype of the embeddings, see `crl_sdk.projection.encode_rows`. float16 halves the
                reply. int8 quarters it and keeps only the directions of the rows.

        Raises:
            ImageBatchError: If some images failed. It carries the result of the others.
            UnknownCriterionError: If the server has no basis of a criterion.
            OverloadedError: If the server is still overloaded after all retries.
            DeadlineError: If a call takes longer than `ClientOptions.timeout`.
            ServiceError: If the server cannot be reached.
        """
        if on_error not in ("raise", "collect"):
            raise InvalidInputError(f"expected on_error 'raise' or 'collect', got {on_error!r}")
        parts = [part async for part in self.embed_batches(images, criteria, dtype=dtype)]
        for _ in range(_MAX_REPROJECTIONS):
            stale = stale_parts(parts)
            if not stale:
                break
            for i in stale:
                parts[i] = await self._reproject(parts[i], _one_or_many(criteria), dtype)
        else:
            raise ServiceError(
                f"the bases of {_one_or_many(criteria)} were replaced {_MAX_REPROJECTIONS} times "
                "during the call: call again"
            )
        result = join_batches(parts)
        if result.errors and on_error == "raise":
            raise ImageBatchError(dict(result.errors), result)
        return result

    async def embed_batches(
        self,
        images: Iterable[ClientImage],
        criteria: str | Sequence[str] = (),
        *,
        dtype: RowDtype = "float32",
    ) -> AsyncGenerator[Embeddings, None]:
        """Embed a long iterable of images batch by batch, in order and in bounded memory.

        Args:
            images: Images as in `embed`.
            criteria: Names of bases on the server, one or a list.
            dtype: Dtype of the embeddings, see `embed`.

        Yields:
            The embeddings of `ClientOptions.batch_size` images. Images that cannot be read are
            reported in `Embeddings.errors`.
        """
        _check_images(images)
        require_row_dtype(dtype)
        names = _one_or_many(criteria)
        batches = _batches(images, self.options.batch_size)
        in_progress: list[asyncio.Task[Embeddings]] = []

        def start(batch: list[ClientImage]) -> asyncio.Task[Embeddings]:
            return asyncio.create_task(self._embed_batch(batch, names, dtype))

        try:
            for batch in islice(batches, self.options.max_in_flight):
                in_progress.append(start(batch))
            while in_progress:
                result = await in_progress.pop(0)
                for batch in islice(batches, 1):
                    in_progress.append(asyncio.create_task(self._embed_batch(batch, names, dtype)))
                yield result
        finally:
            for task in in_progress:
                task.cancel()

    async def embed_text(
        self, texts: Sequence[str], *, truncate: bool = False
    ) -> NDArray[np.float32]:
        """Embed texts with the text tower of the server's model.

        Args:
            texts: The n texts.
            truncate: Whether to cut texts that are longer than the model's context. Otherwise such
                a text is an error.

        Returns:
            Universal embeddings, shape (n, d), float32, unit rows.

        Raises:
            InvalidInputError: If there are no texts, or if one is blank or too long.
            BundleError: If the model has no text tower.
        """
        _check_lists(texts=texts)
        request = embedding_pb2.EmbedTextRequest(
            texts=texts, truncate=truncate, model=self.options.model
        )
        response = await self._connection.call(self._embedding.EmbedText, request)
        return decode_tensor(response.embeddings)

    async def model(self) -> ServedModel:
        """Return a description of the model that the server runs."""
        request = embedding_pb2.GetModelRequest(model=self.options.model)
        return read_model(await self._connection.call(self._embedding.GetModel, request))

    async def bases(self) -> list[BasisInfo]:
        """Return descriptions of the server's bases, sorted by criterion."""
        request = basis_pb2.ListBasesRequest(model=self.options.model)
        response = await self._connection.call(self._bases.ListBases, request)
        return [read_basis_info(info) for info in response.bases]

    async def get_basis(self, criterion: str) -> ServedBasis:
        """Return a basis of the server, with its file.

        Args:
            criterion: Name of the criterion.

        Raises:
            UnknownCriterionError: If the server has no basis of this criterion.
        """
        request = basis_pb2.GetBasisRequest(criterion=criterion, model=self.options.model)
        response = await self._connection.call(self._bases.GetBasis, request)
        return ServedBasis(read_basis_info(response.info), response.file)

    async def put_basis(
        self, file: bytes | str | os.PathLike[str], *, replace: bool = True
    ) -> BasisInfo:
        """Send a basis to the server, which uses it from then on.

        Args:
            file: Path of a basis file, or its content.
            replace: Whether to replace the basis that the criterion has already.

        Returns:
            Description of the basis.

        Raises:
            BasisError: If the file cannot be read.
            BasisMismatchError: If the basis was made for another model.
            IntegrityError: If this is not a basis file.
            BasisExistsError: If the criterion has a basis and `replace` is False.
        """
        try:
            data = file if isinstance(file, bytes) else Path(file).read_bytes()
        except OSError as error:
            raise BasisError(f"{file!s}: cannot be read ({error.strerror}); check the path") from (
                error
            )
        return await self._put(basis_pb2.PutBasisRequest(file=data, no_replace=not replace))

    async def create_basis(
        self,
        criterion: str,
        texts: Sequence[str] = (),
        *,
        curated: bool = False,
        prompts: Sequence[str] = (),
        method: str | None = None,
        post: str | None = None,
        against: str | Sequence[str] = (),
        ignore: str | Sequence[str] = (),
        replace: bool = True,
    ) -> BasisInfo:
        """Let the server make a basis from texts, with the text tower of its model.

        Args:
            criterion: Name of the criterion that the texts describe.
            texts: Short descriptive texts.
            curated: Whether to use the list of the criterion that comes with the server, such as
                that of `color`, instead of `texts`. It was written by hand.
            prompts: Text templates with one `{}` each. Empty for the prompt that the server's
                bundle recommends.
            method: Projection method, see docs/PROJECTIONS.md. None for the default.
            post: Row normalisation after the projection: `l2`, `standardise` or `none`. None for
                `l2`.
            against: Other criteria whose texts should count less, for the methods that take
                them. The server must have a basis of each.
            ignore: Criteria to disregard, whose directions are removed. The server must have a
                basis of each.
            replace: Whether to replace the basis that the criterion has already.

        Returns:
            Description of the basis.

        Raises:
            InvalidInputError: If a criterion, text, prompt or method is malformed, if `method` and
                `against` do not fit together, or if there is no curated list of the criterion.
            UnknownCriterionError: If the server has no basis of one of `against` or `ignore`.
            BasisExistsError: If the criterion has a basis and `replace` is False.
        """
        _check_lists(texts=texts, prompts=prompts)
        given = basis_pb2.BasisTexts(
            criterion=criterion, texts=texts, prompts=prompts, method=method or "",
            post=post or "", against=_one_or_many(against),
            ignore=_one_or_many(ignore), curated=curated,
        )  # fmt: skip
        return await self._put(basis_pb2.PutBasisRequest(texts=given, no_replace=not replace))

    async def delete_basis(self, criterion: str) -> None:
        """Delete a basis of the server.

        Args:
            criterion: Name of the criterion.

        Raises:
            UnknownCriterionError: If the server has no basis of this criterion.
        """
        request = basis_pb2.DeleteBasisRequest(criterion=criterion, model=self.options.model)
        await self._connection.call(self._bases.DeleteBasis, request, retry=False)

    async def generate_basis(
        self,
        criterion: str,
        *,
        hint: str = "",
        prompts: Sequence[str] = (),
        count: int | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        seed: int = 0,
        against: str | Sequence[str] = (),
        ignore: str | Sequence[str] = (),
        form: str = "auto",
        max_words: int | None = None,
        any_script: bool = False,
        subject: str = "",
        pictures: NDArray[np.floating] | None = None,
        accept_unsure: bool = False,
        replace: bool = True,
        progress: Callable[[GenerationProgress], None] | None = None,
        timeout: float = 600.0,
    ) -> BasisInfo:
        """Let the server's language model write texts, and make a basis from them.

        The server uses the basis from then on. Cancelling the call stops the language model.

        Args:
            criterion: Criterion in words, such as `animal habitat`.
            hint: Addition to the criterion, such as "as a zoologist would say".
            prompts: Text templates with one `{}` each. Empty for the prompt that the server's
                bundle recommends.
            count: Maximum number of texts. None for the server's default.
            include: Texts to use in any case.
            exclude: Texts to leave out.
            seed: Seed of the language model. Equal seeds give equal texts.
            against: Other criteria whose texts should count less, see `create_basis`.
            ignore: Criteria to disregard, see `create_basis`.
            form: How to ask: `completion`, `chat` or `list`, see docs/BASES.md. `auto` lets the
                server find out what suits its language model.
            max_words: Maximum number of words in a text. None for the server's default.
            any_script: Whether texts may have letters beyond a to z.
            subject: What the values describe, such as `the color of objects`, for language models
                that answer messages.
            pictures: Universal embeddings of at least 20 pictures of yours, shape (n, d), such as
                `embed(…).universal`. Texts that fit none of them best are left out.
            accept_unsure: Whether to make the basis even if the language model hardly knows the
                criterion.
            replace: Whether to replace the basis that the criterion has already.
            progress: Function that is called from time to time with the state of the generation.
            timeout: Seconds for the whole call.

        Returns:
            Description of the basis.

        Raises:
            NotOfferedError: If the server has no language model.
            GenerationError: If the language model answers nothing usable, or hardly knows the
                criterion.
            BasisExistsError: If the criterion has a basis and `replace` is False.
            UnknownCriterionError: If the server has no basis of one of `against` or `ignore`.
        """
        _check_lists(prompts=prompts, include=include, exclude=exclude)
        for name, value, bits in (
            ("count", count or 0, 32), ("max_words", max_words or 0, 32), ("seed", seed, 64),
        ):  # fmt: skip
            if not 0 <= value < 2**bits:
                raise InvalidInputError(f"expected {name} from 0 to 2**{bits} - 1, got {value}")
        request = basis_pb2.GenerateBasisRequest(
            criterion=criterion, hint=hint, prompts=prompts, count=count or 0, include=include,
            exclude=exclude, seed=seed, no_replace=not replace, against=_one_or_many(against),
            ignore=_one_or_many(ignore), form=form, max_words=max_words or 0,
            any_script=any_script, subject=subject,
            pictures=b"" if pictures is None else np.asarray(pictures, "<f4").tobytes(),
            accept_unsure=accept_unsure, model=self.options.model,
        )  # fmt: skip
        metadata = self._connection.metadata
        try:
            call = self._bases.GenerateBasis(request, timeout=timeout, metadata=metadata)
            async for event in call:
                if event.HasField("done"):
                    return read_basis_info(event.done.info)
                if progress is not None:
                    progress(read_progress(event.progress))
        except grpc.aio.AioRpcError as error:
            raise typed_error(error) from error
        raise ServiceError("the server ended the generation without a basis: try again")

    async def _embed_batch(
        self, images: list[ClientImage], criteria: Sequence[str], dtype: RowDtype
    ) -> Embeddings:
        if self.options.resize and self._model is None:
            self._model = await self.model()
        resize = self._model.preprocessing if self._model is not None else None
        if resize is None and all(isinstance(image, bytes | np.ndarray) for image in images):
            request, local = embed_request(images, criteria, dtype=dtype)
        else:  # reading files and decoding would block the event loop
            request, local = await asyncio.to_thread(
                embed_request, images, criteria, resize, dtype=dtype
            )
        if not request.images:
            return failed_batch(local, len(images))
        request.model = self.options.model
        response = await self._connection.call(self._embedding.Embed, request)
        if self._model is not None and response.fingerprint != self._model.fingerprint:
            self._model = None  # the server has another model now, which may need other pixels
            return await self._embed_batch(images, criteria, dtype)
        return read_response(response, local, images)

    async def _reproject(
        self, part: Embeddings, criteria: Sequence[str], dtype: RowDtype
    ) -> Embeddings:
        """Return a part with its embeddings projected again, onto the bases as they are now."""
        rows = part.universal[part.ok]
        if not len(rows):
            return part
        fresh = await self._embed_batch(list(rows), criteria, dtype)
        return with_conditional(part, fresh)

    async def _put(self, request: basis_pb2.PutBasisRequest) -> BasisInfo:
        request.model = self.options.model
        response = await self._connection.call(self._bases.PutBasis, request, retry=False)
        return read_basis_info(response.info)


def _blocking(
    method: Callable[Concatenate[AsyncClient, Arguments], Coroutine[Any, Any, Result]],
) -> Callable[Concatenate[Client, Arguments], Result]:
    """Return the blocking form of a method, with its signature, types and documentation."""

    @functools.wraps(method)
    def call(self: Client, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        return self._wait(method(self._client, *args, **kwargs))

    call.__qualname__ = f"Client.{method.__name__}"
    return call


class Client:
    """A blocking client, which runs an `AsyncClient` on an event loop in a background thread.

    It can be used from several threads. Use it as a context manager, or call `close`. If it is sent
    to a process that was started with the method spawn or forkserver, a client of the same service
    is made there.
    `progress` functions are called in the background thread.
    """

    def __init__(
        self, address: str = DEFAULT_ADDRESS, options: ClientOptions = DEFAULT_OPTIONS
    ) -> None:
        """Store where the service is. The arguments are those of `AsyncClient`."""
        self._arguments = address, options
        self._lifetime = Lifetime("client")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="crl-client", daemon=True
        )
        self._thread.start()
        try:
            self._client = self._wait(self._open(address, options))
        except BaseException:
            self._stop()
            raise

    def __repr__(self) -> str:
        """Return the address."""
        return f"Client({self._arguments[0]!r})"

    @staticmethod
    async def _open(address: str, options: ClientOptions) -> AsyncClient:
        return AsyncClient(address, options)

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how another process makes a client of the same service."""
        self._lifetime.require()
        return type(self), self._arguments

    async def _close(self) -> None:
        """Close the connection, and end the calls that other threads wait for."""
        await self._client.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._loop.shutdown_asyncgens()

    def __enter__(self) -> Client:
        """Return the client itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the connection."""
        self.close()

    def close(self) -> None:
        """Close the connection and end the thread. Further calls of `close` do nothing."""
        if self._lifetime.closed or self._lifetime.forked:  # a child has neither thread nor calls
            return
        self._wait(self._close())
        self._lifetime.closed = True
        self._stop()

    embed = _blocking(AsyncClient.embed)
    embed_text = _blocking(AsyncClient.embed_text)
    model = _blocking(AsyncClient.model)
    bases = _blocking(AsyncClient.bases)
    get_basis = _blocking(AsyncClient.get_basis)
    put_basis = _blocking(AsyncClient.put_basis)
    create_basis = _blocking(AsyncClient.create_basis)
    delete_basis = _blocking(AsyncClient.delete_basis)
    generate_basis = _blocking(AsyncClient.generate_basis)

    def embed_batches(
        self,
        images: Iterable[ClientImage],
        criteria: str | Sequence[str] = (),
        *,
        dtype: RowDtype = "float32",
    ) -> Iterator[Embeddings]:
        """Embed a long iterable of images batch by batch, see `AsyncClient.embed_batches`."""
        batches = self._client.embed_batches(images, criteria, dtype=dtype)
        try:
            while True:
                try:
                    yield self._wait(batches.__anext__())
                except StopAsyncIteration:
                    return
        finally:
            if not (self._lifetime.closed or self._lifetime.forked):
                self._wait(batches.aclose())

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _wait(self, work: Coroutine[Any, Any, Result]) -> Result:
        try:
            self._lifetime.require()
        except CrlError:
            work.close()
            raise
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except CancelledError:
            raise ClosedError("the client was closed during the call: make a new one") from None
        except KeyboardInterrupt:
            future.cancel()
            raise


def _check_images(images: object) -> None:
    if isinstance(images, str | bytes | os.PathLike) or not isinstance(images, Iterable):
        raise InvalidInputError(
            f"expected a list of images, got one {type(images).__name__}: pass [image]"
        )


def _one_or_many(criteria: str | Sequence[str]) -> list[str]:
    """Return criteria as a list. A single string is one criterion."""
    return [criteria] if isinstance(criteria, str) else list(criteria)


def _check_lists(**lists: object) -> None:
    """Refuse a string in place of a list of strings. Protobuf would send its letters."""
    for name, value in lists.items():
        if isinstance(value, str):
            raise InvalidInputError(
                f"expected a list of {name}, got one string: pass [{value[:40]!r}]"
            )


def _batches(images: Iterable[ClientImage], size: int) -> Iterator[list[ClientImage]]:
    iterator = iter(images)
    while batch := list(islice(iterator, size)):
        yield batch
