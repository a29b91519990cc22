"""Model bundles: directories with a manifest and the files it lists, verified before use."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crl_sdk._processors import count_processors
from crl_sdk.errors import BundleError, IntegrityError
from crl_sdk.model._background import BACKGROUND_FILE, read_background
from crl_sdk.model._familiar_images import (
    FAMILIAR_IMAGES_FILE,
    FamiliarImages,
    read_familiar_images,
)
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
    """A verified model bundle on disk. Opening it needs no torch and starts no engine.

    Attributes:
        path: Directory of the bundle.
        manifest: Description of the bundle.

    Example:
        >>> bundle = ModelBundle.open(demo_bundle())
        >>> bundle.embedding_dim, bundle.precisions
        (128, ('fp32',))
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        """Store a directory and its manifest. `ModelBundle.open` reads and verifies them."""
        self.path = path
        self.manifest = manifest

    def __repr__(self) -> str:
        """Return the name, fingerprint and path."""
        return (
            f"ModelBundle({self.manifest.name!r}, fingerprint={self.fingerprint[:12]}…, "
            f"path={str(self.path)!r})"
        )

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> ModelBundle:
        """Read the manifest of a bundle and verify every file it lists.

        Args:
            path: Directory of the bundle.

        Raises:
            BundleError: If there is no bundle at `path`, or its manifest is malformed.
            UnsupportedSchemaError: If this SDK does not read the schema of the manifest.
            IntegrityError: If a file is missing, changed or truncated, or a path leads out of the
                bundle.
        """
        directory = Path(path)
        try:
            text = (directory / MANIFEST).read_bytes()
        except OSError as error:
            raise BundleError(
                f"{directory}: no readable {MANIFEST} ({error.strerror}); expected the "
                "directory that `crl export` wrote"
            ) from error
        manifest = parse_manifest(text, where=str(directory / MANIFEST))
        with ThreadPoolExecutor(count_processors()) as pool:  # hashing releases the GIL
            checks = [
                pool.submit(_verify, directory, name, entry)
                for name, entry in manifest.files.items()
            ]
        for check in checks:
            check.result()
        return cls(directory, manifest)

    @property
    def fingerprint(self) -> str:
        """Identity of the embedding space. A basis for this model has the same fingerprint."""
        return self.manifest.fingerprint

    @property
    def embedding_dim(self) -> int:
        """Length d of the universal embedding."""
        return self.manifest.embedding_dim

    @property
    def preprocess(self) -> PreprocessSpec:
        """How images are converted to the input of the image tower."""
        return self.manifest.preprocess

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """Precisions that the bundle has image graphs for."""
        return tuple(graph.precision for graph in self.manifest.images)

    @cached_property
    def background(self) -> NDArray[np.float32] | None:
        """Embeddings of generic texts by the bundle's own text tower, or None.

        Their shape is (n, d), float32. The method `contrastive` uses them to see how texts vary
        anyhow. `crl export` makes them; `crl background` adds them to an older bundle.

        Raises:
            IntegrityError: If the file is malformed.
        """
        if BACKGROUND_FILE not in self.manifest.files:
            return None
        return read_background(self.path / BACKGROUND_FILE, self.embedding_dim)

    @cached_property
    def familiar_images(self) -> FamiliarImages | None:
        """What the model's own images look like, or None if it knows images of all kinds.

        Raises:
            IntegrityError: If the file is malformed.
        """
        if FAMILIAR_IMAGES_FILE not in self.manifest.files:
            return None
        return read_familiar_images(self.path / FAMILIAR_IMAGES_FILE, self.embedding_dim)

    def image_graph(self, precision: Precision) -> Path:
        """Return the path of the image graph of a precision.

        Raises:
            BundleError: If the bundle has no graph of this precision.
        """
        for graph in self.manifest.images:
            if graph.precision == precision:
                return self.path / graph.file
        raise BundleError(
            f"{self.path}: expected an image graph in {precision}, it has "
            f"{', '.join(self.precisions)}; export again with --precision "
            f"{','.join((*self.precisions, precision))}"
        )

    @property
    def prompt(self) -> str:
        """Prompt recommended for the texts of a basis, with one `{}`; without a text tower `{}`."""
        return "{}" if self.manifest.text is None else self.manifest.text.prompt

    def text_graph(self) -> Path:
        """Return the path of the text graph.

        Raises:
            BundleError: If the bundle has no text tower.
        """
        return self.path / self._text().file

    def tokenizer(self) -> Tokenizer:
        """Load the tokenizer of the text tower.

        Raises:
            BundleError: If the bundle has no text tower.
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
    """Return the directory of the small demo model that ships with the package.

    It knows rendered scenes of coloured shapes only, see the README.md in that directory.
    """
    return Path(__file__).parents[1] / "bundles" / "demo"


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file, 64 hex digits."""
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
