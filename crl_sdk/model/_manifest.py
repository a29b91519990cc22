"""The manifest of a model bundle: what `manifest.json` holds, and the checks it must pass.

Unknown keys are refused: a misspelt field must not pass in silence.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeAlias, get_args

import msgspec

from crl_sdk.errors import BundleError, IntegrityError, UnsupportedSchemaError
from crl_sdk.model._preprocess import PreprocessSpec
from crl_sdk.model._tokenizer import Clean

SCHEMA = 1
MANIFEST = "manifest.json"

Precision: TypeAlias = Literal["fp32", "fp16", "int8"]
"""Precision of the weights of an image graph."""

PRECISIONS: tuple[Precision, ...] = get_args(Precision)


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a file must be: its SHA-256 in hex and its size in bytes."""

    sha256: str
    bytes: int


class Parity(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How far a graph's unit embeddings were from torch fp32 when it was exported.

    Attributes:
        samples: images or texts compared.
        cosine_mean: mean cosine of corresponding rows.
        cosine_min: the worst of them.
        max_abs: the largest absolute difference of any element.
        centred_cosine_min: the worst cosine once torch's mean row is taken from both sides, which
            also tells graphs apart whose embeddings are all nearly alike.
    """

    samples: int
    cosine_mean: float
    cosine_min: float
    max_abs: float
    centred_cosine_min: float


class ImageGraph(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An image tower with preprocessing and projection fused in.

    Inputs: `image` uint8 (B, H, W, 3), `weight` float32 (d, K), `bias` float32 (K).
    Outputs: `embedding` float32 (B, d) with unit rows, `projected` float32 (B, K).
    """

    file: str
    precision: Precision
    parity: Parity


class TextGraph(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A text tower with its tokenizer.

    Input: `tokens` int64 (B, context_length). Output: `embedding` float32 (B, d) with unit rows.
    """

    file: str
    tokenizer: str
    context_length: int
    pad_id: int
    clean: Clean
    parity: Parity


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The checkpoint a bundle was made from.

    Attributes:
        architecture: open_clip's name of the model, or a digest of its configuration.
        pretrained: open_clip's tag, the name of a file or directory, or `none` for random weights.
        weights_sha256: digest of the state dict, names and dtypes included.
        quick_gelu: whether its activations are QuickGELU, which the weights do not tell.
        license: of the weights, as told at the export.
    """

    architecture: str
    pretrained: str
    weights_sha256: str
    quick_gelu: bool
    license: str = "unknown"


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The description of a bundle, `manifest.json`.

    Attributes:
        schema: version of this format.
        name: for people; not part of the fingerprint.
        fingerprint: identity of the embedding space, see `fingerprint_of`.
        embedding_dim: d.
        preprocess: how images become pixels, and mean and std inside the graph.
        images: the image tower in one or several precisions.
        text: the text tower, or None in an image-only bundle.
        files: every file of the bundle but the manifest, by relative POSIX path.
        source: what it was exported from.
        made_by: versions of the tools that made it.
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


def fingerprint_of(source: Source, preprocess: PreprocessSpec, tokenizer_sha256: str | None) -> str:
    """Name an embedding space: two bundles of one fingerprint may share bases and embeddings.

    It covers the weights, the preprocessing and the tokenizer; not the precision or the tools,
    whose effect is bounded by the recorded parity.

    Args:
        source: the checkpoint.
        preprocess: of its image tower.
        tokenizer_sha256: digest of `tokenizer.json`, None without a text tower.

    Returns:
        64 hex digits.
    """
    identity = {
        "architecture": source.architecture,
        "weights_sha256": source.weights_sha256,
        "quick_gelu": source.quick_gelu,
        "preprocess": msgspec.to_builtins(preprocess),
        "tokenizer_sha256": tokenizer_sha256,
    }
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def parse_manifest(data: bytes, *, where: str = MANIFEST) -> Manifest:
    """Read and check a manifest; files are not touched.

    Args:
        data: JSON.
        where: the name used in errors.

    Raises:
        BundleError: not JSON, or a field is missing, unknown or of a wrong type.
        UnsupportedSchemaError: written in a schema this SDK does not read.
        IntegrityError: the parts contradict each other.
    """
    try:
        raw: Any = msgspec.json.decode(data)
        schema = raw.get("schema") if isinstance(raw, dict) else None
        if isinstance(schema, int) and schema != SCHEMA:
            newer = schema > SCHEMA
            raise UnsupportedSchemaError(
                f"{where}: schema {schema}, this SDK reads {SCHEMA}: "
                + ("upgrade crl-embeddings" if newer else "export the model again")
            )
        manifest = msgspec.convert(raw, Manifest)
    except msgspec.MsgspecError as error:
        raise BundleError(
            f"{where}: not a valid manifest ({error}); export the model again"
        ) from error
    _check_manifest(manifest, where)
    return manifest


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `manifest.json`, readable and in a fixed order.

    Raises:
        IntegrityError: the manifest contradicts itself.
    """
    _check_manifest(manifest, str(directory / MANIFEST))
    text = msgspec.json.format(msgspec.json.encode(manifest, order="deterministic"), indent=2)
    (directory / MANIFEST).write_bytes(text + b"\n")


def _check_manifest(manifest: Manifest, where: str) -> None:
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
