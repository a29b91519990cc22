"""Options that several commands share, and the defaults behind them."""

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

BundleOption = Annotated[
    Path | None,
    typer.Option(
        "--bundle",
        "-b",
        envvar="CRL_BUNDLE",
        help="Model bundle, from `crl export`. Without one the small demo model is used.",
    ),
]
BasesOption = Annotated[
    Path,
    typer.Option("--bases", envvar="CRL_BASES", help="Directory of basis files."),
]
EngineOption = Annotated[
    str,
    typer.Option(
        help="auto, or a name that `crl doctor` lists or its beginning: onnx/cpu/int8, onnx/cuda, "
        "tensorrt-rtx."
    ),
]
BakedOption = Annotated[
    Path | None,
    typer.Option(
        help="Basis file; take the TensorRT plan that has it fixed (`crl compile --baked`)."
    ),
]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, help="Threads of one engine run; one per core by default.")
]
DecodeOption = Annotated[
    Decode,
    typer.Option(
        help="fast: libjpeg shrinks large JPEGs while it decodes them; embeddings drift a little."
    ),
]

DEFAULT_BASES = Path("bases")


def bundle_or_demo(bundle: Path | None) -> Path:
    """Give the bundle's path, or that of the demo model with a note that says so."""
    if bundle is None:
        note("no --bundle: using the demo model, which knows rendered coloured shapes only")
        return demo_bundle()
    return bundle


def load_basis(directory: Path, criterion: str) -> Basis:
    """Load a criterion's basis out of a directory of bases.

    Raises:
        CriterionError: there is none of that name; the message lists those there are.
        BasisError: it cannot be read.
        IntegrityError: it is not a basis file.
    """
    path = basis_path(directory, criterion)
    if not path.exists():
        known = sorted(p.stem.replace("+", " ") for p in directory.glob("*.safetensors"))
        raise CriterionError(
            f"no basis {criterion!r} in {directory}, known are {known}: make it with "
            f"crl basis create {criterion!r} --texts FILE"
        )
    return Basis.load(path)


def open_embedder(
    bundle: Path | None,
    engine: str = "auto",
    threads: int | None = None,
    baked: Path | None = None,
    decode: Decode = "exact",
) -> Embedder:
    """Open the bundle named on the command line, or the demo model."""
    return Embedder.open(
        bundle_or_demo(bundle),
        engine=engine,
        threads=threads,
        baked=Basis.load(baked) if baked is not None else None,
        decode=decode,
    )
