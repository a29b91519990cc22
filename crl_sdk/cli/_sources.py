"""What the tasks' commands work on: pictures or stored embeddings, and the basis of a criterion."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from crl_sdk._criterion import normalise_criterion
from crl_sdk._embedder import Embedder
from crl_sdk.basis._basis import Basis, basis_path, require_one_model
from crl_sdk.basis._build import DEFAULT_PROMPT
from crl_sdk.cli import _generation as generation
from crl_sdk.cli._basis import read_texts, save
from crl_sdk.cli._console import note, progress_bar, warn
from crl_sdk.cli._options import open_embedder
from crl_sdk.errors import InvalidInputError, MissingDependencyError
from crl_sdk.model._image_files import find_image_files
from crl_sdk.model._preprocess import Decode
from crl_sdk.stored._reader import SUFFIXES as STORED
from crl_sdk.stored._reader import StoredEmbeddings

CriterionOption = Annotated[
    str, typer.Option(help="What matters, in words, such as `animal habitat`.")
]
BasisOption = Annotated[
    Path | None, typer.Option("--basis", help="Basis file, instead of the one of that name.")
]
TextsOption = Annotated[
    Path | None, typer.Option(help="Your own texts for the criterion: UTF-8, one a line.")
]
PromptOption = Annotated[
    str, typer.Option(help="Template with one {} for texts that are made or given here.")
]


@dataclass(frozen=True, slots=True, eq=False)
class Material:
    """Pictures or stored embeddings.

    Attributes:
        names: what each row is called: the picture's path, or `row 3` where none is known.
        files: the pictures; None for stored embeddings.
        universal: (n, d) float, unit rows, of the pictures that could be read; may be mapped.
        failed: path and reason of each picture that could not.
        fingerprint: of the model; None where the file does not tell.
    """

    names: list[str]
    files: list[Path] | None
    universal: NDArray[Any]
    failed: list[dict[str, str]]
    fingerprint: str | None


class Workbench:
    """A model that is opened when it is first needed, and what is made with it."""

    def __init__(
        self, bundle: Path | None, engine: str, threads: int | None, decode: Decode
    ) -> None:
        """Store how to open it; the arguments are those of `open_embedder`."""
        self._how = (bundle, engine, threads, decode)
        self._embedder: Embedder | None = None

    @property
    def embedder(self) -> Embedder:
        """The opened model."""
        if self._embedder is None:
            bundle, engine, threads, decode = self._how
            self._embedder = open_embedder(bundle, engine, threads, decode=decode)
        return self._embedder

    def close(self) -> None:
        """Close the model if it was opened."""
        if self._embedder is not None:
            self._embedder.close()

    def material(self, sources: Sequence[Path]) -> Material:
        """Embed pictures and directories of them, or open one file of stored embeddings.

        Pictures that cannot be read are named on stderr and left out.

        Raises:
            ImageError: a directory without pictures.
            InvalidInputError: nothing is there, no picture can be read, or the file is malformed.
        """
        if any(source.suffix in STORED for source in sources):
            if len(sources) > 1:
                raise InvalidInputError(
                    "expected pictures, directories of them, or one file of embeddings; got "
                    f"{len(sources)} of them mixed"
                )
            opened = StoredEmbeddings.open(sources[0])
            names = _stored_names(sources[0], len(opened.embeddings))
            return Material(names, None, opened.embeddings, [], opened.fingerprint)
        for source in sources:
            if not source.exists():
                raise InvalidInputError(
                    f"{source}: expected a directory of pictures, a picture, or a file of "
                    f"embeddings ({', '.join(STORED)}); there is nothing"
                )
        return self.pictures(find_image_files(sources))

    def pictures(self, files: Sequence[Path]) -> Material:
        """Embed pictures; see `material`."""
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
                f"none of {len(files)} pictures can be read, the first is {files[0]}: check them"
            )
        failed = [
            {"path": str(files[i]), "reason": error.reason} for i, error in result.errors.items()
        ]
        return Material(
            [str(file) for file in good], good, result.universal[result.ok], failed,
            embedder.bundle.fingerprint,
        )  # fmt: skip

    def basis(
        self,
        criterion: str,
        bases: Path,
        *,
        file: Path | None = None,
        texts: Path | None = None,
        prompt: str = DEFAULT_PROMPT,
        llm: str | None = None,
    ) -> Basis:
        """Give a criterion's basis: of a file, of given texts, of the bases there are, or made.

        What the language model makes is kept in the directory of bases, as by `crl basis create`.

        Args:
            criterion: in words; may be empty with `file`.
            bases: the directory.
            file: a basis file.
            texts: a file of texts.
            prompt: template for texts.
            llm: Language model, see `crl_sdk.basis.LanguageModel.open`.

        Raises:
            InvalidInputError: file and texts at once, or a criterion is missing.
            BasisError: the file cannot be read, or the language model gives nothing usable.
            IntegrityError: it is not a basis file.
        """
        if file is not None and texts is not None:
            raise InvalidInputError("expected --basis or --texts, got both")
        if file is not None:
            return Basis.load(file)
        if not criterion.strip():
            raise InvalidInputError(
                "expected --criterion, what matters in words, such as 'color'; or --basis FILE"
            )
        name = normalise_criterion(criterion)
        if texts is not None:
            return self.embedder.create_basis(
                name, read_texts(texts), prompts=[prompt],
                provenance={"texts": "given by the user"},
            )  # fmt: skip
        path = basis_path(bases, name)
        if path.exists():
            note(f"{name}: basis {path}")
            return Basis.load(path)
        basis = generation.generate_basis(self.embedder, name, llm, prompts=[prompt])
        save(basis, path)
        note(f"{name}: {', '.join(basis.texts)}")
        return basis


def require_tasks(purpose: str) -> None:
    """Refuse before the work begins if what it ends with is not installed.

    Raises:
        MissingDependencyError: If scikit-learn, scipy or Jinja2 is not installed.
    """
    for module, package in (("sklearn", "scikit-learn"), ("scipy", "scipy"), ("jinja2", "jinja2")):
        if find_spec(module) is None:
            raise MissingDependencyError(package, "tasks", purpose)


@contextmanager
def workbench(
    bundle: Path | None, engine: str = "auto", threads: int | None = None, decode: Decode = "exact"
) -> Iterator[Workbench]:
    """Give a workbench and close it in the end."""
    made = Workbench(bundle, engine, threads, decode)
    try:
        yield made
    finally:
        made.close()


def require_same_model(material: Material, bases: Sequence[Basis]) -> None:
    """Refuse to mix models.

    Raises:
        BasisMismatchError: a basis was made for another model than the embeddings or another basis.
    """
    if material.fingerprint is None:
        warn(
            "the file of embeddings does not tell which model made it; taken on trust to be that "
            f"of the basis, {bases[0].fingerprint[:12]}…"
        )
    require_one_model(bases, material.fingerprint)


def _stored_names(path: Path, count: int) -> list[str]:
    """Give the pictures' paths that `crl embed` kept beside the embeddings, else numbers."""
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
