"""Options that several commands share, and their defaults."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from crl_sdk._criterion import normalise_criterion
from crl_sdk._embedder import Embedder
from crl_sdk.basis._basis import Basis
from crl_sdk.basis._directory import BasisDirectory
from crl_sdk.cli._console import note
from crl_sdk.errors import CriterionError, InvalidInputError
from crl_sdk.model._bundle import ModelBundle, demo_bundle
from crl_sdk.model._preprocess import DEFAULT_LIMITS, Decode, ImageLimits
from crl_sdk.projection._row_dtypes import RowDtype
from crl_sdk.storage._checksummed_safetensors import SUFFIX

BundleOption = Annotated[
    Path | None,
    typer.Option(
        "--bundle",
        "-b",
        envvar="CRL_BUNDLE",
        help="Model bundle made by `crl export`. Default: the small demo model.",
    ),
]
BasesOption = Annotated[
    Path,
    typer.Option("--bases", envvar="CRL_BASES", help="Directory of basis files."),
]
EngineOption = Annotated[
    str,
    typer.Option(
        help="auto; fastest, which first measures all engines once; or a name from `crl doctor` or "
        "the start of one: onnx/cpu/int8, onnx/cuda, tensorrt-rtx."
    ),
]
BakedOption = Annotated[
    Path | None,
    typer.Option(
        help="Basis file. Use the TensorRT plan compiled with it (`crl compile --baked`)."
    ),
]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, help="Threads of one engine run. Default: one per core.")
]
DecodeOption = Annotated[
    Decode,
    typer.Option(
        help="fast shrinks large JPEGs while decoding, and resizes with vector instructions; gpu "
        "decodes JPEGs on an NVIDIA GPU (not run on hardware). Embeddings change slightly."
    ),
]
FormatsOption = Annotated[
    str,
    typer.Option(
        envvar="CRL_FORMATS",
        help="Further formats of images to read, such as `jpeg2000,tga` (docs/IMAGES.md).",
    ),
]
DtypeOption = Annotated[
    RowDtype,
    typer.Option(
        help="Dtype of the embeddings in the file. float16 halves it. int8 quarters it and keeps "
        "the direction of each row, which is enough for cosines."
    ),
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace files that exist already.")
]
PasswordOption = Annotated[
    str,
    typer.Option(
        envvar="CRL_STORE_PASSWORD",
        help="Password or API key of the vector store, better in the environment than here.",
    ),
]

AgainstOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Another criterion whose texts should count less: the name or file of its basis; may "
        "be repeated."
    ),
]

DEFAULT_BASES = Path("bases")


def open_bundle(bundle: Path | None) -> ModelBundle:
    """Open the bundle given on the command line, or the demo model after printing a note."""
    if bundle is None:
        note("no --bundle: using the demo model, which knows only rendered coloured shapes")
        return ModelBundle.open(demo_bundle())
    return ModelBundle.open(bundle)


def command(*words: str, bundle: Path | None = None, bases: Path = DEFAULT_BASES) -> str:
    """Return a command of `crl` for a message, with the user's own --bundle and --bases.

    Example:
        >>> command("basis", "create", "animal habitat", bundle=Path("clip-b32"))
        "crl basis create 'animal habitat' --bundle clip-b32"
    """
    line = ["crl", *words]
    if bundle is not None:
        line += ["--bundle", str(bundle)]
    if bases != DEFAULT_BASES:
        line += ["--bases", str(bases)]
    return shlex.join(line)


def require_new(*paths: Path | None, overwrite: bool) -> None:
    """Check before any work that no file would be replaced, and that there is a place for each.

    Args:
        *paths: Files that the command writes; None for those that it does not.
        overwrite: Whether existing files may be replaced.

    Raises:
        InvalidInputError: If a file exists and may not be replaced, or its directory does not.
    """
    for path in paths:
        if path is not None and not path.parent.is_dir():
            raise InvalidInputError(
                f"{path}: expected an existing directory, found none; run "
                + shlex.join(["mkdir", "-p", str(path.parent)])
            )
        if path is not None and not os.access(path.parent, os.W_OK):
            raise InvalidInputError(
                f"{path}: expected a directory that can be written to, {path.parent} cannot: "
                "choose another"
            )
    there = [str(path) for path in paths if path is not None and path.exists()]
    if there and not overwrite:
        raise InvalidInputError(
            f"{' and '.join(there)}: exists already; pass --overwrite to replace it, or choose "
            "another name"
        )


def parse_criteria(text: str) -> list[str]:
    """Return the normalised names in the value of an option, which commas separate.

    Raises:
        CriterionError: If a name is malformed.
    """
    return [normalise_criterion(part) for part in text.split(",") if part.strip()]


def load_basis(
    directory: Path, criterion: str, fingerprint: str | None, bundle: Path | None = None
) -> Basis:
    """Load the basis of a criterion from a directory of bases, or from a file.

    Args:
        directory: Directory of bases.
        criterion: Name of the criterion, or the path of a basis file.
        fingerprint: Fingerprint of the model, or None.
        bundle: Bundle on the command line, for the command in the error message.

    Raises:
        CriterionError: If the directory has no such basis. The message lists those it has.
        BasisError: If the file cannot be read.
        BasisMismatchError: If the basis belongs to another model.
        IntegrityError: If the file is not a basis file.
    """
    if criterion.endswith(SUFFIX):
        basis = Basis.load(Path(criterion))
        if fingerprint is not None:
            basis.require_fingerprint(fingerprint)
        return basis
    name = normalise_criterion(criterion)
    there = BasisDirectory(directory)
    try:
        return there.load(name, fingerprint)
    except CriterionError as error:
        if fingerprint is None and there.files(name):  # of several models: none is to be made
            raise
        make = command("basis", "create", name, bundle=bundle, bases=directory)
        raise CriterionError(f"{error}. To make it: {make}") from error


def open_embedder(
    bundle: ModelBundle | Path | None,
    engine: str = "auto",
    threads: int | None = None,
    baked: Path | None = None,
    decode: Decode = "exact",
    limits: ImageLimits = DEFAULT_LIMITS,
) -> Embedder:
    """Open the bundle given on the command line, or the demo model."""
    return Embedder.open(
        bundle if isinstance(bundle, ModelBundle) else open_bundle(bundle),
        engine=engine,
        threads=threads,
        baked=Basis.load(baked) if baked is not None else None,
        decode=decode,
        limits=limits,
    )
