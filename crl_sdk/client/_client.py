"""Clients of the service, blocking and asynchronous, over one implementation of what they say.

Needs numpy, grpcio and protobuf. Paths and PIL images are sent as encoded bytes.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
from numpy.typing import NDArray

from crl_sdk._embeddings import Embeddings
from crl_sdk.client._messages import (
    all_failed,
    embed_request,
    joined,
    read_response,
    stale_parts,
    with_conditional,
)
from crl_sdk.errors import (
    CrlError,
    ImageBatchError,
    InvalidInputError,
    OverloadedError,
    ServiceError,
)
from crl_sdk.pb.crl.v1 import (
    basis_pb2,
    basis_pb2_grpc,
    embedding_pb2,
    embedding_pb2_grpc,
)
from crl_sdk.rpc._status import error_from_status
from crl_sdk.rpc._tensors import decode_tensor

if TYPE_CHECKING:
    from crl_sdk.client._messages import ClientImage

DEFAULT_ADDRESS = "127.0.0.1:50051"

_REPROJECTIONS = 3
"""How often a result is made whole when bases change while it is made."""


@dataclass(frozen=True, slots=True)
class ClientSecurity:
    """How a client proves who it is, and knows its server.

    Attributes:
        token: sent as `authorization: Bearer TOKEN`. Without TLS it travels in plain text.
        authority: PEM file of the authority that signed the server's certificate; None for no TLS.
        certificate: PEM file of the client's own certificate, for mTLS.
        key: PEM file of its private key.
    """

    token: str = ""
    authority: str | os.PathLike[str] | None = None
    certificate: str | os.PathLike[str] | None = None
    key: str | os.PathLike[str] | None = None


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """How a client calls.

    Attributes:
        timeout: seconds for one call, tries included.
        retries: how often a call that changes nothing is tried again when the server is overloaded
            or away.
        batch_size: images of one call.
        max_in_flight: calls under way at once for one long list of images.
        max_message_bytes: of one message, in either direction.
        resize: decode and resize here, with the server's own preprocessing, and send pixels: less
            to send of large pictures, less work for the server, the same rows bit for bit. Needs
            Pillow. The server's cache knows such an image by its pixels, not by its file.
        security: token and TLS.
    """

    timeout: float = 30.0
    retries: int = 4
    batch_size: int = 16
    max_in_flight: int = 4
    max_message_bytes: int = 64 * 2**20
    resize: bool = False
    security: ClientSecurity = field(default_factory=ClientSecurity)


class AsyncClient:
    """A client for asyncio. Use it as a context manager, or `close` it."""

    def __init__(
        self, address: str = DEFAULT_ADDRESS, options: ClientOptions = ClientOptions()
    ) -> None:
        """Store where the service is; nothing connects before the first call.

        Args:
            address: `host:port` or `unix:PATH`.
            options: how to call.
        """
        self.address, self.options = address, options
        self._channel = _channel(address, options)
        token = options.security.token
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._model: embedding_pb2.GetModelResponse | None = (
            None  # asked for when images are resized here
        )
        self._embedding = embedding_pb2_grpc.EmbeddingServiceStub(self._channel)
        self._bases = basis_pb2_grpc.BasisServiceStub(self._channel)

    async def __aenter__(self) -> AsyncClient:
        """Return itself."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        await self.close()

    async def close(self) -> None:
        """Close the connection."""
        await self._channel.close()

    async def embed(
        self,
        images: Iterable[ClientImage],
        criteria: Sequence[str] = (),
        *,
        on_error: str = "raise",
    ) -> Embeddings:
        """Embed images, any number of them; their order is kept.

        All rows of a criterion are of one version of its basis, even if it is replaced meanwhile.

        Args:
            images: paths, encoded bytes, PIL images, uint8 pixels (H, W[, C]), or stored universal
                embeddings (d,) as float arrays.
            criteria: names of bases on the server.
            on_error: `raise` embeds all readable images, then raises if any was not; `collect`
                leaves the failures in `Embeddings.errors`.

        Raises:
            ImageBatchError: some images failed; it carries the result of the others.
            UnknownCriterionError: the server has no such basis.
            OverloadedError: the server was overloaded, all retries long.
            DeadlineError: it took longer than `ClientOptions.timeout`.
            ServiceError: the server cannot be reached.
        """
        if on_error not in ("raise", "collect"):
            raise InvalidInputError(f"expected on_error 'raise' or 'collect', got {on_error!r}")
        parts = [part async for part in self.embed_batches(images, criteria)]
        for _ in range(_REPROJECTIONS):
            stale = stale_parts(parts)
            if not stale:
                break
            for i in stale:
                parts[i] = await self._reproject(parts[i], criteria)
        else:
            raise ServiceError("the bases changed again and again during the call: call again")
        result = joined(parts)
        if result.errors and on_error == "raise":
            raise ImageBatchError(dict(result.errors), result)
        return result

    async def embed_batches(
        self, images: Iterable[ClientImage], criteria: Sequence[str] = ()
    ) -> AsyncIterator[Embeddings]:
        """Embed a long iterable of images, a batch at a time, in order and in bounded memory.

        Yields:
            One result per `ClientOptions.batch_size` images; errors are collected in it.
        """
        _check_images(images)
        batches = _batches(images, self.options.batch_size)
        under_way: list[asyncio.Task[Embeddings]] = []
        try:
            for batch in islice(batches, self.options.max_in_flight):
                under_way.append(asyncio.create_task(self._embed_batch(batch, criteria)))
            while under_way:
                result = await under_way.pop(0)
                for batch in islice(batches, 1):
                    under_way.append(asyncio.create_task(self._embed_batch(batch, criteria)))
                yield result
        finally:
            for task in under_way:
                task.cancel()

    async def _embed_batch(self, images: list[ClientImage], criteria: Sequence[str]) -> Embeddings:
        if self.options.resize and self._model is None:
            self._model = await self.model()
        how = self._model.preprocessing if self._model is not None else None
        if how is None and all(isinstance(image, bytes | np.ndarray) for image in images):
            request, local = embed_request(images, criteria)
        else:  # files and decoding would hold up the event loop
            request, local = await asyncio.to_thread(embed_request, images, criteria, how)
        if not request.images:
            return all_failed(local, len(images))
        response = await self._call(self._embedding.Embed, request)
        if self._model is not None and response.fingerprint != self._model.fingerprint:
            self._model = None  # another model, which may want other pixels
            return await self._embed_batch(images, criteria)
        return read_response(response, local, len(images))

    async def _reproject(self, part: Embeddings, criteria: Sequence[str]) -> Embeddings:
        """Project a part's embeddings again, on the bases as they are now."""
        rows = part.universal[part.ok]
        if not len(rows):
            return part
        fresh = await self._embed_batch(list(rows), criteria)
        return with_conditional(part, fresh)

    async def embed_text(
        self, texts: Sequence[str], *, truncate: bool = False
    ) -> NDArray[np.float32]:
        """Embed texts with the model's text tower: (n, d) float32, unit rows."""
        request = embedding_pb2.EmbedTextRequest(texts=texts, truncate=truncate)
        response = await self._call(self._embedding.EmbedText, request)
        return decode_tensor(response.embeddings)

    async def model(self) -> embedding_pb2.GetModelResponse:
        """Tell what model is served."""
        model: embedding_pb2.GetModelResponse = await self._call(
            self._embedding.GetModel, embedding_pb2.GetModelRequest()
        )
        return model

    async def bases(self) -> list[basis_pb2.BasisInfo]:
        """List the server's bases."""
        response = await self._call(self._bases.ListBases, basis_pb2.ListBasesRequest())
        return list(response.bases)

    async def put_basis(self, file: bytes | str | os.PathLike[str]) -> basis_pb2.BasisInfo:
        """Add a basis, or replace the one of its criterion.

        Args:
            file: a basis file or its bytes.

        Raises:
            BasisMismatchError: it was made for another model.
            IntegrityError: it is not a basis file.
        """
        data = file if isinstance(file, bytes) else Path(file).read_bytes()
        request = basis_pb2.PutBasisRequest(file=data)
        response = await self._call(self._bases.PutBasis, request, retry=False)
        info: basis_pb2.BasisInfo = response.info
        return info

    async def create_basis(
        self,
        criterion: str,
        texts: Sequence[str],
        *,
        prompts: Sequence[str] = (),
        method: str = "",
        against: Sequence[str] = (),
    ) -> basis_pb2.BasisInfo:
        """Let the server make a basis of texts, with its model's text tower.

        Args:
            criterion: what the texts describe.
            texts: short descriptive texts.
            prompts: templates with one `{}` each; none for the text alone.
            method: how the projection is made, see docs/PROJECTIONS.md; empty for the default.
            against: other criteria that the server has a basis of, and whose texts are to count
                less: for the methods that begin with `exclusive`.

        Raises:
            InvalidInputError: a malformed criterion, text, prompt or method; `against` with a
                method that takes none, or none with one that does.
            UnknownCriterionError: the server has no basis of one of `against`.
        """
        given = basis_pb2.BasisTexts(
            criterion=criterion, texts=texts, prompts=prompts, method=method, against=against
        )
        request = basis_pb2.PutBasisRequest(texts=given)
        response = await self._call(self._bases.PutBasis, request, retry=False)
        info: basis_pb2.BasisInfo = response.info
        return info

    async def delete_basis(self, criterion: str) -> None:
        """Remove a basis.

        Raises:
            UnknownCriterionError: there is none of this name.
        """
        request = basis_pb2.DeleteBasisRequest(criterion=criterion)
        await self._call(self._bases.DeleteBasis, request, retry=False)

    async def generate_basis(
        self,
        criterion: str,
        *,
        hint: str = "",
        prompts: Sequence[str] = (),
        count: int = 0,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        seed: int = 0,
        no_replace: bool = False,
        against: Sequence[str] = (),
        progress: Callable[[basis_pb2.GenerationProgress], None] | None = None,
        timeout: float = 600.0,
    ) -> basis_pb2.BasisInfo:
        """Let the server's language model write the texts of a criterion; use them from now on.

        Args:
            criterion: in words.
            hint: said beside it, such as "as a zoologist would say".
            prompts: templates with one {} each; the server's default if none.
            count: texts at most; 0 for the default.
            include: texts to take in any case.
            exclude: texts to leave out.
            seed: equal seeds give equal texts.
            no_replace: refuse where the criterion has a basis.
            against: other criteria that the server has a basis of; see `create_basis`.
            progress: called with answers and tokens so far.
            timeout: seconds; leaving the call stops the model.

        Raises:
            NotOfferedError: the server has no language model.
            GenerationError: it answers nothing usable.
            BasisExistsError: there is a basis and `no_replace` is set.
            UnknownCriterionError: the server has no basis of one of `against`.
        """
        request = basis_pb2.GenerateBasisRequest(
            criterion=criterion, hint=hint, prompts=prompts, count=count, include=include,
            exclude=exclude, seed=seed, no_replace=no_replace, against=against,
        )  # fmt: skip
        try:
            call = self._bases.GenerateBasis(request, timeout=timeout, metadata=self._metadata)
            async for event in call:
                if event.HasField("done"):
                    info: basis_pb2.BasisInfo = event.done.info
                    return info
                if progress is not None:
                    progress(event.progress)
        except grpc.aio.AioRpcError as error:
            raise _typed(error) from error
        raise ServiceError("the server ended the generation without a basis: try again")

    async def _call(self, method: Any, request: Any, *, retry: bool = True) -> Any:
        """Make a call; retry it with growing pauses while the server is overloaded or away."""
        ends = time.monotonic() + self.options.timeout
        for attempt in range(self.options.retries + 1):
            try:
                remaining = max(ends - time.monotonic(), 0.001)
                return await method(request, timeout=remaining, metadata=self._metadata)
            except grpc.aio.AioRpcError as error:
                typed = _typed(error)
                pause = _pause(error.code(), typed, attempt)
                late = pause is not None and time.monotonic() + pause >= ends
                if not retry or pause is None or late or attempt == self.options.retries:
                    raise typed from error
            await asyncio.sleep(pause)
        raise AssertionError("unreachable")


class Client:
    """A blocking client: `AsyncClient` on an event loop of its own, in a thread of its own.

    Safe to use from several threads. Use it as a context manager, or `close` it.
    """

    def __init__(
        self, address: str = DEFAULT_ADDRESS, options: ClientOptions = ClientOptions()
    ) -> None:
        """Store where the service is; the arguments are those of `AsyncClient`."""
        import threading

        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="crl-client", daemon=True
        )
        self._thread.start()
        self._client: AsyncClient = self._wait(self._open(address, options))

    @staticmethod
    async def _open(address: str, options: ClientOptions) -> AsyncClient:
        return AsyncClient(address, options)

    def _wait(self, work: Any) -> Any:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise

    def __enter__(self) -> Client:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Close the connection and end the thread. Idempotent."""
        if not self._thread.is_alive():
            return
        self._wait(self._client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def embed(
        self,
        images: Iterable[ClientImage],
        criteria: Sequence[str] = (),
        *,
        on_error: str = "raise",
    ) -> Embeddings:
        """See `AsyncClient.embed`."""
        result: Embeddings = self._wait(self._client.embed(images, criteria, on_error=on_error))
        return result

    def embed_batches(
        self, images: Iterable[ClientImage], criteria: Sequence[str] = ()
    ) -> Iterator[Embeddings]:
        """See `AsyncClient.embed_batches`."""
        batches = self._client.embed_batches(images, criteria)
        try:
            while True:
                try:
                    yield self._wait(anext(batches))
                except StopAsyncIteration:
                    return
        finally:
            self._wait(batches.aclose())  # type: ignore[attr-defined]

    def embed_text(self, texts: Sequence[str], *, truncate: bool = False) -> NDArray[np.float32]:
        """See `AsyncClient.embed_text`."""
        rows: NDArray[np.float32] = self._wait(self._client.embed_text(texts, truncate=truncate))
        return rows

    def model(self) -> embedding_pb2.GetModelResponse:
        """See `AsyncClient.model`."""
        model: embedding_pb2.GetModelResponse = self._wait(self._client.model())
        return model

    def bases(self) -> list[basis_pb2.BasisInfo]:
        """See `AsyncClient.bases`."""
        bases: list[basis_pb2.BasisInfo] = self._wait(self._client.bases())
        return bases

    def put_basis(self, file: bytes | str | os.PathLike[str]) -> basis_pb2.BasisInfo:
        """See `AsyncClient.put_basis`."""
        info: basis_pb2.BasisInfo = self._wait(self._client.put_basis(file))
        return info

    def create_basis(
        self,
        criterion: str,
        texts: Sequence[str],
        *,
        prompts: Sequence[str] = (),
        method: str = "",
        against: Sequence[str] = (),
    ) -> basis_pb2.BasisInfo:
        """See `AsyncClient.create_basis`."""
        info: basis_pb2.BasisInfo = self._wait(
            self._client.create_basis(
                criterion, texts, prompts=prompts, method=method, against=against
            )
        )
        return info

    def generate_basis(self, criterion: str, **options: Any) -> basis_pb2.BasisInfo:
        """See `AsyncClient.generate_basis`; `progress` is called in the client's thread."""
        info: basis_pb2.BasisInfo = self._wait(self._client.generate_basis(criterion, **options))
        return info

    def delete_basis(self, criterion: str) -> None:
        """See `AsyncClient.delete_basis`."""
        self._wait(self._client.delete_basis(criterion))


def _channel(address: str, options: ClientOptions) -> grpc.aio.Channel:
    sizes = [
        ("grpc.max_receive_message_length", options.max_message_bytes),
        ("grpc.max_send_message_length", options.max_message_bytes),
    ]
    security = options.security
    if security.authority is None:
        if security.certificate is not None:
            raise InvalidInputError("a client certificate needs the server's authority too")
        return grpc.aio.insecure_channel(address, options=sizes)
    credentials = grpc.ssl_channel_credentials(
        _read(security.authority), _read(security.key), _read(security.certificate)
    )
    return grpc.aio.secure_channel(address, credentials, options=sizes)


def _typed(error: grpc.aio.AioRpcError) -> CrlError:
    return error_from_status(error.code(), error.details() or "", error.trailing_metadata())


def _read(path: str | os.PathLike[str] | None) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot be read ({error.strerror})") from error


def _pause(code: grpc.StatusCode, error: Exception, attempt: int) -> float | None:
    """Give the seconds to wait before another try, or None if it would not help."""
    if isinstance(error, OverloadedError):
        base = error.retry_after
    elif code == grpc.StatusCode.UNAVAILABLE:
        base = 0.05
    else:
        return None
    return float(min(base * 2**attempt, 5.0) * random.uniform(0.5, 1.5))


def _check_images(images: object) -> None:
    if isinstance(images, str | bytes | os.PathLike) or not isinstance(images, Iterable):
        raise InvalidInputError(
            f"expected a list of images, got one {type(images).__name__}: pass [image]"
        )


def _batches(images: Iterable[ClientImage], size: int) -> Iterator[list[ClientImage]]:
    iterator = iter(images)
    while batch := list(islice(iterator, size)):
        yield batch
