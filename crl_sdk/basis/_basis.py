"""The basis of a criterion: its texts, their embeddings and the projection made from them.

A basis is one safetensors file, bound to the fingerprint of the model whose text tower made it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from crl_sdk._criterion import normalise_criterion
from crl_sdk.errors import (
    BasisError,
    BasisMismatchError,
    IntegrityError,
    InvalidInputError,
    UnsupportedSchemaError,
)
from crl_sdk.projection._projection import Post, Projection
from crl_sdk.storage._atomic_files import write_atomically
from crl_sdk.storage._checksummed_safetensors import SUFFIX, digest, require_digest, seal, unseal

SCHEMA = 1

Method: TypeAlias = Literal[
    "cosine", "centred", "orthogonal", "pca", "tangent",
    "exclusive", "exclusive-orthogonal", "exclusive-weighted",
]  # fmt: skip
"""Name of a projection method."""

METHODS: tuple[Method, ...] = get_args(Method)
"""All projection methods."""

_METADATA_KEY = "crl_basis"


class MergedText(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A text that was left out because another says the same.

    Attributes:
        text: the text left out.
        into: the text of the basis that stands for it.
        cosine: of their embeddings; 1.0 for exact duplicates.
    """

    text: str
    into: str
    cosine: float


class _Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The JSON in a basis file's metadata; `sha256` is of the rest of it and all tensors."""

    schema: int
    criterion: str
    texts: tuple[str, ...]
    counts: tuple[int, ...]
    prompts: tuple[str, ...]
    method: Method
    post: Post
    fingerprint: str
    merge_threshold: float
    merged: tuple[MergedText, ...]
    provenance: dict[str, Any]
    sha256: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Basis:
    """What a criterion is made of, for one model.

    Attributes:
        criterion: its normalised name.
        texts: k distinct texts, in the order given.
        counts: how many given texts each of them stands for.
        prompts: templates with one `{}`; a text's embedding is the mean over all of them.
        text_embeddings: (k, d) float32, unit rows.
        projection: the affine map, from (d,) to (m,); m is k where its columns are texts.
        method: how the map was made of the texts, see `crl_sdk.basis`.
        fingerprint: of the model bundle.
        merge_threshold: cosine from which two texts were taken for one.
        merged: the texts left out as duplicates.
        provenance: JSON values that say where the texts came from, and under `references` and
            `against` how many images and which criteria the map was made with.
    """

    criterion: str
    texts: tuple[str, ...]
    counts: tuple[int, ...]
    prompts: tuple[str, ...]
    text_embeddings: NDArray[np.float32]
    projection: Projection
    method: Method
    fingerprint: str
    merge_threshold: float = 1.0
    merged: tuple[MergedText, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def require_fingerprint(self, fingerprint: str) -> None:
        """Refuse to be used with another model.

        Raises:
            BasisMismatchError: `fingerprint` is not the one this basis was made for.
        """
        if self.fingerprint != fingerprint:
            raise BasisMismatchError(
                f"basis {self.criterion!r} was made for model {self.fingerprint[:12]}…, this "
                f"bundle is {fingerprint[:12]}…: make it again with "
                f"crl basis create {self.criterion!r}"
            )

    def sha256(self) -> str:
        """Digest everything the basis says, in hex: equal for equal bases, wherever they lie."""
        return digest(self._header(), self._tensors())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the basis; the file is replaced whole or not at all.

        The same basis gives the same bytes.

        Raises:
            BasisError: the file cannot be written.
        """
        write_atomically(Path(path), self.to_bytes(), BasisError)

    def to_bytes(self) -> bytes:
        """Serialise the basis as a safetensors file.

        Returns:
            Tensors `text_embeddings`, `weight`, `bias`, and the rest as JSON in the metadata.
        """
        return seal(_METADATA_KEY, self._header(), self._tensors())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Basis:
        """Read a basis file and check it.

        Raises:
            BasisError: the file cannot be read.
            IntegrityError: it is not a basis, or its parts contradict each other.
            UnsupportedSchemaError: written in a schema this SDK does not read.
        """
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise BasisError(
                f"{path}: cannot be read ({error.strerror}); check the path"
            ) from error
        return cls.from_bytes(data, where=str(path))

    @classmethod
    def from_bytes(cls, data: bytes, *, where: str = "basis") -> Basis:
        """Read a basis from the bytes of its file; `where` names it in errors.

        Raises:
            IntegrityError: it is not a basis, or its parts contradict each other.
            UnsupportedSchemaError: written in a schema this SDK does not read.
        """
        from safetensors import SafetensorError

        remedy = "copy the file again or make it again with crl basis create"
        try:
            header, tensors = unseal(
                data, _METADATA_KEY, _Header,
                schema=SCHEMA, where=where, remake="make the basis again",
            )  # fmt: skip
            projection = Projection(tensors["weight"], tensors["bias"], header.post)
            basis = cls(
                criterion=normalise_criterion(header.criterion),
                texts=header.texts,
                counts=header.counts,
                prompts=header.prompts,
                text_embeddings=tensors["text_embeddings"],
                projection=projection,
                method=header.method,
                fingerprint=header.fingerprint,
                merge_threshold=header.merge_threshold,
                merged=header.merged,
                provenance=header.provenance,
            )
            _check(basis)
            require_digest(header.sha256, basis._header(), tensors)
        except UnsupportedSchemaError:
            raise
        except (SafetensorError, msgspec.MsgspecError, KeyError, ValueError) as error:
            raise IntegrityError(f"{where}: not a valid basis file ({error}); {remedy}") from error
        return basis

    def _tensors(self) -> dict[str, NDArray[np.float32]]:
        return {
            "text_embeddings": np.ascontiguousarray(self.text_embeddings),
            "weight": np.ascontiguousarray(self.projection.weight),
            "bias": np.ascontiguousarray(self.projection.bias),
        }

    def _header(self) -> _Header:
        return _Header(
            schema=SCHEMA,
            criterion=self.criterion,
            texts=self.texts,
            counts=self.counts,
            prompts=self.prompts,
            method=self.method,
            post=self.projection.post,
            fingerprint=self.fingerprint,
            merge_threshold=self.merge_threshold,
            merged=self.merged,
            provenance=dict(self.provenance),
        )


def basis_path(directory: Path, criterion: str) -> Path:
    """Give the place of a criterion's basis in a directory of bases.

    Spaces become `+`, which no criterion holds, so that distinct names give distinct files.

    Raises:
        CriterionError: the name is malformed; it never becomes a path then.
    """
    return directory / f"{normalise_criterion(criterion).replace(' ', '+')}{SUFFIX}"


def _check(basis: Basis) -> None:
    k, d = len(basis.texts), basis.projection.input_dim
    if basis.text_embeddings.shape != (k, d) or basis.text_embeddings.dtype != np.float32:
        raise InvalidInputError(
            f"expected text_embeddings ({k}, {d}) float32, got {basis.text_embeddings.shape} "
            f"{basis.text_embeddings.dtype}"
        )
    if not np.isfinite(basis.text_embeddings).all():
        raise InvalidInputError("text_embeddings hold NaN or infinity")
    if len(basis.counts) != k or k == 0:
        raise InvalidInputError(f"expected one count for each of {k} texts, got {basis.counts}")
