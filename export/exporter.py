"""Exports a model of open_clip or transformers to a bundle and checks the graphs against torch."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.transforms.functional import normalize

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
    tool_versions,
)
from crl_export.checkpoint import Checkpoint, ImagePart, TextPart
from crl_export.encoders import ImageEncoder
from crl_export.graphs import (
    ImageGraph,
    TextGraph,
    export_image_graph,
    export_text_graph,
)
from crl_export.loading import load_checkpoint
from crl_export.messages import first_lines
from crl_export.precision import quantise
from crl_export.tokenizers import TokenizerSettings
from crl_sdk.basis._build import check_prompts
from crl_sdk.engines._onnx_sessions import open_session
from crl_sdk.errors import ExportError, InvalidInputError, ParityError
from crl_sdk.model import _parity as parity
from crl_sdk.model._bundle import ModelBundle
from crl_sdk.model._manifest import (
    PRECISIONS,
    RECOMMENDED_PROMPT,
    Manifest,
    Precision,
    fingerprint_of,
    schema_for,
    write_manifest,
)
from crl_sdk.model._manifest import ImageGraph as ImageEntry
from crl_sdk.model._manifest import TextGraph as TextEntry
from crl_sdk.model._preprocess import PreprocessSpec
from crl_sdk.model._tokenizer import Tokenizer
from crl_sdk.storage._atomic_files import make_directory, new_directory

_SAME = 1e-6
"""Largest difference of embeddings that are the same: rounding."""

_TOOLS = ("torch", "onnx", "onnxruntime", "onnxscript", "tokenizers")


def export_model(
    model: str,
    *,
    out: Path,
    pretrained: str | None = None,
    text_model: str | None = None,
    precisions: Sequence[Precision] = ("fp32",),
    name: str | None = None,
    license: str | None = None,
    text: bool = True,
    context_length: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    strict_int8: bool = False,
    background: Sequence[str] | None = None,
    prompt: str = RECOMMENDED_PROMPT,
    progress: Progress | None = None,
) -> ModelBundle:
    """Export a model of open_clip or transformers to a bundle.

    Every graph is run in ONNX Runtime and compared with torch in fp32 on fixed images and texts.
    The manifest records the measured parity. The bundle is put in place when all graphs passed.

    Args:
        model: Name of an open_clip architecture; a directory with `open_clip_config.json`, or in
            the format of Hugging Face; or `hf:OWNER/REPO`.
        out: Directory of the new bundle.
        pretrained: Tag of open_clip, a `.safetensors` or `.pt` file, or `none` for random weights.
            None if `model` is a directory or repository, which has its own weights.
        text_model: Directory or `hf:OWNER/REPO` of the text tower, if it is another one.
        precisions: Precisions of the image graph, one graph each.
        name: Name of the model in the manifest; by default that of the architecture, directory or
            repository.
        license: Licence of the weights, for the manifest. None for that of the model card.
        text: Whether to export the text tower. A bundle without it cannot make bases.
        context_length: Number of tokens per text of a text tower of Hugging Face; by default what
            its files say, at most 128.
        seed: Seed of random weights.
        overwrite: Whether to replace a bundle at `out`.
        strict_int8: Whether to fail if int8 exceeds its tolerance, instead of warning.
        background: Generic texts, see `crl_export.background.add_background`. None for the list
            that ships.
        prompt: Prompt that the bundle recommends for the texts of a basis, with one `{}`.
        progress: Function that is called with the current step in words, the number of finished
            steps, and the number of all steps.

    Returns:
        The bundle, opened and verified.

    Raises:
        ExportError: If the model cannot be loaded or exported, or `out` is not empty.
        ParityError: If a graph differs from torch by more than its tolerance.
        InvalidInputError: If a precision is unknown, or the prompt or a background text is
            malformed.
    """
    check_prompts([prompt])
    if text_model is not None and not text:
        raise InvalidInputError("a text tower is named and left out: choose one of the two")
    if background is not None and not text:
        raise InvalidInputError("background texts need the text tower: leave one of the two out")
    unknown = set(precisions) - set(PRECISIONS)
    if unknown or not precisions:
        raise InvalidInputError(f"expected precisions among {PRECISIONS}, got {tuple(precisions)}")
    out = Path(out)
    check_place(out, overwrite)
    made = len(_exported(precisions)) + len(set(precisions)) + ("int8" in precisions)
    steps = Steps(progress, total=3 + made + (3 if text else 0))

    steps.begin("loading the model")
    checkpoint = load_checkpoint(
        model, pretrained, text=text, text_model=text_model, context_length=context_length,
        seed=seed, report=steps.detail,
    )  # fmt: skip
    if checkpoint.image is None:
        raise ExportError(f"{model}: has no image tower; name it, and this one with --text-model")
    if text and checkpoint.text is None:
        raise ExportError(
            f"{model}: has no text tower; name one with --text-model, or export the image tower "
            "alone with --no-text"
        )
    if checkpoint.text is not None:
        _compare_vocabularies(checkpoint.text)
    spec = checkpoint.image.preprocess
    check_preprocessing(spec, model, "correct the file of the model that says so")
    make_directory(out.parent, ExportError)
    with new_directory(out, ExportError) as work:
        images = _write_images(checkpoint.image, work, precisions, steps)
        texts = None
        if checkpoint.text is not None:
            texts = _write_text(checkpoint.text, work, images.shape[1], steps)
        # the model may be as large as the graphs that are loaded next
        checkpoint = replace(checkpoint, image=None, text=None)
        entries = _check_images(
            images, spec, work, precisions, strict_int8=strict_int8, steps=steps
        )
        entry = None if texts is None else _check_text(texts, work, prompt, steps)
        steps.begin("writing the manifest")
        _write_manifest(
            work, checkpoint, spec, name=name, license=license, dim=images.shape[1],
            images=entries, text=entry,
        )  # fmt: skip
        if entry is not None:
            steps.begin("embedding the background texts")
            add_background(work, background)
        ModelBundle.open(work)
        check_place(out, overwrite)  # another export may have taken it
    steps.begin("done")
    return ModelBundle.open(out)


def _write_images(
    part: ImagePart, work: Path, precisions: Sequence[Precision], steps: Steps
) -> NDArray[np.float32]:
    """Write the image graphs that torch makes; return the embeddings of the check images."""
    model, spec = part.model, part.preprocess
    steps.begin("embedding the check images with torch")
    try:
        reference = parity.batched(
            lambda rows: _torch_images(model, spec, rows), parity.images(spec)
        )
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        raise ExportError(
            f"the image tower cannot embed images of {spec.height}×{spec.width} pixels "
            f"({first_lines(error)}): the preprocessing is of another model; get its file again"
        ) from error
    _check_embeddings(reference, "images")
    for precision in _exported(precisions):
        steps.begin(f"exporting the image tower in {precision}")
        graph = ImageGraph(model, spec, torch.float16 if precision == "fp16" else torch.float32)
        export_image_graph(graph, spec, reference.shape[1], work / image_file(precision))
    return reference


def _check_images(
    reference: NDArray[np.float32],
    spec: PreprocessSpec,
    work: Path,
    precisions: Sequence[Precision],
    *,
    strict_int8: bool,
    steps: Steps,
) -> tuple[ImageEntry, ...]:
    """Make the int8 graph, check all image graphs and return their entries in the manifest."""
    images = parity.images(spec)
    fp32 = work / image_file("fp32")
    entries: list[ImageEntry] = []
    for precision in [each for each in PRECISIONS if each in precisions]:
        path = work / image_file(precision)
        if precision == "int8":
            steps.begin("making the image graph in int8")
            quantise(fp32, path, spec)
        steps.begin(f"checking the image graph in {precision} against torch")
        measured = check_image_graph(path, precision, images, reference, strict_int8=strict_int8)
        entries.append(ImageEntry(file=path.name, precision=precision, parity=measured))
    if "fp32" not in precisions:
        fp32.unlink(missing_ok=True)
        Path(f"{fp32}.data").unlink(missing_ok=True)
    return tuple(entries)


def _exported(precisions: Sequence[Precision]) -> list[Precision]:
    """Return the precisions that torch exports for others: int8 is made from fp32."""
    return sorted({"fp16" if each == "fp16" else "fp32" for each in precisions}, reverse=True)


@dataclass(frozen=True, slots=True)
class _Texts:
    """The check texts: settings of the tokenizer, token ids, and embeddings by torch."""

    settings: TokenizerSettings
    tokens: NDArray[np.int64]
    reference: NDArray[np.float32]


def _write_text(part: TextPart, work: Path, dim: int, steps: Steps) -> _Texts:
    """Write the tokenizer and the text graph, and check the tokenizer."""
    steps.begin("exporting the text tower")
    path = work / TOKENIZER_FILE
    settings = part.tokenizer.write(path)
    tokens = Tokenizer.open(path, **settings._asdict()).encode(parity.TEXTS, truncate=True)
    expected = part.tokenizer.ids(list(parity.TEXTS))
    if not np.array_equal(tokens, expected):
        row = int(np.flatnonzero((tokens != expected).any(axis=1))[0])
        raise ParityError(f"the exported tokenizer differs from the model's: {parity.TEXTS[row]!r}")

    graph = TextGraph(part.model).eval()
    try:
        with torch.inference_mode():
            reference = graph(torch.from_numpy(tokens)).numpy()
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        raise ExportError(
            f"the text tower cannot embed {tokens.shape[1]} tokens with ids up to {tokens.max()} "
            f"({first_lines(error)}): the tokenizer is of another model, or --context-length is "
            "too large"
        ) from error
    _check_embeddings(reference, "texts")
    if reference.shape[1] != dim:
        raise ExportError(
            f"the embeddings of texts have {reference.shape[1]} dimensions, those of images {dim}: "
            "the towers are of different models; check --text-model"
        )
    export_text_graph(graph, torch.from_numpy(tokens), work / TEXT_FILE)
    return _Texts(settings, tokens, reference)


def _check_text(texts: _Texts, work: Path, prompt: str, steps: Steps) -> TextEntry:
    """Check the text graph and return its entry in the manifest."""
    steps.begin("checking the text graph against torch")
    session = open_session(work / TEXT_FILE)
    measured = parity.compare(
        texts.reference,
        parity.batched(lambda rows: session.run(["embedding"], {"tokens": rows})[0], texts.tokens),
    )
    parity.require(measured, parity.TOLERANCES["fp32"], TEXT_FILE)
    return TextEntry(
        file=TEXT_FILE,
        tokenizer=TOKENIZER_FILE,
        **texts.settings._asdict(),
        parity=measured,
        prompt=prompt,
    )


def _compare_vocabularies(part: TextPart) -> None:
    """Compare the number of tokens of a tokenizer with the tower's table of token embeddings.

    Raises:
        ExportError: If the tower has no embeddings for some of its tokens.
    """
    tables = [each for each in part.model.modules() if isinstance(each, torch.nn.Embedding)]
    rows = max((each.num_embeddings for each in tables), default=0)  # positions are fewer
    tokens = part.tokenizer.size()
    counts = f"the text tower has embeddings of {rows:,} tokens, its tokenizer {tokens:,} tokens"
    if rows and tokens > rows:
        raise ExportError(f"{counts}: the tokenizer is of another model; get its files again")
    if tokens < SPARE_ROWS * rows:
        warnings.warn(
            f"{counts}: the tokenizer is probably of another model. Compare pictures with texts "
            "before you use the bundle",
            stacklevel=2,
        )


def _check_embeddings(embeddings: NDArray[np.float32], of: str) -> None:
    """Check that embeddings are neither zero nor infinite, as with damaged weights, and differ."""
    norms = np.linalg.norm(embeddings, axis=1)
    if not np.all(np.abs(norms - 1) < 1e-3):
        raise ExportError(
            f"the model gives {of} embeddings that are zero or not finite (norms from "
            f"{norms.min():.3g} to {norms.max():.3g}): the weights are damaged; get them again"
        )
    if np.ptp(embeddings, axis=0).max() < _SAME:
        raise ExportError(
            f"the model gives all {of} the same embedding: "
            + (
                "the tokenizer is of another model, whose end of a text this one does not know"
                if of == "texts"
                else "the weights are damaged"
            )
            + "; get the files again"
        )


def _torch_images(
    model: ImageEncoder, spec: PreprocessSpec, rows: NDArray[np.generic]
) -> NDArray[np.float32]:
    """Return the embeddings of the model itself, with torchvision's normalisation."""
    pixels = torch.from_numpy(rows).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        embedding = model.encode_image(normalize(pixels, list(spec.mean), list(spec.std)))
        return torch.nn.functional.normalize(embedding, dim=-1).numpy()


def _write_manifest(
    work: Path,
    checkpoint: Checkpoint,
    preprocess: PreprocessSpec,
    *,
    name: str | None,
    license: str | None,
    dim: int,
    images: tuple[ImageEntry, ...],
    text: TextEntry | None,
) -> None:
    files = list_files(work)
    tokenizer = files[TOKENIZER_FILE].sha256 if text is not None else None
    source = checkpoint.source
    if license is not None:
        source = msgspec.structs.replace(source, license=license)
    manifest = Manifest(
        schema=schema_for(preprocess),
        name=name or checkpoint.name,
        fingerprint=fingerprint_of(source, preprocess, tokenizer),
        embedding_dim=dim,
        preprocess=preprocess,
        images=images,
        text=text,
        files=files,
        source=source,
        made_by=tool_versions((*_TOOLS, checkpoint.library)),
    )
    write_manifest(work, manifest)
