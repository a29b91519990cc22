"""The in-process API: images and criteria in, universal and conditional embeddings out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from itertools import islice
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Literal, get_args, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from crl_sdk._criterion import normalise_criterion
from crl_sdk._embeddings import Embeddings
from crl_sdk.basis._basis import Basis
from crl_sdk.basis._build import build_basis
from crl_sdk.engines._contract import ImageEngine, TextEngine
from crl_sdk.errors import (
    ImageBatchError,
    ImageError,
    InvalidInputError,
    UnknownCriterionError,
)
from crl_sdk.model._bundle import ModelBundle
from crl_sdk.model._preprocess import DEFAULT_LIMITS, Decode, ImageLimits, load_pixels
from crl_sdk.projection._project_rows import project_rows
from crl_sdk.projection._projection import normalise_rows, pack

if TYPE_CHECKING:
    from crl_sdk.engines._engine_name import EngineName
    from crl_sdk.model._preprocess import ImageInput

_TEXT_BATCH = 64


class Embedder:
    """A bundle with its engines and bases. Safe to use from several threads."""

    def __init__(
        self,
        bundle: ModelBundle,
        image_engine: ImageEngine,
        open_text_engine: Callable[[], TextEngine],
        *,
        limits: ImageLimits = DEFAULT_LIMITS,
        decode: Decode = "exact",
    ) -> None:
        """Store the parts; `Embedder.open` makes them from a bundle's path.

        Args:
            bundle: the model.
            image_engine: runs its image tower.
            open_text_engine: makes the text engine when texts are first embedded.
            limits: which images to refuse.
            decode: how JPEGs are decoded.

        Raises:
            InvalidInputError: an unknown way of decoding.
        """
        if decode not in get_args(Decode):
            raise InvalidInputError(f"expected decode of {get_args(Decode)}, got {decode!r}")
        self.bundle = bundle
        self.limits = limits
        self.decode: Decode = decode
        self._image_engine = image_engine
        self._open_text_engine = open_text_engine
        self._text_engine: TextEngine | None = None
        self._tokenizer = bundle.tokenizer() if bundle.manifest.text else None
        self._bases: dict[str, Basis] = {}
        self._pool = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="crl-decode")

    @classmethod
    def open(
        cls,
        bundle: ModelBundle | str | os.PathLike[str],
        *,
        engine: str = "auto",
        threads: int | None = None,
        baked: Basis | None = None,
        limits: ImageLimits = DEFAULT_LIMITS,
        decode: Decode = "exact",
    ) -> Embedder:
        """Open a bundle with an engine of this machine.

        Args:
            bundle: a directory that `crl export` wrote, or `crl_sdk.demo_bundle()`.
            engine: `auto`, which logs what it chose; or a name that `crl doctor` lists, or its
                beginning: `onnx/cpu/int8`, `onnx/cuda`, `tensorrt-rtx`. It is never replaced by
                another in silence.
            threads: of one engine run on a CPU; None for one per physical core.
            baked: with a TensorRT engine, take the plan that has this basis fixed in it; the basis
                is loaded too.
            limits: which images to refuse.
            decode: `exact`, or `fast` for JPEGs: see `crl_sdk.model.load_pixels`.

        Raises:
            InvalidInputError: no engine of this bundle is called so, or an unknown way of decoding.
            BundleError: no such bundle.
            IntegrityError: a file of the bundle was changed.
            EngineError: the engine cannot run here or does not load.
            PlanError: a compiled plan is missing, damaged or stale.
            MissingDependencyError: a package that the engine needs is not installed.
        """
        from crl_sdk.engines._selection import open_engine, open_text_engine

        opened = bundle if isinstance(bundle, ModelBundle) else ModelBundle.open(bundle)
        if baked is not None:
            baked.require_fingerprint(opened.fingerprint)
        image_engine = open_engine(opened, engine, threads=threads, baked=baked)
        embedder = cls(
            opened,
            image_engine,
            lambda: open_text_engine(opened, image_engine.name, threads=threads),
            limits=limits,
            decode=decode,
        )
        if baked is not None:
            embedder.add_basis(baked)
        return embedder

    def __enter__(self) -> Embedder:
        """Use as a context manager; leaving it closes the embedder."""
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
        """Stop the decoding threads and free the engine's device memory. Idempotent."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._image_engine.close()

    @property
    def engine(self) -> str:
        """Runtime, device and precision of the image tower, such as `onnx/cpu/fp32`."""
        return str(self._image_engine.name)

    @property
    def engine_name(self) -> EngineName:
        """The parts of `engine`: runtime, device and precision."""
        return self._image_engine.name

    @property
    def decode_pool(self) -> Executor:
        """Threads that decode images, one per logical CPU. They end when the embedder is closed."""
        return self._pool

    @property
    def bases(self) -> Mapping[str, Basis]:
        """The loaded bases by criterion, read-only."""
        return MappingProxyType(self._bases)

    def add_basis(self, basis: Basis | str | os.PathLike[str]) -> Basis:
        """Load a basis, so that its criterion can be named in `embed`. Replaces one of its name.

        Args:
            basis: a basis or the path of its file.

        Raises:
            BasisMismatchError: it was made for another model.
            BasisError: the file cannot be read.
            IntegrityError: it is not a basis file.
        """
        loaded = basis if isinstance(basis, Basis) else Basis.load(basis)
        loaded.require_fingerprint(self.bundle.fingerprint)
        self._bases = {**self._bases, loaded.criterion: loaded}
        return loaded

    def create_basis(self, criterion: str, texts: Sequence[str], **options: Any) -> Basis:
        """Make a basis from texts with this model's text tower, and load it.

        Args:
            criterion: what the texts describe, such as `color`.
            texts: short descriptive texts, such as `red`, `green`.
            **options: `prompts`, `method`, `post`, `merge_threshold`, `reference`, `provenance`
                of `crl_sdk.basis.build_basis`, which also says what it raises.
        """
        basis = build_basis(
            criterion, texts, self.embed_text, fingerprint=self.bundle.fingerprint, **options
        )
        return self.add_basis(basis)

    def embed(
        self,
        images: Iterable[ImageInput],
        criteria: Sequence[str | Basis] = (),
        *,
        batch_size: int = 32,
        on_error: Literal["raise", "collect"] = "raise",
        progress: Callable[[int], None] | None = None,
    ) -> Embeddings:
        """Embed images, once each, for any number of criteria.

        Images are decoded in threads while the engine runs the batch before them.

        Args:
            images: paths, encoded bytes, PIL images or uint8 arrays, see
                `crl_sdk.model.load_pixels`. A long iterable is never held in memory whole.
            criteria: names of loaded bases, or bases.
            batch_size: images per engine run.
            on_error: `raise` embeds all readable images, then raises if any was not; `collect`
                leaves the failures in `Embeddings.errors`.
            progress: called after each batch with the number of images done so far.

        Raises:
            UnknownCriterionError: no basis of that name is loaded.
            BasisMismatchError: a basis was made for another model.
            ImageBatchError: some images failed; it carries the result of the others.
            EngineError: an engine run failed.
        """
        _check_images(images)
        if batch_size < 1:
            raise InvalidInputError(f"expected batch_size >= 1, got {batch_size}")
        if on_error not in ("raise", "collect"):
            raise InvalidInputError(f"expected on_error 'raise' or 'collect', got {on_error!r}")
        bases = [self._basis(criterion) for criterion in criteria]
        weight, bias, columns = self._pack(bases)

        universal: list[NDArray[np.float32]] = []
        projected: list[NDArray[np.float32]] = []
        errors: dict[int, ImageError] = {}
        done = 0
        for decoded in self._decoded_batches(images, batch_size):
            pixels = [item for item in decoded if not isinstance(item, ImageError)]
            good = np.array([not isinstance(item, ImageError) for item in decoded])
            errors.update(
                (done + i, item) for i, item in enumerate(decoded) if isinstance(item, ImageError)
            )
            batch = np.full((len(decoded), self.bundle.embedding_dim), np.nan, np.float32)
            batch_projected = np.full((len(decoded), weight.shape[1]), np.nan, np.float32)
            if pixels:
                batch[good], batch_projected[good] = self._image_engine.run(
                    np.stack(pixels), weight, bias
                )
            universal.append(batch)
            projected.append(batch_projected)
            done += len(decoded)
            if progress is not None:
                progress(done)

        rows = np.concatenate([np.zeros((0, weight.shape[1]), np.float32), *projected])
        result = Embeddings(
            np.concatenate([np.zeros((0, self.bundle.embedding_dim), np.float32), *universal]),
            {
                basis.criterion: normalise_rows(rows[:, own], basis.projection.post)
                for basis, own in zip(bases, columns, strict=True)
            },
            errors,
            self.bundle.fingerprint,
        )
        if errors and on_error == "raise":
            raise ImageBatchError(errors, result)
        return result

    def load_pixels(self, image: ImageInput, *, source: str | None = None) -> NDArray[np.uint8]:
        """Decode one image for this model, under its limits and its way of decoding.

        Args:
            image: see `crl_sdk.model.load_pixels`, which also says what is raised.
            source: the name used in errors.

        Returns:
            (H, W, 3) uint8.
        """
        return load_pixels(
            image, self.bundle.preprocess, limits=self.limits, source=source, decode=self.decode
        )

    def embed_pixels(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embed what `crl_sdk.model` made of images, in one engine run.

        Args:
            pixels: (n, H, W, 3) uint8, in the model's own size.

        Returns:
            (n, d) float32, unit rows.

        Raises:
            EngineError: the run failed.
        """
        return self._image_engine.run(pixels, *self._pack([])[:2])[0]

    def embed_text(self, texts: Sequence[str], *, truncate: bool = False) -> NDArray[np.float32]:
        """Embed texts with the text tower.

        Args:
            texts: n texts.
            truncate: cut texts longer than the model's context instead of refusing them.

        Returns:
            (n, d) float32, unit rows.

        Raises:
            BundleError: the bundle is image-only.
            InvalidInputError: an empty list, a blank text, or one longer than the context.
            EngineError: an engine run failed.
        """
        tokenizer = self._tokenizer or self.bundle.tokenizer()
        tokens = tokenizer.encode(texts, truncate=truncate)
        if self._text_engine is None:
            self._text_engine = self._open_text_engine()
        engine = self._text_engine
        return np.concatenate(
            [
                engine.run(tokens[start : start + _TEXT_BATCH])
                for start in range(0, len(tokens), _TEXT_BATCH)
            ]
        )

    @overload
    def project(  # type: ignore[overload-overlap]  # a str is a sequence of str as well
        self,
        embeddings: NDArray[np.floating],
        criteria: str | Basis,
        *,
        out: NDArray[Any] | None = None,
        threads: int | None = None,
    ) -> NDArray[Any]: ...

    @overload
    def project(
        self,
        embeddings: NDArray[np.floating],
        criteria: Sequence[str | Basis],
        *,
        out: Mapping[str, NDArray[Any]] | None = None,
        threads: int | None = None,
    ) -> dict[str, NDArray[Any]]: ...

    def project(
        self,
        embeddings: NDArray[np.floating],
        criteria: str | Basis | Sequence[str | Basis],
        *,
        out: NDArray[Any] | Mapping[str, NDArray[Any]] | None = None,
        threads: int | None = None,
    ) -> NDArray[Any] | dict[str, NDArray[Any]]:
        """Project stored universal embeddings onto one basis or several; no image is needed.

        Args:
            embeddings: (n, d) float16, float32 or float64, unit rows, of this model; may be
                memory-mapped, and is read once, whatever the number of criteria.
            criteria: the name of a loaded basis, or a basis; or a list of them.
            out: where to write, such as memory maps: an array (n, m) of float32 or float16, or for
                a list of criteria one for each name. None makes float32 arrays.
            threads: see `crl_sdk.projection.project_rows`: with several, which many rows get by
                default, BLAS is limited to one thread in the whole process meanwhile.

        Returns:
            (n, m) float32, or `out`; for a list of criteria a dictionary of them.

        Raises:
            UnknownCriterionError: no basis of that name is loaded.
            BasisMismatchError: the basis was made for another model.
            InvalidInputError: a wrong shape or dtype, NaN or infinity; a criterion twice; `out`
                lacks one.
        """
        if isinstance(criteria, str | Basis):
            one = self._basis(criteria).projection
            target = None if out is None else [np.asanyarray(out)]
            return project_rows(embeddings, [one], target, threads=threads)[0]
        bases = {basis.criterion: basis for basis in map(self._basis, criteria)}
        if len(bases) != len(criteria) or not bases:
            raise InvalidInputError(f"expected criteria, each once, got {list(criteria)}")
        if out is not None and not (isinstance(out, Mapping) and out.keys() == bases.keys()):
            raise InvalidInputError(f"expected out to be a mapping of {sorted(bases)}")
        targets = None if out is None else [out[name] for name in bases]
        projections = [basis.projection for basis in bases.values()]
        results = project_rows(embeddings, projections, targets, threads=threads)
        return dict(zip(bases, results, strict=True))

    def _basis(self, criterion: str | Basis) -> Basis:
        if isinstance(criterion, Basis):
            criterion.require_fingerprint(self.bundle.fingerprint)
            return criterion
        name = normalise_criterion(criterion)
        if name not in self._bases:
            raise UnknownCriterionError(
                f"no basis {name!r} is loaded, known are {sorted(self._bases)}: make one with "
                f"create_basis({name!r}, texts) or load one with add_basis(path)"
            )
        return self._bases[name]

    def _pack(
        self, bases: Sequence[Basis]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], list[slice]]:
        names = [basis.criterion for basis in bases]
        if len(set(names)) != len(names):
            raise InvalidInputError(f"expected each criterion once, got {names}")
        if not bases:
            return np.zeros((self.bundle.embedding_dim, 0), np.float32), np.zeros(0, np.float32), []
        return pack([basis.projection for basis in bases])

    def _decoded_batches(
        self, images: Iterable[ImageInput], size: int
    ) -> Iterator[list[NDArray[np.uint8] | ImageError]]:
        """Decode in threads, one batch ahead of the one that is out."""
        numbered = enumerate(images)

        def submit() -> list[Future[NDArray[np.uint8] | ImageError]]:
            return [self._pool.submit(self._decode, i, item) for i, item in islice(numbered, size)]

        waiting = submit()
        while waiting:
            upcoming = submit()
            yield [future.result() for future in waiting]
            waiting = upcoming

    def _decode(self, position: int, image: ImageInput) -> NDArray[np.uint8] | ImageError:
        source = None if isinstance(image, str | os.PathLike) else f"image {position}"
        try:
            return self.load_pixels(image, source=source)
        except ImageError as error:
            return error


def _check_images(images: object) -> None:
    single = isinstance(images, str | bytes | os.PathLike | Image.Image) or (
        isinstance(images, np.ndarray) and images.ndim != 4
    )
    if single or not isinstance(images, Iterable):
        raise InvalidInputError(
            f"expected a list of images, got one {type(images).__name__}: pass [image]"
        )
