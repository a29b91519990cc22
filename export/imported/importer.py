"""Turns a foreign ONNX export of a CLIP model into a bundle and checks it against that export."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from crl_export.background import add_background
from crl_export.bundle_parts import (
    SPARE_ROWS,
    TEXT_FILE,
    TOKENIZER_FILE,
    Progress,
    Steps,
    check_image_graph,
    check_place,
    check_preprocessing,
    image_file,
    list_files,
    quiet_run,
    tool_versions,
)
from crl_export.imported import bounded_run
from crl_export.imported.batches import with_any_batch
from crl_export.imported.downloads import fetch_export
from crl_export.imported.graphs import Batching, image_graph, text_graph, with_dynamic_batch
from crl_export.imported.layouts import Layout, find_layout
from crl_export.imported.onnx_edits import sort_nodes
from crl_export.imported.preprocessing import OPENAI_MEAN, OPENAI_STD, spec_from
from crl_export.imported.reading import OnnxFile, read_onnx
from crl_export.imported.texts import TextSettings, lengths_of, text_part, text_settings
from crl_export.imported.towers import (
    ImageTower,
    TextTower,
    Tower,
    has_text,
    image_tower,
    text_tower,
)
from crl_export.imported.weights import (
    AnyTower,
    move_weights,
    remove_unused_weights,
    take_weights,
    weight_bytes,
    written,
)
from crl_export.model_files import read_json
from crl_export.precision import quantise
from crl_sdk.basis._build import check_prompts
from crl_sdk.engines._onnx_sessions import open_session
from crl_sdk.errors import EngineError, ExportError, InvalidInputError, ParityError
from crl_sdk.model import _parity as parity
from crl_sdk.model._bundle import ModelBundle, sha256_file
from crl_sdk.model._manifest import (
    PRECISIONS,
    RECOMMENDED_PROMPT,
    ImageGraph,
    Manifest,
    Origin,
    Parity,
    Precision,
    Source,
    TextGraph,
    fingerprint_of,
    schema_for,
    write_manifest,
)
from crl_sdk.model._preprocess import PreprocessSpec
from crl_sdk.model._tokenizer import Clean, Tokenizer
from crl_sdk.storage._atomic_files import make_directory, new_directory

_AGAINST = "the imported graph"
_ALL_OF_IT = {"height", "mean", "std", "interpolation", "resize_mode"}
"""Fields of the preprocessing that the caller gives in place of the file."""

_TOOLS = ("onnx", "onnxruntime", "tokenizers")


@dataclass(frozen=True, slots=True)
class Given:
    """What the caller says about an export, where its files say nothing or are wrong.

    Attributes:
        image_input: Name of the input with the pixels.
        image_output: Name of the output with the embeddings of images.
        text_output: Name of the output with the embeddings of texts.
        tokenizer: `tokenizer.json`, or a directory with it.
        context_length: Number of tokens per text.
        pad_id: Token id that fills the rest of a row.
        preprocess: Fields of `PreprocessSpec`.
    """

    image_input: str | None = None
    image_output: str | None = None
    text_output: str | None = None
    tokenizer: Path | None = None
    context_length: int | None = None
    pad_id: int | None = None
    preprocess: dict[str, Any] | None = None


def import_model(
    source: str | Path,
    *,
    out: Path,
    text_source: str | Path | None = None,
    variant: str = "fp32",
    text_variant: str | None = None,
    precisions: Sequence[Precision] = (),
    name: str | None = None,
    license: str | None = None,
    text: bool = True,
    overwrite: bool = False,
    background: Sequence[str] | None = None,
    prompt: str = RECOMMENDED_PROMPT,
    given: Given | None = None,
    time_limit: float = bounded_run.SECONDS,
    progress: Progress | None = None,
) -> ModelBundle:
    """Import an ONNX export of a CLIP model as a bundle.

    Every graph is run in batches and compared with the export, whose graphs run the same images and
    texts one by one, in a process with limits on memory and time. The bundle is put in place when
    all graphs passed.

    Args:
        source: Directory of the export, the ONNX file of an image tower, or `hf:OWNER/REPO`.
        out: Directory of the new bundle.
        text_source: The same for the text tower, if it is elsewhere.
        variant: Which of several files of a tower to import, see
            `crl_export.imported.layouts.VARIANTS`.
        text_variant: The same for the text tower; None for `variant`.
        precisions: Precisions of the image graph; by default that of the imported one. Others are
            made from an fp32 graph.
        name: Name of the model in the manifest; that of the directory or repository by default.
        license: Licence of the weights, for the manifest. None for that of the repository's model
            card.
        text: Whether to import the text tower. A bundle without it cannot make bases from texts.
        overwrite: Whether to replace a bundle at `out`.
        background: Generic texts, see `crl_export.background.add_background`.
        prompt: Prompt that the bundle recommends for the texts of a basis, with one `{}`.
        given: What the files of the export do not say.
        time_limit: Seconds that a graph of the export may take for the check images or texts.
        progress: Function that is called with the progress.

    Returns:
        The bundle, opened and verified.

    Raises:
        ExportError: If the export cannot be imported, or `out` is not empty.
        ParityError: If a graph differs from the export by more than its tolerance.
        InvalidInputError: If a precision is unknown, or the prompt or a background text is
            malformed.
    """
    check_prompts([prompt])
    given = given or Given()
    if unknown := set(precisions) - set(PRECISIONS):
        raise InvalidInputError(f"expected precisions among {PRECISIONS}, got {tuple(unknown)}")
    out = Path(out)
    check_place(out, overwrite)
    steps = Steps(progress, total=8)
    steps.begin("reading the export")
    places = fetch_export(
        source, text_source=text_source, text=text, variant=variant, text_variant=text_variant,
        report=steps.detail,
    )  # fmt: skip
    layout = find_layout(
        places.source, text=places.text, variant=variant, text_variant=text_variant
    )
    if not text:
        layout = replace(layout, text=None, text_directory=None)
    image, words, files = _read_towers(layout, given)
    if places.text is not None and words is None:
        raise ExportError(f"{layout.text}: has no text tower; check --text-model")
    spec = _preprocessing(layout, image, given)
    wanted = [each for each in PRECISIONS if each in (precisions or (image.precision,))]
    if image.precision != "fp32" and wanted != [image.precision]:
        raise ExportError(
            f"{image.path}: its weights are in {image.precision}; {', '.join(wanted)} can be made "
            "from an fp32 file only: choose one with --variant fp32, or leave out --precision"
        )

    make_directory(out.parent, ExportError)
    with new_directory(out, ExportError) as work:
        graphs = _Graphs(work, time_limit)
        settings = None
        if words is not None:
            settings = _text_settings(layout, words, given, work / TOKENIZER_FILE)
            _compare_vocabularies(layout, words, settings)
            files["tokenizer.json"] = sha256_file(work / TOKENIZER_FILE)
        steps.begin("embedding the check images with the imported graph")
        image = take_weights(image, work, image_file(image.precision))
        pixels = image.pixels(parity.images(spec), spec.mean, spec.std)
        reference = graphs.run_singly(image, {image.input: pixels})
        dim = reference.shape[1]
        steps.begin("writing the image graphs")
        entries, image_batch = graphs.write_images(image, spec, reference, wanted)
        entry, text_batch = None, None
        if words is not None and settings is not None:
            steps.begin("writing the text graph")
            words = take_weights(words, work, TEXT_FILE)
            entry, text_batch = graphs.write_text(words, settings, dim, prompt)
        remove_unused_weights(work)
        steps.begin("writing the manifest")
        origin = Origin(
            layout=layout.name, files=files, image_batch=image_batch, text_batch=text_batch
        )
        _write_manifest(
            work, layout, origin, name=name or places.name, label=places.label,
            license=license or places.license or "unknown", spec=spec, dim=dim, images=entries,
            text=entry,
        )  # fmt: skip
        if entry is not None:
            steps.begin("embedding the background texts")
            add_background(work, background)
        ModelBundle.open(work)
        check_place(out, overwrite)  # another import may have taken it
    steps.begin("done")
    return ModelBundle.open(out)


def _read_towers(
    layout: Layout, given: Given
) -> tuple[ImageTower, TextTower | None, dict[str, str]]:
    """Read the towers; return them with the digests of their files."""
    file = read_onnx(layout.image)
    files = {f"image {layout.image.name}": file.sha256}
    text_file: OnnxFile | None = None
    if layout.text == layout.image:
        if has_text(file):
            copied = onnx.ModelProto()
            copied.CopyFrom(file.model)
            text_file = replace(file, model=copied)
    elif layout.text is not None:
        text_file = read_onnx(layout.text)
    model_type = str(layout.config.get("model_type", ""))
    image = image_tower(file, model_type, input=given.image_input, output=given.image_output)
    if text_file is None:
        return image, None, files
    files[f"text {text_file.path.name}"] = text_file.sha256
    model_type = str(layout.text_config.get("model_type", ""))
    return image, text_tower(text_file, model_type, output=given.text_output), files


def _preprocessing(layout: Layout, tower: ImageTower, given: Given) -> PreprocessSpec:
    """Return the preprocessing, and check it against the input of the tower."""
    config = read_json(layout.preprocess)
    fields = given.preprocess or {}
    if not config and layout.name == "clip-as-service" and tower.height and tower.width:
        config = {
            "size": (tower.height, tower.width), "mean": OPENAI_MEAN, "std": OPENAI_STD,
        }  # fmt: skip
    if config and not fields.keys() >= _ALL_OF_IT:
        height, width = (fields.get(k) or getattr(tower, k) for k in ("height", "width"))
        taken = (height, width) if height and width else None
        spec = replace(spec_from(config, layout.preprocess, taken), **fields)
    else:
        height = fields.get("height", tower.height)
        if height is None or "mean" not in fields or "std" not in fields:
            raise ExportError(
                f"{layout.preprocess}: no such file, so that the preprocessing is not known; pass "
                "--size, --mean and --std (OpenAI's are "
                f"--mean {','.join(map(str, OPENAI_MEAN))} --std {','.join(map(str, OPENAI_STD))})"
            )
        size = {"height": height, "width": fields.get("width", tower.width or height)}
        spec = PreprocessSpec(**{**size, **fields})
    check_preprocessing(spec, layout.preprocess, "pass --size, --resize, --mean and --std")
    fixed = (tower.height or spec.height, tower.width or spec.width)
    if fixed != (spec.height, spec.width):
        raise ExportError(
            f"{layout.preprocess}: the preprocessing gives {spec.height}×{spec.width} pixels, "
            f"{tower.path} takes {fixed[0]}×{fixed[1]}: the files are of different models, or pass "
            f"--size {fixed[0]}"
        )
    return spec


@dataclass(frozen=True, slots=True)
class _Graphs:
    """Runs the imported graphs, and writes and checks those of the bundle.

    Attributes:
        work: Directory of the new bundle.
        seconds: How long an imported graph may run.
    """

    work: Path
    seconds: float

    def run_singly(self, tower: Tower, feeds: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Run the imported graph itself on one input at a time; return unit rows, float32.

        Args:
            tower: The tower.
            feeds: Its inputs, each with the batch as first axis.

        Raises:
            ExportError: If the graph cannot run, or its embeddings are not finite.
        """
        try:
            with written(tower, self.work) as graph:
                found = bounded_run.run_singly(
                    graph, tower.output, feeds, name=tower.path, precision=tower.precision,
                    weights=weight_bytes(tower), seconds=self.seconds,
                )  # fmt: skip
        except bounded_run.RowError as error:
            if error.row < 0:
                raise ExportError(
                    f"{tower.path}: ONNX Runtime cannot load it ({error}); take another export, "
                    "or a newer onnxruntime"
                ) from error
            raise ExportError(
                f"{tower.path}: ONNX Runtime cannot run it on one input ({error}); its files may "
                "belong to different models, or name another output"
            ) from error
        if not np.isfinite(found).all():
            raise ExportError(
                f"{tower.path}: gives values that are not finite; take an fp32 export (--variant "
                "fp32)"
            )
        return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)

    def write_images(
        self,
        tower: ImageTower,
        spec: PreprocessSpec,
        reference: NDArray[np.float32],
        wanted: Sequence[Precision],
    ) -> tuple[tuple[ImageGraph, ...], Batching]:
        """Write and check the image graphs; return their entries and how they run a batch."""
        images = parity.images(spec)
        dim = reference.shape[1]
        base = self.work / image_file(tower.precision)

        def write(tried: ImageTower, batching: Batching) -> Parity:
            onnx.save(image_graph(tried, spec, dim, batching), base)
            return check_image_graph(
                base, tower.precision, images, reference, strict_int8=True, against=_AGAINST
            )

        measured, chosen, batching = _first_that_agrees(write, tower, self.work)
        entries = {
            tower.precision: ImageGraph(file=base.name, precision=tower.precision, parity=measured)
        }
        for precision in [each for each in wanted if each != tower.precision]:
            path = self.work / image_file(precision)
            if precision == "fp16":
                onnx.save(image_graph(_half(chosen, self.work), spec, dim, batching), path)
            elif batching == "one by one":
                raise ExportError(
                    f"{tower.path}: takes one image at a time, so that int8 cannot be made from "
                    "it; leave out --precision int8, or export the model with a dynamic batch"
                )
            else:
                quantise(base, path, spec)
            found = check_image_graph(
                path, precision, images, reference, strict_int8=False, against=_AGAINST
            )
            entries[precision] = ImageGraph(file=path.name, precision=precision, parity=found)
        if tower.precision not in wanted:
            base.unlink()
        return tuple(entries[each] for each in wanted), batching

    def write_text(
        self, tower: TextTower, settings: TextSettings, dim: int, prompt: str
    ) -> tuple[TextGraph, Batching]:
        """Write and check the text graph; return its entry and how it runs a batch."""
        tokenizer = Tokenizer.open(
            settings.path,
            context_length=settings.context_length,
            pad_id=settings.pad_id,
            clean=settings.clean,
        )
        tokens = tokenizer.encode(parity.TEXTS, truncate=True)
        reference = self._embed_texts(tower, settings, tokens, lengths_of(tokenizer, parity.TEXTS))
        if reference.shape[1] != dim:
            raise ExportError(
                f"{tower.path}: its embeddings have {reference.shape[1]} dimensions, those of the "
                f"image tower {dim}: the towers are of different models"
            )
        path = self.work / TEXT_FILE

        def write(tried: TextTower, batching: Batching) -> Parity:
            graph = text_graph(
                tried,
                dim,
                context_length=settings.context_length,
                pad_id=settings.pad_id,
                pad_ends_texts=settings.pad_ends_texts,
                batching=batching,
            )
            onnx.save(graph, path)
            session, options = open_session(path), quiet_run()
            measured = parity.compare(
                reference,
                parity.batched(
                    lambda rows: session.run(["embedding"], {"tokens": rows}, options)[0], tokens
                ),
            )
            parity.require(measured, parity.TOLERANCES[tower.precision], TEXT_FILE, _AGAINST)
            return measured

        measured, _, batching = _first_that_agrees(write, tower, self.work)
        entry = TextGraph(
            file=TEXT_FILE,
            tokenizer=TOKENIZER_FILE,
            context_length=settings.context_length,
            pad_id=settings.pad_id,
            clean=settings.clean,
            parity=measured,
            prompt=prompt,
        )
        return entry, batching

    def _embed_texts(
        self,
        tower: TextTower,
        settings: TextSettings,
        tokens: NDArray[np.int64],
        lengths: list[int],
    ) -> NDArray[np.float32]:
        """Return the embeddings of texts, and check that the tower has one for each token.

        Args:
            tower: The tower.
            settings: The settings of its tokenizer.
            tokens: Token ids, shape (n, L).
            lengths: Number of tokens of each text without padding.
        """
        largest = tokens[:1].copy()
        largest[0, 1] = settings.vocabulary - 1
        rows = np.concatenate([largest, tokens])
        try:
            return self.run_singly(tower, tower.feeds(rows, [rows.shape[1], *lengths]))[1:]
        except ExportError as error:
            cause = error.__cause__
            if not isinstance(cause, bounded_run.RowError) or cause.row != 0:
                raise
            raise ExportError(
                f"{tower.path}: cannot run the token ids of its tokenizer, the largest of which is "
                f"{settings.vocabulary - 1} ({cause}); the tokenizer is of another model: pass the "
                "right one with --tokenizer"
            ) from error


def _text_settings(layout: Layout, tower: TextTower, given: Given, out: Path) -> TextSettings:
    return text_settings(
        layout.text_directory,
        layout.text_config,
        fixed_length=tower.length,
        clean=_cleaning(layout),
        tokenizer=given.tokenizer,
        context_length=given.context_length,
        pad_id=given.pad_id,
        out=out,
    )


def _compare_vocabularies(layout: Layout, tower: TextTower, settings: TextSettings) -> None:
    """Warn if the tower has embeddings of many more tokens than its tokenizer has."""
    stated = text_part(layout.text_config).get("vocab_size")
    rows = tower.rows or (stated if isinstance(stated, int) else None)
    if rows is not None and settings.vocabulary < SPARE_ROWS * rows:
        warnings.warn(
            f"{tower.path} has embeddings of {rows:,} tokens, its tokenizer {settings.vocabulary:,}"
            " tokens: the tokenizer is probably of another model. Compare a picture with texts "
            "(--check), or pass the right one with --tokenizer",
            stacklevel=2,
        )


def _cleaning(layout: Layout) -> Clean:
    """Return how texts are cleaned before they are tokenised.

    The models of immich are those of open_clip, which cleans texts itself. Tokenizers of
    transformers contain their cleaning.
    """
    if layout.name not in ("immich", "clip-as-service"):
        return "none"
    options = text_part(layout.config).get("tokenizer_kwargs")
    clean = options.get("clean") if isinstance(options, dict) else None
    return "canonicalize" if clean == "canonicalize" else "whitespace"


def _first_that_agrees(
    write: Callable[[AnyTower, Batching], Parity], tower: AnyTower, work: Path
) -> tuple[Parity, AnyTower, Batching]:
    """Write a graph that agrees with the export: if possible, one that runs batches as such.

    Args:
        write: Function that writes and checks the graph of a tower.
        tower: The tower.
        work: Directory for temporary files.

    Returns:
        The parity, the tower that was written, and how it runs a batch.
    """
    failed: Exception | None = None
    for tried, batching in _candidates(tower, work):
        try:
            return write(tried, batching), tried, batching
        except (ParityError, EngineError) as error:
            failed = error
        except (ExportError, OSError):
            raise
        except Exception as error:  # ONNX Runtime's exceptions have no common base class
            failed = error
    if isinstance(failed, ParityError):
        raise failed
    raise ExportError(
        f"{tower.path}: ONNX Runtime cannot run the bundle's graph ({_reason(failed)}); take "
        "another export"
    ) from failed


def _candidates(tower: AnyTower, work: Path) -> Iterator[tuple[AnyTower, Batching]]:
    """Yield a tower with its batch declared as dynamic, rewritten so, and as it is."""
    yield _declared_dynamic(tower), "dynamic"
    if (rewritten := with_any_batch(tower, work)) is not None:
        yield _declared_dynamic(rewritten), "dynamic"
    yield tower, "one by one"


def _declared_dynamic(tower: AnyTower) -> AnyTower:
    model = onnx.ModelProto()
    model.CopyFrom(tower.model)
    with_dynamic_batch(model)
    return replace(tower, model=model)


def _half(tower: ImageTower, work: Path) -> ImageTower:
    """Return a tower in half precision, whose inputs and outputs keep their types."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with written(tower, work) as path:
        half = convert_float_to_float16(str(path), keep_io_types=True)
    sort_nodes(half.graph)  # it appends casts, and a Scan takes sorted nodes only
    made = replace(tower, model=half, weights=None)
    return made if tower.weights is None else move_weights(made, work, work, image_file("fp16"))


def _write_manifest(
    work: Path,
    layout: Layout,
    origin: Origin,
    *,
    name: str,
    label: str,
    license: str,
    spec: PreprocessSpec,
    dim: int,
    images: tuple[ImageGraph, ...],
    text: TextGraph | None,
) -> None:
    files = list_files(work)
    weights = hashlib.sha256("\n".join(f"{k} {v}" for k, v in origin.files.items()).encode())
    source = Source(
        architecture=f"imported {layout.config.get('model_type', 'CLIP')}",
        pretrained=f"{layout.name} export {label}",
        weights_sha256=weights.hexdigest(),
        quick_gelu=False,  # the graphs show their activations, and their digest covers them
        license=license,
    )
    tokenizer = files[TOKENIZER_FILE].sha256 if text is not None else None
    manifest = Manifest(
        schema=schema_for(spec),
        name=name,
        fingerprint=fingerprint_of(source, spec, tokenizer),
        embedding_dim=dim,
        preprocess=spec,
        images=images,
        text=text,
        files=files,
        source=source,
        made_by=tool_versions(_TOOLS),
        origin=origin,
    )
    write_manifest(work, manifest)


def _reason(error: Exception | None) -> str:
    if isinstance(error, EngineError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # it names no temporary file
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
