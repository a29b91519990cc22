"""Clients of the service, blocking and asynchronous, over one implementation of what they say.

Needs numpy, grpcio and protobuf. Paths and PIL images are sent as encoded bytes.
"""

from __future__ import annotations

import asyncio
import io
import os
import random
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc
import numpy as np
from numpy.typing import NDArray

from crl_sdk import wire
from crl_sdk.errors import (
    CriterionError,
    ImageBatchError,
    ImageError,
    ImageTooLargeError,
    InvalidInputError,
    OverloadedError,
)
from crl_sdk.pb.crl.v1 import (
    basis_pb2,
    basis_pb2_grpc,
    embedding_pb2,
    embedding_pb2_grpc,
)
from crl_sdk.status import error_of

if TYPE_CHECKING:
    from PIL import Image

    ClientImage: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | NDArray[Any]"

DEFAULT_ADDRESS = "127.0.0.1:50051"


@dataclass(frozen=True, slots=True)
class Security:
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
class Options:
    """How a client calls.

    Attributes:
        timeout: seconds for one call, tries included.
        retries: how often a call that changes nothing is tried again when the server is overloaded
            or away.
        batch_size: images of one call.
        max_in_flight: calls under way at once for one long list of images.
        max_message_bytes: of one message, in either direction.
        security: token and TLS.
    """

    timeout: float = 30.0
    retries: int = 4
    batch_size: int = 16
    max_in_flight: int = 4
    max_message_bytes: int = 64 * 2**20
    security: Security = field(default_factory=Security)


@dataclass(frozen=True, slots=True)
class RemoteEmbeddings:
    """What the service gave for n images.

    Attributes:
        universal: (n, d) float32, unit rows; NaN in the rows of failed images.
        conditional: criterion → (n, m) float32; NaN likewise.
        errors: position → why an image failed.
        cached: (n,) bool, whether the server knew the image.
        basis_sha256: criterion → version of the basis that was used.
        fingerprint: of the model.
        timings: microseconds of each stage, as the server measured them, summed over the calls.
    """

    universal: NDArray[np.float32]
    conditional: Mapping[str, NDArray[np.float32]]
    errors: Mapping[int, ImageError]
    cached: NDArray[np.bool_]
    basis_sha256: Mapping[str, str]
    fingerprint: str
    timings: Mapping[str, int] = field(default_factory=dict)

    def __getitem__(self, criterion: str) -> NDArray[np.float32]:
        """Return the conditional embeddings (n, m) of a criterion.

        Raises:
            CriterionError: it was not asked for.
        """
        name = " ".join(criterion.lower().split())
        if name not in self.conditional:
            raise CriterionError(
                f"criterion {name!r} was not asked for; asked for were {sorted(self.conditional)}"
            )
        return self.conditional[name]


class AsyncClient:
    """A client for asyncio. Use it as a context manager, or `close` it."""

    def __init__(self, address: str = DEFAULT_ADDRESS, options: Options = Options()) -> None:
        """Store where the service is; nothing connects before the first call.

        Args:
            address: `host:port` or `unix:PATH`.
            options: how to call.
        """
        self.address, self.options = address, options
        self._channel = _channel(address, options)
        token = options.security.token
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
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
    ) -> RemoteEmbeddings:
        """Embed images, any number of them; their order is kept.

        Args:
            images: paths, encoded bytes, PIL images, uint8 pixels (H, W[, C]), or stored universal
                embeddings (d,) as float arrays.
            criteria: names of bases on the server.
            on_error: `raise` embeds all readable images, then raises if any was not; `collect`
                leaves the failures in `RemoteEmbeddings.errors`.

        Raises:
            ImageBatchError: some images failed; it carries the result of the others.
            UnknownCriterionError: the server has no such basis.
            OverloadedError: the server was overloaded, all retries long.
            DeadlineError: it took longer than `Options.timeout`.
            ServiceError: the server cannot be reached.
        """
        if on_error not in ("raise", "collect"):
            raise InvalidInputError(f"expected on_error 'raise' or 'collect', got {on_error!r}")
        parts = [part async for part in self.embed_batches(images, criteria)]
        result = _joined(parts)
        if result.errors and on_error == "raise":
            raise ImageBatchError(dict(result.errors), result)
        return result

    async def embed_batches(
        self, images: Iterable[ClientImage], criteria: Sequence[str] = ()
    ) -> AsyncIterator[RemoteEmbeddings]:
        """Embed a long iterable of images, a batch at a time, in order and in bounded memory.

        Yields:
            One result per `Options.batch_size` images; errors are collected in it.
        """
        _check_images(images)
        batches = _batches(images, self.options.batch_size)
        under_way: list[asyncio.Task[RemoteEmbeddings]] = []
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

    async def _embed_batch(
        self, images: list[ClientImage], criteria: Sequence[str]
    ) -> RemoteEmbeddings:
        request, local = _embed_request(images, criteria)
        if not request.images:
            return _all_failed(local, len(images))
        response = await self._call(self._embedding.Embed, request)
        return _read_response(response, local, len(images))

    async def embed_text(
        self, texts: Sequence[str], *, truncate: bool = False
    ) -> NDArray[np.float32]:
        """Embed texts with the model's text tower: (n, d) float32, unit rows."""
        request = embedding_pb2.EmbedTextRequest(texts=texts, truncate=truncate)
        response = await self._call(self._embedding.EmbedText, request)
        return wire.decode(response.embeddings)

    async def model(self) -> embedding_pb2.Model:
        """Tell what model is served."""
        model: embedding_pb2.Model = await self._call(
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
        self, criterion: str, texts: Sequence[str], *, prompts: Sequence[str] = ()
    ) -> basis_pb2.BasisInfo:
        """Let the server make a basis of texts, with its model's text tower."""
        given = basis_pb2.BasisTexts(criterion=criterion, texts=texts, prompts=prompts)
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

    async def _call(self, method: Any, request: Any, *, retry: bool = True) -> Any:
        """Make a call; retry it with growing pauses while the server is overloaded or away."""
        ends = time.monotonic() + self.options.timeout
        for attempt in range(self.options.retries + 1):
            try:
                remaining = max(ends - time.monotonic(), 0.001)
                return await method(request, timeout=remaining, metadata=self._metadata)
            except grpc.aio.AioRpcError as error:
                typed = error_of(error.code(), error.details() or "", error.trailing_metadata())
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

    def __init__(self, address: str = DEFAULT_ADDRESS, options: Options = Options()) -> None:
        """Store where the service is; the arguments are those of `AsyncClient`."""
        import threading

        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="crl-client", daemon=True
        )
        self._thread.start()
        self._client: AsyncClient = self._wait(self._open(address, options))

    @staticmethod
    async def _open(address: str, options: Options) -> AsyncClient:
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
    ) -> RemoteEmbeddings:
        """See `AsyncClient.embed`."""
        result: RemoteEmbeddings = self._wait(
            self._client.embed(images, criteria, on_error=on_error)
        )
        return result

    def embed_batches(
        self, images: Iterable[ClientImage], criteria: Sequence[str] = ()
    ) -> Iterator[RemoteEmbeddings]:
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

    def model(self) -> embedding_pb2.Model:
        """See `AsyncClient.model`."""
        model: embedding_pb2.Model = self._wait(self._client.model())
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
        self, criterion: str, texts: Sequence[str], *, prompts: Sequence[str] = ()
    ) -> basis_pb2.BasisInfo:
        """See `AsyncClient.create_basis`."""
        info: basis_pb2.BasisInfo = self._wait(
            self._client.create_basis(criterion, texts, prompts=prompts)
        )
        return info

    def delete_basis(self, criterion: str) -> None:
        """See `AsyncClient.delete_basis`."""
        self._wait(self._client.delete_basis(criterion))


def _channel(address: str, options: Options) -> grpc.aio.Channel:
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


def _embed_request(
    images: Sequence[ClientImage], criteria: Sequence[str]
) -> tuple[embedding_pb2.EmbedRequest, dict[int, ImageError]]:
    """Encode images; those that cannot be read here stay here, with their errors."""
    messages, errors = [], {}
    for position, image in enumerate(images):
        try:
            messages.append(_image(image, position))
        except ImageError as error:
            errors[position] = error
    return embedding_pb2.EmbedRequest(images=messages, criteria=criteria), errors


def _image(image: ClientImage, position: int) -> embedding_pb2.Image:
    if isinstance(image, bytes):
        return embedding_pb2.Image(encoded=image)
    if isinstance(image, str | os.PathLike):
        try:
            return embedding_pb2.Image(encoded=Path(image).read_bytes())
        except OSError as error:
            raise ImageError(
                f"cannot be read ({error.strerror}); check the path", source=str(image)
            ) from error
    if isinstance(image, np.ndarray):
        tensor = wire.encode(image)
        if tensor.dtype == embedding_pb2.DTYPE_UINT8:
            return embedding_pb2.Image(pixels=tensor)
        return embedding_pb2.Image(embedding=tensor)
    if hasattr(image, "save"):  # PIL, without importing it
        buffer = io.BytesIO()
        image.save(buffer, "PNG", compress_level=1)
        return embedding_pb2.Image(encoded=buffer.getvalue())
    raise InvalidInputError(
        f"image {position}: expected a path, bytes, a PIL image or an array, "
        f"got {type(image).__name__}"
    )


def _read_response(
    response: embedding_pb2.EmbedResponse, local: Mapping[int, ImageError], count: int
) -> RemoteEmbeddings:
    """Read a reply; without local failures its tensors are views of the message."""
    sent = [i for i in range(count) if i not in local]
    errors = dict(local)
    cached = np.zeros(count, np.bool_)
    for position, status in zip(sent, response.images, strict=True):
        cached[position] = status.cached
        if status.code != embedding_pb2.ImageStatus.OK:
            large = status.code == embedding_pb2.ImageStatus.TOO_LARGE
            kind = ImageTooLargeError if large else ImageError
            errors[position] = kind(status.message, source=f"image {position}")

    def rows(tensor: embedding_pb2.Tensor) -> NDArray[np.float32]:
        array: NDArray[np.float32] = wire.decode(tensor)
        if not local:
            return array
        spread = np.full((count, array.shape[1]), np.nan, np.float32)
        spread[sent] = array
        return spread

    return RemoteEmbeddings(
        universal=rows(response.universal),
        conditional={part.criterion: rows(part.rows) for part in response.conditional},
        errors=errors,
        cached=cached,
        basis_sha256={part.criterion: part.basis_sha256 for part in response.conditional},
        fingerprint=response.fingerprint,
        timings={
            name.name: getattr(response.timings, name.name)
            for name in embedding_pb2.Timings.DESCRIPTOR.fields
        },
    )


def _all_failed(errors: dict[int, ImageError], count: int) -> RemoteEmbeddings:
    """Give the result of a batch of which nothing could be sent."""
    none = np.full((count, 0), np.nan, np.float32)
    return RemoteEmbeddings(none, {}, errors, np.zeros(count, np.bool_), {}, "")


def _joined(parts: Sequence[RemoteEmbeddings]) -> RemoteEmbeddings:
    """Join the results of batches; those of which nothing could be sent become rows of NaN.

    Raises:
        InvalidInputError: there are none.
    """
    if not parts:
        raise InvalidInputError("expected at least one image, got an empty list")
    if len(parts) == 1:
        return parts[0]
    model = next((part for part in parts if part.fingerprint), parts[0])
    starts = np.cumsum([0, *(len(part.cached) for part in parts)])

    def rows(name: str | None) -> NDArray[np.float32]:
        like = model.universal if name is None else model.conditional[name]
        blank = [np.full((len(p.cached), like.shape[1]), np.nan, np.float32) for p in parts]
        return np.concatenate(
            [
                blank[i] if not p.fingerprint else p.universal if name is None
                else p.conditional[name]
                for i, p in enumerate(parts)
            ]
        )  # fmt: skip

    return RemoteEmbeddings(
        universal=rows(None),
        conditional={name: rows(name) for name in model.conditional},
        errors={
            int(start) + position: error
            for start, part in zip(starts, parts, strict=False)
            for position, error in part.errors.items()
        },
        cached=np.concatenate([part.cached for part in parts]),
        basis_sha256=model.basis_sha256,
        fingerprint=model.fingerprint,
        timings={name: sum(part.timings.get(name, 0) for part in parts) for name in model.timings},
    )
