"""Options that several commands share, and the defaults behind them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from crl_sdk.bundle import demo_bundle
from crl_sdk.cli.console import note
from crl_sdk.embedder import Embedder
from crl_sdk.manifest import Precision

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
PrecisionOption = Annotated[
    Literal["auto", "fp32", "fp16", "int8"], typer.Option(help="Of the image tower's graph.")
]
DeviceOption = Annotated[Literal["cpu", "cuda"], typer.Option(help="Where to run.")]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, help="Threads of one engine run; one per core by default.")
]

DEFAULT_BASES = Path("bases")


def bundle_or_demo(bundle: Path | None) -> Path:
    """Give the bundle's path, or that of the demo model with a note that says so."""
    if bundle is None:
        note("no --bundle: using the demo model, which knows rendered coloured shapes only")
        return demo_bundle()
    return bundle


def open_embedder(
    bundle: Path | None,
    precision: Precision | Literal["auto"] = "auto",
    device: Literal["cpu", "cuda"] = "cpu",
    threads: int | None = None,
) -> Embedder:
    """Open the bundle named on the command line, or the demo model."""
    return Embedder.open(
        bundle_or_demo(bundle), precision=precision, device=device, threads=threads
    )
