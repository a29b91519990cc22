"""The basis of a criterion: its texts, their embeddings and the projection made from them.

A basis is stored as one safetensors file. It holds the fingerprint of the model whose text tower
made it, and is refused for any other model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from crl_sdk._criterion import normalise_criterion
from crl_sdk.errors import (
    BasisError,
    IntegrityError,
    InvalidInputError,
    UnsupportedSchemaError,
)
from crl_sdk.model._fingerprint import require_same_model, short_fingerprint
from crl_sdk.projection._projection import Post, Projection
from crl_sdk.storage._atomic_files import write_atomically
from crl_sdk.storage._checksummed_safetensors import (
    content_sha256,
    decode_checksummed,
    encode_checksummed,
    require_checksum,
)

SCHEMA = 1

_METADATA_KEY = "crl_basis"


class MergedText(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A text that was left out because another text says the same.

    Attributes:
        text: The text that was left out.
        into: The text of the basis that represents it.
        cosine: Cosine of their embeddings; 1.0 for exact duplicates.
    """

    text: str
    into: str
    cosine: float


class _Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The JSON header of a basis file. `sha256` covers the other fields and all tensors."""

    schema: int
    criterion: str
    texts: tuple[str, ...]
    counts: tuple[int, ...]
    prompts: tuple[str, ...]
    method: str
    post: Post
    fingerprint: str
    merge_threshold: float
    merged: tuple[MergedText, ...]
    provenance: dict[str, Any]
    sha256: str = ""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Basis:
    """The texts and the projection of one criterion, for one model.

    Attributes:
        criterion: Normalised name of the criterion.
        texts: The k distinct texts, in the order given.
        counts: Number of given texts that each of them represents.
        prompts: Templates with one `{}`. The embedding of a text is its mean over all prompts.
        text_embeddings: Embeddings of the texts, shape (k, d), float32, unit rows.
        projection: Affine map from (d,) to (m,); m equals k if its columns are texts.
        method: Name of the projection method, one of `crl_sdk.basis.METHODS`. A file may name a
            method of another version; its projection can be used all the same.
        fingerprint: Fingerprint of the model bundle.
        merge_threshold: Smallest cosine at which two texts were merged.
        merged: Texts that were left out as duplicates.
        provenance: JSON values that say where the texts came from, and what the projection was
            made with, if anything: `against` and `ignore`, lists of other criteria; `background`,
            the number of generic texts; `weights`, the weight of each text, at most 1; and
            `sharpened`, what it learnt from images (see `crl_sdk.tasks.sharpen`).
    """

    criterion: str
    texts: tuple[str, ...]
    counts: tuple[int, ...]
    prompts: tuple[str, ...]
    text_embeddings: NDArray[np.float32]
    projection: Projection
    method: str
    fingerprint: str
    merge_threshold: float = 1.0
    merged: tuple[MergedText, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Return the criterion, the first texts, the method and the sizes."""
        shown = ", ".join(map(repr, self.texts[:3])) + (", …" if len(self.texts) > 3 else "")
        return (
            f"Basis({self.criterion!r}, {len(self.texts)} texts: {shown}; {self.method}, "
            f"{self.projection.input_dim} → {self.projection.output_dim}, "
            f"model {short_fingerprint(self.fingerprint)})"
        )

    def require_fingerprint(self, fingerprint: str, *, used_with: str = "this bundle") -> None:
        """Raise an error if the basis was made for another model.

        Args:
            fingerprint: Fingerprint of the model that the basis is used with.
            used_with: Name of what has this fingerprint, for the error message.

        Raises:
            BasisMismatchError: If the basis was made for another model.
        """
        require_same_model(
            f"basis {self.criterion!r}", self.fingerprint, fingerprint, used_with=used_with,
            remedy=f"name the bundle that the basis was made with, or make it again with crl basis "
            f"create {self.criterion!r}",
        )  # fmt: skip

    def sha256(self) -> str:
        """Return the SHA-256 of the content in hex. Equal bases have equal digests."""
        return content_sha256(self._header(), self._tensors())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the basis to a file, which is replaced completely or not at all.

        Equal bases give equal bytes.

        Raises:
            BasisError: If the file cannot be written.
        """
        write_atomically(Path(path), self.to_bytes(), BasisError)

    def to_bytes(self) -> bytes:
        """Serialise the basis as a safetensors file.

        Returns:
            File with the tensors `text_embeddings`, `weight` and `bias`; its metadata holds the
            other fields as JSON.
        """
        return encode_checksummed(_METADATA_KEY, self._header(), self._tensors())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Basis:
        """Read a basis file and verify it.

        Raises:
            BasisError: If the file cannot be read.
            IntegrityError: If the file is not a basis, or its parts contradict each other.
            UnsupportedSchemaError: If this SDK does not read the file's schema.
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
        """Read a basis from the bytes of its file and verify it.

        Args:
            data: Content of the file.
            where: Name of the file, for error messages.

        Raises:
            IntegrityError: If the file is not a basis, or its parts contradict each other.
            UnsupportedSchemaError: If this SDK does not read the file's schema.
        """
        from safetensors import SafetensorError

        remedy = "copy the file again or make it again with crl basis create"
        try:
            header, tensors = decode_checksummed(
                data, _METADATA_KEY, _Header,
                schema=SCHEMA, where=where, remedy="make the basis again",
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
            require_checksum(header.sha256, basis._header(), tensors)
        except UnsupportedSchemaError:
            raise
        except (SafetensorError, msgspec.MsgspecError, KeyError, ValueError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise IntegrityError(f"{where}: not a valid basis file ({reason}); {remedy}") from error
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
            counts=tuple(map(int, self.counts)),  # as they are read again, whatever was given
            prompts=self.prompts,
            method=self.method,
            post=self.projection.post,
            fingerprint=self.fingerprint,
            merge_threshold=float(self.merge_threshold),
            merged=self.merged,
            provenance=dict(self.provenance),
        )


def require_one_model(
    bases: Sequence[Basis], fingerprint: str | None = None, *, used_with: str = "the embeddings"
) -> str:
    """Return the fingerprint of the model that bases and embeddings have in common.

    Args:
        bases: Bases, at least one.
        fingerprint: Fingerprint of the embeddings' model; None if it is not known.
        used_with: Name of what has this fingerprint, for the error message.

    Returns:
        Fingerprint of the model. If none is given, the embeddings are assumed to be of the model
        of the bases.

    Raises:
        BasisMismatchError: If a basis was made for another model.
    """
    if fingerprint is None:
        fingerprint, used_with = bases[0].fingerprint, f"basis {bases[0].criterion!r}"
    for basis in bases:
        basis.require_fingerprint(fingerprint, used_with=used_with)
    return fingerprint


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
