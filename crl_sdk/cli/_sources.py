"""Inputs of the task commands: images or stored embeddings, and the basis of a criterion."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from crl_sdk._criterion import normalise_criterion
from crl_sdk._embedder import Embedder
from crl_sdk.basis._basis import Basis, require_one_model
from crl_sdk.basis._directory import BasisDirectory
from crl_sdk.basis._methods import DEFAULT_METHOD
from crl_sdk.cli import _generation as generation
from crl_sdk.cli._basis import read_texts, save, warn_without_background
from crl_sdk.cli._console import leave_out, note, progress_bar, warn
from crl_sdk.cli._options import load_basis, open_embedder
from crl_sdk.errors import InvalidInputError, MissingDependencyError
from crl_sdk.model._bundle import ModelBundle
from crl_sdk.model._fingerprint import require_same_model as require_fingerprints
from crl_sdk.model._fingerprint import short_fingerprint
from crl_sdk.model._image_files import find_image_files, printable_path
from crl_sdk.model._image_formats import parse_formats
from crl_sdk.model._preprocess import Decode, ImageLimits
from crl_sdk.stored._directory import ABOUT, MANIFEST, EmbeddingDirectory
from crl_sdk.stored._reader import SUFFIXES as STORED_SUFFIXES
from crl_sdk.stored._reader import StoredEmbeddings

CriterionOption = Annotated[
    str, typer.Option(help="What matters about the images, in words, such as `animal habitat`.")
]
BasisOption = Annotated[
    Path | None, typer.Option("--basis", help="Basis file to use, instead of one from --bases.")
]
TextsOption = Annotated[
    Path | None, typer.Option(help="File with your own texts for the criterion: UTF-8, one a line.")
]
PromptOption = Annotated[
    str | None,
    typer.Option(
        help="Prompt for texts from --texts or the language model, with one {}. Default: what the "
        "bundle recommends."
    ),
]


@dataclass(frozen=True, slots=True, eq=False)
class ImageSource:
    """Embeddings of images, from image files or from a file of stored embeddings.

    Attributes:
        names: Name of each row: the path of the image, or `row 3` if the path is unknown.
        files: Image files. None for stored embeddings.
        universal: Universal embeddings of the images that could be read, shape (n, d), of a float
            dtype, unit rows. May be memory-mapped.
        failed: Path and reason for each image that could not be read.
        fingerprint: Fingerprint of the model. None if the file does not contain it.
        model: Name of the model that embedded image files. Empty for stored embeddings.
        warning: Warning that the model has never seen such images, or None.
    """

    names: list[str]
    files: list[Path] | None
    universal: NDArray[Any]
    failed: list[dict[str, str]]
    fingerprint: str | None
    model: str = ""
    warning: str | None = None


class LazyEmbedder:
    """An embedder that is opened when it is first needed. Use it as a context manager."""

    def __init__(
        self,
        bundle: Path | ModelBundle | None,
        engine: str = "auto",
        threads: int | None = None,
        decode: Decode = "exact",
        formats: str = "",
    ) -> None:
        """Store the arguments of `open_embedder`, and the formats of `--formats`."""
        self._arguments = (bundle, engine, threads, decode)
        self._limits = ImageLimits(formats=parse_formats(formats))
        self._embedder: Embedder | None = None
        self.bundle = bundle if isinstance(bundle, Path) else None

    def __enter__(self) -> LazyEmbedder:
        """Return the object itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the embedder if it was opened."""
        if self._embedder is not None:
            self._embedder.close()

    @property
    def embedder(self) -> Embedder:
        """The embedder. It is opened on first use."""
        if self._embedder is None:
            bundle, engine, threads, decode = self._arguments
            self._embedder = open_embedder(
                bundle, engine, threads, decode=decode, limits=self._limits
            )
        return self._embedder

    def read(self, paths: Sequence[Path]) -> ImageSource:
        """Embed image files and directories, or open one file of stored embeddings.

        Images that cannot be read are listed on stderr and left out.

        Args:
            paths: Image files and directories, or one file of stored embeddings.

        Raises:
            ImageError: If a directory has no images.
            InvalidInputError: If a path does not exist, no image can be read, or a file is
                malformed.
        """
        if any(_is_stored(path) for path in paths):
            if len(paths) > 1:
                raise InvalidInputError(
                    "expected images and directories, or one file of embeddings; got "
                    f"{len(paths)} paths with at least one file of embeddings"
                )
            if paths[0].is_dir():
                directory = EmbeddingDirectory.open(paths[0])
                rows, names = directory.read()
                return ImageSource(names, None, rows, [], directory.fingerprint)
            opened = StoredEmbeddings.open(paths[0])
            names = _stored_names(paths[0], len(opened.embeddings))
            return ImageSource(names, None, opened.embeddings, [], opened.fingerprint)
        for path in paths:
            if not path.exists():
                raise InvalidInputError(
                    f"{path}: expected a directory of images, an image, or a file of embeddings "
                    f"({', '.join(STORED_SUFFIXES)}); this path does not exist"
                )
        files = find_image_files(paths, formats=self._limits.formats, leave_out=leave_out)
        return self.embed_files(files)

    def embed_files(self, files: Sequence[Path]) -> ImageSource:
        """Embed image files.

        Images that cannot be read are listed on stderr and left out.

        Raises:
            InvalidInputError: If no image can be read.
        """
        embedder = self.embedder
        with progress_bar() as progress:
            task = progress.add_task("embedding", total=len(files))
            result = embedder.embed(
                files,
                on_error="collect",
                progress=lambda done: progress.update(task, completed=done),
            )
        for error in result.errors.values():
            warn(f"left out: {error}")
        good = [file for file, ok in zip(files, result.ok, strict=True) if ok]
        if not good:
            raise InvalidInputError(
                f"none of {len(files)} images can be read, the first is {files[0]}: check the files"
            )
        failed = [
            {"path": printable_path(files[i]), "reason": error.reason}
            for i, error in result.errors.items()
        ]
        return ImageSource(
            [printable_path(file) for file in good], good, result.universal[result.ok], failed,
            embedder.bundle.fingerprint, embedder.bundle.manifest.name, embedder.unfamiliar,
        )  # fmt: skip

    def find_or_make_basis(
        self,
        criterion: str,
        bases: Path,
        fingerprint: str | None,
        *,
        file: Path | None = None,
        texts: Path | None = None,
        prompt: str | None = None,
        llm: str | None = None,
        against: Sequence[str] = (),
    ) -> Basis:
        """Return the basis of a criterion.

        The first of these is used: `file`; a basis made from `texts`; the basis of that name in
        `bases`; a basis whose texts the language model writes. The last is saved in `bases`, as
        `crl basis create` does.

        Args:
            criterion: Criterion in words. May be empty with `file`.
            bases: Directory of bases.
            fingerprint: Fingerprint of the model; None if the embeddings do not name it.
            file: Basis file.
            texts: File of texts.
            prompt: Prompt for the texts; None for the one that the bundle recommends.
            llm: Language model, see `crl_sdk.basis.LanguageModel.open`.
            against: Other criteria, whose texts count less in a basis that is made: names of bases
                in `bases`, or basis files.

        Raises:
            InvalidInputError: If `file` and `texts` are both given, the criterion is missing, or
                `against` is given for a basis that exists.
            BasisError: If the file cannot be read or the language model writes no usable text.
            IntegrityError: If the file is not a basis file.
        """
        if file is not None and texts is not None:
            raise InvalidInputError("expected --basis or --texts, got both: leave one out")
        if file is not None:
            _refuse_against(against, str(file))
            return Basis.load(file)
        if not criterion.strip():
            raise InvalidInputError(
                "expected --criterion in words, such as 'color', or --basis FILE; got neither"
            )
        name = normalise_criterion(criterion)
        prompts = None if prompt is None else [prompt]
        if texts is not None:
            warn_without_background(self.embedder.bundle, DEFAULT_METHOD)
            return self.embedder.create_basis(
                name, read_texts(texts), prompts=prompts,
                provenance={"texts": "given by the user"}, against=self._load(bases, against),
            )  # fmt: skip
        directory = BasisDirectory(bases)
        if name in directory.criteria(fingerprint):
            _refuse_against(against, name)
            basis = load_basis(bases, name, fingerprint, self.bundle)
            note(f"{name}: basis {directory.path_of(name, basis.fingerprint)}")
            return basis
        warn_without_background(self.embedder.bundle, DEFAULT_METHOD)
        basis = generation.generate_basis(
            self.embedder, name, llm, prompts=prompts, bundle=self.bundle, bases=bases,
            against=self._load(bases, against),
        )  # fmt: skip
        save(basis, directory.path_of(name, basis.fingerprint))
        return basis

    def _load(self, bases: Path, names: Sequence[str]) -> list[Basis]:
        """Return bases by their names or files."""
        fingerprint = self.embedder.bundle.fingerprint
        return [load_basis(bases, name, fingerprint, self.bundle) for name in names]


def _refuse_against(against: Sequence[str], name: str) -> None:
    """Refuse `--against` for a basis that is not made now."""
    if against:
        raise InvalidInputError(
            f"--against is for a basis that is made now, and {name} exists: leave it out, or make "
            "the basis again with crl basis create --against NAME --overwrite"
        )


def require_tasks(purpose: str) -> None:
    """Check that the packages of the extra `tasks` are installed, before any work is done.

    Args:
        purpose: Command that needs them, for the message.

    Raises:
        MissingDependencyError: If scikit-learn, SciPy or Jinja2 is not installed.
    """
    for module, package in (("sklearn", "scikit-learn"), ("scipy", "scipy"), ("jinja2", "jinja2")):
        if find_spec(module) is None:
            raise MissingDependencyError(package, "tasks", purpose)


def require_same_model(source: ImageSource, bases: Sequence[Basis]) -> None:
    """Check that the bases were made for the model of the embeddings.

    A warning is printed if the file of embeddings does not name its model.

    Raises:
        BasisMismatchError: If a basis was made for another model.
    """
    if source.fingerprint is None:
        warn(
            "the file of embeddings does not name the model that made it; it is assumed to be the "
            f"model of the basis, {short_fingerprint(bases[0].fingerprint)}"
        )
    require_one_model(bases, source.fingerprint)


def require_fingerprint(name: str, source: ImageSource, fingerprint: str) -> None:
    """Check that embeddings are those of a model.

    Args:
        name: Name of the embeddings in the error.
        source: The embeddings.
        fingerprint: Fingerprint of the model.

    Raises:
        BasisMismatchError: If they name another model.
    """
    if source.fingerprint is not None:
        require_fingerprints(
            name, source.fingerprint, fingerprint, used_with="--bundle",
            remedy="embed the images with this model: crl embed",
        )  # fmt: skip


def read_label_table(directory: Path, path: Path, column: str) -> dict[Path, str]:
    """Return the class of each image from a CSV file.

    Args:
        directory: Directory that the files in the table are relative to.
        path: CSV file with a header, the column `file` and a column of labels.
        column: Name of the column of labels.

    Raises:
        InvalidInputError: If the file cannot be read, lacks a column or a cell, or gives a file two
            labels.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            header = list(reader.fieldnames or ())
            if "file" not in header or column not in header:
                raise InvalidInputError(
                    f"{path}: expected a first line with the columns 'file' and {column!r}, "
                    f"separated by commas, found {header}; --column chooses the column of labels"
                )
            lines = [(reader.line_num, line) for line in reader]
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InvalidInputError(f"{path}: expected CSV in UTF-8 ({error})") from error
    given: dict[Path, str] = {}
    for number, line in lines:
        name, label = (line["file"] or "").strip(), (line[column] or "").strip()
        if not name or not label or None in line:
            raise InvalidInputError(
                f"{path}, line {number}: expected a file and a label and {len(header)} columns, "
                f"found {[value for value in line.values() if value is not None]}"
            )
        if given.setdefault(directory / name, label) != label:
            raise InvalidInputError(
                f"{path}, line {number}: {name!r} has the label {label!r} here and "
                f"{given[directory / name]!r} before: keep one"
            )
    if not given:
        raise InvalidInputError(f"{path}: expected a line for each labelled image, found none")
    return given


def _is_stored(path: Path) -> bool:
    """Return whether a path is a file or a directory of embeddings."""
    return path.suffix in STORED_SUFFIXES or (path / ABOUT / MANIFEST).is_file()


def _stored_names(path: Path, count: int) -> list[str]:
    """Return the image paths that `crl embed` stored with the embeddings, or row numbers."""
    names: list[str] = []
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            if "path" in arrays.files:
                names = [str(name) for name in arrays["path"]]
    elif path.suffix == ".parquet":
        from pyarrow import parquet

        if "path" in parquet.read_schema(path).names:
            column = parquet.read_table(path, columns=["path"])["path"]
            names = [str(name) for name in column.to_pylist()]
    return names if len(names) == count else [f"row {i}" for i in range(count)]
