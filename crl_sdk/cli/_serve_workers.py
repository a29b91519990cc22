"""`crl serve --workers N`: the same command, in several processes."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import typer

from crl_sdk._processors import count_processors

if TYPE_CHECKING:
    from crl_sdk.serving import ServerSettings

WORKER_VARIABLE = "CRL_WORKER"
"""Environment variable that tells a process that it is a worker, with its number."""

_OWN_OPTIONS = ("config", "address", "metrics")

_log = logging.getLogger(__name__)


def run_workers(
    context: typer.Context,
    count: int,
    threads: int | None,
    settings: ServerSettings,
    print_ready: Callable[[dict[str, Any]], None],
) -> None:
    """Run workers with the options of this command until SIGTERM or Ctrl-C.

    Args:
        context: Context of the command, which has the value of each option.
        count: Number of workers.
        threads: Threads of one engine run of each worker; None for its part of the cores.
        settings: Settings of the server, for its addresses.
        print_ready: Function that prints the ready line.

    Raises:
        ServiceError: If the address cannot be used or shared, or the workers cannot run.
    """
    from crl_sdk.serving._supervisor import Supervisor, reserve_port

    processors = count_processors()
    if count * (threads or 1) > processors:
        _log.warning(
            "%d workers of %d threads on %d processors take them from each other: fewer do more",
            count, threads or max(1, processors // count), processors,
        )  # fmt: skip
    address, held = reserve_port(settings.address)
    arguments = [*worker_arguments(context), "--address", address]

    def environment(number: int) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("CRL_SERVE_")}
        openmp = min(max(1, processors // count), int(kept.get("OMP_NUM_THREADS") or processors))
        return {**kept, "OMP_NUM_THREADS": str(openmp), WORKER_VARIABLE: str(number)}

    def on_ready(ready: dict[str, Any], metrics: str | None) -> None:
        print_ready({**ready, "metrics": metrics, "pid": os.getpid()})

    supervisor = Supervisor(
        [sys.executable, "-m", "crl_sdk", "serve", *arguments], count,
        environment=environment, drain_seconds=settings.drain_seconds,
    )  # fmt: skip
    try:
        asyncio.run(supervisor.run(on_ready, settings.metrics_address))
    finally:
        for each in held:
            each.close()


def worker_arguments(context: typer.Context) -> list[str]:
    """Return the options of the command as they were read from line, environment and file.

    Defaults are named as well, so that no variable of the environment changes them in a worker.
    """
    arguments: list[str] = []
    for parameter in context.command.params:
        name, value = str(parameter.name), context.params.get(str(parameter.name))
        if name in _OWN_OPTIONS or value is None:
            continue
        if isinstance(value, bool):
            arguments.append((parameter.opts if value else parameter.secondary_opts)[0])
            continue
        for each in value if isinstance(value, list | tuple) else [value]:
            arguments += [parameter.opts[0], str(each)]
    return arguments
