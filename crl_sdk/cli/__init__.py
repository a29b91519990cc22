"""The command line interface `crl`, the only place that reads environment variables."""

from __future__ import annotations

import io
import logging
import sys
from typing import Annotated

import typer

from crl_sdk._version import __version__
from crl_sdk.cli import _basis as basis
from crl_sdk.cli import _bench as bench
from crl_sdk.cli import _classify as classify
from crl_sdk.cli import _cluster as cluster
from crl_sdk.cli import _compile as compile
from crl_sdk.cli import _create as create
from crl_sdk.cli import _demo as demo
from crl_sdk.cli import _doctor as doctor
from crl_sdk.cli import _embed as embed
from crl_sdk.cli import _evaluate as evaluate
from crl_sdk.cli import _evaluate_vectors as evaluate_vectors
from crl_sdk.cli import _export as models
from crl_sdk.cli import _export_triton as export_triton
from crl_sdk.cli import _import as imports
from crl_sdk.cli import _project as project
from crl_sdk.cli import _retrieve as retrieve
from crl_sdk.cli import _serve as serve
from crl_sdk.cli import _sharpen as sharpen
from crl_sdk.cli import _store as store
from crl_sdk.cli import _tune as tune
from crl_sdk.cli import _verify as verify
from crl_sdk.cli._console import LogHandler, print_error
from crl_sdk.errors import CrlError
from crl_sdk.evaluation._benchmarks import BENCHMARK_NAMES

app = typer.Typer(
    name="crl",
    help="Conditional image embeddings: say in words what matters about your images.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # Rich's tables of options are too narrow at 80 columns
)
evaluation = typer.Typer(
    help="Run the paper's benchmarks, or compare methods on your own vectors.",
    short_help="Run benchmarks, or compare methods on your own vectors.",
    no_args_is_help=True,
)
for _name in BENCHMARK_NAMES:
    evaluation.command(_name, short_help=f"Run the benchmark {_name}.")(evaluate.command(_name))
evaluation.command("vectors", short_help="Compare all projection methods on stored vectors.")(
    evaluate_vectors.evaluate_vectors
)
app.command("export")(models.export)
app.command("export-triton", short_help="Write a model repository for Triton Inference Server.")(
    export_triton.export_triton
)
app.command("import", short_help="Import an ONNX export of a CLIP model as a bundle.")(
    imports.import_bundle
)
app.command("background", short_help="Add generic texts to a bundle of an older version.")(
    models.add_background
)
app.command("info")(models.info)
app.command("doctor", short_help="Show this machine and the engines that run on it.")(doctor.doctor)
app.command("compile")(compile.compile_bundle)
basis.app.command("create")(create.create)
basis.app.command("sharpen")(sharpen.sharpen)
app.add_typer(basis.app, name="basis")
app.command("embed")(embed.embed)
app.command("project", short_help="Project stored embeddings onto criteria, without images.")(
    project.project
)
app.command("store", short_help="Write stored embeddings to a vector store.")(store.store)
app.command("cluster")(cluster.cluster)
app.add_typer(classify.app, name="classify")
app.command("retrieve")(retrieve.retrieve)
app.command("verify")(verify.verify)
app.command(
    "serve",
    short_help="Serve conditional embeddings over gRPC.",
    context_settings={"auto_envvar_prefix": "CRL_SERVE"},
)(serve.serve)
app.command("bench", short_help="Measure latency, throughput and failures of a server.")(
    bench.bench
)
app.command("tune", short_help="Find the settings that serve a bundle best on this machine.")(
    tune.tune
)
app.add_typer(evaluation, name="eval")
app.command("demo")(demo.demo)
app.command("demo-data")(demo.demo_data)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"crl {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Log the choices that crl makes.")
    ] = False,
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(message)s",
        handlers=[LogHandler()],
    )
    # downloads are said, not only with --verbose
    logging.getLogger("crl_export.hugging_face.hub").setLevel(logging.INFO)


def run() -> None:
    """Run `crl` with the arguments of the process. Errors give one message and exit status 1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # characters that the terminal has not: `\xff`
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except CrlError as error:
        print_error(error, as_json="--json" in sys.argv)
        sys.exit(1)
