"""`crl serve`: run the server in the foreground."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from crl_sdk._processors import share_processors
from crl_sdk.basis._endpoint import is_endpoint
from crl_sdk.basis._gguf import read_header
from crl_sdk.basis._llm_backend import find_backend
from crl_sdk.basis._llm_files import find_model
from crl_sdk.cli import _generation as generation
from crl_sdk.cli._options import (
    DEFAULT_BASES,
    BakedOption,
    BasesOption,
    DecodeOption,
    EngineOption,
    FormatsOption,
    ThreadsOption,
    open_embedder,
)
from crl_sdk.cli._serve_config import read_config
from crl_sdk.cli._serve_workers import WORKER_VARIABLE, run_workers
from crl_sdk.errors import CrlError, InvalidInputError, MissingDependencyError
from crl_sdk.model._bundle import demo_bundle
from crl_sdk.model._image_formats import parse_formats
from crl_sdk.model._preprocess import DEFAULT_LIMITS, ImageLimits

if TYPE_CHECKING:
    from crl_sdk.serving import RunningServer

_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_log = logging.getLogger(__name__)


def serve(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option(
            callback=read_config,
            is_eager=True,
            help="TOML file with options, such as `max-batch = 64`. The command line and the "
            "environment come first.",
        ),
    ] = None,
    address: Annotated[
        str, typer.Option(help="Address to listen on: host:port (port 0: any free) or unix:PATH.")
    ] = "127.0.0.1:50051",
    workers: Annotated[
        int, typer.Option(min=1, help="Number of processes that serve at this address.")
    ] = 1,
    bundle: Annotated[
        list[Path] | None,
        typer.Option(
            "--bundle",
            "-b",
            envvar="CRL_BUNDLE",
            help="Model bundle made by `crl export`. For several models: NAME=DIR, repeated; the "
            "first is the default one. Without it: the small demo model.",
        ),
    ] = None,
    bases: BasesOption = DEFAULT_BASES,
    shared_bases: Annotated[
        str | None,
        typer.Option(
            help="Directory or URL, such as s3://bucket/bases, of bases that servers share, in "
            "place of --bases."
        ),
    ] = None,
    bases_poll: Annotated[
        float, typer.Option(min=0.1, help="Seconds between two looks for changes of shared bases.")
    ] = 2.0,
    read_only_bases: Annotated[bool, typer.Option(help="Refuse calls that change bases.")] = False,
    engine: EngineOption = "auto",
    baked: BakedOption = None,
    threads: ThreadsOption = None,
    decode: DecodeOption = "exact",
    formats: FormatsOption = "",
    max_decode_mb: Annotated[
        int, typer.Option(min=1, help="Memory in MiB for all images that are decoded at once.")
    ] = DEFAULT_LIMITS.max_decode_bytes >> 20,
    max_batch: Annotated[
        int, typer.Option(min=1, help="Largest number of images in one engine run.")
    ] = 32,
    max_queue: Annotated[
        int, typer.Option(min=1, help="Largest number of images in progress.")
    ] = 1024,
    cache_mb: Annotated[
        int, typer.Option(min=0, help="Size of the embedding cache in MiB; 0 disables it.")
    ] = 256,
    tls_cert: Annotated[
        Path | None, typer.Option(help="PEM file of the certificate chain; needs --tls-key.")
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(help="PEM file of the private key; needs --tls-cert.")
    ] = None,
    tls_client_ca: Annotated[
        Path | None,
        typer.Option(
            help="PEM file of an authority; clients must show a certificate that it signed (mTLS)."
        ),
    ] = None,
    tokens: Annotated[
        Path | None, typer.Option(help="TOML file of bearer tokens and their rights.")
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(help="host:port of the Prometheus page over HTTP; none by default."),
    ] = None,
    generate: Annotated[
        bool, typer.Option(help="Offer GenerateBasis with a local language model.")
    ] = False,
    llm: generation.LlmOption = None,
    log_format: Annotated[
        Literal["text", "json"], typer.Option(help="json: one JSON object per line.")
    ] = "text",
    access_log: Annotated[bool, typer.Option(help="Log every call, not only failed ones.")] = False,
    otlp: Annotated[
        str | None,
        typer.Option(help="http(s)://host:port of an OpenTelemetry collector (OTLP over gRPC)."),
    ] = None,
    shared_memory: Annotated[
        bool,
        typer.Option(
            help="Let KServe clients read and write any shared memory object of this user.",
        ),
    ] = False,
) -> None:
    """Serve conditional embeddings over gRPC until SIGTERM or Ctrl-C.

    When the server answers calls, it prints one JSON line on stdout with its address. The log goes
    to stderr.
    """
    try:
        from crl_sdk.serving._admission import ServerLimits
        from crl_sdk.serving._logs import make_log_handler, stderr_in_the_log
        from crl_sdk.serving._security import ServerTls, read_tokens
        from crl_sdk.serving._server import ServerSettings
        from crl_sdk.serving._server import serve as run
        from crl_sdk.serving._worker import Worker
    except ImportError as error:
        raise MissingDependencyError(error.name or "grpcio", "serve", "crl serve") from error

    number = os.environ.pop(WORKER_VARIABLE, None)
    worker = None if number is None else Worker(int(number), workers)
    supervises = worker is None and workers > 1
    handler = make_log_handler(log_format, None if worker is None else worker.number)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    # every line of the log is then an object, whoever writes it; those of workers are objects
    whole_log = stderr_in_the_log() if log_format == "json" and not supervises else nullcontext()
    with whole_log, _errors_as_log_lines(log_format):
        if (tls_cert is None) != (tls_key is None) or (tls_client_ca and tls_cert is None):
            raise InvalidInputError(
                "expected --tls-cert and --tls-key together: give both, or neither and no "
                "--tls-client-ca"
            )
        if generate:  # the model itself is loaded when it is needed
            if not is_endpoint(llm):
                find_backend()
            if not (str(llm).startswith("hf:") or is_endpoint(llm)):
                read_header(find_model(llm))
        image_limits = ImageLimits(
            formats=parse_formats(formats), max_decode_bytes=max_decode_mb << 20
        )
        settings = ServerSettings(
            address=address,
            tls=ServerTls(tls_cert, tls_key, tls_client_ca) if tls_cert and tls_key else None,
            metrics_address=metrics,
            tokens=read_tokens(tokens) if tokens is not None else (),
            bases=Path(bases),
            shared_bases=shared_bases,
            bases_poll=bases_poll,
            read_only_bases=read_only_bases,
            limits=ServerLimits(
                max_images=min(ServerLimits().max_images, max_queue),
                max_batch=max_batch,
                max_queue=max_queue,
                cache_bytes=(cache_mb << 20) // workers,
            ),
            shared_memory=shared_memory,
            access_log=access_log,
            otlp=otlp,
            open_llm=partial(generation.open_llm, llm) if generate else None,
            worker=worker,
        )
        bundles = name_bundles(bundle or [])
        if not bundle and worker is None:
            _log.info(
                "no --bundle: serving the demo model, which knows only rendered coloured shapes"
            )
        if supervises:
            run_workers(context, workers, threads, settings, _print_ready_line)
            return
        if worker is not None:
            share_processors(worker.number, worker.count)
        with ExitStack() as opened:
            embedders = {
                name: opened.enter_context(
                    open_embedder(path, engine, threads, baked, decode, image_limits)
                )
                for name, path in bundles.items()
            }
            unnamed = embedders.get("")
            asyncio.run(run(unnamed or embedders, settings, on_ready=_on_ready))


def name_bundles(bundles: Sequence[Path]) -> dict[str, Path]:
    """Return the bundles by the names of their models.

    Args:
        bundles: Directories, or `NAME=DIR`, as on the command line.

    Returns:
        Directories by name, in the same order. A single directory without a name has the name "",
        and so has the demo model, if there are none.

    Raises:
        InvalidInputError: If a name is malformed, occurs twice, or is missing among several.
    """
    named: dict[str, Path] = {}
    for bundle in bundles:
        name, equals, directory = str(bundle).partition("=")
        if not equals or "/" in name or bundle.is_dir():  # the `=` belongs to the directory
            if len(bundles) > 1:
                raise InvalidInputError(
                    f"expected NAME=DIR for each of several bundles, got {str(bundle)!r}: name it, "
                    f"such as --bundle small={shlex.quote(str(bundle))}"
                )
            return {"": bundle}
        if not directory:
            raise InvalidInputError(f"expected NAME=DIR, got {str(bundle)!r}: name a directory")
        if not _MODEL_NAME.fullmatch(name):
            raise InvalidInputError(
                f"expected a name of 1-64 letters, digits, '_' and '-' before the '=', got "
                f"{name[:80]!r}"
            )
        if name in named:
            raise InvalidInputError(
                f"two bundles have the name {name!r}, {named[name]} and {directory}: give each "
                "model a name of its own"
            )
        named[name] = Path(directory)
    return named or {"": demo_bundle()}


@contextmanager
def _errors_as_log_lines(log_format: str) -> Iterator[None]:
    """End with a line of the log after an error, if every line must be JSON."""
    try:
        yield
    except CrlError as error:
        if log_format != "json":
            raise
        _log.error("%s", error)
        raise typer.Exit(1) from error
    except Exception as error:
        if log_format != "json":
            raise
        _log.exception("crl serve failed")
        raise typer.Exit(1) from error


def _on_ready(server: RunningServer) -> None:
    """Print the ready line, and exempt what was loaded so far from garbage collection.

    A full collection of all modules takes 20 ms, in which nothing else runs.
    """
    gc.collect()
    gc.freeze()
    embedder = server.pipeline.embedder
    _print_ready_line(
        {
            "event": "serving",
            "address": server.address,
            "metrics": server.metrics_address,
            "model": embedder.bundle.manifest.name,
            "engine": embedder.engine,
            "pid": os.getpid(),
        }
    )


def _print_ready_line(ready: dict[str, Any]) -> None:
    """Print the line that supervisors wait for; `_local_server.parse_ready_line` reads it."""
    try:
        print(json.dumps(ready), flush=True)
    except OSError as error:  # the reader of stdout has gone, or the disk is full
        _log.warning("the ready line could not be printed (%s)", error.strerror)
        # The line is still in the buffer. Writing it at exit would fail again, with status 120.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
