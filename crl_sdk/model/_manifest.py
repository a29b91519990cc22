"""The manifest of a model bundle: the fields of `manifest.json` and their checks.

Unknown keys are refused, so that a misspelt field is noticed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeAlias, get_args

import msgspec

from crl_sdk.errors import BundleError, IntegrityError, UnsupportedSchemaError
from crl_sdk.model._preprocess import PreprocessSpec
from crl_sdk.model._tokenizer import Clean
from crl_sdk.storage._atomic_files import write_atomically
from crl_sdk.storage._json import decode_json

SCHEMA, RESIZE_SCHEMA = 1, 2
"""Versions of the manifest: 2 has `preprocess.resize`, which readers of version 1 would ignore. A
manifest without it is written in version 1, see `schema_for`."""

MANIFEST = "manifest.json"

Precision: TypeAlias = Literal["fp32", "fp16", "int8"]
"""Precision of the weights of an image graph."""

PRECISIONS: tuple[Precision, ...] = get_args(Precision)

_PREPROCESS_FIELDS = {field.name for field in dataclasses.fields(PreprocessSpec)}

RECOMMENDED_PROMPT = "a photo of {}"
"""Prompt that a bundle recommends by default.

CLIP learned from captions, not from words: a label in "a photo of a {}." instead of the label alone
gains 1.3 points on ImageNet (Radford et al., arXiv 2103.00020, section 3.1.4).
"""


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The expected SHA-256 (64 hex digits) and size in bytes of a file."""

    sha256: str
    bytes: int


class Parity(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Agreement of a graph's unit embeddings with the reference in fp32.

    Attributes:
        samples: Number of images or texts compared.
        cosine_mean: Mean cosine of corresponding rows.
        cosine_min: Smallest cosine of corresponding rows.
        max_abs: Largest absolute difference of any element.
        centred_cosine_min: Smallest cosine after the mean row of the reference is subtracted from
            both sides. It detects a graph that ignores its input even if all embeddings of the
            model are similar.
    """

    samples: int
    cosine_mean: float
    cosine_min: float
    max_abs: float
    centred_cosine_min: float


class ImageGraph(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An image tower with fused preprocessing and projection.

    Inputs: `image` (B, H, W, 3) uint8, `weight` (d, K) float32, `bias` (K,) float32.
    Outputs: `embedding` (B, d) float32 with unit rows, `projected` (B, K) float32.

    Attributes:
        file: Path in the bundle.
        precision: Precision of the graph.
        parity: Agreement with torch fp32, measured at the export. If the bundle has an `origin`,
            agreement with the imported graph.
    """

    file: str
    precision: Precision
    parity: Parity


class TextGraph(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A text tower with its tokenizer.

    Input: `tokens` (B, context_length) int64. Output: `embedding` (B, d) float32 with unit rows.

    Attributes:
        file: Path of the graph in the bundle.
        tokenizer: Path of `tokenizer.json` in the bundle.
        context_length: Number of tokens per text, start and end included.
        pad_id: Token id that fills the rest of a row.
        clean: How texts are cleaned before they are tokenised.
        parity: Agreement with torch fp32, measured at the export. If the bundle has an `origin`,
            agreement with the imported graph.
        prompt: Prompt that is recommended for the texts of a basis, with one `{}` for the text.
    """

    file: str
    tokenizer: str
    context_length: int
    pad_id: int
    clean: Clean
    parity: Parity
    prompt: str = "{}"


RANDOM_WEIGHTS = "none (random weights"
"""Beginning of `Source.pretrained` of a model with random weights."""


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The checkpoint that a bundle was made from.

    Attributes:
        architecture: Name of the model in open_clip, or a digest of its configuration.
        pretrained: Tag in open_clip, the name of a file or directory, or `none` for random weights.
        weights_sha256: SHA-256 of the state dict, including names and dtypes.
        quick_gelu: Whether the activations are QuickGELU, which the weights do not show.
        license: License of the weights, as given at the export.
    """

    architecture: str
    pretrained: str
    weights_sha256: str
    quick_gelu: bool
    license: str = "unknown"

    @property
    def random(self) -> bool:
        """Whether the weights are random, so that the model knows nothing."""
        return self.pretrained.startswith(RANDOM_WEIGHTS)


class Origin(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The ONNX export of somebody else that `crl import` made a bundle from.

    The parity of such a bundle is measured against these graphs, and not against torch.

    Attributes:
        layout: Layout of the export, such as `immich`.
        files: SHA-256 of each graph with its external data, and of the tokenizer, by role and name.
        image_batch: How the image graph runs a batch: `dynamic` as such, `one by one` if the
            imported graph takes one image.
        text_batch: How the text graph runs a batch; None without a text tower.
    """

    layout: str
    files: dict[str, str]
    image_batch: Literal["dynamic", "one by one"]
    text_batch: Literal["dynamic", "one by one"] | None = None


class Manifest(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True
):
    """The description of a bundle, `manifest.json`.

    Attributes:
        schema: Version of the manifest format, see `schema_for`.
        name: Name for people. It is not part of the fingerprint.
        fingerprint: Identity of the embedding space, see `fingerprint_of`.
        embedding_dim: Length d of the universal embedding.
        preprocess: How images are converted to the input of the image tower.
        images: Image tower in one or several precisions.
        text: Text tower; None if the bundle has none.
        files: All files of the bundle except the manifest, by relative POSIX path.
        source: Checkpoint that the bundle was made from.
        made_by: Versions of the tools that made the bundle.
        origin: The ONNX export that the bundle was imported from; None for an exported model.
    """

    schema: int
    name: str
    fingerprint: str
    embedding_dim: int
    preprocess: PreprocessSpec
    images: tuple[ImageGraph, ...]
    text: TextGraph | None
    files: dict[str, FileEntry]
    source: Source
    made_by: dict[str, str]
    origin: Origin | None = None


def schema_for(preprocess: PreprocessSpec) -> int:
    """Return the version of a manifest with this preprocessing: the oldest that can say it."""
    return SCHEMA if preprocess.resize is None else RESIZE_SCHEMA


def fingerprint_of(source: Source, preprocess: PreprocessSpec, tokenizer_sha256: str | None) -> str:
    """Return the fingerprint of an embedding space.

    Bundles with the same fingerprint may share bases and embeddings. The fingerprint covers the
    weights, the preprocessing and the tokenizer. It does not cover the precision and the tools,
    because the recorded parity bounds their effect.

    Args:
        source: Checkpoint of the bundle.
        preprocess: Preprocessing of the image tower.
        tokenizer_sha256: SHA-256 of `tokenizer.json`; None without a text tower.

    Returns:
        SHA-256, 64 hex digits.
    """
    identity = {
        "architecture": source.architecture,
        "weights_sha256": source.weights_sha256,
        "quick_gelu": source.quick_gelu,
        "preprocess": _without_no_resize(msgspec.to_builtins(preprocess)),
        "tokenizer_sha256": tokenizer_sha256,
    }
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _without_no_resize(preprocess: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a `PreprocessSpec` as version 1 has them, unless `resize` is set."""
    return {key: value for key, value in preprocess.items() if key != "resize" or value is not None}


def parse_manifest(data: bytes, *, where: str = MANIFEST) -> Manifest:
    """Parse and check a manifest. The files of the bundle are not read.

    Args:
        data: Content of `manifest.json`.
        where: Name of the file, for error messages.

    Raises:
        BundleError: If it is not JSON, or a field is missing, unknown or of a wrong type.
        UnsupportedSchemaError: If this SDK does not read its schema.
        IntegrityError: If its parts contradict each other.
    """
    try:
        raw = decode_json(data)
        schema = raw.get("schema") if isinstance(raw, dict) else None
        if isinstance(schema, int) and not SCHEMA <= schema <= RESIZE_SCHEMA:
            newer = schema > RESIZE_SCHEMA
            raise UnsupportedSchemaError(
                f"{where}: schema {schema}, this SDK reads {SCHEMA} and {RESIZE_SCHEMA}: "
                + ("upgrade crl-embeddings" if newer else "export the model again")
            )
        manifest = msgspec.convert(raw, Manifest)
        if unknown := set(raw["preprocess"]) - _PREPROCESS_FIELDS:
            raise msgspec.ValidationError(
                f"Object contains unknown field `{min(unknown)}` - at `$.preprocess`"
            )  # msgspec refuses those of its own classes alone
    except msgspec.MsgspecError as error:
        raise BundleError(
            f"{where}: not a valid manifest ({error}); export the model again"
        ) from error
    _check_manifest(manifest, where)
    return manifest


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `manifest.json`, indented and with keys in a fixed order.

    Readers see the old or the new manifest, even after a crash.

    Raises:
        IntegrityError: If the parts of the manifest contradict each other.
        BundleError: If it cannot be written.
    """
    _check_manifest(manifest, str(directory / MANIFEST))
    fields = msgspec.to_builtins(manifest, order="deterministic")
    fields["preprocess"] = _without_no_resize(fields["preprocess"])
    text = msgspec.json.format(msgspec.json.encode(fields), indent=2)
    write_atomically(directory / MANIFEST, text + b"\n", BundleError)


def _check_manifest(manifest: Manifest, where: str) -> None:
    if manifest.schema < schema_for(manifest.preprocess):
        raise IntegrityError(
            f"{where}: schema {manifest.schema} has no `preprocess.resize`, which readers of this "
            f"schema would ignore: expected schema {RESIZE_SCHEMA}; export the model again"
        )
    precisions = [graph.precision for graph in manifest.images]
    if not precisions or len(set(precisions)) != len(precisions):
        raise IntegrityError(
            f"{where}: expected images in one or several distinct precisions, got {precisions}; "
            "export the model again"
        )
    used = [graph.file for graph in manifest.images]
    tokenizer_sha256 = None
    if manifest.text is not None:
        used += [manifest.text.file, manifest.text.tokenizer]
        if manifest.text.prompt.count("{}") != 1:
            raise IntegrityError(
                f"{where}: expected a prompt with exactly one {{}} for the text, got "
                f"{manifest.text.prompt!r}; export the model again"
            )
        if manifest.text.tokenizer in manifest.files:
            tokenizer_sha256 = manifest.files[manifest.text.tokenizer].sha256
    unlisted = sorted(set(used) - set(manifest.files))
    if unlisted:
        raise IntegrityError(
            f"{where}: {', '.join(unlisted)} used but not listed under `files`; "
            "export the model again"
        )
    for name in manifest.files:
        parts = PurePosixPath(name).parts
        if not parts or ".." in parts or name.startswith("/") or "\\" in name or ":" in name:
            raise IntegrityError(
                f"{where}: the path {name!r} leads out of the bundle; "
                "do not use this bundle, get it from a source you trust"
            )
    expected = fingerprint_of(manifest.source, manifest.preprocess, tokenizer_sha256)
    if manifest.fingerprint != expected:
        raise IntegrityError(
            f"{where}: fingerprint {manifest.fingerprint[:12]}… does not follow from the source, "
            f"preprocessing and tokenizer, which give {expected[:12]}…: the manifest was edited; "
            "export the model again"
        )
