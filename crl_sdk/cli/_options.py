"""Options that several commands share, and their defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from crl_sdk._embedder import Embedder
from crl_sdk.basis._basis import Basis, basis_path
from crl_sdk.cli._console import note
from crl_sdk.errors import CriterionError
from crl_sdk.model._bundle import demo_bundle
from crl_sdk.model._preprocess import Decode
from crl_sdk.projection._row_dtypes import RowDtype

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
        help="auto, or a name from `crl doctor` or the start of one: onnx/cpu/int8, onnx/cuda, "
        "tensorrt-rtx."
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
        help="fast lets libjpeg shrink large JPEGs while decoding; embeddings change slightly."
    ),
]
DtypeOption = Annotated[
    RowDtype,
    typer.Option(
        help="Dtype of the embeddings in the file. float16 halves it. int8 quarters it and keeps "
        "the direction of each row, which is enough for cosines."
    ),
]

DEFAULT_BASES = Path("bases")


def bundle_or_demo(bundle: Path | None) -> Path:
    """Return the path of the bundle, or that of the demo model after printing a note."""
    if bundle is None:
        note("no --bundle: using the demo model, which knows only rendered coloured shapes")
        return demo_bundle()
    return bundle


def load_basis(directory: Path, criterion: str) -> Basis:
    """Load the basis of a criterion from a directory of bases.

    Args:
        directory: Directory of basis files.
        criterion: Name of the criterion.

    Raises:
        CriterionError: If the directory has no such basis. The message lists those it has.
        BasisError: If the file cannot be read.
        IntegrityError: If the file is not a basis file.
    """
    path = basis_path(directory, criterion)
    if not path.exists():
        known = sorted(p.stem.replace("+", " ") for p in directory.glob("*.safetensors"))
        raise CriterionError(
            f"no basis {criterion!r} in {directory}, which has {', '.join(known) or 'none'}: make "
            f"it with crl basis create {criterion!r}"
        )
    return Basis.load(path)


def open_embedder(
    bundle: Path | None,
    engine: str = "auto",
    threads: int | None = None,
    baked: Path | None = None,
    decode: Decode = "exact",
) -> Embedder:
    """Open the bundle given on the command line, or the demo model."""
    return Embedder.open(
        bundle_or_demo(bundle),
        engine=engine,
        threads=threads,
        baked=Basis.load(baked) if baked is not None else None,
        decode=decode,
    )
