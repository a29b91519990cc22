"""Model bundles: a directory with a manifest and the files it lists, verified before use."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from crl_sdk.errors import BundleError, IntegrityError
from crl_sdk.model._manifest import (
    MANIFEST,
    FileEntry,
    Manifest,
    Precision,
    TextGraph,
    parse_manifest,
)
from crl_sdk.model._preprocess import PreprocessSpec
from crl_sdk.model._tokenizer import Tokenizer


class ModelBundle:
    """A verified bundle on disk. Reading it needs no torch and starts no engine."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        """Store a directory and its manifest; `ModelBundle.open` reads and verifies them."""
        self.path = path
        self.manifest = manifest

    def __repr__(self) -> str:
        """Name, fingerprint and place."""
        return (
            f"ModelBundle({self.manifest.name!r}, fingerprint={self.fingerprint[:12]}…, "
            f"path={str(self.path)!r})"
        )

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> ModelBundle:
        """Read a bundle's manifest and verify every file it lists.

        Args:
            path: the bundle's directory.

        Raises:
            BundleError: there is no bundle at `path`, or its manifest is malformed.
            UnsupportedSchemaError: the manifest's schema is not the one this SDK reads.
            IntegrityError: a file is missing, changed or truncated, or a path leads out of the
                bundle.
        """
        directory = Path(path)
        try:
            text = (directory / MANIFEST).read_bytes()
        except OSError as error:
            raise BundleError(
                f"{directory}: no readable {MANIFEST} there ({error.strerror}); expected the "
                "directory that `crl export` wrote"
            ) from error
        manifest = parse_manifest(text, where=str(directory / MANIFEST))
        with ThreadPoolExecutor() as pool:  # digests are computed without Python's lock
            checks = [
                pool.submit(_verify, directory, name, entry)
                for name, entry in manifest.files.items()
            ]
        for check in checks:
            check.result()
        return cls(directory, manifest)

    @property
    def fingerprint(self) -> str:
        """Identity of the embedding space; a basis carries the same."""
        return self.manifest.fingerprint

    @property
    def embedding_dim(self) -> int:
        """Length d of the universal embedding."""
        return self.manifest.embedding_dim

    @property
    def preprocess(self) -> PreprocessSpec:
        """How images become the pixels of the graph."""
        return self.manifest.preprocess

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """The precisions this bundle has image graphs for."""
        return tuple(graph.precision for graph in self.manifest.images)

    def image_graph(self, precision: Precision) -> Path:
        """Give the path of the image graph in one precision.

        Raises:
            BundleError: the bundle has none; the message lists those it has.
        """
        for graph in self.manifest.images:
            if graph.precision == precision:
                return self.path / graph.file
        raise BundleError(
            f"{self.path}: expected an image graph in {precision}, it has "
            f"{', '.join(self.precisions)}; export again with --precision "
            f"{','.join((*self.precisions, precision))}"
        )

    def text_graph(self) -> Path:
        """Give the path of the text graph.

        Raises:
            BundleError: the bundle is image-only.
        """
        return self.path / self._text().file

    def tokenizer(self) -> Tokenizer:
        """Load the tokenizer of the text tower.

        Raises:
            BundleError: the bundle is image-only.
        """
        text = self._text()
        return Tokenizer.open(
            self.path / text.tokenizer,
            context_length=text.context_length,
            pad_id=text.pad_id,
            clean=text.clean,
        )

    def _text(self) -> TextGraph:
        if self.manifest.text is None:
            raise BundleError(
                f"{self.path}: this bundle has no text tower, so it cannot embed texts or build "
                "bases; export the model with its text tower"
            )
        return self.manifest.text


def demo_bundle() -> Path:
    """Give the directory of the small model that ships with the package.

    It knows rendered scenes of coloured shapes only; see the model card beside it.
    """
    return Path(__file__).parents[1] / "bundles" / "demo"


def sha256_file(path: Path) -> str:
    """Digest a file.

    Returns:
        SHA-256, 64 hex digits.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _verify(directory: Path, name: str, entry: FileEntry) -> None:
    path = directory / name
    if not path.resolve().is_relative_to(directory.resolve()):
        raise IntegrityError(
            f"{path}: a link leads out of the bundle; do not use this bundle, get it from a "
            "source you trust"
        )
    try:
        size = path.stat().st_size
        if size != entry.bytes:
            raise IntegrityError(
                f"{path}: expected {entry.bytes:,} bytes, got {size:,}: the file is incomplete or "
                "was changed; copy the bundle again or export the model again"
            )
        digest = sha256_file(path)
    except OSError as error:
        raise IntegrityError(
            f"{path}: listed in the manifest but cannot be read ({error.strerror}); "
            "copy the bundle again"
        ) from error
    if digest != entry.sha256:
        raise IntegrityError(
            f"{path}: expected SHA-256 {entry.sha256[:12]}…, got {digest[:12]}…: the file was "
            "changed; copy the bundle again or export the model again"
        )
