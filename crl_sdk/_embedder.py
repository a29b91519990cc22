"""The in-process API: make bases, and embed images for them."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from itertools import accumulate, islice
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Literal, get_args, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from crl_sdk._budget import Budget
from crl_sdk._criterion import normalise_criterion
from crl_sdk._embeddings import Embeddings
from crl_sdk._lifetime import Lifetime
from crl_sdk._processors import count_processors
from crl_sdk.basis._asking import ReportProgress
from crl_sdk.basis._basis import Basis
from crl_sdk.basis._build import DEFAULT_MERGE_THRESHOLD, build_basis, check_options
from crl_sdk.basis._curated import CuratedList
from crl_sdk.basis._generate import GeneratedTexts, generate_texts
from crl_sdk.basis._generation_options import DEFAULT_OPTIONS, GenerationOptions
from crl_sdk.basis._language_model import LanguageModel
from crl_sdk.basis._methods import Method
from crl_sdk.basis._picture_votes import require_pictures
from crl_sdk.engines._contract import Finish, ImageEngine, PipelinedEngine, TextEngine
from crl_sdk.errors import (
    ImageBatchError,
    ImageError,
    InvalidInputError,
    UnknownCriterionError,
)
from crl_sdk.model._bundle import ModelBundle
from crl_sdk.model._familiar_images import FEW
from crl_sdk.model._gpu_decode import require_gpu_decoder
from crl_sdk.model._preprocess import DEFAULT_LIMITS, Decode, ImageLimits, load_pixels
from crl_sdk.projection._project_rows import project_rows
from crl_sdk.projection._projection import Post, normalise_rows, pack

if TYPE_CHECKING:
    from crl_sdk.engines._engine_name import EngineName
    from crl_sdk.model._preprocess import ImageInput

_TEXT_BATCH = 64

_RECENT = 20
"""Number of recent images that are compared with the model's own images."""

_log = logging.getLogger(__name__)


class Embedder:
    """A model bundle with its engines and bases. Several threads may use it at once.

    Forked processes cannot use it, see docs/PROCESSES.md. If it is sent to a process that was
    started with the method spawn or forkserver, the same bundle, engine and bases are opened there.

    Attributes:
        bundle: Model bundle.
        limits: Limits above which images are refused.
        decode: How JPEGs are decoded, see `crl_sdk.model.load_pixels`.

    Example:
        >>> from crl_sdk import Embedder, demo_bundle
        >>> with Embedder.open(demo_bundle()) as embedder:
        ...     basis = embedder.create_basis("color", ["red", "green", "blue"])
        ...     result = embedder.embed([np.full((96, 96, 3), 200, np.uint8)], ["color"])
        >>> result.universal.shape, result["color"].shape
        ((1, 128), (1, 2))
    """

    def __init__(
        self,
        bundle: ModelBundle,
        image_engine: ImageEngine,
        open_text_engine: Callable[[], TextEngine],
        *,
        limits: ImageLimits = DEFAULT_LIMITS,
        decode: Decode = "exact",
    ) -> None:
        """Store the parts. `Embedder.open` makes them from the path of a bundle.

        Args:
            bundle: Model bundle.
            image_engine: Engine that runs the image tower.
            open_text_engine: Function that opens the text engine, called when a text is first
                embedded.
            limits: Limits above which images are refused.
            decode: How JPEGs are decoded, see `crl_sdk.model.load_pixels`.

        Raises:
            InvalidInputError: If `decode` is unknown.
            EngineError: If `decode` is `gpu` and there is no GPU.
            MissingDependencyError: If `decode` is `gpu` and nvImageCodec is not installed.
        """
        if decode not in get_args(Decode):
            raise InvalidInputError(f"expected decode of {get_args(Decode)}, got {decode!r}")
        if decode == "gpu":
            require_gpu_decoder()
        self._lifetime = Lifetime("embedder")
        self._threads: int | None = None
        self._baked: Basis | None = None
        self._opened = False  # whether `open` can make the same embedder again
        self.bundle = bundle
        self.limits = limits
        self.decode: Decode = decode
        self._image_engine = image_engine
        self._open_text_engine = open_text_engine
        self._text_engine: TextEngine | None = None
        self._tokenizer = bundle.tokenizer() if bundle.manifest.text else None
        self._bases: dict[str, Basis] = {}
        self._distances: deque[float] = deque(maxlen=_RECENT)  # of the recent images
        self._unfamiliar: str | None = None
        self._budget = Budget(limits.max_decode_bytes)
        self._text_turn = Budget(1)
        self._pool = ThreadPoolExecutor(count_processors(), thread_name_prefix="crl-decode")

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
            bundle: Directory that `crl export` wrote, or `crl_sdk.demo_bundle()`.
            engine: `auto` chooses the engine and logs the choice. `fastest` first compares and
                times all engines, unless that was done on this machine; it takes a minute. Any
                other value is a name that
                `crl doctor` lists, or the beginning of one: `onnx/cpu/int8`, `onnx/cuda`,
                `tensorrt-rtx`. No other engine is used in its place.
            threads: Number of threads of one engine run on a CPU; None for one per physical core.
            baked: Basis that is compiled into a TensorRT plan (`crl compile --baked`). That plan
                is used, and the basis is loaded.
            limits: Limits above which images are refused.
            decode: `exact`, or `fast` for JPEGs, see `crl_sdk.model.load_pixels`.

        Raises:
            InvalidInputError: If the bundle has no such engine, or `decode` is unknown.
            BundleError: If there is no such bundle.
            IntegrityError: If a file of the bundle was changed.
            BasisMismatchError: If `baked` was made for another model.
            EngineError: If the engine cannot run on this machine or cannot be loaded.
            PlanError: If a compiled plan is missing, damaged or stale.
            MissingDependencyError: If a package that the engine needs is not installed.
        """
        from crl_sdk.engines._selection import open_engine, open_text_engine

        opened = bundle if isinstance(bundle, ModelBundle) else ModelBundle.open(bundle)
        if baked is not None:
            baked.require_fingerprint(opened.fingerprint)
        if opened.manifest.source.random:
            _log.warning(
                "%s: the model has random weights and knows nothing, so that its embeddings serve "
                "to measure speed only: export it again with --pretrained TAG",
                opened.path,
            )
        image_engine = open_engine(opened, engine, threads=threads, baked=baked)
        embedder = cls(
            opened,
            image_engine,
            lambda: open_text_engine(opened, image_engine.name, threads=threads),
            limits=limits,
            decode=decode,
        )
        embedder._threads, embedder._baked, embedder._opened = threads, baked, True
        if baked is not None:
            embedder.add_basis(baked)
        return embedder

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how another process opens the same bundle, engine and bases."""
        self._lifetime.require()
        if not self._opened:
            raise InvalidInputError(
                "an embedder that was made from its parts cannot be sent to another process: use "
                "Embedder.open, here or there"
            )
        arguments = {
            "engine": self.engine, "threads": self._threads, "baked": self._baked,
            "limits": self.limits, "decode": self.decode,
        }  # fmt: skip
        return _open_again, (self.bundle.path.absolute(), arguments, tuple(self._bases.values()))

    def __repr__(self) -> str:
        """Return the name of the model, the engine and the loaded criteria."""
        criteria = ", ".join(map(repr, self._bases)) or "none"
        return f"Embedder({self.bundle.manifest.name!r}, {self.engine}; criteria: {criteria})"

    def __enter__(self) -> Embedder:
        """Return the embedder; leaving the context closes it."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the embedder."""
        self.close()

    def close(self) -> None:
        """Stop the decoding threads and free the engine's device memory. May be called twice."""
        self._lifetime.closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._image_engine.close()

    @property
    def engine(self) -> str:
        """Engine name of the image tower, such as `onnx/cpu/fp32`."""
        return str(self._image_engine.name)

    @property
    def engine_name(self) -> EngineName:
        """The parts of `engine`: runtime, device and precision."""
        return self._image_engine.name

    @property
    def image_engine(self) -> ImageEngine:
        """The engine that runs the image tower."""
        return self._image_engine

    @property
    def baked(self) -> Basis | None:
        """The basis that is compiled into the engine's plan, the only one that it projects onto."""
        return self._baked

    @property
    def decode_pool(self) -> Executor:
        """Threads that decode images, one per processor. They end when the embedder is closed."""
        return self._pool

    @property
    def bases(self) -> Mapping[str, Basis]:
        """Loaded bases by criterion, read-only."""
        return MappingProxyType(self._bases)

    def add_basis(self, basis: Basis | str | os.PathLike[str]) -> Basis:
        """Load a basis, so that `embed` knows its criterion. Replaces a basis of the same name.

        Args:
            basis: A basis, or the path of its file.

        Returns:
            The basis.

        Raises:
            BasisMismatchError: If the basis was made for another model.
            BasisError: If the file cannot be read.
            IntegrityError: If the file is not a basis.
        """
        loaded = basis if isinstance(basis, Basis) else Basis.load(basis)
        loaded.require_fingerprint(self.bundle.fingerprint)
        self._bases = {**self._bases, loaded.criterion: loaded}
        return loaded

    def generate_basis(
        self,
        criterion: str,
        *,
        llm: LanguageModel | str | os.PathLike[str] | None = None,
        options: GenerationOptions = DEFAULT_OPTIONS,
        prompts: Sequence[str] | None = None,
        method: Method | None = None,
        post: Post = "l2",
        merge_threshold: float = DEFAULT_MERGE_THRESHOLD,
        against: str | Basis | Sequence[str | Basis] = (),
        ignore: str | Basis | Sequence[str | Basis] = (),
        pictures: NDArray[np.floating] | None = None,
        progress: ReportProgress | None = None,
        load: bool = True,
    ) -> Basis:
        """Make a basis from a criterion in words, with texts of a local language model.

        This is `generate_texts` followed by `create_basis`. Call the two to see or edit the texts
        first.

        Args:
            criterion: What matters, in words, such as `animal habitat`.
            llm: An open language model, a GGUF file, `hf:OWNER/REPO/FILE.gguf`, or None for the
                default model.
            options: How often and how the language model is asked.
            prompts: Templates with one `{}` for the text. Embeddings are averaged over all of
                them. None for the prompt that the bundle recommends.
            method: Projection method, one of `crl_sdk.basis.METHODS`. None for `contrastive`, or
                for `cosine` with two texts.
            post: Row normalisation of the conditional embedding.
            merge_threshold: Cosine from which two texts are merged, in (0, 1].
            against: Other criteria, whose texts should count less: names of loaded bases, or
                bases.
            ignore: Criteria to disregard, whose directions are removed from the map: names of
                loaded bases, or bases.
            pictures: Universal embeddings of at least 20 pictures of yours, shape (n, d), such as
                `embed(…).universal`. Texts that fit none of them best are dropped.
            progress: Called after each token of the language model.
            load: Whether to load the basis, so that `embed` knows its criterion.

        Returns:
            The basis. Its provenance records the language model, the options and the votes.

        Raises:
            CriterionError: If the criterion is malformed.
            UnknownCriterionError: If `against` or `ignore` names a basis that is not loaded.
            BasisMismatchError: If a basis in `against` or `ignore` was made for another model.
            BundleError: If the bundle has no text tower.
            GenerationError: If the language model cannot be loaded, fails, or does not know the
                criterion.
            InvalidInputError: If another argument is malformed, see `crl_sdk.basis.build_basis`.
            MissingDependencyError: If neither llama-cpp-python nor xllamacpp is installed.
            ClosedError: If this embedder is closed.
            ForkError: If this process was forked after the embedder had been made.
        """
        self._lifetime.require()
        others = self._each_basis(against)
        ignored = self._each_basis(ignore)
        prompts = self._prompts(prompts)
        self.check_generation(
            criterion, options, prompts=prompts, method=method, post=post,
            merge_threshold=merge_threshold, against=others, ignore=ignored, pictures=pictures,
        )  # fmt: skip
        texts = self.generate_texts(
            criterion, llm=llm, options=options, prompts=prompts, pictures=pictures,
            progress=progress,
        )  # fmt: skip
        return self.create_basis(
            criterion, texts, prompts=prompts, method=method, post=post,
            merge_threshold=merge_threshold, against=others, ignore=ignored, load=load,
        )  # fmt: skip

    def check_generation(
        self,
        criterion: str,
        options: GenerationOptions = DEFAULT_OPTIONS,
        *,
        prompts: Sequence[str] | None = None,
        method: Method | None = None,
        post: Post = "l2",
        merge_threshold: float = DEFAULT_MERGE_THRESHOLD,
        against: str | Basis | Sequence[str | Basis] = (),
        ignore: str | Basis | Sequence[str | Basis] = (),
        pictures: NDArray[np.floating] | None = None,
    ) -> None:
        """Check the arguments of `generate_basis` at once, before a language model is loaded.

        The arguments are those of `generate_basis`.

        Raises:
            CriterionError: If the criterion is malformed.
            UnknownCriterionError: If `against` or `ignore` names a basis that is not loaded.
            BasisMismatchError: If a basis in `against` or `ignore` was made for another model.
            BundleError: If the bundle has no text tower.
            InvalidInputError: If another argument is malformed, or a text of `options.include` is
                too long for the model.
        """
        self.bundle.text_graph()
        _, checked = check_options(
            criterion, fingerprint=self.bundle.fingerprint, prompts=self._prompts(prompts),
            method=method, post=post, merge_threshold=merge_threshold,
            against=self._each_basis(against), ignore=self._each_basis(ignore),
        )  # fmt: skip
        if pictures is not None:
            require_pictures(pictures, self.bundle.embedding_dim)
        if options.include:
            tokenizer = self._tokenizer or self.bundle.tokenizer()
            tokenizer.encode([each.replace("{}", text) for each in checked
                              for text in options.include])  # fmt: skip

    def generate_texts(
        self,
        criterion: str,
        *,
        llm: LanguageModel | str | os.PathLike[str] | None = None,
        options: GenerationOptions = DEFAULT_OPTIONS,
        prompts: Sequence[str] | None = None,
        pictures: NDArray[np.floating] | None = None,
        progress: ReportProgress | None = None,
    ) -> GeneratedTexts:
        """Let a local language model write the texts of a criterion, without making a basis.

        Args:
            criterion: What matters, in words, such as `animal habitat`.
            llm: An open language model, a GGUF file, `hf:OWNER/REPO/FILE.gguf`, or None for the
                default model.
            options: How often and how the language model is asked.
            prompts: Prompts that the texts will be embedded with. Texts far from the others in
                this model's embedding space are dropped. None for the prompt that the bundle
                recommends.
            pictures: Universal embeddings of at least 20 pictures of yours, shape (n, d), such as
                `embed(…).universal`. Texts that fit none of them best are dropped.
            progress: Called after each token of the language model.

        Returns:
            The texts with their votes, for `create_basis`.

        Raises:
            CriterionError: If the criterion is malformed.
            InvalidInputError: If a prompt is malformed, or a text of `options.include` is too long.
            BundleError: If the bundle has no text tower.
            GenerationError: If the language model cannot be loaded, fails, or does not know the
                criterion.
            MissingDependencyError: If neither llama-cpp-python nor xllamacpp is installed.
            ClosedError: If this embedder is closed.
            ForkError: If this process was forked after the embedder had been made.
        """
        self._lifetime.require()
        self.check_generation(criterion, options, prompts=prompts, pictures=pictures)
        return generate_texts(
            criterion, llm, options, embed_text=self.embed_text,
            background=self.bundle.background, prompts=self._prompts(prompts), pictures=pictures,
            progress=progress,
        )  # fmt: skip

    def create_basis(
        self,
        criterion: str,
        texts: Sequence[str] | GeneratedTexts | CuratedList,
        *,
        prompts: Sequence[str] | None = None,
        method: Method | None = None,
        post: Post = "l2",
        merge_threshold: float = DEFAULT_MERGE_THRESHOLD,
        against: str | Basis | Sequence[str | Basis] = (),
        ignore: str | Basis | Sequence[str | Basis] = (),
        provenance: Mapping[str, Any] | None = None,
        load: bool = True,
        check: Callable[[], None] = lambda: None,
    ) -> Basis:
        """Make a basis from texts with the text tower of this model.

        Args:
            criterion: What the texts describe, such as `color`.
            texts: Short descriptive texts, such as `red` and `green`; generated texts; or a
                list of `crl_sdk.basis.curated_lists()`.
            prompts: Templates with one `{}` for the text. Embeddings are averaged over all of
                them. None for the prompt that the bundle recommends.
            method: Projection method, one of `crl_sdk.basis.METHODS`. None for `contrastive`, or
                for `cosine` with two texts.
            post: Row normalisation of the conditional embedding.
            merge_threshold: Cosine from which two texts are merged, in (0, 1].
            against: Other criteria, whose texts should count less: names of loaded bases, or
                bases.
            ignore: Criteria to disregard, whose directions are removed from the map: names of
                loaded bases, or bases.
            provenance: JSON values to store with the basis, beside those of generated texts and
                of curated lists.
            load: Whether to load the basis, so that `embed` knows its criterion.
            check: Called before each batch of texts. What it raises ends the call, and is raised
                here.

        Returns:
            The basis.

        Raises:
            CriterionError: If the criterion is malformed.
            UnknownCriterionError: If `against` or `ignore` names a basis that is not loaded.
            BasisMismatchError: If a basis in `against` or `ignore` was made for another model.
            BundleError: If the bundle has no text tower.
            InvalidInputError: If another argument is malformed, see `crl_sdk.basis.build_basis`.
        """
        if isinstance(texts, GeneratedTexts):
            provenance = {**texts.provenance, **(provenance or {})}
            texts = [each.text for each in texts.texts]
        elif isinstance(texts, CuratedList):
            provenance = {**texts.provenance, **(provenance or {})}
            texts = texts.texts
        basis = build_basis(
            criterion, texts, partial(self.embed_text, check=check),
            fingerprint=self.bundle.fingerprint,
            prompts=self._prompts(prompts), method=method, post=post,
            merge_threshold=merge_threshold, against=self._each_basis(against),
            ignore=self._each_basis(ignore),
            background=self.bundle.background, provenance=provenance,
        )  # fmt: skip
        return self.add_basis(basis) if load else basis

    def embed(
        self,
        images: Iterable[ImageInput],
        criteria: str | Basis | Sequence[str | Basis] = (),
        *,
        batch_size: int = 32,
        on_error: Literal["raise", "collect"] = "raise",
        progress: Callable[[int], None] | None = None,
    ) -> Embeddings:
        """Embed images, each once, for any number of criteria.

        Images are decoded in threads while the engine runs the batch before them.

        Args:
            images: Paths, encoded bytes, PIL images or uint8 arrays, see
                `crl_sdk.model.load_pixels`. Only two batches of them are in memory at a time.
            criteria: Names of loaded bases, or bases; one or a list.
            batch_size: Number of images per engine run.
            on_error: What to do with unreadable images. `raise` embeds all others and then raises
                an error; `collect` lists the failures in `Embeddings.errors`.
            progress: Called after each batch with the number of images done so far.

        Returns:
            Universal and conditional embeddings.

        Raises:
            UnknownCriterionError: If no basis of that name is loaded.
            BasisMismatchError: If a basis was made for another model.
            InvalidInputError: If another argument is malformed, or a criterion is given twice.
            ImageBatchError: If some images failed. It carries the result of the others.
            EngineError: If an engine run fails.
            ClosedError: If this embedder is closed.
            ForkError: If this process was forked after the embedder had been made.
        """
        self._lifetime.require()
        _check_images(images)
        if batch_size < 1:
            raise InvalidInputError(f"expected batch_size >= 1, got {batch_size}")
        if on_error not in ("raise", "collect"):
            raise InvalidInputError(f"expected on_error 'raise' or 'collect', got {on_error!r}")
        bases = self._each_basis(criteria)
        batches: list[Embeddings] = []
        done = 0
        for batch in self._embed_batches(images, bases, batch_size):
            batches.append(batch)
            done += len(batch.universal)
            if progress is not None:
                progress(done)
        empty = [np.zeros((0, self.bundle.embedding_dim), np.float32)]
        firsts = accumulate((len(batch.universal) for batch in batches), initial=0)
        result = Embeddings(
            np.concatenate(empty + [batch.universal for batch in batches]),
            {
                basis.criterion: np.concatenate(
                    [np.zeros((0, basis.projection.output_dim), np.float32)]
                    + [batch[basis.criterion] for batch in batches]
                )
                for basis in bases
            },
            {
                first + i: error
                for first, batch in zip(firsts, batches, strict=False)
                for i, error in batch.errors.items()
            },
            self.bundle.fingerprint,
        )
        if result.errors and on_error == "raise":
            raise ImageBatchError(dict(result.errors), result)
        return result

    def embed_batches(
        self,
        images: Iterable[ImageInput | ImageError],
        criteria: str | Basis | Sequence[str | Basis] = (),
        *,
        batch_size: int = 32,
    ) -> Iterator[Embeddings]:
        """Embed any number of images, batch by batch.

        Images are decoded in threads while the engine runs the batch before them. Only two batches
        of them are in memory at a time.

        Args:
            images: Images as for `embed`. An `ImageError` stands for an image that could not be
                read.
            criteria: Names of loaded bases, or bases; one or a list.
            batch_size: Number of images per engine run.

        Returns:
            Iterator of the embeddings of each batch, in order. Images that cannot be read are in
            `Embeddings.errors`, by their place in the batch.

        Raises:
            UnknownCriterionError: If no basis of that name is loaded.
            BasisMismatchError: If a basis was made for another model.
            InvalidInputError: If another argument is malformed, or a criterion is given twice.
            EngineError: If an engine run fails.
            ClosedError: If this embedder is closed.
            ForkError: If this process was forked after the embedder had been made.

        Example:
            >>> from crl_sdk import Embedder, demo_bundle
            >>> pictures = (np.zeros((96, 96, 3), np.uint8) for _ in range(5))
            >>> with Embedder.open(demo_bundle()) as embedder:
            ...     for batch in embedder.embed_batches(pictures, batch_size=2):
            ...         print(len(batch.universal))
            2
            2
            1
        """
        self._lifetime.require()
        _check_images(images)
        if batch_size < 1:
            raise InvalidInputError(f"expected batch_size >= 1, got {batch_size}")
        return self._embed_batches(images, self._each_basis(criteria), batch_size)

    def _embed_batches(
        self, images: Iterable[ImageInput | ImageError], bases: Sequence[Basis], batch_size: int
    ) -> Iterator[Embeddings]:
        weight, bias, columns = self._pack(bases)
        for decoded in self._decoded_batches(images, batch_size):
            errors = {i: item for i, item in enumerate(decoded) if isinstance(item, ImageError)}
            pixels = [item for item in decoded if not isinstance(item, ImageError)]
            good = np.array([i not in errors for i in range(len(decoded))])
            universal = np.full((len(decoded), self.bundle.embedding_dim), np.nan, np.float32)
            projected = np.full((len(decoded), weight.shape[1]), np.nan, np.float32)
            if pixels:
                universal[good], projected[good] = self._image_engine.run(
                    np.stack(pixels), weight, bias
                )
                self._note_unfamiliar(universal[good], least=FEW)
            yield Embeddings(
                universal,
                {
                    basis.criterion: normalise_rows(projected[:, own], basis.projection.post)
                    for basis, own in zip(bases, columns, strict=True)
                },
                errors,
                self.bundle.fingerprint,
            )
        self._note_unfamiliar(least=1)

    def load_pixels(self, image: ImageInput, *, source: str | None = None) -> NDArray[np.uint8]:
        """Decode one image for this model, with the limits and decoder of this embedder.

        Args:
            image: Image of any form that `crl_sdk.model.load_pixels` accepts.
            source: Name of the image in error messages.

        Returns:
            Pixels, shape (H, W, 3), uint8.

        Raises:
            ImageError: If the image cannot be read, see `crl_sdk.model.load_pixels`.
        """
        return load_pixels(
            image, self.bundle.preprocess, limits=self.limits, source=source, decode=self.decode,
            budget=self._budget,
        )  # fmt: skip

    def embed_pixels(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embed decoded images in one engine run.

        Args:
            pixels: Images from `load_pixels`, shape (n, H, W, 3), uint8.

        Returns:
            Universal embeddings, shape (n, d), float32, unit rows.

        Raises:
            EngineError: If the engine run fails.
            ClosedError: If this embedder is closed.
            ForkError: If this process was forked after the embedder had been made.
        """
        return self.start_run(pixels, *self._pack([])[:2])()[0]

    def start_run(
        self, pixels: NDArray[np.uint8], weight: NDArray[np.float32], bias: NDArray[np.float32]
    ) -> Finish:
        """Begin an engine run that embeds decoded images and projects them onto packed bases.

        An engine that is a `PipelinedEngine` takes the next run while this one is under way. Other
        engines finish the run before this method returns.

        Args:
            pixels: Images from `load_pixels`, shape (n, H, W, 3), uint8.
            weight: Weights of all bases side by side, shape (d, K) with K >= 0 and at most the
                engine's `max_columns`, float32; see `crl_sdk.projection.pack`.
            bias: Biases of all bases, shape (K,), float32.

        Returns:
            Function that waits for the result and must be called once. It returns universal
            embeddings, shape (n, d), float32, unit rows; and the projected columns, shape (n, K),
            float32, without row normalisation.

        Raises:
            EngineError: If the run cannot be started, or there are too many columns.
            ClosedError: If this embedder is closed.
            ForkError: If this process was forked after the embedder had been made.
        """
        self._lifetime.require()
        engine = self._image_engine
        if isinstance(engine, PipelinedEngine):
            wait = engine.start(pixels, weight, bias)
        else:
            result = engine.run(pixels, weight, bias)
            wait = lambda: result  # noqa: E731

        def finish() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
            rows, projected = wait()
            self._note_unfamiliar(rows, least=_RECENT)
            return rows, projected

        return finish

    def embed_text(
        self,
        texts: Sequence[str],
        *,
        truncate: bool = False,
        check: Callable[[], None] = lambda: None,
    ) -> NDArray[np.float32]:
        """Embed texts with the text tower, in batches. Threads take turns after each batch.

        Args:
            texts: The n texts.
            truncate: Whether to cut texts that are longer than the model's context. Otherwise they
                are refused.
            check: Called before each batch. What it raises ends the call, and is raised here.

        Returns:
            Embeddings, shape (n, d), float32, unit rows.

        Raises:
            BundleError: If the bundle has no text tower.
            InvalidInputError: If the list is empty, or a text is blank or too long.
            EngineError: If an engine run fails.
            ClosedError: If this embedder is closed.
            ForkError: If this process was forked after the embedder had been made.
        """
        self._lifetime.require()
        tokenizer = self._tokenizer or self.bundle.tokenizer()
        tokens = tokenizer.encode(texts, truncate=truncate)
        if self._text_engine is None:
            self._text_engine = self._open_text_engine()
        engine = self._text_engine
        rows = []
        for start in range(0, len(tokens), _TEXT_BATCH):
            with self._text_turn.reserve(1):
                check()
                rows.append(engine.run(tokens[start : start + _TEXT_BATCH]))
        return np.concatenate(rows)

    @overload
    def project(  # type: ignore[overload-overlap]  # a str is a sequence of str as well
        self,
        embeddings: NDArray[Any],
        criteria: str | Basis,
        *,
        out: NDArray[Any] | None = None,
        threads: int | None = None,
    ) -> NDArray[Any]: ...

    @overload
    def project(
        self,
        embeddings: NDArray[Any],
        criteria: Sequence[str | Basis],
        *,
        out: Mapping[str, NDArray[Any]] | None = None,
        threads: int | None = None,
    ) -> dict[str, NDArray[Any]]: ...

    def project(
        self,
        embeddings: NDArray[Any],
        criteria: str | Basis | Sequence[str | Basis],
        *,
        out: NDArray[Any] | Mapping[str, NDArray[Any]] | None = None,
        threads: int | None = None,
    ) -> NDArray[Any] | dict[str, NDArray[Any]]:
        """Project stored universal embeddings onto one or several bases, without images.

        Args:
            embeddings: Universal embeddings of this model, shape (n, d), int8, float16, float32
                or float64, unit rows. They may be memory-mapped and are read once for all criteria.
            criteria: Name of a loaded basis, or a basis; or a list of them.
            out: Arrays to write to, such as memory maps, each of shape (n, m), float32, float16 or
                int8: one array, or for a list of criteria one by name. None creates float32 arrays.
            threads: Number of threads, see `crl_sdk.projection.project_rows`. With several, which
                is the default for many rows, BLAS is limited to one thread in the whole process
                during the call.

        Returns:
            Conditional embeddings, shape (n, m), float32, or `out`; for a list of criteria a
            dictionary of them by name.

        Raises:
            UnknownCriterionError: If no basis of that name is loaded.
            BasisMismatchError: If a basis was made for another model.
            InvalidInputError: If a shape or dtype is wrong, a value is not finite, a criterion is
                given twice, or `out` lacks one.
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

    @property
    def unfamiliar(self) -> str | None:
        """A warning, if the model has never seen images like those it has embedded here."""
        return self._unfamiliar

    def _note_unfamiliar(self, universal: NDArray[np.float32] | None = None, *, least: int) -> None:
        """Look at embeddings, and warn once if the recent images are unlike the model's own.

        Args:
            universal: Further embeddings, shape (n, d).
            least: Number of recent images from which they are judged.
        """
        familiar = self.bundle.familiar_images
        if familiar is None or self._unfamiliar is not None:
            return
        if universal is not None:
            self._distances.extend(familiar.distances(universal).tolist())
        if len(self._distances) >= least:
            distances, name = np.array(self._distances), self.bundle.manifest.name
            self._unfamiliar = familiar.warning(distances, name)
            if self._unfamiliar is not None:
                _log.warning("%s", self._unfamiliar)

    def _basis(self, criterion: str | Basis) -> Basis:
        if isinstance(criterion, Basis):
            criterion.require_fingerprint(self.bundle.fingerprint)
            return criterion
        name = normalise_criterion(criterion)
        if name not in self._bases:
            raise UnknownCriterionError(
                f"no basis {name!r} is loaded, the loaded ones are {sorted(self._bases)}: make it "
                f"with generate_basis({name!r}) or create_basis({name!r}, texts), or load it with "
                "add_basis(path)"
            )
        return self._bases[name]

    def _prompts(self, prompts: Sequence[str] | None) -> Sequence[str]:
        return (self.bundle.prompt,) if prompts is None else prompts

    def _each_basis(self, criteria: str | Basis | Sequence[str | Basis]) -> list[Basis]:
        return [
            self._basis(each)
            for each in ([criteria] if isinstance(criteria, str | Basis) else criteria)
        ]

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
        self, images: Iterable[ImageInput | ImageError], size: int
    ) -> Iterator[list[NDArray[np.uint8] | ImageError]]:
        """Yield decoded batches, while threads decode the batch after the yielded one."""
        numbered = enumerate(images)

        def submit() -> list[Future[NDArray[np.uint8] | ImageError]]:
            given = list(islice(numbered, size))
            with self._lifetime.ending():
                return [self._pool.submit(self._decode, i, item) for i, item in given]

        waiting = submit()
        while waiting:
            upcoming = submit()
            with self._lifetime.ending():
                decoded = [future.result() for future in waiting]
            yield decoded
            waiting = upcoming

    def _decode(
        self, position: int, image: ImageInput | ImageError
    ) -> NDArray[np.uint8] | ImageError:
        if isinstance(image, ImageError):
            return image
        source = None if isinstance(image, str | os.PathLike) else f"image {position}"
        try:
            return self.load_pixels(image, source=source)
        except ImageError as error:
            return error


def _open_again(
    bundle: os.PathLike[str], arguments: Mapping[str, Any], bases: Sequence[Basis]
) -> Embedder:
    """Open an embedder that was sent from another process."""
    embedder = Embedder.open(bundle, **arguments)
    for basis in bases:
        embedder.add_basis(basis)
    return embedder


def _check_images(images: object) -> None:
    single = isinstance(images, str | bytes | os.PathLike | Image.Image) or (
        isinstance(images, np.ndarray) and images.ndim != 4
    )
    if single or not isinstance(images, Iterable):
        raise InvalidInputError(
            f"expected a list of images, got one {type(images).__name__}: pass [image]"
        )
